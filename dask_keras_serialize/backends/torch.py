"""PyTorch: tensors are updated in place, so a view has to be a copy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from dask_keras_serialize.backends import Array

#: dtypes numpy lacks, as (same-sized dtype both have, ml_dtypes' dtype)
_BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
_DTYPES = {np.dtype(there): (bits, here) for here, (bits, there) in _BITS.items()}


def view(variable: Any) -> Array:
    """Copy a variable's value.

    Parameters
    ----------
    variable : keras.Variable
        On any device.

    Returns
    -------
    ndarray
        Read-only, of the variable's shape and dtype.

    Notes
    -----
    Copies: one, because training writes to the tensor's own memory and would show
    in a view.
    """
    value = variable.value.detach().to("cpu", copy=True).contiguous()
    if value.dtype in _BITS:
        bits, dtype = _BITS[value.dtype]
        array: Array = value.view(bits).numpy().view(dtype)
    else:
        array = value.numpy()
    array.flags.writeable = False
    return array


def tensor(array: Array) -> torch.Tensor:
    """Copy an array into a tensor that owns its memory."""
    if array.dtype in _DTYPES:
        bits, dtype = _DTYPES[array.dtype]
        width = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(width).copy()).view(bits).view(dtype)
    return torch.from_numpy(array.copy())


def version() -> str:
    """Return PyTorch's version."""
    return str(torch.__version__)


#: None: torch and distributed pickle tensors themselves, out of band.
TENSORS: tuple[type, ...] = ()

REDUCED: tuple[type, ...] = ()

SHELLS: tuple[type, ...] = ()


def shell(cls: type) -> Any:
    """Never called: there are no classes in SHELLS."""
    raise TypeError(cls)


def reduce(obj: Any) -> None:
    """Leave every object to pickle."""


def drop(obj: Any, state: dict[str, Any]) -> None:
    """Leave nothing out."""


def mend(obj: Any, state: dict[str, Any]) -> None:
    """Mend nothing."""
