"""Says whether Keras's config carries a model whole, and if not, what it would lose.

Keras's own configs lose things silently. We choose the config, which is portable and
runs no foreign code, only for a model about which nothing is known that its config
leaves out; every other model goes by value. When in doubt the answer is no: by value
is never wrong, only less portable.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import private

#: Attributes that Keras sets on its objects from outside their classes.
_SET_FROM_OUTSIDE = frozenset({"history", "stop_training", "_keras_mask", "train_function"})

#: Layers of Keras's own whose state or code a config cannot carry.
_NEVER_BY_CONFIG = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")


def loss_by_config(model: keras.Model, config: Mapping[str, Any]) -> str | None:
    """Name the first thing that the config of a model would lose.

    Parameters
    ----------
    model : keras.Model
    config : dict
        ``keras.saving.serialize_keras_object(model)``.

    Returns
    -------
    str or None
        What would be lost, for logs and errors; None if the config is faithful.

    Notes
    -----
    Copies: none; variables are not read. Costs about a tenth of making the config.
    """
    if type(model) not in (keras.Sequential, keras.Model, _functional()):
        return f"{type(model).__qualname__} is a subclass of Model, with Python state of its own"
    foreign = next(_foreign(config), None)
    if foreign:
        return f"{foreign} is not Keras's own"
    layers = list(private.flatten_layers(model))
    for reason in (_shared(model), *map(_layer_loss, layers), _extra(model)):
        if reason:
            return str(reason)
    if model.compiled:
        return _compile_loss(model)
    return None


def history_of(model: keras.Model) -> dict[str, Any] | None:
    """Return what ``fit`` left in ``model.history``, if it is plain data.

    Raises
    ------
    ValueError
        If there is a history that is not plain data, or not Keras's History.
    """
    history = vars(model).get("history")
    if history is None:
        return None
    state = {k: v for k, v in vars(history).items() if k in ("history", "epoch", "params")}
    if type(history) is not keras.callbacks.History or not _plain(state):
        raise ValueError("model.history is not plain data")
    return state


def _functional() -> type:
    return type(_empty_functional())


@functools.cache
def _empty_functional() -> keras.Model:
    inputs = keras.Input((1,))
    return keras.Model(inputs, inputs)


def _foreign(config: Any) -> Iterator[str]:
    """Yield the names of classes and functions in a config that are not Keras's."""
    if isinstance(config, Mapping):
        name = config.get("class_name")
        if name is not None and "config" in config:
            module = config.get("module")
            registered = config.get("registered_name")
            if name == "__lambda__":
                yield "a lambda"
            elif name == "function":
                if module != "builtins" and not _of_keras(module):
                    yield f"function {config['config']!r}"
            elif not str(name).startswith("__") and (
                not _of_keras(module) or (registered and registered != name)
            ):
                yield f"class {name!r}"
        for value in config.values():
            yield from _foreign(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _foreign(value)


def _of_keras(module: object) -> bool:
    return isinstance(module, str) and module.partition(".")[0] == "keras"


def _shared(model: keras.Model) -> str | None:
    """Find a layer or variable reached through two parents: a config makes two of it."""
    owned = [v for layer in [model, *private.flatten_layers(model)] for v in private.own(layer)]
    if len({id(v) for v in owned}) < len(owned):
        return "two of its layers share a variable"
    seen: set[int] = set()
    parents = [model]
    while parents:
        parent = parents.pop()
        for layer in parent._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                return f"layer {layer.name!r} is shared across levels of nesting"
            seen.add(id(layer))
            parents.append(layer)
    return None


def _layer_loss(layer: keras.Layer) -> str | None:
    where = f"layer {layer.name!r}"
    if type(layer).__name__ in _NEVER_BY_CONFIG:
        return f"{where} is a {type(layer).__name__}, which holds code"
    if isinstance(layer, keras.Model):
        if type(layer) not in (keras.Sequential, keras.Model, _functional()):
            return f"{where} is a subclass of Model"
        if layer.compiled:
            return f"{where} is a compiled model inside a model"
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return f"{where} is quantized or carries LoRA factors"
    if getattr(layer, "stateful", False):
        return f"{where} is stateful"
    return _extra(layer)


def _extra(layer: keras.Layer) -> str | None:
    """Find attributes that no method of the layer's class sets."""
    extra = vars(layer).keys() - _stored_names(layer.__class__) - _SET_FROM_OUTSIDE
    if extra:
        return f"attribute {min(extra)!r} was set on {layer.name!r} from outside"
    return None


@functools.cache
def _stored_names(cls: Any) -> frozenset[str]:
    """Collect every name that the methods of a class and its bases assign to."""
    names: set[str] = set()
    for base in cls.__mro__:
        for member in vars(base).values():
            for function in _functions(member):
                names.update(_stores(function.__code__))
    return frozenset(names)


def _functions(member: Any) -> Iterator[types.FunctionType]:
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    candidates: Iterable[Any] = (member,)
    if isinstance(member, property):
        candidates = (member.fget, member.fset)
    for candidate in candidates:
        while candidate is not None:  # decorated with functools.wraps
            if isinstance(candidate, types.FunctionType):
                yield candidate
            candidate = getattr(candidate, "__wrapped__", None)


def _stores(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _stores(constant)


def _compile_loss(model: keras.Model) -> str | None:
    try:
        arguments = private.compile_arguments(model)
    except AttributeError:
        return "the arguments of compile() are not known"
    optimizer = model.optimizer
    if optimizer is None:
        return "it is compiled without an optimizer"
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if arguments["optimizer"] not in (optimizer, inner):
        return "its optimizer is not the one it was compiled with"
    if optimizer.built and [id(v) for v in private.trained_variables(optimizer)] != [
        id(v) for v in model.trainable_variables
    ]:
        return "its optimizer was built for other variables than are trainable now"
    for key in ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics"):
        for value in _leaves(arguments[key]):
            if hasattr(value, "get_config"):
                lost = _attribute_lost(value)
                if lost:
                    return f"the config of {key} {type(value).__name__!r} loses {lost!r}"
    try:
        history_of(model)
    except ValueError as error:
        return str(error)
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _attribute_lost(value: Any) -> str | None:
    """Rebuild a small object from its config and compare what it remembers."""
    twin = type(value).from_config(value.get_config())
    ours: dict[str, Any] = vars(value)
    theirs: dict[str, Any] = vars(twin)
    for name in sorted(ours.keys() | theirs.keys()):
        if not name.startswith(_PROGRESS) and not _alike(ours.get(name), theirs.get(name), depth=4):
            return name
    return None


#: Attributes, by how they begin, that say how far an object has come, which its
#: variables carry; and what Keras and TensorFlow keep to find those.
_PROGRESS = (
    "built",
    "_built",
    "_exclude_from_weight_decay_cache",
    "_self_",
    "_tracker",
    "_trainable_variables_indices",
)


def _alike(a: Any, b: Any, depth: int) -> bool:
    """Compare remembered values; what holds variables only is the table's business."""
    if _holds_variables(a) or _holds_variables(b):
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k], depth) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, (types.FunctionType, type, str, int, float, complex, bytes, set, frozenset)):
        return bool(a is b or a == b)
    if hasattr(a, "__dict__"):
        names = vars(a).keys() | vars(b).keys()
        return depth > 0 and all(_alike(vars(a).get(k), vars(b).get(k), depth - 1) for k in names)
    return bool(a == b)


def _holds_variables(value: Any) -> bool:
    if isinstance(value, keras.Variable):
        return True
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_holds_variables, value))
    return False


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and _plain(v) for k, v in value.items())
    if type(value) is list:
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)
