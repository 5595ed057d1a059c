"""Whether objects remember the same: a config's own memory put to the test.

For losses, metrics, optimizers, initializers and the like, which are cheap to rebuild
and compare, and for what a config cannot be trusted with in any object: functions,
which it names, and constructor arguments, which it may leave out.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import private

#: Callables that Keras writes to a config by their name.
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


@functools.cache
def kind(cls: Any) -> str:
    """Tell values by their class: functions, Keras's configurable objects, all others."""
    if issubclass(cls, FUNCTIONS):
        return "function"
    configurable = hasattr(cls, "get_config") and not issubclass(cls, keras.Layer)
    return "configurable" if configurable else "plain"


def keras_finds(function: Any) -> bool:
    """Say whether Keras finds this very function by its name."""
    return any(found is function for found in functions_named(getattr(function, "__name__", "")))


@functools.lru_cache(256)
def functions_named(name: str) -> tuple[Any, ...]:
    """Return functions of Keras's own that have a name; a cache of functions would keep others."""
    own = (private.functions(registry) for registry in ("activations", "losses", "metrics"))
    return tuple(functions[name] for functions in own if name in functions)


def argument_lost(obj: Any) -> str | None:
    """Name a constructor argument that is no default and that the config does not have."""
    unsaid = _UNSAID.get(obj.__class__)
    if unsaid is None:
        unsaid = _UNSAID[obj.__class__] = _unsaid(obj.__class__, obj)
    for name, default in unsaid:
        for holder in (obj, getattr(obj, "cell", None)):
            attributes = getattr(holder, "__dict__", {})
            for attribute in (name, f"_{name}"):
                if attribute in attributes and not _alike(attributes[attribute], default, depth=1):
                    return name
    return None


#: What :func:`_unsaid` found, by class.
_UNSAID: dict[type, tuple[tuple[str, Any], ...]] = {}


def _unsaid(cls: Any, example: Any) -> tuple[tuple[str, Any], ...]:
    """Collect the arguments of a class, with their defaults, that its config leaves out."""
    try:
        said = {"activity_regularizer", "dtype", *example.get_config()}
        parameters = inspect.signature(inspect.unwrap(cls.__init__)).parameters.values()
    except Exception:  # get_config is anybody's code
        return ()
    return tuple(
        (each.name, each.default)
        for each in parameters
        if each.default is not each.empty
        and each.name not in said
        and not isinstance(getattr(cls, each.name, None), property)
    )


def attribute_lost(value: Any) -> str | None:
    """Rebuild a small object from its config, as that is sent, and compare what it remembers."""
    try:
        sent = json.loads(json.dumps(keras.saving.serialize_keras_object(value)["config"]))
        twin = type(value).from_config(sent)
    except Exception:  # a config that its own class does not take, such as arrays in AUC's
        return "config"
    if isinstance(value, keras.Metric) and _shapes(value) != _shapes(twin):
        return "variables"
    for name in sorted(_settings(value, twin)):
        if not _alike(vars(value).get(name), vars(twin).get(name), depth=4):
            return name
    return None


def _settings(value: Any, twin: Any) -> set[str]:
    """Return the attributes of either that do not say how far it has come."""
    ours: dict[str, Any] = vars(value)
    names = {name for name in ours.keys() | vars(twin).keys() if not name.startswith(_PROGRESS)}
    # slots that building makes, of which this kind has none, or none for any variable (Muon)
    more = ((name, ours[name]) for name in names - vars(twin).keys())
    return names - {
        name
        for name, slots in more
        if isinstance(slots, list) and all(slot is None for slot in slots)
    }


def _shapes(metric: keras.Metric) -> list[tuple[int, ...]]:
    return [tuple(variable.shape) for variable in metric.variables]


#: Attributes, by how they begin, that say how far an object has come, which its
#: variables carry; what Keras and TensorFlow keep to find those; and where it is placed.
_PROGRESS = (
    "built",
    "_built",
    "_distribution_strategy",
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
        inner = isinstance(a, keras.Optimizer)  # another one's
        names = _settings(a, b) if inner else vars(a).keys() | vars(b).keys()
        return depth > 0 and all(_alike(vars(a).get(k), vars(b).get(k), depth - 1) for k in names)
    return bool(a == b)


def _holds_variables(value: Any) -> bool:
    if isinstance(value, keras.Variable):
        return True
    if isinstance(value, (list, tuple)):
        # Muon keeps slots for some of a model's variables, and None in the places of the others
        held = [each for each in value if each is not None]
        return bool(held) and all(map(_holds_variables, held))
    return False
