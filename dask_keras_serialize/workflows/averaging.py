"""Rounds of averaging: replicas of a model train apart, each on its own data, and meet in a mean.

The model crosses to each worker once, as a snapshot. What goes back and forth afterwards are
weights alone, from worker to worker: they are assigned to a replica that stays where it is, so
that no round after the first rebuilds, traces or compiles anything. This is federated averaging
(McMahan et al., 2017, https://arxiv.org/abs/1602.05629), with Dask's workers for clients.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle
import dask
import numpy as np

from dask_keras_serialize.workflows.means import Weights, closed, logs_of, mean_of
from dask_keras_serialize.workflows.replicas import Snapshot

if TYPE_CHECKING:
    import keras
    from distributed import Client

#: Seconds after which we look whether the workers are still there that a round waits for.
_PATIENCE = 2.0


def fit_rounds(
    model: keras.Model,
    train: Callable[[Any, Any], Any],
    parts: Sequence[Any],
    *,
    rounds: int = 1,
    weights: Sequence[float] | None = None,
    on_round: Callable[[int, list[Any]], object] | None = None,
    client: Client | None = None,
) -> list[list[Any]]:
    """Train a model in rounds: on each part of the data apart, then on with the mean.

    Parameters
    ----------
    model : keras.Model
        Built, and compiled if ``train`` fits it. Gets the mean of the weights after every round.
    train : callable
        ``train(model, part)`` trains a replica in place, on a worker; what it returns is logged.
        The scheduler does not open it: it may use what only workers have.
    parts : sequence
        What ``train`` gets: futures, whose values stay on the workers that have them; Dask
        collections and delayed objects, alone or in tuples, lists and dicts, which are computed
        there; or values, which are sent there, spread over the workers. Each once.
    rounds : int
    weights : sequence of float, optional
        Of each part in the mean, such as its number of samples; else all count alike.
    on_round : callable, optional
        ``on_round(number, logs)`` is called here after every round, from 0, when the model has its
        weights: to evaluate it, to show progress. The next round goes on meanwhile.
    client : distributed.Client, optional
        Else the current one.

    Returns
    -------
    list of list
        For each round what ``train`` returned for each part.

    Raises
    ------
    ValueError
        If the model is not built, there are no parts, or weights or rounds that are none.
    TypeError
        If the client is asynchronous, or what ``train`` returned cannot be pickled.
    EncodeError
        If the model cannot travel without losing something.
    RuntimeError
        If a part is gone with its worker, and is no result of a task that could run again; if
        workers die each time that a round is begun.
    Exception
        What ``train`` raised. The model then has the weights of the last round that was complete.

    Notes
    -----
    Every replica begins a round with the mean of the weights, and with the optimizer's state as it
    was in the model that was given: what comes out does not hang on which worker trained what.
    Seeds differ from part to part and from round to round, but are the same each time; what draws
    from the process (``shuffle``, on PyTorch a dropout without a seed) is for ``train`` to seed.
    Floating weights are averaged in double precision; others (counts, tables) are the first part's.

    A part is trained on where it lies, and nowhere else as long as that worker is there. If one
    dies, its parts are computed again elsewhere, and the round is begun again.

    Copies: each round, the mean once to every worker that trains, and here; the weights of each
    part once to the worker that averages them.
    """
    from distributed import get_client

    client = client or get_client()
    if client.asynchronous:
        raise TypeError(
            "fit_rounds waits for its rounds, which an asynchronous client cannot: call it with "
            "another client, in a thread of its own"
        )
    parts, shares = _parts(parts, weights)
    if not model.built:
        raise ValueError(
            f"model {model.name!r} has no weights yet to average: build it, or call it once"
        )
    if rounds < 0:
        raise ValueError(f"rounds={rounds!r} is no number of rounds: give one from 0")
    if rounds == 0:
        return []
    if model.compiled and not model.optimizer.built:
        # as `fit` does: else the first round's replicas would differ from those of the next
        model.optimizer.build(model.trainable_variables)
    running = _Rounds(client, model, train, _sent(client, parts), shares, rounds)
    history = []
    try:
        for number in range(rounds):
            mean, logs = running.finish(number)
            model.set_weights(mean)
            history.append(logs)
            if on_round is not None:
                on_round(number, logs)
    finally:
        running.stop()
    return history


class _Round(NamedTuple):
    mean: Any
    logs: list[Any]


class _Rounds:
    """Rounds, each submitted while the one before it runs.

    So workers go from one to the next by themselves, and keep the snapshot: of what several have,
    and no task waits for, Dask leaves one (``ReduceReplicas``,
    ``distributed/active_memory_manager.py``).
    """

    def __init__(
        self,
        client: Client,
        model: keras.Model,
        train: Callable[[Any, Any], Any],
        parts: list[Any],
        shares: list[float],
        total: int,
    ) -> None:
        self._client = client
        self._parts = parts
        self._shares = shares
        self._total = total
        self._dtypes = [weight.dtype for weight in model.weights]
        # as bytes: only a task may fail to open them, and the scheduler need not
        self._sent = [Snapshot(model), cloudpickle.dumps(train)]
        #: What the next round to be submitted begins with, if that is not the mean of another's.
        self._start: Weights | None = None
        self._holders: dict[Any, Sequence[str]] = {}
        self._submitted: dict[int, _Round] = {}

    def finish(self, number: int) -> tuple[Weights, list[Any]]:
        """Wait for a round's mean and logs; begin it again if a worker dies."""
        tries = 1 + int(dask.config.get("distributed.scheduler.allowed-failures"))
        for _ in range(tries):
            if self._gone():
                self._submitted.clear()
                self._spread()
            for each in range(number, min(number + 2, self._total)):
                if each not in self._submitted:
                    self._submitted[each] = self._submit(each)
            if (gathered := self._gather(self._submitted[number])) is not None:
                del self._submitted[number]
                self._start = gathered[0]
                return gathered
        raise RuntimeError(
            f"round {number} was begun {tries} times, and each time a worker died that trained: "
            "look into their logs, they may lack memory"
        )

    def stop(self) -> None:
        """Let go of what still runs."""
        self._submitted.clear()

    def _gone(self) -> bool:
        """Say whether workers that have parts are not there any more, or not yet."""
        alive = self._client.nthreads()
        return not self._holders or any(
            worker not in alive for each in self._holders.values() for worker in each
        )

    def _spread(self) -> None:
        """Send what all rounds need to where the parts are."""
        self._holders = _holders(self._client, self._parts)
        start = [] if self._start is None else [self._start]
        self._base, self._train, *self._first = self._client.scatter(
            [*self._sent, *start], broadcast=True, hash=False,
            workers=sorted({worker for each in self._holders.values() for worker in each}),
        )  # fmt: skip

    def _submit(self, number: int) -> _Round:
        before = self._submitted.get(number - 1)
        mean = before.mean if before else next(iter(self._first), None)
        trained = [
            self._client.submit(
                _train, self._train, part, self._base, mean, (number, place), pure=False,
                workers=list(self._holders[part.key]),
            )
            for place, part in enumerate(self._parts)
        ]  # fmt: skip
        return _Round(
            mean_of(self._client, trained, self._shares, self._dtypes),
            [self._client.submit(logs_of, each, pure=False) for each in trained],
        )

    def _gather(self, submitted: _Round) -> tuple[Weights, list[Any]] | None:
        """Return a round's mean and logs; None if a worker is gone that they wait for."""
        from distributed import CancelledError

        gathering = asyncio.run_coroutine_threadsafe(
            self._client.gather(list(submitted), asynchronous=True), self._client.loop.asyncio_loop
        )
        while True:
            concurrent.futures.wait([gathering], _PATIENCE)
            try:
                if gathering.done():
                    mean, logs = gathering.result()
                    return mean, list(map(cloudpickle.loads, logs))
            except (CancelledError, concurrent.futures.CancelledError):
                # what was scattered is lost with the last worker that had it
                if not self._gone():
                    raise
            if self._gone():
                gathering.cancel()
                return None


