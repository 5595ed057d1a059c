"""What a task of ``predict`` runs: one replica of a model, on one chunk, batch by batch.

Each batch goes through ``model.predict_on_batch``: the function that ``model.predict`` runs too,
without the pipeline of data that it starts for every call. So the values are those of
``model.predict(chunk, batch_size=...)`` to the bit, remainders included, which are batches of their
own there as well.

Threads of one worker share its replica. On JAX its trainer takes the weights out of the model while
it runs, so a replica predicts for one thread at a time. On TensorFlow and PyTorch only the first
batch of each shape is one thread's, which is when functions are made and traced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.errors import one_line
from dask_keras_serialize.packed import Parcel
from dask_keras_serialize.workflows.outputs import (
    Rows,
    floats_as_keras,
    leaves,
    mapped,
    of,
    overrides_predict,
)

#: What Keras's ``predict`` takes where it is not told.
BATCH_SIZE = 32


def replica(model: Any) -> Any:
    """Return a model: the one task of the graph that holds it.

    Raises
    ------
    DecodeError
        If it could not be opened here.
    TypeError
        If it is no model.
    """
    if isinstance(model, BrokenObject):
        model()
    if isinstance(model, Parcel):
        model = model.open()
    import keras

    if not isinstance(model, keras.Model):
        raise TypeError(
            f"predict takes a keras.Model, not what this gave: a {type(model).__name__}"
        )
    return model


def whole(part: Any) -> Any:
    """Return a dataframe's partition, as the block of an array."""
    return part


def outputs_of(model: Any, inputs: Any) -> Any:
    """Say what a model returns, see :func:`dask_keras_serialize.workflows.outputs.of`.

    Parameters
    ----------
    model : keras.Model
    inputs : Rows
        Or a structure of such, or an empty dataframe or series.
    """
    if not isinstance(inputs, (Rows, dict, list, tuple)):
        columns = of_frame(model, inputs)
        inputs = mapped(lambda array: Rows(array.shape[1:], array.dtype), columns)
    return of(model, inputs)


def of_blocks(*blocks: Any, model: Any, template: Any, batch_size: int | None, outputs: Any) -> Any:
    """Predict on one block of each of a model's inputs.

    Parameters
    ----------
    *blocks : ndarray, DataFrame or Series
        Or lists of a single one, as Dask hands over axes that the result does not have. Not
        written to.
    model : keras.Model
    template : int
        The place of a block; or lists, tuples or dicts of such, as the model takes its inputs.
    batch_size : int or None
    outputs : Rows
        Or a structure of such: what the graph promised.

    Returns
    -------
    ndarray
        Or a structure of such, as ``model.predict`` returns it; the caller's own.

    Raises
    ------
    ValueError
        If the model returns something else than was promised, or inputs differ in rows.
    """
    blocks = tuple(map(_bare, blocks))
    inputs = mapped(lambda place: blocks[place], template)
    if hasattr(inputs, "to_numpy"):
        inputs = of_frame(model, inputs)
    rows = {len(each) for each in leaves(inputs)}
    if len(rows) > 1:
        raise ValueError(f"{_name(model)}: its inputs have {sorted(rows)} rows in one chunk")
    (count,) = rows
    if count == 0:
        return mapped(lambda each: _no_rows(model, each), outputs)
    result = _Runner(model).predict(inputs, count, batch_size or BATCH_SIZE)
    promised, got = leaves(outputs), leaves(result)
    if len(promised) != len(got) or not all(map(Rows.holds, promised, got)):
        here = ", ".join(str(Rows(each.shape[1:], each.dtype)) for each in got)
        raise ValueError(
            f"{_name(model)} returned {here}, not {', '.join(map(str, promised))}: "
            "give predict what it returns here as meta="
        )
    return result


def part_of(block: Any, path: tuple[Any, ...]) -> Any:
    """Return one output out of all that :func:`of_blocks` returned; uncopied."""
    for step in path:
        block = block[step]
    return block


def of_partition(samples: Iterable[Any], model: Any, batch_size: int | None) -> list[Any]:
    """List what :func:`of_samples` yields: workers give results to each other, not generators."""
    return list(of_samples(samples, model, batch_size))


def of_samples(samples: Iterable[Any], model: Any, batch_size: int | None) -> Iterator[Any]:
    """Predict on samples, of which no more than a batch is held at a time.

    Parameters
    ----------
    samples : iterable
        Of arrays or numbers; or tuples or dicts of such, for a model of several inputs.
    model : keras.Model
    batch_size : int or None

    Yields
    ------
    ndarray
        For each sample its row of what ``model.predict`` returns, a view of its batch's; or a
        structure of such.
    """
    size = batch_size or BATCH_SIZE
    samples = iter(samples)
    runner = _Runner(model)
    while batch := list(islice(samples, size)):
        result = runner.predict(_stacked(model, batch), len(batch), size)
        for row in range(len(batch)):
            yield mapped(itemgetter(row), result)


