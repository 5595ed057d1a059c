"""``predict``: a model over a Dask collection, lazily.

The model is one task of the graph, which all others depend on: it crosses to each worker once, and
is one replica there, whose traced function all chunks share. Nothing is computed to make the graph:
what the model returns is asked of it symbolically.
"""

from __future__ import annotations

import math
import sys
from itertools import count, islice
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed, delayed

from dask_keras_serialize.workflows import batches, outputs
from dask_keras_serialize.workflows.outputs import Rows, leaves, mapped


def predict(model: Any, collection: Any, *, batch_size: int | None = None, meta: Any = None) -> Any:
    """Predict on all of a Dask collection; what ``model.predict`` returns for each chunk of it.

    Parameters
    ----------
    model : keras.Model, distributed.Future or dask.delayed.Delayed
        Built. Of a future, and a Delayed, of a model, one small task asks what it returns, for
        which a Delayed is computed; not if there is ``meta``.
    collection : dask Array, DataFrame, Series or Bag
        Rows along axis 0. Lists, tuples or dicts of arrays for a model of several inputs. Columns
        of a dataframe go to inputs of their names if the model has several, or a dict of them; else
        all together. Items of a bag are samples: arrays or numbers, or tuples or dicts of such.
    batch_size : int, optional
        As of ``model.predict``: 32, if not given. The last batch of a chunk has what remains.
    meta : ndarray, optional
        What the model returns, without rows, such as ``np.empty((0, 10), "float32")``, or the
        structure of such; sizes of 0 are unknown ones. Else it is asked of the model. Not used for
        bags.

    Returns
    -------
    dask Array
        For arrays and dataframes, in chunks as the collection's along axis 0, of all that is known
        of shape and dtype; in lists, tuples or dicts where ``model.predict`` returns such. The
        outputs of one chunk are computed at once.
    dask Bag
        For a bag: the prediction of each sample, in as many partitions.

    Raises
    ------
    TypeError
        If the model is no model, or the collection no Dask collection.
    ValueError
        If the model is not built, or cannot predict on such data; if inputs do not match.
    EncodeError
        If the model cannot travel whole.

    Notes
    -----
    The graph holds the model as it is now, closed: what is trained later does not count. Each
    ``compute`` opens it once, and sends it to the other workers. The values are those of
    ``model.predict(chunk, batch_size=...)`` to the bit, on the same kind of machine; floats are
    turned into Keras's floatx first, as it does.
    JAX compiles for each size of a batch, so let the rows of chunks be multiples of ``batch_size``.
    Chunks are not written to, and results are their own; a bag's are views of their batch's.

    Examples
    --------
    >>> images = da.from_array(x, chunks=(256, -1, -1, -1))  # doctest: +SKIP
    >>> predict(model, images, batch_size=64)  # doctest: +SKIP
    dask.array<..., shape=(10000, 10), dtype=float32, chunksize=(256, 10), ...>
    """
    sizes: tuple[type, ...] = (int, np.integer)
    if batch_size is not None and not (isinstance(batch_size, sizes) and batch_size > 0):
        raise ValueError(f"batch_size={batch_size!r} is no number of rows from 1")
    task = _task_of(model)
    kind = _kind(collection)
    if kind == "bag":
        return collection.map_partitions(batches.of_partition, model=task, batch_size=batch_size)
    if kind == "frame":
        blocks = np.empty((0,), object)  # an array of them to Dask, pandas' own to our tasks
        arrays = [collection.map_partitions(batches.whole, meta=blocks, enforce_metadata=False)]
        template: Any = 0
        asked = collection._meta
    else:
        arrays, template = _aligned(collection)
        asked = mapped(lambda place: _rows(arrays[place]), template)
    spec = outputs.given(meta) if meta is not None else _ask(model, task, asked)
    return _arrays(arrays, template, task, batch_size, spec)


