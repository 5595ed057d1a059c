"""What PyTorch's modules keep beside the values of Keras's variables.

With this backend a Keras layer is a ``torch.nn.Module``, which lists its parameters, and may have
hooks and buffers; and a module of a user's, in a ``TorchModuleWrapper``, shares its parameters with
the layer's variables. Those values may lie in memory otherwise than in C order. The verbs here
are the adapter's, ``torch.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import keras
import torch
from torch.utils.weak import WeakIdKeyDictionary


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
    """Lay a tensor out so; one copy. ValueError if that is no order of its axes."""
    if sorted(placement) != list(range(tensor.dim())):
        raise ValueError(f"no order of {tensor.dim()} axes")
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


#: Variables by the parameters of modules in a TorchModuleWrapper, which they share.
_OWNERS: Any = WeakIdKeyDictionary()


def value_of(variable: Any) -> torch.nn.Parameter:
    """Return a variable's value; one that is not filled yet gets an empty one."""
    value = vars(variable).get("_value")
    if value is None:
        value = variable.__dict__["_value"] = torch.nn.Parameter(torch.empty(0))
    parameter: torch.nn.Parameter = value
    return parameter


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is no more than numbers in memory."""
    return (
        tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not (tensor.is_meta or vars(tensor))
    )


def owner_of(obj: Any) -> Any:
    """Return the variable whose value a parameter of a user's module is, or None."""
    owner = _OWNERS.get(obj) if isinstance(obj, torch.nn.Parameter) else None
    variable = owner() if owner is not None else None
    return variable if variable is not None and variable._value is obj else None


def creating() -> AbstractContextManager[None]:
    """Do nothing: variables leave nothing behind."""
    return nullcontext()


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

SHELLS: tuple[type, ...] = ()


def shell(cls: type) -> Any:
    """Never called: there are no classes in SHELLS."""
    raise TypeError(cls)
