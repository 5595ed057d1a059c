"""What a cluster needs beside handlers: models as tasks, and collections kept together.

Wraps public methods of ``distributed.Client``, which are refused where a process lacks us
(:mod:`dask_keras_serialize.cluster.presence`); :mod:`dask_keras_serialize.registration` puts the
wrappers in place.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from types import MethodType
from typing import Any
from uuid import uuid4

import numpy as np

from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.cluster.presence import require_package
from dask_keras_serialize.errors import EncodeError, KerasSerializeError
from dask_keras_serialize.wire import cuda
from dask_keras_serialize.wire.header import FORMAT


def wrap_client(cls: Any) -> Callable[[], None]:
    """Wrap the methods of Client that send something; return what unwraps them.

    Parameters
    ----------
    cls : type
        ``distributed.Client``.

    Returns
    -------
    callable
        Puts the original methods back.
    """
    names = ("map", "scatter", "submit", "compute", "persist", "get")
    originals = {name: getattr(cls, name) for name in names}

    def unwrap() -> None:
        for name, method in originals.items():
            setattr(cls, name, method)

    cls.map = _with_models_as_tasks(originals["map"])
    cls.scatter = _with_check(originals["scatter"], graph=False)
    for name in names[2:]:
        setattr(cls, name, _with_check(originals[name], graph=True))
    return unwrap


def _with_models_as_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    from dask.base import tokenize

    own = inspect.signature(original).parameters

    @functools.wraps(original)
    def map(self: Any, func: Callable[..., Any], *iterables: Any, **kwargs: Any) -> Any:
        placed = {k: kwargs[k] for k in ("workers", "allow_other_workers") if k in kwargs}

        def task(value: Any) -> Any:
            # as of any task, pure says whether equal ones may share a result
            token = tokenize(value) if kwargs.get("pure") in (None, True) else uuid4().hex
            return self.submit(_identity, value, key=f"keras-model-{token}", **placed)

        for name, value in kwargs.items():
            if name not in own and holds_keras(value):
                kwargs[name] = task(value)
        model = getattr(func, "__self__", None)
        if holds_keras(model):  # its method, which would carry it into every task
            kwargs.setdefault("key", func.__name__)
            kwargs |= {"__model": task(model), "__method": func.__name__}
            func = _call_method
        return original(self, func, *iterables, **kwargs)

    return map


def _with_check(original: Callable[..., Any], *, graph: bool) -> Callable[..., Any]:
    own = inspect.signature(original)

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if holds_keras(list(args)) or holds_keras(kwargs):
            given = own.bind(self, *args, **kwargs).arguments
            require_package(self, on_scheduler=graph, workers=_only(given))
        try:
            return original(self, *args, **kwargs)
        except TypeError as error:  # which says no more than the class of what was sent
            lost = _error_of_ours(error)
            by_a_task = graph and _NOT_SENT not in str(error)  # get() raises what tasks do, too
            if lost is None or by_a_task or isinstance(error, KerasSerializeError):
                raise
            raise EncodeError(str(lost)) from error

    return checked


def _only(given: dict[str, Any]) -> list[Any]:
    """Return the workers that alone a call is for; none if any may be."""
    workers = given.get("workers")
    if given.get("allow_other_workers") or not workers or isinstance(workers, dict):
        return []
    return list(workers) if isinstance(workers, (list, tuple, set)) else [workers]


#: What distributed says of what it cannot send (``distributed/protocol/serialize.py``).
_NOT_SENT = "Could not serialize object of type"


def _error_of_ours(error: BaseException | None) -> KerasSerializeError | None:
    """Find ours among the causes of an error."""
    while error is not None and not isinstance(error, KerasSerializeError):
        error = error.__cause__ or error.__context__
    return error


def _call_method(*args: Any, __model: Any, __method: str, **kwargs: Any) -> Any:
    return getattr(__model, __method)(*args, **kwargs)


def _identity(value: Any) -> Any:
    if isinstance(value, BrokenObject):
        value()
    return value


def serialize_together(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``serialize``, so that collections of Keras's objects are pickled whole.

    distributed serializes the items of a list or dict one by one: a model that is there
    twice would arrive as two, a layer that two models share as two layers
    (``distributed/protocol/serialize.py``, ``iterate_collection``).
    """

    @functools.wraps(original)
    def serialize(x: Any, serializers: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (serializers is None or "pickle" in serializers) and _may_share(x):
            if len(args) == 3:
                args = args[:2]
            kwargs["iterate_collection"] = False
        return original(x, serializers, *args, **kwargs)

    return serialize


def or_keras(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Wrap what decides that a value is left to pickle, also where pickle failed on another.

    distributed would take ours by its own family then, into a pickle that cannot hold
    memoryviews (``distributed/protocol/pickle.py``, ``_DaskPickler``).
    """

    @functools.wraps(original)
    def always_use_pickle_for(value: Any) -> bool:
        return original(value) or holds_keras(value, 0)

    return always_use_pickle_for


def saying_gpu(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap what a comm tells its peer of this process: whether it has a GPU.

    As the driver says, which has no need of CUDA itself: that would settle which GPUs it may use.
    """

    @functools.wraps(original)
    def handshake_info(self: Any) -> dict[str, Any]:
        nvml = sys.modules.get("distributed.diagnostics.nvml")
        has = not cuda.hidden() and nvml is not None and nvml.device_get_count() > 0
        return original(self) | {_GPU: has}

    return handshake_info


def only_to_gpus(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``write`` of a comm that sends a GPU's memory: models go by the host to who has none.

    distributed-ucxx asks the "cuda" family whoever receives, and breaks the connection where
    memory for such a frame cannot be had (``UCXX.read``, ``distributed_ucxx/ucxx.py``).
    """

    @functools.wraps(original)
    async def write(self: Any, msg: Any, serializers: Any = None, *args: Any, **kwargs: Any) -> Any:
        there = (getattr(self, "remote_info", None) or {}).get(_GPU, False)
        if not there and any(map(holds_keras, values_in(msg))):
            families = serializers or ("dask", "pickle", "error")
            serializers = tuple(family for family in families if family != "cuda")
        return await original(self, msg, serializers, *args, **kwargs)

    return write


_GPU = f"{FORMAT} gpu"


def values_in(message: Any) -> Iterable[Any]:
    """Return the values that a message hands over, to be serialized as it is written."""
    data = message.get("data") if type(message) is dict else None
    if type(data) is not dict:
        return ()
    return [value.data for value in data.values() if type(value).__name__ == "Serialize"]


def _may_share(value: Any) -> bool:
    """Say whether a collection holds one of Keras's objects and something beside it."""
    if type(value) not in (list, tuple, set, dict):
        return False
    items = list(value.values() if type(value) is dict else value)
    beside = [item for item in items if type(item) not in _PLAIN]
    return len(beside) > 1 and any(holds_keras(item, 2) for item in beside)


_PLAIN = frozenset({str, bytes, int, float, bool, complex, type(None), np.ndarray})


def holds_keras(value: Any, depth: int = 3) -> bool:
    """Say whether a value is Keras's, a method of it, or a plain container with such in front."""
    # not imported here: who imports Keras, in another thread, imports it too, at the end
    # (registration), and of two threads that wait for each other's modules one gets half of one
    private: Any = sys.modules.get("dask_keras_serialize.private")
    if not hasattr(private, "SHELLS"):  # nor are there any objects of Keras's yet
        return False
    if isinstance(value, (*private.CITIZENS, *private.TRACKED)):
        return True
    items: Iterable[Any] = ()
    if type(value) is MethodType:
        items = (value.__self__,)
    elif type(value) is dict:
        items = value.values()
    elif type(value) in (list, tuple, set):
        items = value
    # the first few: scattering a million numbers should not wait for us
    return depth > 0 and any(holds_keras(item, depth - 1) for item in islice(items, 32))
