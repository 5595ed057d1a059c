"""What a config may ask for: all of it is looked at before Keras builds anything.

Keras builds what a config names: up to 3.8 out of any module, which it imports (CVE-2025-1550);
later out of its own alone, with ways to call what is no layer (CVE-2025-8747, CVE-2025-9906), to
load code (CVE-2025-49655) or to read files (CVE-2025-12058) that were closed one by one. A sender
of this package sends by config only what is Keras's own and holds no code (``fidelity.py``), so
whoever asks for more is not to be trusted, and gets nothing of what it asked for.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import keras

from dask_keras_serialize.configs import skew
from dask_keras_serialize.configs.fields import FIELDS
from dask_keras_serialize.configs.layerwise import (
    ABSTRACT,
    NEVER_BY_CONFIG,
    RUN_FOR_SHAPES,
    RUN_THEIR_ARGUMENTS,
    UNREADABLE,
    model_classes,
)
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits import arguments, calls, kinds, names, operations
from dask_keras_serialize.limits.kinds import DATA, NUMBERS
from dask_keras_serialize.limits.symbols import (
    finds_function,
    found_by_name,
    is_listed,
    of_keras,
    symbol,
)
from dask_keras_serialize.wire.header import FORMAT, ITEMSIZE, Header

#: Where in arguments strings are no names of classes: Keras looks none of them up.
_NO_NAMES = ("name", "vocabulary", "input_layers", "output_layers")

#: It calls its ``optimizer_map`` on each variable (``keras/src/optimizers/multi_optimizer.py``).
_CALLING_THEIR_ARGUMENTS = ("MultiOptimizer",)

#: Names that Keras registers its own classes under.
_OWN_NAMES = (None, "Functional", "Sequential")


class Vetted(NamedTuple):
    """A config that may be built.

    Attributes
    ----------
    config : dict
        As it was sent, less what is not used and unknown here; the receiver's to change.
    classes : dict of str to type
        Those of the user's own modules in it, by the names Keras looks them up by.
    nodes : int
        How many objects it names, and calls.
    """

    config: dict[str, Any]
    classes: dict[str, type]
    nodes: int


def read(text: Any, header: Header) -> Vetted:
    """Read a config, trusting nothing.

    Parameters
    ----------
    text : str
        JSON, as ``by_config.dump`` wrote it.
    header : Header
        Of the object that it is of.

    Raises
    ------
    DecodeError
        If it is no config of this package, or names anything that this process would have to
        import, call or read for it: a class or function that is not Keras's own, nor in a module
        that the setting ``dask-keras-serialize.modules`` lists; a layer that holds code; a file.

    Notes
    -----
    Runs nothing; imports nothing but modules that the setting lists.
    """
    problem = f"{header.owner}: its config cannot be rebuilt here"
    try:
        config, named = names.objects(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DecodeError(f"{problem}, it is malformed: {error!r}; send it again") from None
    for key, fits in FIELDS.items():
        if not isinstance(config, dict) or not fits(config.get(key, ...)):
            raise DecodeError(f"{problem}, it is malformed at {key!r}; send it again")
    classes: dict[str, type] = {}
    called = calls.Calls()
    asked: float = 0
    is_newer = skew.is_newer(header)
    ending = f"; {skew.named(header) if is_newer else 'send it by value'}"
    if reason := names.too_costly(config, named, (each.path for each in header.variables)):
        raise DecodeError(f"{problem}: {reason}{ending}")
    if reason := _is_no_policy(config["policy"]) or found_by_name(
        [config["policy"], config["compile"]]
    ):
        raise DecodeError(f"{problem}: {reason}{ending}")
    for node in named:
        try:
            reason = _refusal(node, called) or names.twice(node["config"])
            asked += arguments.asked(node["config"])
        except RecursionError as error:
            raise DecodeError(f"{problem}, it is malformed: {error!r}; send it again") from None
        if reason := reason or arguments.too_much(asked):
            raise DecodeError(f"{problem}: {reason}{ending}")
        if is_newer and isinstance(node["config"], dict):
            cls = symbol(node.get("module"), node["class_name"])
            if isinstance(cls, type):
                skew.leave_out_unused(cls, node["config"])
    if reason := arguments.too_large(config["model"], (each.shape for each in header.variables)):
        raise DecodeError(f"{problem}: {reason}{ending}")
    # to look at the user's own may be to import them: when all else may be built
    for node in named:
        if is_listed(node.get("module")) and (reason := _user_class(node, classes)):
            raise DecodeError(f"{problem}: {reason}{ending}")
        if _is_operation(symbol(node.get("module"), node["class_name"])):
            operations.restore_tuples(node)
    objects = sum(node["class_name"] not in DATA | NUMBERS for node in named)
    return Vetted(config, classes, objects + called.made)


def _refusal(node: dict[str, Any], called: calls.Calls) -> str | None:
    """Say why what a node of a config names must not be built; of the user's, but for the class."""
    name, module, inner = node["class_name"], node.get("module"), node["config"]
    registered = node.get("registered_name")
    if not isinstance(name, str) or not isinstance(registered, str | None):
        return f"{name!r} is no name of a class"
    if reason := called.refusal(node):
        return reason
    if name in DATA:
        return None
    # which Keras would take before its own
    if reason := found_by_name([name, registered, inner if isinstance(inner, str) else None]):
        return reason
    if name in NUMBERS:
        dtype = inner.get("dtype") if isinstance(inner, dict) else None
        known = isinstance(dtype, str) and dtype in ITEMSIZE
        return None if known else f"it holds numbers of dtype {dtype!r}"
    if name == "function":
        known = finds_function(module, inner)
        return None if known else f"the function {inner!r} of {module!r} is not Keras's own"
    if name.startswith("__"):
        return f"it holds a {name.strip('_')}, which is code"
    if node.get("compile_config"):
        return f"{name} is compiled inside a model"
    reason = called.read_too_often(inner) or _registered_here(node)
    reason = reason or arguments.costly(name, inner)
    if reason or is_listed(module):
        return reason
    cls = symbol(module, name)
    bases = (*_KINDS, keras.dtype_policies.DTypePolicyMap)
    if not isinstance(cls, type) or not issubclass(cls, bases) or not of_keras(cls.__module__):
        return (
            f"{name!r} of {module!r} is not a class of Keras's own, nor of a module that the "
            f"setting {FORMAT}.modules lists"
        )
    if registered not in _OWN_NAMES and registered != name:
        return f"{name!r} is registered as {registered!r}"
    if issubclass(cls, _HOLDING_CODE):
        return f"{name} holds code"
    if issubclass(cls, _RUN_FOR_SHAPES) or cls.__name__ in ABSTRACT:
        return f"{name} would be run for its shapes"
    if reason := unlike_keras(node):
        return reason
    if issubclass(cls, keras.Model) and cls not in model_classes():
        return f"{name} is a subclass of Model"
    return _is_no_map(inner) if cls is keras.dtype_policies.DTypePolicyMap else None


