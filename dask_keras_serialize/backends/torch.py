"""PyTorch: tensors are updated in place, so memory is shared until one of the two writes.

PyTorch can do that itself: ``Tensor._lazy_clone()`` shares a storage whose first writer
takes a copy (``c10/core/impl/COW.h``). It is private, as is ``torch._C._data_address``, which
tells where such a tensor lies without taking the copy: without them every byte is copied.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary, ref

import keras
import ml_dtypes
import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from dask_keras_serialize.backends import Array, behind, tensor_of

#: dtypes numpy lacks, as (same-sized dtype both have, ml_dtypes' dtype)
_BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
_DTYPES = {np.dtype(there): (bits, here) for here, (bits, there) in _BITS.items()}


#: Whether this PyTorch can share memory until it is written to.
LAZY = hasattr(torch.Tensor, "_lazy_clone") and hasattr(torch._C, "_data_address")


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
    tensor = variable.value.detach()
    raw = np.asarray(_Memory(_own_view(tensor)))
    return raw.view(_numpy_dtype(tensor.dtype)).reshape(tuple(tensor.shape))


def _own_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that nobody writes to, of the same content, contiguous, on the host."""
    with _WRITES:  # or an update under way in another thread would show, or half of it
        if LAZY and tensor.device.type == "cpu" and tensor.is_contiguous():
            try:
                return tensor._lazy_clone()
            except RuntimeError:  # memory that it did not allocate cannot change hands
                pass
        return tensor.to("cpu", copy=True).contiguous()


#: Held by who writes to variables, and who takes a view of one.
_WRITES = threading.RLock()


def placement(variable: Any) -> list[int] | None:
    """Say in which order a value's axes lie in memory; None if as they are.

    Some initializers transpose, and sums of a transposed kernel are rounded otherwise.
    """
    value = variable.value
    if value.is_contiguous():
        return None
    order = sorted(range(value.dim()), key=lambda axis: -value.stride(axis))
    return order if value.permute(order).is_contiguous() else None


def place(tensor: torch.Tensor, placement: list[int]) -> torch.Tensor:
    """Lay a tensor out so; one copy."""
    back = sorted(range(len(placement)), key=placement.__getitem__)
    return tensor.permute(placement).contiguous().permute(back)


def no_config_holds(layer: Any) -> str | None:
    """Say what was done to a layer as to a module of torch's: hooks, buffers, frozen tensors."""
    attributes = vars(layer)
    for name in _MODULE:
        if attributes.get(name):
            return f"layer {layer.name!r} has {name.strip('_')} of torch's"
    own = (*layer._trainable_variables, *layer._non_trainable_variables)
    frozen = next((v for v in own if _learns(v) not in (None, v.trainable)), None)
    return f"variable {frozen.path!r} has another requires_grad" if frozen is not None else None


#: Where torch's modules keep what users register with them.
_MODULE = [
    name for name, value in vars(torch.nn.Module()).items() if isinstance(value, (dict, set))
]
_MODULE.remove("_modules")  # that is where Keras's layers are


def _learns(variable: Any) -> bool | None:
    """Return a value's requires_grad; None where there is none to set."""
    value = variable._value
    floating = value is not None and (value.is_floating_point() or value.is_complex())
    return bool(value.requires_grad) if floating else None


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

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        with _WRITES if kwargs.get(unless) is not False else contextlib.nullcontext():
            return original(*args, **kwargs)

    return method


class _Memory:
    """A tensor's memory as bytes, for NumPy; keeps the tensor."""

    def __init__(self, tensor: torch.Tensor, writeable: bool = False) -> None:
        self.tensor = tensor
        address = torch._C._data_address(tensor) if LAZY else tensor.data_ptr()
        self.__array_interface__ = {
            "version": 3,
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (address, not writeable),
        }


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    bits = _BITS.get(dtype)
    known: np.dtype[Any] = (
        np.dtype(bits[1]) if bits is not None else torch.empty(0, dtype=dtype).numpy().dtype
    )
    return known


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
        In host memory.

    Notes
    -----
    Copies: none of a writeable array, and none of a view of a tensor of this process, until
    one of the two is written to; else one.
    """
    shared = _tensor_behind(array)
    if shared is not None:
        return shared
    if not array.flags.writeable:
        array = array.copy()  # training would write to what is read-only
    if array.dtype in _DTYPES:
        bits, dtype = _DTYPES[array.dtype]
        width = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]
        return torch.from_numpy(array.view(width)).view(bits).view(dtype)
    return torch.from_numpy(array)


def tensor_in(array: Array, memory: Array) -> torch.Tensor:
    """Turn an array into a tensor; others in the same memory share it with this one.

    Notes
    -----
    Copies: none if ``memory`` is writeable, which is given away.
    """
    if not memory.flags.writeable:
        return tensor(array)
    like = tensor(np.empty(0, array.dtype))
    size = array.itemsize
    offset = array.ctypes.data - memory.ctypes.data if array.size else 0
    steps = [step // size for step in array.strides]
    storage = torch.from_numpy(memory).untyped_storage()
    return like.set_(storage, offset // size, array.shape, steps)


def _tensor_behind(array: Array) -> torch.Tensor | None:
    """Return a tensor that shares the memory that :func:`view` gave as this array."""
    base = behind(array, _Memory)
    if base is None or not LAZY or base.tensor.nbytes != array.nbytes:
        return None
    if _numpy_dtype(base.tensor.dtype) != array.dtype:
        return None
    return _own_view(base.tensor).reshape(array.shape)


def version() -> str:
    """Return PyTorch's version."""
    return str(torch.__version__)


