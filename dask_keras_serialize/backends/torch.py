"""PyTorch: tensors are updated in place, so memory is shared until one of the two writes.

PyTorch can do that itself: ``Tensor._lazy_clone()`` shares a storage whose first writer
takes a copy (``c10/core/impl/COW.h``). It is private, as is ``torch._C._data_address``, which
tells where such a tensor lies without taking the copy: without them every byte is copied.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial, wraps
from typing import Any
from weakref import WeakValueDictionary

import keras
import numpy as np
import torch

from dask_keras_serialize.backends import Array, behind, borrowed, tensor_of
from dask_keras_serialize.backends.torch_memory import LAZY, Memory, numpy_dtype, tensor_on
from dask_keras_serialize.backends.torch_memory import as_array as _as_array
from dask_keras_serialize.backends.torch_objects import SHELLS as SHELLS
from dask_keras_serialize.backends.torch_objects import adopt as adopt
from dask_keras_serialize.backends.torch_objects import creating as creating
from dask_keras_serialize.backends.torch_objects import drop as drop
from dask_keras_serialize.backends.torch_objects import initialize as initialize
from dask_keras_serialize.backends.torch_objects import is_plain, owner_of, value_of
from dask_keras_serialize.backends.torch_objects import mend as mend
from dask_keras_serialize.backends.torch_objects import no_config_holds as no_config_holds
from dask_keras_serialize.backends.torch_objects import place as place
from dask_keras_serialize.backends.torch_objects import placement as placement
from dask_keras_serialize.backends.torch_objects import shell as shell
from dask_keras_serialize.wire.cuda import DeviceFrame

try:
    from keras.src.backend.torch.core import get_device
except ImportError:  # then Keras moves what is made here

    def get_device() -> str:
        """Say that values are made on the host."""
        return "cpu"


def view(variable: Any) -> Array:
    """View a variable's value.

    Parameters
    ----------
    variable : keras.Variable
        On any device.

    Returns
    -------
    ndarray
        Read-only, of the variable's shape and dtype. Later training does not show: the
        first to write to the tensor takes memory of its own.

    Notes
    -----
    Copies: none for a tensor in host memory that PyTorch allocated; else one, as for one that
    adopted the memory it was received in.
    """
    return views([variable])[0]


def views(variables: Sequence[Any]) -> list[Array]:
    """View several; copies from a GPU are under way together, into memory pinned for them."""
    return _fetched([variable.value.detach() for variable in variables])


def _fetched(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """Return arrays of tensors' content, on the host, once all of it has arrived there."""
    here = [_own_view(tensor) for tensor in tensors]
    _wait_for(tensors)
    return [_as_array(tensor) for tensor in here]


def _wait_for(tensors: Sequence[torch.Tensor]) -> None:
    """Wait until GPUs are done with what this thread has asked of them."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _own_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that nobody writes to, of the same content, contiguous, on the host.

    From a GPU it may still be under way: :func:`_wait_for` it.
    """
    with WRITES:  # or an update under way in another thread would show, or half of it
        if LAZY and _on_cpu(tensor) and tensor.is_contiguous():
            try:
                return tensor._lazy_clone()
            except RuntimeError:  # memory that it did not allocate cannot change hands
                pass
        if _on_cpu(tensor):
            return tensor.clone(memory_format=torch.contiguous_format)
        tensor = tensor.contiguous()
        if tensor.is_cuda:
            with contextlib.suppress(RuntimeError):  # no more memory can be pinned
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                return host.copy_(tensor, non_blocking=True)
        return tensor.to("cpu")


def _on_cpu(tensor: torch.Tensor) -> bool:
    return bool(tensor.device.type == "cpu")


#: Held by who writes to variables, and who takes a view of one.
WRITES = threading.RLock()


def slots() -> Iterator[tuple[Any, str, Any]]:
    """Yield what of Keras's writes to variables, taking turns with views."""
    for base, name in ((keras.Optimizer, "apply"), (keras.Variable, "assign")):
        cls = next(cls for cls in base.__mro__ if name in vars(cls))
        yield cls, name, _writing(vars(cls)[name])
    # whose forward writes to buffers, such as the averages of BatchNorm
    wrapper = keras.layers.TorchModuleWrapper
    yield wrapper, "call", _writing(vars(wrapper)["call"], unless="training")


def _writing(original: Any, unless: str = "") -> Any:
    """Wrap a method that writes, unless an argument is False."""

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        with WRITES if kwargs.get(unless) is not False else contextlib.nullcontext():
            return original(*args, **kwargs)

    return method


def tensor(array: Array) -> torch.Tensor:
    """Turn an array into a tensor; ``torch.nn.Parameter(tensor)`` then takes its memory over.

    Parameters
    ----------
    array : ndarray
        Any shape and dtype that ``header.ITEMSIZE`` names. A writeable one is the
        caller's to give away: from now on training writes to it.

    Returns
    -------
    torch.Tensor
        Where Keras puts new variables.

    Notes
    -----
    Copies: none of a writeable array, and none of a view of a tensor of this process, until
    one of the two is written to; else one. To another device one, out of the array itself.
    """
    device = _device()
    if device is not None:
        return tensor_on(borrowed(array)).to(device)
    return _on_host(array)