def unlike_keras(node: dict[str, Any]) -> str | None:
    """Say why a class of Keras's own is not made from such a config; its sender asks, too."""
    name, inner = node["class_name"], node["config"]
    cls = symbol(node.get("module"), name)
    if not _is_operation(cls):
        if getattr(cls, "__name__", name) in _CALLING_THEIR_ARGUMENTS:
            return f"{name} would call what it is given on the model's variables"
        of_kind = isinstance(cls, type) and issubclass(cls, keras.Initializer)
        lists = kinds.OF_INITIALIZERS if of_kind else kinds.LISTS
        return kinds.unlike(name, inner, node.get("build_config"), lists)
    if cls.__name__ in RUN_THEIR_ARGUMENTS:
        return f"{name} would be run for its shapes"
    if cls.__name__ in UNREADABLE:
        return f"Keras itself cannot read the config of {name}"
    return operations.not_of_operations(name, inner)


def _is_operation(cls: Any) -> bool:
    """Say whether something is a class of ``keras.ops``, and no layer."""
    is_class = isinstance(cls, type) and issubclass(cls, keras.Operation)
    return is_class and not issubclass(cls, keras.Layer)


def _is_no_policy(value: object) -> str | None:
    """Say what is not a dtype policy where there has to be one."""
    if value is None or isinstance(value, str):
        return None
    node: dict[str, Any] = value if isinstance(value, dict) else {}
    cls = symbol(node.get("module"), str(node.get("class_name")))
    is_policy = isinstance(cls, type) and issubclass(cls, keras.DTypePolicy)
    if is_policy and isinstance(node.get("config"), dict):
        return None
    return f"{str(value)[:60]!r} is no dtype policy"


