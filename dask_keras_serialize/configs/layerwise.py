"""What the config of a layer would lose: code, values, attributes, what it shares."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import private
from dask_keras_serialize.configs.likeness import argument_lost, keras_finds, kind
from dask_keras_serialize.limits import calls
from dask_keras_serialize.rebuilding.aside import aside

#: Attributes that Keras sets on its objects from outside their classes.
_SET_FROM_OUTSIDE = frozenset({"history", "stop_training", "_keras_mask", "train_function"})

#: Layers of Keras's own whose state or code a config cannot carry.
NEVER_BY_CONFIG = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")

#: Layers whose shapes Keras knows by running them, with all that they hold, whatever that costs: a
#: receiver of a config does not, for who sent it may mean ill.
RUN_FOR_SHAPES = ("Pipeline", "FeatureSpace")

#: Keras's own that compute nothing but in a subclass: called, they fail, on torch only after Keras
#: has made ones of their input's shape (``compute_output_spec`` in ``keras/src/backend/torch``).
ABSTRACT = (
    *("Operation", "Layer", "Wrapper", "DataLayer", "TFDataLayer"),
    "BaseImagePreprocessingLayer",
)

#: Operations whose shapes Keras knows by running what they are given (``keras/src/ops/core.py``).
RUN_THEIR_ARGUMENTS = (
    *("AssociativeScan", "Cond", "ForiLoop", "Map", "Scan", "Switch", "VectorizedMap", "WhileLoop"),
    "JVP",
)

#: Layers and operations that cannot be made from what their ``get_config`` writes: RandomShear's
#: factors are from -0.3 to 0.3 where 0.3 was given
#: (``preprocessing/image_preprocessing/random_shear.py``), the pools add a list to a tuple
#: (``keras/src/ops/nn.py``).
UNREADABLE = ("RandomShear", "AdaptiveAveragePool", "AdaptiveMaxPool")


def layer_loss(layer: keras.Layer) -> str | None:
    """Name the first thing that the config of a layer inside a model would lose."""
    where = f"layer {layer.name!r}"
    if type(layer).__name__ in NEVER_BY_CONFIG:
        return f"{where} is a {type(layer).__name__}, which holds code"
    if type(layer).__name__ in RUN_FOR_SHAPES:
        return f"{where} is a {type(layer).__name__}, which Keras runs to know its shapes"
    if type(layer).__name__ in ABSTRACT and type(layer).__module__.startswith("keras."):
        return f"{where} is a {type(layer).__name__}, which computes nothing of its own"
    if type(layer).__name__ in UNREADABLE:
        return f"{where} is a {type(layer).__name__}, whose config Keras itself cannot read"
    if isinstance(layer, keras.Model):
        if type(layer) not in model_classes():
            return f"{where} is a subclass of Model"
        if layer.compiled:
            return f"{where} is a compiled model inside a model"
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return f"{where} is quantized or carries LoRA factors"
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        # in which it finds policies by paths, and those are others in a rebuild
        return f"{where} has a map of dtype policies"
    if getattr(layer, "stateful", False):
        return f"{where} is stateful"
    if isinstance(layer, private.LOOKUPS):
        if layer.output_mode == "tf_idf" or isinstance(layer.input_vocabulary, str):
            return f"{where} has document frequencies, or its vocabulary in a file of this machine"
        # Keras cannot read the empty file of a table without any
        if not int(layer.lookup_table.size()) or getattr(layer, "encoding", "utf-8") != "utf-8":
            return f"{where} has no vocabulary yet, or encodes it in another way than UTF-8"
    lost = _value_lost(layer) or _variable_lost(layer)
    if lost:
        return f"{where} has a value of {lost!r} that its config does not hold"
    return _extra(layer)


#: Attributes of layers that may be set and that no config holds.
_PLAIN_ATTRIBUTES = (
    "supports_masking",
    "autocast",
    "supports_jit",
    "_convert_input_args",
    "_allow_non_tensor_positional_args",
)


#: Keras's layers that an argument has support masks, or not.
_MASKING = (keras.layers.Embedding, getattr(keras.layers, "ReversibleEmbedding", None))


def _variable_lost(layer: keras.Layer) -> str | None:
    """Name what was set on a layer's variables, or adapted by hand, that no config holds."""
    for variable in private.own(layer):
        extra = vars(variable).keys() - _variable_attributes()
        if variable.overwrite_with_gradient or any(not n.startswith("_self_") for n in extra):
            return f"{variable.name} itself"
    if isinstance(layer, keras.layers.Normalization) and layer.built and layer.input_mean is None:
        for adapted, used in (("adapt_mean", "mean"), ("adapt_variance", "variance")):
            ours: Any = getattr(layer, adapted, None)
            theirs: Any = getattr(layer, used, None)
            if ours is None or theirs is None:
                continue
            ours, theirs = (keras.ops.convert_to_numpy(each) for each in (ours, theirs))
            if not np.array_equal(ours.ravel(), theirs.ravel()):
                return used
    summary = getattr(layer, "summary", None)  # Discretization's, of what it was shown
    if isinstance(summary, np.ndarray) and summary.size:
        return "summary"
    return None


@functools.cache
def _variable_attributes() -> frozenset[str]:
    with aside():
        return frozenset(vars(keras.Variable(0.0)))