def _holders(client: Client, parts: list[Any]) -> dict[Any, Sequence[str]]:
    """Say where the parts are, when they are."""
    from distributed import CancelledError, wait

    while True:
        try:
            wait(parts)
        except CancelledError as error:
            raise RuntimeError(
                "a part is gone with the worker that had it, and no task could be run again for "
                "it: give parts as results of tasks, or give them anew"
            ) from error
        for part in parts:
            if part.status == "error":
                part.result()
        holders: dict[Any, Sequence[str]] = client.who_has(parts)
        if all(holders.values()):
            return holders
        time.sleep(_PATIENCE / 20)


def _parts(parts: Sequence[Any], weights: Sequence[float] | None) -> tuple[list[Any], list[float]]:
    from dask.base import is_dask_collection

    if is_dask_collection(parts):
        raise ValueError(
            f"parts is one {type(parts).__name__}: give a list, such as its to_delayed() has"
        )
    parts = list(parts)
    shares = [1.0] * len(parts) if weights is None else [float(share) for share in weights]
    if not parts:
        raise ValueError("there are no parts to train on: give a list of futures or values")
    if len(shares) != len(parts) or not min(shares) >= 0 or not 0 < sum(shares) < float("inf"):
        raise ValueError(
            f"weights={weights!r} are no weights of {len(parts)} parts: give one number for each, "
            "none negative, not all zero"
        )
    return parts, shares