def _is_no_map(inner: object) -> str | None:
    """Say what in the config of a map is not a dtype policy; a map in it is looked at by itself."""
    settings: dict[str, Any] = inner if isinstance(inner, dict) else {}
    policies = settings.get("policy_map") or {}
    if not isinstance(policies, dict):
        return f"{str(policies)[:60]!r} is no map of dtype policies"
    found = map(_is_no_policy, (settings.get("default_policy"), *policies.values()))
    return next(filter(None, found), None)


def _registered_here(node: dict[str, Any]) -> str | None:
    """Say which string in a node of a config Keras would look up, as :func:`found_by_name`."""
    inner = node["config"]
    settings = inner if isinstance(inner, dict) else {}
    names_only = {key for key in _NO_NAMES if key != "name" or isinstance(settings.get(key), str)}
    looked_up = [value for key, value in settings.items() if key not in names_only]
    looked_up += [node.get("inbound_nodes"), node.get("build_config")]
    return found_by_name([*looked_up, inner if settings is not inner else None])


def _user_class(node: dict[str, Any], classes: dict[str, type]) -> str | None:
    """Import and collect a class of a module that the user lists; say why not."""
    module, name = str(node["module"]), node["class_name"]
    registered = node.get("registered_name")
    if name == "function" or name in DATA | NUMBERS:
        return None
    try:
        cls: Any = importlib.import_module(module)
        for part in name.split("."):
            cls = vars(cls)[part]
            if not isinstance(cls, type):  # another module, say, which would lead out of this one
                break
    except (Exception, SystemExit) as error:  # a module is anybody's code
        return f"{name!r} of {module!r} is not there: {error!r}"
    of_kinds = isinstance(cls, type) and issubclass(cls, _KINDS)
    if not of_kinds or not is_listed(cls.__module__):
        return f"{name!r} of {module!r} is not a class of Keras's kinds, made there"
    if issubclass(cls, _HOLDING_CODE):
        return f"{name!r} holds code"
    key = keras.saving.get_registered_name(cls)
    if registered not in (None, name, key):
        return f"{name!r} is registered as {registered!r}"
    if classes.setdefault(key, cls) is not cls:
        return f"two classes {key!r}: register them by names of their own"
    return None


#: What is built from configs: the bases of Keras's own, and of the user's.
_KINDS: tuple[type, ...] = (
    keras.Operation,
    keras.Loss,
    keras.Metric,
    keras.Optimizer,
    keras.Initializer,
    keras.Regularizer,
    keras.constraints.Constraint,
    keras.DTypePolicy,
    keras.optimizers.schedules.LearningRateSchedule,
)


#: Of Keras's layers, which some backends have not all.
_HOLDING_CODE, _RUN_FOR_SHAPES = (
    tuple(
        getattr(where, each)
        for where in (keras.layers, keras.utils)
        for each in listed
        if hasattr(where, each)
    )
    for listed in (NEVER_BY_CONFIG, RUN_FOR_SHAPES)
)