def _value_lost(layer: keras.Layer) -> str | None:
    """Name an attribute whose value the config leaves out or tells by its name alone."""
    if isinstance(layer, keras.layers.InputLayer):
        return None
    twin = _twin(layer.__class__)
    for name in _PLAIN_ATTRIBUTES:
        default = getattr(twin, name, None)
        if name == "supports_masking" and layer.__class__ in _MASKING:
            default = layer.mask_zero
        if twin is not None and getattr(layer, name) != default:
            return str(name)
    rules, unused = set(), set()  # regularizers and constraints of variables, by id
    for name, value in vars(layer).items():
        sort = kind(value.__class__)
        if sort == "plain":
            # as an argument of a call, see below; in float32 it is the same
            if isinstance(value, np.floating) and layer.compute_dtype != "float32":
                return f"{name}, a number of NumPy's,"
            continue
        if sort == "function":
            if name not in private.WRAPPED and not keras_finds(value):
                return str(name)
            continue
        if isinstance(value, keras.random.SeedGenerator):
            # its state is sent beside the config; but on torch dropout asks whether it was given a
            # seed (``keras/src/backend/torch/random.py``), which Keras 3.11's attention forgets
            seeded = getattr(layer, "dropout", 0) and value.get_config()["seed"] is not None
            if seeded and "seed" not in layer.get_config():
                return f"{name}.seed"
        elif lost := argument_lost(value):
            return f"{name}.{lost}"
        if isinstance(value, keras.Initializer) and not isinstance(
            getattr(value, "seed", 0), (int, type(None))
        ):
            return f"{name}.seed"
        if name.endswith(("_regularizer", "_constraint")) and name != "activity_regularizer":
            rules.add(id(value))
            if getattr(layer, name.strip("_").rpartition("_")[0], value) is None:
                unused.add(id(value))  # as of the bias that is left out
    if layer.built:
        used = {id(rule) for v in private.own(layer) for rule in (v.regularizer, v.constraint)}
        # layers in it have others, made of the same config
        unused |= rules if any(True for _ in private.flatten_layers(layer)) else set()
        if not rules - unused <= used <= rules | {id(None)}:
            return "regularizer or constraint"
    return argument_lost(layer) or _structure_lost(layer)


def _structure_lost(layer: keras.Layer) -> str | None:
    """Name what of a functional model's nest holds tuples, which a config makes lists.

    Or dicts that are none there, or have other keys: Keras finds inputs and outputs by their
    order, and sorts a dict's (``keras.tree``). Or that it is called on a number of NumPy's, which
    a config makes one of Python's: that takes the dtype of what it is added to. Or on an array
    without numbers, whose shape a list does not tell. Or that a Sequential is built but for its
    layers, as ``add(rebuild=False)`` leaves it.
    """
    is_built = isinstance(layer, keras.Sequential) and layer.built
    if is_built and not all(each.built for each in layer.layers):
        return "layer that was never built"
    for name in ("_inputs_struct", "_outputs_struct"):
        if not _is_of_json(vars(layer).get(name), sequences=(list,)):
            return name
    for _, node in private.nodes(private.function_of(layer)):
        # Keras itself reads a call's tuples as lists
        if not _is_of_json([*node.arguments.args, node.arguments.kwargs], sequences=(list, tuple)):
            return "dict that it is called on"
        for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs)):
            if isinstance(value, keras.KerasTensor):
                continue
            if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim):
                return f"{value.dtype} number"
            if 0 in tuple(getattr(value, "shape", ()))[:-1]:
                return "empty array"
    return None


def _is_of_json(nest: Any, sequences: tuple[type, ...]) -> bool:
    """Say whether JSON keeps what lists and dicts, one in the other, are, and their order."""
    waiting = [nest]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if type(value) is not dict or not all(isinstance(key, str) for key in value):
                return False
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            if not isinstance(value, sequences):
                return False
            waiting += value
    return True


def model_loss(model: keras.Model) -> str | None:
    """Name the first thing of the model itself, as a layer, that its config would lose."""
    if extra := _extra(model):
        return extra
    for name in ("stop_training", "stop_evaluating", "stop_predicting"):
        if vars(model).get(name) and not model.compiled:
            return f"its {name} is not in its config"
    if called := calls.lost(model):
        return called
    lost = _variable_lost(model) or _structure_lost(model)
    if lost or not model.supports_jit:
        return f"its {lost or 'supports_jit'} is not in its config"
    return None


@functools.cache
def _twin(cls: Any) -> Any:
    """Make the plainest instance of a layer's class, or None; says how it is by default."""
    with aside():
        for arguments in ((), (1,), ((1,),), (1, 1)):
            try:
                return cls(*arguments, name="twin")
            except Exception:  # another number of arguments, or of another kind
                continue
    return None


def _extra(layer: keras.Layer) -> str | None:
    """Find attributes that no method of the layer's class sets."""
    extra = _set_from_outside(layer.__class__, tuple(vars(layer)))
    return f"attribute {extra!r} was set on {layer.name!r} from outside" if extra else None


@functools.lru_cache(1024)
def _set_from_outside(cls: type, names: tuple[str, ...]) -> str | None:
    # torch's modules set some by their names
    known = _stored_names(cls) | _SET_FROM_OUTSIDE | vars(_twin(keras.Layer)).keys()
    return min(set(names) - known, default=None)


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


@functools.cache
def model_classes() -> tuple[type, ...]:
    """Return the classes of models that go by config; Keras does not export the functional one."""
    with aside():
        inputs = keras.Input((1,))
        # older versions want a layer between (3.13: keras/src/ops/function.py)
        functional = type(keras.Model(inputs, keras.layers.Identity()(inputs)))
    return keras.Sequential, keras.Model, functional