def of_frame(model: Any, frame: Any) -> Any:
    """Turn a dataframe or series into what a model takes.

    Parameters
    ----------
    model : keras.Model
        With several inputs, or a dict of them, it takes the columns of their names.
    frame : DataFrame or Series

    Returns
    -------
    ndarray or dict of ndarray
        Of shape (rows, columns), or (rows, 1) for a series and each named column; copies where
        pandas has to make them.

    Raises
    ------
    ValueError, TypeError
        If a column is not there, or is not of numbers and the model does not take strings.
    """
    if frame.ndim == 1:
        return frame.to_numpy()[:, np.newaxis]
    names = input_names(model)
    if names is not None:
        missing = [name for name in names if name not in frame.columns]
        if missing:
            raise ValueError(
                f"{_name(model)} takes {', '.join(map(repr, names))}: there is no column "
                f"{', '.join(map(repr, missing))} among {', '.join(map(repr, frame.columns))}"
            )
        return {name: frame[name].to_numpy()[:, np.newaxis] for name in names}
    if [str(each.dtype) for each in getattr(model, "inputs", None) or []] == ["string"]:
        return frame.to_numpy(object)
    wrong = [
        f"{name!r} ({dtype})" for name, dtype in frame.dtypes.items() if dtype.kind not in "biuf"
    ]
    if wrong:
        raise TypeError(f"{_name(model)} takes numbers, these columns are none: {', '.join(wrong)}")
    array = frame.to_numpy()
    # missing values of pandas' own dtypes, booleans beside numbers
    return frame.to_numpy("float64", na_value=np.nan) if array.dtype == object else array


def input_names(model: Any) -> list[str] | None:
    """Return the names of a model's inputs, if it has several or takes a dict of them."""
    inputs = getattr(model, "inputs", None) or []
    taken = getattr(model, "input", None)  # which a Sequential, and a subclass, may lack
    if inputs and isinstance(taken, dict):
        return list(taken)
    return [each.name for each in inputs] if len(inputs) > 1 else None


class _Shared:
    """What threads that predict with one replica share."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.traced: set[Any] = set()


_SHARED: WeakKeyDictionary[Any, _Shared] = WeakKeyDictionary()
_GUARD = threading.Lock()


class _Runner:
    """A replica at work for one chunk or partition."""

    def __init__(self, model: Any) -> None:
        import keras

        self.model = model
        with _GUARD:
            self.shared = _SHARED.setdefault(model, _Shared())
        self.backend = keras.backend.backend()
        strategy = getattr(model, "distribute_strategy", None)
        # these say themselves how data is handed to the model, or spread over devices
        self.by_itself = (
            overrides_predict(model)
            or getattr(strategy, "num_replicas_in_sync", 1) > 1
            or keras.distribution.distribution() is not None
        )
        if self.backend == "torch":
            model.eval()  # as predict does, predict_on_batch does not

    def predict(self, inputs: Any, rows: int, batch_size: int) -> Any:
        """Return what ``model.predict`` does."""
        if self.by_itself:
            whole = mapped(_as_keras, inputs)
            return self._in_turn(
                lambda: self.model.predict(whole, batch_size=batch_size, verbose=0), whole
            )
        if rows <= batch_size and self.backend != "torch":
            return self._batch(inputs, 0, rows)
        made: Any = None
        for start in range(0, rows, batch_size):
            stop = min(start + batch_size, rows)
            batch = self._batch(inputs, start, stop)
            if made is None:
                made = mapped(lambda each: np.empty((rows, *each.shape[1:]), each.dtype), batch)
            for target, values in zip(leaves(made), leaves(batch), strict=True):
                target[start:stop] = values
        return made

    def _batch(self, inputs: Any, start: int, stop: int) -> Any:
        batch = mapped(lambda array: self._tensor(array[start:stop]), inputs)
        result = self._in_turn(lambda: self.model.predict_on_batch(batch), batch)
        for each in leaves(result):
            if np.shape(each)[:1] != (stop - start,):
                raise ValueError(
                    f"{_name(self.model)} returned shape {np.shape(each)} for {stop - start} rows: "
                    "predict needs a row for each"
                )
        return result

    def _tensor(self, array: Any) -> Any:
        array = _as_keras(array)
        if self.backend == "torch":
            # whose tensors share memory: chunks are read-only, or another task's too
            return _to_tensor(np.array(array))
        return _to_tensor(array) if array.dtype == object else array

    def _in_turn(self, run: Callable[[], Any], batch: Any) -> Any:
        signature = tuple((each.shape, str(each.dtype)) for each in leaves(batch))
        if self.backend != "jax" and signature in self.shared.traced:
            return run()
        with self.shared.turn:
            result = run()
        self.shared.traced.add(signature)
        return result


def _bare(block: Any) -> Any:
    while isinstance(block, list):
        (block,) = block
    return block


def _as_keras(array: Any) -> Any:
    array = np.asarray(array)
    return array.astype(floats_as_keras(array.dtype), copy=False)


def _to_tensor(array: Any) -> Any:
    import keras

    return keras.ops.convert_to_tensor(array)


def _no_rows(model: Any, rows: Rows) -> Any:
    if None in rows.shape:
        raise ValueError(
            f"{_name(model)}: a chunk has no rows, and its output is {rows}: give predict "
            "the sizes by meta=, or leave out chunks without rows"
        )
    return rows.empty()


def _stacked(model: Any, samples: list[Any]) -> Any:
    first = samples[0]
    try:
        if isinstance(first, dict):
            return {key: np.stack([each[key] for each in samples]) for key in first}
        if isinstance(first, tuple):
            return tuple(np.stack(part) for part in zip(*samples, strict=True))
        return np.stack(samples)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{_name(model)}: samples of a bag are not all alike: {one_line(error)}"
        ) from error


def _name(model: Any) -> str:
    from dask_keras_serialize.private import describe

    return describe(model)
