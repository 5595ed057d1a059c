"""Says whether Keras's config carries a model whole, and if not, what it would lose.

Keras's own configs lose things silently. We choose the config, which is portable and
runs no foreign code, only for a model about which nothing is known that its config
leaves out; every other model goes by value. When in doubt the answer is no: by value
is less portable, but takes what it finds.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from dask_keras_serialize import private
from dask_keras_serialize.likeness import (
    FUNCTIONS,
    argument_lost,
    attribute_lost,
    keras_finds,
    kind,
)

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
    foreign = _foreign(config)
    if foreign:
        return f"{foreign} is not Keras's own"
    layers = list(private.flatten_layers(model))
    policies = (each.dtype_policy for each in layers if isinstance(each, keras.Model))
    if any(policy != model.dtype_policy for policy in policies):
        return "a model inside it has another dtype policy"
    for reason in (_shared(model), *map(_layer_loss, layers), _extra(model)):
        if reason:
            return str(reason)
    if model.compiled and (lost := _compile_loss(model)):
        return lost
    try:
        history_of(model)
    except ValueError as error:
        return str(error)
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


def _foreign(config: Any) -> str | None:
    """Name a class in a config that is not Keras's own."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            name = node.get("class_name")
            if name is not None and "config" in node:
                if name == "__lambda__":
                    return "a lambda"
                registered = node.get("registered_name")
                if (
                    name != "function"
                    and not str(name).startswith("__")
                    and (not _of_keras(node.get("module")) or (registered and registered != name))
                ):
                    return f"class {name!r}"
            node = node.values()
        waiting += [each for each in node if isinstance(each, (dict, list, tuple))]
    return None


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
    if isinstance(layer, private.LOOKUPS) and (
        layer.output_mode == "tf_idf" or isinstance(layer.input_vocabulary, str)
    ):
        return f"{where} has document frequencies, or its vocabulary in a file of this machine"
    lost = _value_lost(layer)
    if lost:
        return f"{where} has a value of {lost!r} that its config does not hold"
    return _extra(layer)


def _value_lost(layer: keras.Layer) -> str | None:
    """Name an attribute whose value the config leaves out or tells by its name alone."""
    if isinstance(layer, keras.layers.InputLayer):
        return None
    twin = _twin(layer.__class__)
    for name in ("supports_masking", "autocast"):
        if twin is not None and getattr(layer, name) != getattr(twin, name):
            return str(name)
    rules = set()  # regularizers and constraints of variables, by id
    for name, value in vars(layer).items():
        sort = kind(value.__class__)
        if sort == "plain":
            continue
        if sort == "function":
            if name not in _WRAPPED and not keras_finds(value):
                return str(name)
            continue
        if lost := argument_lost(value):
            return f"{name}.{lost}"
        if name.endswith(("_regularizer", "_constraint")) and name != "activity_regularizer":
            rules.add(id(value))
    if layer.built:
        used = {id(rule) for v in private.own(layer) for rule in (v.regularizer, v.constraint)}
        if used - {id(None)} != rules:
            return "regularizer or constraint"
    return argument_lost(layer)


#: Methods that Layer.__new__ wraps for each instance (keras/src/layers/layer.py).
_WRAPPED = ("build", "quantize")


@functools.cache
def _twin(cls: Any) -> Any:
    """Make the plainest instance of a layer's class, or None; says how it is by default."""
    for arguments in ((), (1,), ((1,),), (1, 1)):
        try:
            return cls(*arguments, name="twin")  # a name, or Keras would count it
        except Exception:  # another number of arguments, or of another kind
            continue
    return None


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
    rate = getattr(inner, "_learning_rate", None)
    if isinstance(rate, keras.Variable) and rate.dtype != keras.config.floatx():
        return "its optimizer was made under another floatx than is set now"
    if optimizer.built and [id(v) for v in private.trained_variables(optimizer)] != [
        id(v) for v in model.trainable_variables
    ]:
        return "its optimizer was built for other variables than are trainable now"
    given: list[Any] = []
    for key in ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics"):
        for value in leaves(arguments[key]):
            if isinstance(value, keras.Metric) and any(value is other for other in given):
                return f"metric {value.name!r} is given twice"
            given.append(value)
            if isinstance(value, FUNCTIONS) and not keras_finds(value):
                return f"{key} {getattr(value, '__name__', value)!r} is not Keras's own"
            if hasattr(value, "get_config"):
                lost = attribute_lost(value)
                if lost:
                    return f"the config of {key} {type(value).__name__!r} loses {lost!r}"
    return None


def leaves(value: Any) -> Iterator[Any]:
    """Yield what an argument of ``compile`` holds, in order, whatever its structure."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and _plain(v) for k, v in value.items())
    if type(value) is list:
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)
