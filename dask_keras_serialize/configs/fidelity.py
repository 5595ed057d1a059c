"""Says whether Keras's config carries a model whole, and if not, what it would lose.

Keras's own configs lose things silently. We choose the config, which is portable and
runs no foreign code, only for a model about which nothing is known that its config
leaves out; every other model goes by value. When in doubt the answer is no: by value
is less portable, but takes what it finds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends, private
from dask_keras_serialize.configs.fields import MOST_DEEP
from dask_keras_serialize.configs.layerwise import layer_loss, model_classes, model_loss
from dask_keras_serialize.configs.likeness import (
    FUNCTIONS,
    attribute_lost,
    keras_finds,
)
from dask_keras_serialize.limits import arguments, kinds, operations, symbols, vetting
from dask_keras_serialize.limits.arguments import SPARE
from dask_keras_serialize.rebuilding.aside import aside
from dask_keras_serialize.wire.frames import LARGE
from dask_keras_serialize.wire.header import ITEMSIZE


def loss_by_config(
    model: keras.Model, config: Mapping[str, Any], text: str, compile_config: Any
) -> str | None:
    """Name the first thing that the config of a model would lose.

    Parameters
    ----------
    model : keras.Model
    config : dict
        ``keras.saving.serialize_keras_object(model)``, without what compiled it.
    text : str
        It as JSON; empty if it is no plain data.
    compile_config : dict or None

    Returns
    -------
    str or None
        What would be lost, for logs and errors; None if the config is faithful.

    Notes
    -----
    Copies: none; variables are not read. Costs about a tenth of making the config.
    """
    if type(model) not in model_classes():
        return f"{type(model).__qualname__} is a subclass of Model, with Python state of its own"
    if _only_keras(text):
        foreign = _foreign([compile_config], asked=sum(map(int, _COUNTED.findall(text))))
    else:
        foreign = _foreign([config, compile_config])
    foreign = foreign or symbols.found_by_name(compile_config) or symbols.registered_in(text)
    if foreign:
        return foreign
    layers = list(private.flatten_layers(model))
    policies = (each.dtype_policy for each in layers if isinstance(each, keras.Model))
    if any(policy != model.dtype_policy for policy in policies):
        return "a model inside it has another dtype policy"
    if sum(map(_features, layers)) > arguments.MOST_FEATURES:
        return "its Normalization keeps one number for more features than a receiver takes"
    backend = backends.current()[1]
    added = (backend.no_config_holds(each) for each in (model, *layers))
    reasons = (_shared(model), *map(layer_loss, layers), model_loss(model), *added)
    for reason in reasons:
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


def _only_keras(text: str) -> bool:
    """Say whether a config, as Keras writes it, names classes of Keras's alone; if in doubt, no.

    In JSON no quote inside a string stands unescaped, so that none can look like these keys.
    """
    ours, own_names = (sum(1 for _ in each.finditer(text)) for each in (_OF_KERAS, _OWN_NAMES))
    named, registered = (text.count(f'"{key}": ') for key in ("class_name", "registered_name"))
    if not 0 < named == ours or registered != own_names or OPERATIONS in text:
        return False
    return _NUMBERED.search(text) is None and not kinds.may_be_unlike(text)


_OF_KERAS = re.compile(
    r'''"module": "keras(?:\.\w+)*", "class_name": "[A-Za-z]|"class_name": "__keras_tensor__"'''
)
#: Arguments that receivers look at, of five figures or more; see :func:`arguments.costly`.
_NUMBERED = re.compile(
    rf'"(?:{"|".join((*arguments.COUNTS, arguments.CLASSES))})": \d{{5}}|"vocabulary": \['
    rf'|"stateful": true|"class_name": "{arguments.STACKED}"'
)
#: The same, whatever they are.
_COUNTED = re.compile(rf'"(?:{"|".join(arguments.COUNTS)})": (\d+)')
#: The modules of operations, at whose arguments receivers look, too.
OPERATIONS = '"module": "keras.src.ops.'
_OWN_NAMES = re.compile(r'"registered_name": (?:null|"Functional"|"Sequential")')


def _foreign(config: Any, asked: float = 0) -> str | None:
    """Say what in a config is not Keras's own, or asks for more than receivers take of one.

    ``asked`` is what has been asked for without it.
    """
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            name = node.get("class_name")
            if name is not None and "config" in node:
                if name == "__lambda__":
                    return "a lambda is not Keras's own"
                if name == "function" and not symbols.finds_function(
                    node.get("module"), node["config"]
                ):
                    return f"function {node['config']!r} is not Keras's own"
                if name == "__bytes__":
                    return "a name in bytes is not a config's"  # lookups are not told that they are
                registered = node.get("registered_name")
                own = symbols.of_keras(node.get("module")) and registered in (None, "", name)
                if (
                    name != "function"
                    and not str(name).startswith("__")
                    and not (own or symbols.is_listed(node.get("module")))
                ):
                    return f"class {name!r} is not Keras's own"
                if much := arguments.costly(str(name), node["config"]):
                    return much
                asked += arguments.asked(node["config"])
                keras_class = name != "function" and symbols.of_keras(node.get("module"))
                if keras_class and (unlike := vetting.unlike_keras(node)):
                    return unlike
                if operations.is_operation(node) and "name" not in node["config"]:
                    return f"the name of {name} is not in its config"
            node = node.values()
        waiting += [each for each in node if isinstance(each, (dict, list, tuple))]
    return arguments.too_much(asked)


def _features(layer: keras.Layer) -> int:
    """Return of how many features a Normalization keeps a mean that it was told."""
    told = isinstance(layer, keras.layers.Normalization) and layer.input_mean is not None
    return math.prod(getattr(layer.mean, "shape", ())) if told and layer.built else 0


def _shared(model: keras.Model) -> str | None:
    """Find a layer or variable reached through two parents: a config makes two of it."""
    layers = [model, *private.flatten_layers(model)]
    owned = [v for layer in layers for v in private.own(layer) if not _is_wrapped(layer, v)]
    if len({id(v) for v in owned}) < len(owned):
        return "two of its layers share a variable"
    seen: set[int] = set()
    parents = [model]
    while parents:
        parent = parents.pop()
        layers = list(parent._flatten_layers(include_self=False, recursive=False))
        for value in vars(parent).values() if layers else ():
            if isinstance(value, (list, tuple)):
                held = [id(each) for each in value if isinstance(each, keras.Layer)]
                if len(set(held)) < len(held):
                    return f"{parent.name!r} holds a layer twice"
        for layer in layers:
            if id(layer) in seen:
                return f"layer {layer.name!r} is shared across levels of nesting"
            seen.add(id(layer))
            parents.append(layer)
    return None


def _is_wrapped(layer: keras.Layer, variable: keras.Variable) -> bool:
    """Say whether a variable is that of the layer in a SpectralNormalization, which keeps it."""
    wraps = isinstance(layer, keras.layers.SpectralNormalization)
    return wraps and variable is getattr(layer, "kernel", None)


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
            if isinstance(value, np.number):  # totals are rounded otherwise with Python's
                return f"{key} has numbers of NumPy's"
            if isinstance(value, FUNCTIONS) and not keras_finds(value):
                return f"{key} {getattr(value, '__name__', value)!r} is not Keras's own"
            if hasattr(value, "get_config"):
                with aside():
                    lost = attribute_lost(value)
                if lost:
                    return f"the config of {key} {type(value).__name__!r} loses {lost!r}"
    sent = {id(variable) for variable in model.metrics_variables}
    metrics = (each for each in given if isinstance(each, keras.Metric))
    unsent = [v for metric in metrics for v in metric.variables if id(v) not in sent]
    most = SPARE + len(model.variables), max(LARGE, sum(map(_nbytes, model.variables)))
    if len(unsent) > most[0] or sum(map(_nbytes, unsent)) > most[1]:
        return "its metrics are large, and not built"
    return None


def _nbytes(variable: keras.Variable) -> int:
    return int(math.prod(variable.shape)) * ITEMSIZE.get(variable.dtype, 1)


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


def _plain(value: Any, depth: int = 0) -> bool:
    """Say whether JSON gives back the same, no deeper than receivers take it."""
    if depth > MOST_DEEP:
        return False
    if isinstance(value, dict):
        return all(type(k) is str and _plain(v, depth + 1) for k, v in value.items())
    if type(value) is list:
        return all(_plain(each, depth + 1) for each in value)
    return value is None or type(value) in (bool, int, float, str)