def _sent(client: Client, parts: Sequence[Any]) -> list[Any]:
    """Return futures of all parts."""
    from dask import delayed
    from dask.base import unpack_collections
    from distributed import Future
    from distributed.client import futures_of

    def to_compute(part: Any) -> bool:
        return bool(unpack_collections(part)[0] or futures_of(part))

    sent = [
        part if isinstance(part, Future)
        else client.compute(delayed(part)) if to_compute(part)
        else None
        for part in parts
    ]  # fmt: skip
    values = [part for part, future in zip(parts, sent, strict=True) if future is None]
    scattered = iter(client.scatter(values, hash=False) if values else [])
    return [next(scattered) if future is None else future for future in sent]


def _train(
    train: bytes, part: Any, base: Snapshot, mean: Weights | None, place: tuple[int, int]
) -> tuple[Weights, bytes]:
    with base.replica(mean, keep_metrics=True) as model:
        _draw_apart(model, place)
        shapes = [tuple(weight.shape) for weight in model.weights]
        logs = _opened(train)(model, part)
        if [tuple(weight.shape) for weight in model.weights] != shapes:
            raise ValueError(
                f"train made other weights of model {model.name!r}: let it change their values "
                "alone, or there is no mean of them"
            )
        return _weights_of(model), closed(logs)


@functools.lru_cache(maxsize=2)
def _opened(train: bytes) -> Callable[[Any, Any], Any]:
    """Open a function once, so that what it keeps, such as a compiled step, stays."""
    opened: Callable[[Any, Any], Any] = cloudpickle.loads(train)
    return opened


def _weights_of(model: keras.Model) -> Weights:
    """Return snapshots of a model's weights: no copies, where the backend can show them."""
    from dask_keras_serialize import backends, private
    from dask_keras_serialize.values import states

    return states.views(model.weights, backends.current()[1], private.describe(model))


def _draw_apart(model: keras.Model, place: tuple[int, int]) -> None:
    """Give each round and part seeds of its own, or all would drop the same units each time."""
    weights = set(map(id, model.weights))
    for variable in model.variables:
        if id(variable) not in weights and tuple(variable.shape) == (2,):  # a seed generator's
            state = np.asarray(variable).astype("uint32")
            drawn = np.random.SeedSequence([*state.tolist(), *place]).generate_state(2)
            variable.assign((drawn & 0x7FFFFFFF).astype(variable.dtype))
