"""Device frames: bytes that stay in a GPU's memory on the way, for Dask's "cuda" family.

Comms that can send a GPU's memory (``distributed_ucxx``) take frames with a
``__cuda_array_interface__``, and receive into objects that have one, of rmm, numba or cupy. A
:class:`DeviceFrame` is either: on the way out a snapshot that the backend's adapter made,
read-only; on the way in what a comm handed over, which is the receiver's own where it says so. It
keeps alive whatever holds the memory. Nothing here needs a GPU, rmm, numba or cupy to be installed,
nor reads a byte: :func:`to_host` asks the object that holds the bytes.

TensorFlow and JAX take such memory by DLPack alone, whose structs
(https://dmlc.github.io/dlpack/latest/c_api.html) are written here by ctypes: :class:`Loan`. Who
borrows has to copy, and give back soon: a deleter in Python must not run once Python has ended.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_keras_serialize.errors import DecodeError

_INTERFACE = "__cuda_array_interface__"

#: ``kDLCUDA`` of DLDeviceType.
DEVICE_TYPE = 2


class DeviceFrame:
    """A contiguous run of bytes in a GPU's memory.

    Parameters
    ----------
    address : int
    nbytes : int
    source : object
        What holds the memory; kept alive.
    copy_to_host : callable
        Returns the bytes as an array.
    writeable : bool
        Whether they are the receiver's to keep, and nobody else will write to them.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        source: object,
        copy_to_host: Callable[[], Any] | None,
        writeable: bool = False,
    ) -> None:
        self.address = address
        self.nbytes = nbytes
        self.source = source
        self.copy_to_host = copy_to_host
        self.writeable = writeable

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "strides": None,
            "data": (self.address, not self.writeable),
            "stream": None,  # what has to be written is
        }

    def own(self) -> DeviceFrame:
        """Return the same memory as if it were the caller's, who will copy it."""
        return DeviceFrame(self.address, self.nbytes, self.source, self.copy_to_host, True)


def hidden() -> bool:
    """Say whether ``CUDA_VISIBLE_DEVICES`` hides all GPUs from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def on_device(buffer: object) -> bool:
    """Say whether a frame lies in a GPU's memory."""
    return hasattr(buffer, _INTERFACE)


def received(buffer: Any, owner: str, *, keep: bool = False) -> DeviceFrame:
    """Take what a comm handed over.

    Parameters
    ----------
    buffer : object with ``__cuda_array_interface__``
        rmm.DeviceBuffer, or an array of numba's or cupy's, or a DeviceFrame.
    owner : str
        Whose bytes they are, for the error.
    keep : bool
        Whether they are the caller's own from now on.

    Raises
    ------
    DecodeError
        If it is not contiguous.

    Notes
    -----
    Copies: none.
    """
    try:
        interface = getattr(buffer, _INTERFACE)
        shape, item = tuple(interface["shape"]), int(interface["typestr"][2:])
        address, readonly = interface["data"]
        strides = interface.get("strides")
        steps = zip(shape, strides or (), _strides(shape, item), strict=strides is not None)
        if any(there != step for n, there, step in steps if n != 1):
            raise ValueError(f"strides {strides}")
        nbytes, address = math.prod(shape) * item, int(address)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DecodeError(
            f"{owner}: a frame in a GPU's memory is no contiguous run of bytes: {error!r}"
        ) from None
    # rmm and numba; cupy
    copy = getattr(buffer, "copy_to_host", None) or getattr(buffer, "get", None)
    return DeviceFrame(address, nbytes, buffer, copy, keep and not readonly)


def to_host(frame: DeviceFrame, owner: str) -> memoryview:
    """Copy a frame to the host's memory, by what holds it.

    Parameters
    ----------
    frame : DeviceFrame
    owner : str
        Whose bytes they are, for the error.

    Returns
    -------
    memoryview
        Of format ``B``, and its receiver's own.

    Raises
    ------
    DecodeError
        If what holds it cannot.

    Notes
    -----
    Copies: one.
    """
    if frame.copy_to_host is None:
        raise DecodeError(
            f"{owner}: it arrived in a GPU's memory, which Keras does not use in this process, in "
            f"a {type(frame.source).__qualname__}, which cannot copy itself to the host: let Keras "
            "use the GPU here, or connect by tcp://, which sends what lies in the host's memory"
        )
    array: npt.NDArray[Any] = np.asarray(frame.copy_to_host())
    return array.reshape(-1).view(np.uint8).data


def _strides(shape: Sequence[int], item: int) -> tuple[int, ...]:
    return tuple(item * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor: all that has ever been in it."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (
    ("dl_tensor", _Tensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_NAME = b"dltensor"
_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _api)
)
# of a capsule by its address: one that is on its way out must not be referred to again
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _api)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)

#: What is lent just now, by the address of its struct.
_LENT: dict[int, tuple[Any, ...]] = {}

#: DLDataTypeCode by NumPy's kind, and by name where NumPy has none.
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_NAMED = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}


class Loan:
    """A device frame for a backend that takes memory by DLPack.

    Parameters
    ----------
    frame : DeviceFrame
    dtype : dtype
    shape : sequence of int
    device : int
        The GPU's number, of those that this process sees.

    Notes
    -----
    Copies: none. What is made of it has to be copied and let go of: see the module's docstring.
    """

    def __init__(
        self, frame: DeviceFrame, dtype: np.dtype[Any], shape: Sequence[int], device: int
    ) -> None:
        self._frame = frame
        self._dtype = dtype
        self._shape = tuple(shape)
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE_TYPE, self._device

    def __dlpack__(self, **options: Any) -> Any:
        """Return a new capsule; what it points to lives until its receiver is done with it."""
        shape = (ctypes.c_int64 * len(self._shape))(*self._shape)
        code = _NAMED.get(self._dtype.name)
        managed = _Managed()
        tensor = managed.dl_tensor
        tensor.data = self._frame.address
        tensor.device = _Device(*self.__dlpack_device__())
        tensor.ndim = len(self._shape)
        tensor.dtype = _DataType(
            _CODES[self._dtype.kind] if code is None else code, 8 * self._dtype.itemsize, 1
        )
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        managed.deleter = _give_back
        key = ctypes.addressof(managed)
        _LENT[key] = managed, shape, self._frame
        return _new(key, _NAME, _never_taken)


@_Deleter  # type: ignore[untyped-decorator]
def _give_back(managed: Any) -> None:
    _LENT.pop(ctypes.addressof(managed.contents), None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _never_taken(capsule: int) -> None:
    if _is_valid(capsule, _NAME):  # who takes it gives it another name
        _LENT.pop(_pointer(capsule, _NAME), None)


def address_in(capsule: Any) -> int | None:
    """Return where the tensor in a capsule lies, which keeps it; None if not in a GPU's memory."""
    tensor = _Managed.from_address(_pointer(id(capsule), _NAME)).dl_tensor
    if tensor.device.device_type != DEVICE_TYPE:
        return None
    return int(tensor.data or 0) + int(tensor.byte_offset)
