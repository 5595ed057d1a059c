"""A tensor's memory as NumPy's, and NumPy's as a tensor's: of the host, every dtype, never copied.

Which of the two may write to it is ``torch.py``'s business.
"""

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


#: Whether this PyTorch can share memory until it is written to.
LAZY = hasattr(torch.Tensor, "_lazy_clone") and hasattr(torch._C, "_data_address")


class Memory:
    """A tensor's memory as bytes, for NumPy; keeps the tensor."""

    def __init__(self, tensor: torch.Tensor, writeable: bool = False) -> None:
        self.tensor = tensor
        address = torch._C._data_address(tensor) if LAZY else tensor.data_ptr()
        self.__array_interface__ = {
            "version": 3,
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (address or 64, not writeable),  # empty: NumPy 2.0 takes no memory at 0
        }


def as_array(tensor: torch.Tensor) -> Array:
    """View a contiguous tensor of the host's memory as an array, read-only."""
    raw = np.asarray(Memory(tensor))
    return raw.view(numpy_dtype(tensor.dtype)).reshape(tuple(tensor.shape))


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's dtype of one of torch's, or that of ml_dtypes."""
    bits = _BITS.get(dtype)
    known: np.dtype[Any] = (
        np.dtype(bits[1]) if bits is not None else torch.empty(0, dtype=dtype).numpy().dtype
    )
    return known


def tensor_on(array: Array) -> torch.Tensor:
    """Return a tensor of an array's memory."""
    if array.dtype in _DTYPES:
        bits, dtype = _DTYPES[array.dtype]
        width = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(width)).view(bits).view(dtype)
    return torch.from_numpy(array)
