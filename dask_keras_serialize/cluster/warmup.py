"""Worker plugin that runs a model once on every worker, so that the first task is not the slow one.

A backend builds, traces and compiles what a model computes when it is first run. What it has traced
belongs to the very object: so the one is run that the worker keeps for tasks, under the key of a
future, and a worker that has none yet fetches it first. A model that is sent inside a task, not as
a future, is another object there, and is traced by the task.

Dask takes back what workers hold beside the first, within two seconds, once no task waits for it
(``ReduceReplicas``, ``distributed/active_memory_manager.py``), and a model that is fetched again is
traced again. So a worker keeps what it has warmed up until the future is gone: it answers that it
has it still. Where distributed asks otherwise, in a version to come, the model is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from distributed import Future
from distributed.diagnostics.plugin import WorkerPlugin

from dask_keras_serialize.errors import PlacementError
from dask_keras_serialize.wire.header import FORMAT, ITEMSIZE

logger = logging.getLogger(__name__)

#: A shape, or shapes in lists or dicts, as the model takes its inputs.
Shape = Sequence[Any] | Mapping[str, Any]


class WarmKeras(WorkerPlugin):  # type: ignore[misc]
    """Build a model and trace its ``predict`` on every present and future worker.

    Parameters
    ----------
    model : distributed.Future
        Of a model: ``client.scatter(model, broadcast=True)``, or a task's result.
    batch_shape : tuple of int
        Of one batch, its size first, as tasks will give it to ``predict``; lists or dicts of
        such for a model that takes several inputs so.
    dtype : str, optional
        Of the batch; else what each of the model's inputs says, or float32.

    Raises
    ------
    TypeError, ValueError
        If the model is no future, the shape no shape.
    PlacementError
        By ``client.register_plugin``: names the worker, and what is wrong.

    Notes
    -----
    Workers keep the model until the future is released. The batch is of zeros; variables that a
    prediction changes are put back, also those that another thread trains meanwhile. On TensorFlow
    batches of another size are traced again, once; JAX compiles for each size, also for what
    remains of a chunk: register one for each. A worker that joins when the future is gone starts
    without it, and a model that a worker has spilled is another one when it is read again.

    Examples
    --------
    >>> future = client.scatter(model, broadcast=True)  # doctest: +SKIP
    >>> client.register_plugin(WarmKeras(future, (32, 8)))  # doctest: +SKIP
    >>> client.map(predict, chunks, model=future)  # doctest: +SKIP
    """

    def __init__(self, model: Future, batch_shape: Shape, *, dtype: str | None = None) -> None:
        if not isinstance(model, Future):
            raise TypeError(
                f"WarmKeras takes the future of a model, not a {type(model).__name__}: make one by "
                "client.scatter(model, broadcast=True), and give it to tasks"
            )
        _check(batch_shape)
        if dtype is not None and dtype not in ITEMSIZE:
            raise ValueError(f"dtype={dtype!r} is none of {', '.join(ITEMSIZE)}")
        # the future itself would start a client on each worker
        self.key = model.key
        self.batch_shape = batch_shape
        self.dtype = dtype
        self.name = f"{FORMAT} warm-up of {model.key} for {batch_shape} {dtype}"

    async def setup(self, worker: Any) -> None:
        """Run the model there; on another thread, for tracing it takes long.

        Raises
        ------
        PlacementError
            If that fails.
        """
        _keeper(worker).keys[self.key] += 1
        if self.key not in worker.data:
            holders = await worker.scheduler.who_has(keys=[self.key])
            if not any(holders.values()):
                logger.warning("%s is nowhere any more: it is not warmed up", self.key)
                return
            await worker.gather(holders)
            if self.key not in worker.data:
                raise PlacementError(
                    f"worker {worker.address} ({worker.name!r}): {self.key} could not be "
                    f"fetched from {', '.join(holders[self.key])}: look into their logs"
                )
            await worker.scheduler.add_keys(worker=worker.address, keys=[self.key])
        model = worker.data[self.key]
        error = await asyncio.to_thread(self._run, model)
        if error is not None:
            said = _STYLE.sub("", str(error))
            raise PlacementError(
                f"worker {worker.address} ({worker.name!r}): {getattr(model, 'name', model)!r} "
                f"({self.key}) cannot predict on zeros of shape {self.batch_shape}: "
                f"{type(error).__name__}: {said}"
            )

    def teardown(self, worker: Any) -> None:
        """Let Dask take the model back."""
        _keeper(worker).keys[self.key] -= 1

    def _run(self, model: Any) -> Exception | None:
        """Predict; return what that raised: of all, asyncio cannot hand on a StopIteration."""
        from dask_keras_serialize import backends
        from dask_keras_serialize.values import states

        backend = backends.current()[1]
        try:
            x = _zeros(self.batch_shape, self.dtype, getattr(model, "inputs", None) or [])
            if not model.built:
                model(_symbols(x))
            before = states.views(model.variables, backend, self.key)
            model.predict(x, batch_size=_rows(x), verbose=0)
            after = states.views(model.variables, backend, self.key)
            for variable, old, new in zip(model.variables, before, after, strict=True):
                if old.tobytes() != new.tobytes():
                    variable.assign(old)
        except Exception as error:  # a model's own code
            return error
        return None


class _Keeper:
    """Answers for a worker that is told to drop what it has beside others."""

    def __init__(self, worker: Any) -> None:
        self.keys: Counter[Any] = Counter()
        self._worker = worker
        self._remove = worker.stream_handlers.get(_REMOVE)
        if self._remove is not None:
            worker.stream_handlers[_REMOVE] = self.remove

    def remove(self, keys: Sequence[Any], stimulus_id: str, **more: Any) -> None:
        """Drop keys, but for those that the memory manager could as well leave."""
        kept: list[Any] = []
        if stimulus_id.startswith(_MANAGER):  # else the scheduler does not know them any more
            kept = [key for key in keys if self.keys[key] > 0 and key in self._worker.data]
        if kept:
            answer = {"op": "add-keys", "keys": kept, "stimulus_id": f"{FORMAT}-{stimulus_id}"}
            self._worker.batched_send(answer)
        rest = [key for key in keys if key not in kept]
        self._remove(keys=rest, stimulus_id=stimulus_id, **more)


#: How Keras colours what it says for terminals.
_STYLE = re.compile(r"\x1b\[[0-9;]*m")

_REMOVE, _MANAGER = "remove-replicas", "active_memory_manager"


def _keeper(worker: Any) -> _Keeper:
    """Return a worker's, which goes with it."""
    name = f"{FORMAT} keeper"
    if name not in worker.extensions:
        worker.extensions[name] = _Keeper(worker)
    keeper: _Keeper = worker.extensions[name]
    return keeper


