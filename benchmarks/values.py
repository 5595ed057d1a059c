"""What a value consists of: its arrays, where they lie, whether two of them are equal.

A value is a Keras model, a torch Module, or a list of arrays. Its arrays are views, not
copies, where that is possible, so that an address tells a copied byte from one that is
used where it lies. What came back is compared with what was sent bit for bit; of models it
is said which parts are the same: weights, optimizer, seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import keras

Array = npt.NDArray[Any]

ALL = "all variables"

#: Bytes compared at a time.
_PIECE = 64 << 20


def variables(model: keras.Model) -> list[keras.Variable]:
    """List a model's variables, the optimizer's after its own."""
    return [variable for part in _parts(model).values() for variable in part]


def arrays(value: Any) -> list[Array]:
    """List a value's arrays, uncopied where that is possible."""
    if isinstance(value, (list, tuple)):
        return [np.asarray(each) for each in value]
    if hasattr(value, "state_dict") and not hasattr(value, "get_config"):
        return [_of_tensor(tensor) for tensor in value.state_dict().values()]
    return [_view(variable) for variable in variables(value)]


def weights(value: Any) -> list[Array]:
    """Copy a value's arrays to writeable ones."""
    return [np.array(array) for array in arrays(value)]


def digest(value: Any) -> str:
    """Hash all arrays, their shapes and dtypes: equal only where all bits are."""
    total = hashlib.sha256()
    for array in arrays(value):
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(_bytes(array).data)
    return total.hexdigest()


def checksum(value: Any) -> str:
    """Hash sums along both sides of tables of all bytes: a fifth of `digest`'s time for a GiB."""
    total = hashlib.sha256()
    for array in arrays(value):
        raw = _bytes(array)
        table = raw[: raw.size - raw.size % 4096].view(np.uint64).reshape(-1, 512)
        total.update(f"{array.dtype} {array.shape}".encode())
        for axis in (0, 1):
            total.update(np.add.reduce(table, axis=axis, dtype=np.uint64).data)
        total.update(raw[table.nbytes :].data)
    return total.hexdigest()


def nbytes(value: Any) -> int:
    """Count the bytes of a value's arrays."""
    return sum(array.nbytes for array in arrays(value))


def equal(sent: Any, got: Any) -> str:
    """Say what of two values is the same, bit for bit.

    Parameters
    ----------
    sent, got : object

    Returns
    -------
    str
        "arrays"; of models "all variables", or which parts are, where only seeds are
        not: Keras's own formats do not hold them.

    Raises
    ------
    ValueError
        If arrays, weights or the optimizer differ; says which.
    """
    if not hasattr(sent, "get_config"):
        if not same(arrays(sent), arrays(got)):
            raise ValueError("other arrays came back")
        return "arrays"
    ours, theirs = _parts(sent), _parts(got)
    kept = [
        part
        for part in ours
        if same(map(_view, ours[part]), map(_view, theirs[part]))  # of nothing, nothing
    ]
    lost = [part for part in ours if part not in kept]
    if set(lost) - {"seeds"}:
        raise ValueError(f"does not bring back: {', '.join(lost)}")
    return ALL if not lost else ", ".join(part for part in kept if ours[part])


def same(one: Iterable[Array], two: Iterable[Array]) -> bool:
    """Say whether two lists of arrays are the same, bit for bit."""
    one, two = list(one), list(two)
    if [(a.shape, a.dtype) for a in one] != [(a.shape, a.dtype) for a in two]:
        return False
    return all(
        np.array_equal(_bytes(a)[i : i + _PIECE], _bytes(b)[i : i + _PIECE])
        for a, b in zip(one, two, strict=True)
        for i in range(0, a.nbytes, _PIECE)
    )


def elsewhere(parts: Iterable[Array], memory: Sequence[Array]) -> int:
    """Count the bytes of arrays that do not lie in the memory of others.

    Parameters
    ----------
    parts : iterable of ndarray
        Contiguous.
    memory : sequence of ndarray

    Returns
    -------
    int
        What was copied, if ``parts`` were made of ``memory``.
    """
    spans = sorted((span for span in map(_span, memory)), key=lambda span: span[0])
    starts = [start for start, _ in spans]
    total = 0
    for start, end in map(_span, parts):
        i = int(np.searchsorted(starts, start, side="right")) - 1
        if i < 0 or end > spans[i][1]:
            total += end - start
    return total


def _span(array: Array) -> tuple[int, int]:
    start: int = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _view(variable: keras.Variable) -> Array:
    import keras

    from dask_keras_serialize import backends

    if keras.backend.backend() == "torch":  # ours is of memory that may be copied later
        return _of_tensor(variable.value)
    return backends.current()[1].view(variable)


def _of_tensor(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _parts(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """Take a model's variables apart: weights, the optimizer's, what is left."""
    optimizer = getattr(model, "optimizer", None)
    of_weights = {id(variable) for variable in model.weights}
    return {
        "weights": list(model.weights),
        "optimizer": list(_unique(optimizer.variables)) if optimizer is not None else [],
        "seeds": [each for each in model.variables if id(each) not in of_weights],
    }


def _unique(items: Iterable[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for item in items:
        if id(item) not in seen:
            seen.add(id(item))
            yield item