def _task_of(model: Any) -> Delayed:
    """Make the task that holds the model, or depends on who makes it."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.Model):
        outputs.check_built(model)
        # or the key would stand for values that the model has no more when the graph is computed
        from dask_keras_serialize.pickling import pack

        model = pack(model)
    elif not _is_elsewhere(model):
        raise TypeError(
            f"predict takes a keras.Model, or a Future or Delayed of one, not a "
            f"{type(model).__name__}"
        )
    # a key of its own: the same model twice is one task
    return delayed(batches.replica)(model, dask_key_name=f"keras-model-{tokenize(model)}")


def _is_elsewhere(model: Any) -> bool:
    """Say whether a model is a future, or to be made."""
    distributed = sys.modules.get("distributed")
    return isinstance(model, Delayed) or (
        distributed is not None and isinstance(model, distributed.Future)
    )


def _kind(collection: Any) -> str:
    """Say what a collection is, without loading what the others need."""
    if _is_one(collection, "dask.bag", "Bag"):
        return "bag"
    if _is_one(collection, "dask.dataframe", "DataFrame", "Series"):
        return "frame"
    parts = leaves(collection)
    if parts and all(isinstance(each, da.Array) for each in parts):
        return "arrays"
    other = next((each for each in parts if not isinstance(each, da.Array)), collection)
    raise TypeError(
        "predict takes a dask Array, DataFrame, Series or Bag, or lists, tuples or dicts of "
        f"Arrays, not a {type(other).__name__}: give what is in memory to model.predict, or make "
        "it one by dask.array.from_array"
    )


def _is_one(collection: Any, module: str, *names: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(
        collection, tuple(getattr(loaded, name) for name in names)
    )


def _aligned(collection: Any) -> tuple[list[Any], Any]:
    """List the arrays, in equal chunks along axis 0 and one chunk along others; and their places.

    Raises
    ------
    ValueError
        If that cannot be.
    """
    places = count()
    arrays: list[Any] = []
    names: list[str] = []

    def place(array: Any) -> int:
        number = next(places)
        if not array.ndim:
            raise ValueError(f"input {number} is a dask Array of no axes, predict needs rows")
        if isinstance(array._meta, np.ma.MaskedArray):
            raise TypeError(f"input {number} is masked, which models do not see: fill it first")
        if any(blocks > 1 for blocks in array.numblocks[1:]):
            array = array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
        arrays.append(array)
        return number

    template = mapped(place, collection)
    names = _names(collection)
    rows = [array.shape[0] for array in arrays]
    if not any(math.isnan(each) for each in rows):
        if len(set(rows)) > 1:
            raise ValueError(f"inputs differ in rows: {_listed(names, rows)}")
        if len({array.chunks[0] for array in arrays}) > 1:
            arrays = da.core.unify_chunks(*_with_axes(arrays))[1]
    elif len({array.numblocks[0] for array in arrays}) > 1 or len(set(map(str, rows))) > 1:
        chunks = [str(array.chunks[0]) for array in arrays]
        raise ValueError(
            f"inputs have chunks that cannot be brought in line, for sizes are not known: "
            f"{_listed(names, chunks)}: call compute_chunk_sizes() on them first"
        )
    return arrays, template


def _names(structure: Any, path: str = "") -> list[str]:
    """Name the leaves of a structure, in the order in which ``mapped`` sees them."""
    if isinstance(structure, (dict, list, tuple)):
        items = structure.items() if isinstance(structure, dict) else enumerate(structure)
        return [name for key, each in items for name in _names(each, f"{path}[{key!r}]")]
    return [f"input{path}"]


def _listed(names: list[str], values: list[Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def _with_axes(arrays: list[Any]) -> list[Any]:
    """Pair arrays with names of their axes, for blockwise: they have but their rows, 0, in common.

    Names are numbers, which Dask sorts; outputs' are negative.
    """
    axes = count(1)
    return [
        each for array in arrays for each in (array, (0, *islice(axes, array.ndim - 1)))
    ]  # fmt: skip


def _rows(array: Any) -> Rows:
    shape = (None if math.isnan(size) else int(size) for size in array.shape[1:])
    return Rows(tuple(shape), array.dtype)


def _ask(model: Any, task: Delayed, asked: Any) -> Any:
    """Ask the model what it returns: here, or where it is."""
    if not _is_elsewhere(model):
        return batches.outputs_of(model, asked)
    # a future's own cluster, which need not be the default
    scheduler = None if isinstance(model, Delayed) else model.client
    return delayed(batches.outputs_of)(task, asked).compute(scheduler=scheduler)


def _arrays(arrays: list[Any], template: Any, task: Any, batch_size: Any, spec: Any) -> Any:
    """Make the graph: one task for each chunk, and more to part what it returns."""
    pairs = _with_axes(arrays)
    settings = {"model": task, "template": template, "batch_size": batch_size, "outputs": spec}

    def layer(function: Any, rows: Any, *pairs: Any, **settings: Any) -> Any:
        axes = {-axis: size or math.nan for axis, size in enumerate(rows.shape, 1)}
        return da.blockwise(
            function, (0, *axes), *pairs, new_axes=axes, align_arrays=False, concatenate=False,
            dtype=rows.dtype, meta=rows.empty(), **settings,
        )  # fmt: skip

    if isinstance(spec, Rows):
        return layer(batches.of_blocks, spec, *pairs, **settings)
    chunks = layer(batches.of_blocks, Rows((), np.dtype(object)), *pairs, **settings)

    def part(path: tuple[Any, ...], structure: Any) -> Any:
        if isinstance(structure, Rows):
            return layer(batches.part_of, structure, chunks, (0,), path=path)
        if isinstance(structure, dict):
            return {key: part((*path, key), each) for key, each in structure.items()}
        parts = [part((*path, place), each) for place, each in enumerate(structure)]
        return type(structure)(*parts) if hasattr(structure, "_fields") else type(structure)(parts)

    return part((), spec)