def _check(shape: Any) -> None:
    """Raise ValueError unless it is a shape, or shapes in lists or dicts."""
    if isinstance(shape, Mapping):
        parts = list(shape.values())
    elif isinstance(shape, (list, tuple)) and not all(isinstance(n, Integral) for n in shape):
        parts = list(shape)
    else:
        right = isinstance(shape, (list, tuple)) and shape and min(shape) > 0
        parts = [] if right else [None]
    if (not parts and isinstance(shape, Mapping)) or None in parts or isinstance(shape, str):
        raise ValueError(
            f"batch_shape={shape!r} is no shape of a batch, such as (32, 8): its size comes first, "
            "all are numbers from 1; lists or dicts of such for several inputs"
        )
    for part in parts:
        _check(part)


def _zeros(shape: Shape, dtype: str | None, inputs: Sequence[Any]) -> Any:
    """Make a batch of zeros; of the dtype that each input has, by name or by place."""
    if isinstance(shape, Mapping):
        named = {each.name: [each] for each in inputs}
        return {key: _zeros(each, dtype, named.get(key, [])) for key, each in shape.items()}
    if not all(isinstance(each, Integral) for each in shape):
        return [_zeros(each, dtype, inputs[i : i + 1]) for i, each in enumerate(shape)]
    return np.zeros(tuple(shape), dtype or (inputs[0].dtype if inputs else "float32"))


def _rows(x: Any) -> int:
    while not isinstance(x, np.ndarray):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return len(x)


def _symbols(x: Any) -> Any:
    """Return what a model is built from without running it."""
    import keras

    return keras.tree.map_structure(lambda each: keras.KerasTensor(each.shape, str(each.dtype)), x)