STRINGS = False

#: ``keras/src/backend/torch/trainer.py`` refuses others.
ONE_STEP = True

#: None: torch and distributed pickle tensors themselves, out of band.
TENSORS: tuple[type, ...] = ()

REDUCED: tuple[type, ...] = (torch.nn.Parameter, torch.Tensor)

SHELLS: tuple[type, ...] = ()


def shell(cls: type) -> Any:
    """Never called: there are no classes in SHELLS."""
    raise TypeError(cls)


def reduce(obj: Any) -> tuple[Any, ...] | None:
    """Reduce a parameter of a user's module that is a variable's value to that variable's.

    And plain tensors to what every backend can make one of, without a copy; and dtypes.
    """
    if type(obj) is torch.dtype:  # pickled by name alone, which no other backend could find
        return dtype_of, (str(obj).rpartition(".")[2],)
    if type(obj) is torch.Tensor:
        return _reduce_tensor(obj) if LAZY and _is_plain(obj) else None
    owner = _OWNERS.get(obj) if isinstance(obj, torch.nn.Parameter) else None
    variable = owner() if owner is not None else None
    if variable is None or variable._value is not obj:
        return None
    return _value_of, (variable,)


def dtype_of(name: str) -> Any:
    """Return a dtype by its name."""
    return getattr(torch, name)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is no more than numbers in memory."""
    return (
        tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not (tensor.is_meta or vars(tensor))
    )


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    tensor = tensor.cpu()
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    where = torch._C._data_address(whole), whole.nbytes
    memory = _MEMORIES.get(where)
    if memory is None or not np.array_equal(memory, np.asarray(_Memory(whole))):
        memory = _MEMORIES[where] = np.asarray(_Memory(_own_view(whole), writeable=True))
    size = tensor.element_size()
    strides = tuple(size * step for step in tensor.stride())
    dtype = _numpy_dtype(tensor.dtype).name
    return tensor_of, (memory, dtype, tuple(tensor.shape), strides, size * tensor.storage_offset())


#: Arrays of the memory of tensors on their way out, by where it is: tensors that share theirs
#: travel with the same array, for as long as nobody writes to it.
_MEMORIES: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()

#: Variables by the parameters of modules in a TorchModuleWrapper, which they share.
_OWNERS: Any = WeakIdKeyDictionary()


def _value_of(variable: Any) -> torch.nn.Parameter:
    """Return a variable's value; one that is not filled yet gets an empty one."""
    value = vars(variable).get("_value")
    if value is None:
        value = variable.__dict__["_value"] = torch.nn.Parameter(torch.empty(0))
    parameter: torch.nn.Parameter = value
    return parameter


def initialize(variable: Any, tensor: torch.Tensor) -> None:
    """Give a new variable its value; one that a module has already got is filled."""
    shared = vars(variable).get("_value")
    variable._initialize(tensor)
    if shared is not None:
        shared.data, shared.requires_grad = variable._value.data, variable._value.requires_grad
        variable._value = shared


def drop(obj: Any, state: dict[str, Any]) -> None:
    """Leave out what torch's modules list of a layer's variables by themselves."""
    if isinstance(obj, keras.Variable) and _learns(obj) not in (None, obj.trainable):
        state[_LEARNS] = _learns(obj)
    if isinstance(obj, keras.layers.TorchModuleWrapper):
        for variable in obj.variables:
            _OWNERS[variable._value] = ref(variable)
    if isinstance(obj, torch.nn.Module):
        modules = dict(state.get("_modules", ()))
        # among the attributes where a __setattr__ of its own goes past torch's, as KerasHub's
        if any(part.pop(_PARAMETERS, None) is not None for part in (modules, state)):
            state |= {"_modules": modules, _LISTED: True}


def mend(obj: Any, state: dict[str, Any]) -> None:
    """List a layer's variables again (``keras/src/backend/torch/layer.py``)."""
    if isinstance(obj, keras.Variable) and _LEARNS in vars(obj):
        obj._value.requires_grad_(vars(obj).pop(_LEARNS))
    if isinstance(obj, torch.nn.Module) and vars(obj).pop(_LISTED, False):
        obj._track_variables()


def adopt(obj: Any) -> None:
    """Keep modules where torch's modules keep them."""
    if isinstance(obj, torch.nn.Module):
        for name, value in list(vars(obj).items()):
            if isinstance(value, torch.nn.Module):
                obj._modules[name] = obj.__dict__.pop(name)


_PARAMETERS = "_torch_params"
_LISTED = "variables listed by torch"
_LEARNS = "requires_grad"