def _device() -> torch.device | None:
    """Return where Keras puts new variables; None for the host's memory."""
    name = get_device()
    device = None if name == "cpu" else torch.device(name)
    return None if device is None or device.type == "cpu" else device


def _on_host(array: Array) -> torch.Tensor:
    shared = _tensor_behind(array)
    if shared is not None:
        return shared
    return tensor_on(array if array.flags.writeable else array.copy())  # training writes to it


def lost(array: Array) -> str | None:
    """Return None: a tensor holds an array's numbers."""
    return None


def tensor_in(array: Array, memory: Array) -> torch.Tensor:
    """Turn an array into a tensor; others in the same memory share it with this one.

    Notes
    -----
    Copies: none if ``memory`` is writeable, which is given away.
    """
    if not memory.flags.writeable:
        return _on_host(array)
    like = tensor_on(np.empty(0, array.dtype))
    size = array.itemsize
    offset = array.ctypes.data - memory.ctypes.data if array.size else 0
    steps = [step // size for step in array.strides]
    storage = torch.from_numpy(memory).untyped_storage()
    return like.set_(storage, offset // size, array.shape, steps)


def _tensor_behind(array: Array) -> torch.Tensor | None:
    """Return a tensor that shares the memory that :func:`view` gave as this array."""
    base = behind(array, Memory)
    if base is None or not LAZY or base.tensor.nbytes != array.nbytes:
        return None
    if numpy_dtype(base.tensor.dtype) != array.dtype:
        return None
    return _own_view(base.tensor).reshape(array.shape)


def on_gpu(variable: Any) -> bool:
    """Say whether a variable lies on a GPU."""
    return bool(variable._value is not None and variable._value.is_cuda)


def device_frames(variables: Sequence[Any]) -> list[DeviceFrame | None]:
    """Take snapshots of values where they are.

    Notes
    -----
    Copies: one on the GPU, for training writes to a tensor's memory in place.
    """
    with WRITES:
        clones = [_clone(variable.value.detach()) for variable in variables]
    _wait_for([clone for clone in clones if clone is not None])
    return [
        None if c is None else DeviceFrame(c.data_ptr(), c.nbytes, c, partial(_to_host, c))
        for c in clones
    ]


def _to_host(tensor: torch.Tensor) -> Array:
    return _fetched([tensor])[0]


def _clone(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return tensor.clone(memory_format=torch.contiguous_format)
    except RuntimeError:  # no memory left: it goes by the host
        return None


def device_tensor(
    frame: DeviceFrame, dtype: np.dtype[Any], shape: Sequence[int]
) -> torch.Tensor | None:
    """Turn a device frame into a tensor.

    Notes
    -----
    Copies: none of one that is the receiver's own, which training then writes to; else one, on the
    GPU.
    """
    if not _takes_frames():
        return None
    raw = _adopted(frame if frame.writeable else frame.own())
    if not frame.writeable:
        raw = raw.clone()
        _wait_for([raw])  # before the frame goes
    return raw.view(tensor_on(np.empty(0, dtype)).dtype).reshape(tuple(shape))


def _takes_frames() -> bool:
    return bool(torch.device(get_device()).type == "cuda")


def _adopted(frame: DeviceFrame) -> torch.Tensor:
    return torch.as_tensor(frame, device="cuda")


def version() -> str:
    """Return PyTorch's version."""
    return str(torch.__version__)


STRINGS = False

#: ``keras/src/backend/torch/trainer.py`` refuses others.
ONE_STEP = True

#: None: torch and distributed pickle tensors themselves, out of band.
TENSORS: tuple[type, ...] = ()

REDUCED: tuple[type, ...] = (torch.nn.Parameter, torch.Tensor)


def reduce(obj: Any) -> tuple[Any, ...] | None:
    """Reduce a parameter of a user's module that is a variable's value to that variable's.

    And plain tensors to what every backend can make one of, without a copy; and dtypes.
    """
    if type(obj) is torch.dtype:  # pickled by name alone, which no other backend could find
        return dtype_of, (str(obj).rpartition(".")[2],)
    if type(obj) is torch.Tensor:
        return _reduce_tensor(obj) if LAZY and is_plain(obj) else None
    variable = owner_of(obj)
    return None if variable is None else (value_of, (variable,))


def dtype_of(name: str) -> Any:
    """Return a dtype by its name."""
    return getattr(torch, name)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    tensor = tensor.cpu()
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    where = torch._C._data_address(whole), whole.nbytes
    memory = _MEMORIES.get(where)
    if memory is None or not np.array_equal(memory, np.asarray(Memory(whole))):
        memory = _MEMORIES[where] = np.asarray(Memory(_own_view(whole), writeable=True))
    size = tensor.element_size()
    strides = tuple(size * step for step in tensor.stride())
    dtype = numpy_dtype(tensor.dtype).name
    return tensor_of, (memory, dtype, tuple(tensor.shape), strides, size * tensor.storage_offset())


#: Arrays of the memory of tensors on their way out, by where it is: tensors that share theirs
#: travel with the same array, for as long as nobody writes to it.
_MEMORIES: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()
