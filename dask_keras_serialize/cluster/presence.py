"""Which processes of a cluster have this package, and what is said where one has not.

Workers and the scheduler say so as they describe themselves, so a client knows before it sends
anything; what it finds out later comes as an error of distributed's, whose cause is then said in
its place. Loads nothing of distributed: :mod:`dask_keras_serialize.registration` puts in place what
is wrapped here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from dask_keras_serialize import errors
from dask_keras_serialize.errors import EncodeError, KerasSerializeError, MissingPackageError
from dask_keras_serialize.wire.header import FORMAT, package_version

#: How distributed begins what it says of a graph that its scheduler cannot unpickle, whatever the
#: reason (``Scheduler.update_graph``, ``distributed/scheduler.py``).
UNREADABLE_GRAPH = "Error during deserialization of the task graph"

#: An error of ours in the text of a traceback, at its end.
_OURS = re.compile(rf"^{re.escape(errors.__name__)}\.(\w+): (.+)$", re.MULTILINE)


def announce(worker: Any) -> None:
    """Let workers tell their scheduler that they have this package.

    Parameters
    ----------
    worker : module
        ``distributed.worker``.
    """
    worker.DEFAULT_STARTUP_INFORMATION[FORMAT] = _version


async def _version(worker: Any) -> str:
    return package_version()


def announce_scheduler(scheduler: Any) -> None:
    """Let schedulers say whether they have this package, and which of their workers have not.

    Clients ask for a scheduler's identity as they connect, and every few seconds; those that run
    in an event loop cannot ask for more.

    Parameters
    ----------
    scheduler : module
        ``distributed.scheduler``.
    """
    original = scheduler.Scheduler.identity

    @functools.wraps(original)
    def identity(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        lack = [ws for ws in self.workers.values() if FORMAT not in ws.extra]
        ours = {
            "version": package_version(),
            "workers": len(self.workers),
            "workers-without": {ws.address: ws.name for ws in lack},
        }
        return {**original(self, *args, **kwargs), FORMAT: ours}

    scheduler.Scheduler.identity = identity


def require_package(client: Any, *, on_scheduler: bool, workers: Iterable[Any] = ()) -> None:
    """Raise on the client if its cluster lacks this package.

    Parameters
    ----------
    client : distributed.Client
    on_scheduler : bool
        Whether the scheduler needs it too, which unpickles task graphs, but no values.
    workers : iterable, optional
        The only workers that what is sent may go to, by address, host or name. Default: all.

    Raises
    ------
    MissingPackageError
    """
    if client.asynchronous:  # what it last heard; nothing while it connects
        identity = client.scheduler_info()
    else:  # scheduler_info() returns at times what the client asks for itself
        identity = client.sync(client.scheduler.identity, n_workers=0)
    if not identity:
        return
    ours = identity.get(FORMAT)
    if ours is not None:
        without, total = ours["workers-without"], ours["workers"]
    elif on_scheduler:
        raise MissingPackageError.on_scheduler(client.scheduler.address)
    elif client.asynchronous:
        return
    else:
        every = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
        without = {address: each["name"] for address, each in every.items() if FORMAT not in each}
        total = len(every)
    if wanted := set(map(str, workers)):
        without = {key: name for key, name in without.items() if wanted & _names(key, name)}
    if without:
        raise MissingPackageError.on_workers(list(without), total)


def _names(address: str, name: Any) -> set[str]:
    """Return what a worker may be called by who restricts tasks to it (``Client.submit``)."""
    _, _, place = address.rpartition("://")
    return {address, place, place.rpartition(":")[0], str(name)}


def explain_error(original: Callable[..., Any], header: Any, frames: Any) -> None:
    """Raise what another process could not send with, in a line of ours if the error is ours.

    distributed sends the text of a traceback, and raises all of it
    (``serialization_error_loads``, ``distributed/protocol/serialize.py``).
    """
    try:
        original(header, frames)
    except TypeError as error:
        text = str(error)
        if raised := _OURS.findall(text):
            name, sentence = raised[-1]
            kind = getattr(errors, name, EncodeError)
            if not issubclass(kind, EncodeError):  # it was not about this object: say what was
                kind, sentence = EncodeError, f"{text.partition(chr(10))[0]}: {sentence}"
            raise kind(sentence) from error
        if "distributed/protocol/keras.py" not in text:
            raise
        raise MissingPackageError(
            f"a Keras model could not be sent by a process without {FORMAT}: "
            f"pip install {FORMAT} on every worker and restart them"
        ) from error


def explain_refusal(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap what sets a future's error, so that it is ours if the scheduler's cause is.

    Whatever is in a graph, of a collection say, is not looked at before it is sent.
    """

    @functools.wraps(original)
    def set_error(self: Any, exception: Any, traceback: Any) -> None:
        original(self, exception, traceback)
        cause = _cause_of_refusal(self.exception)
        if cause is not None:
            cause.__cause__, self.exception = self.exception, cause

    return set_error


def _cause_of_refusal(error: BaseException | None) -> KerasSerializeError | None:
    """Say by an error of ours why a scheduler refused a graph, if that is our concern."""
    if type(error) is not RuntimeError or UNREADABLE_GRAPH not in str(error):
        return None
    cause = error.__cause__
    if isinstance(cause, KerasSerializeError):
        return type(cause)(str(cause))
    if isinstance(cause, ImportError) and str(cause) == _NO_MODULE:
        return MissingPackageError.on_scheduler()
    return None


_NO_MODULE = "No module named 'dask_keras_serialize'"
