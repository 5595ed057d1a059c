"""Everything private of Keras that we touch, in one place.

Each entry of :data:`KERAS` names what is touched, the upstream file, and what we do
if it is gone. ``tests/test_private.py`` fails, naming the entry, when upstream moves.
What is private of distributed is listed in :mod:`dask_keras_serialize.registration`,
which alone touches it; of TensorFlow, in its adapter.
"""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import keras

#: What of Keras's own classes was not found; then nothing goes by value.
MISSING: list[str] = []


def _find(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        MISSING.append(f"{module}.{name}")
        return type(name, (), {})  # of which nothing is an instance


Function = _find("keras.src.ops.function", "Function")
Node = _find("keras.src.ops.node", "Node")
KerasHistory = _find("keras.src.ops.node", "KerasHistory")
KerasSaveable = _find("keras.src.saving.keras_saveable", "KerasSaveable")
Tracker = _find("keras.src.utils.tracking", "Tracker")
DynamicBackend = _find("keras.src.utils.backend_utils", "DynamicBackend")

#: Keras's containers that watch what is put into them.
TRACKED = tuple(
    _find("keras.src.utils.tracking", name)
    for name in ("TrackedList", "TrackedDict", "TrackedOrderedDict", "TrackedSet")
    # which came with Keras 3.14
    if name != "TrackedOrderedDict" or hasattr(import_module(Tracker.__module__), name)
)


def _public(module: str, pattern: str) -> list[type]:
    """Find classes that not every version of Keras that we support has."""
    found = vars(getattr(keras, module, None) or object).items()
    return [cls for name, cls in found if re.fullmatch(pattern, name) and isinstance(cls, type)]


#: What errors call an object, by the first of its bases found here: all that Keras's
#: users hold. Layer and Model stand before KerasSaveable, the base of most.
CITIZENS: dict[type, str] = {
    keras.Model: "model",
    keras.Layer: "layer",
    keras.Optimizer: "optimizer",
    keras.Metric: "metric",
    keras.Loss: "loss",
    keras.Variable: "variable",
    keras.KerasTensor: "symbolic tensor",
    keras.Initializer: "initializer",
    keras.Regularizer: "regularizer",
    keras.constraints.Constraint: "constraint",
    keras.Quantizer: "quantizer",
    keras.optimizers.schedules.LearningRateSchedule: "schedule",
    keras.DTypePolicy: "dtype policy",
    keras.random.SeedGenerator: "seed generator",
    keras.callbacks.Callback: "callback",
    KerasSaveable: "operation",
    **dict.fromkeys(_public("wrappers", "SKLearn.*"), "estimator"),
    **dict.fromkeys(_public("optimizers", "OptimizerMap"), "optimizer map"),
    **dict.fromkeys(_public("quantizers", "QuantizationConfig"), "quantization config"),
    **dict.fromkeys(_public("distillation", ".*Distillation.*"), "distillation loss"),
}

#: Classes whose instances become shells when an object goes by value.
SHELLS: tuple[type, ...] = (*CITIZENS, Node, Tracker, *TRACKED)

_NOT_BY_CONFIG = "encoding by config is not chosen"
_NOT_BY_VALUE = "encoding by value is refused"

_VARIABLES = "keras/src/backend/common/variables.py"
_OPTIMIZER = "keras/src/optimizers/base_optimizer.py"

KERAS = {
    "Variable._initialize_with_initializer": (
        _VARIABLES,
        "values are assigned after the rebuild instead of given at creation (slower)",
    ),
    "Variable._initialize": (_VARIABLES, "as above; decoding by value fails"),
    "Variable._shape": (_VARIABLES, "its shape is asked (slower)"),
    "Functional.get_config": ("keras/src/models/functional.py", "configs are copied (slower)"),
    "Variable._path": (_VARIABLES, "replicas' variables keep the paths of the rebuild"),
    "Layer._flatten_layers": ("keras/src/layers/layer.py", "layers are walked by model.layers"),
    "Layer._trainable_variables": ("keras/src/layers/layer.py", _NOT_BY_CONFIG),
    "Layer._non_trainable_variables": ("keras/src/layers/layer.py", _NOT_BY_CONFIG),
    "Layer._seed_generators": ("keras/src/layers/layer.py", _NOT_BY_CONFIG),
    "Layer.__new__": ("keras/src/layers/layer.py", "layers by value are made by it (slower)"),
    "remat.get_current_remat_mode": ("keras/src/backend/common/remat.py", "clones take a scope"),
    "Layer._losses": ("keras/src/layers/layer.py", "nothing: it is a cache"),
    "inject_functional_model_class": (
        "keras/src/models/model.py",
        "functional subclasses fail by value in a process that has made none",
    ),
    "Sequential._functional": ("keras/src/models/sequential.py", "nothing pickled with it shares"),
    "Function._outputs_struct": ("keras/src/ops/function.py", _NOT_BY_CONFIG),
    "Operation._inbound_nodes": ("keras/src/ops/operation.py", "functional models fail by value"),
    "Operation._outbound_nodes": ("keras/src/ops/operation.py", "as _inbound_nodes"),
    "KerasTensor._keras_history": ("keras/src/ops/node.py", "functional models fail by value"),
    "KerasHistory": ("keras/src/ops/node.py", _NOT_BY_VALUE),
    "Function._operations": ("keras/src/ops/function.py", "functional models fail by value"),
    "Function._run_through_graph": ("keras/src/ops/function.py", "data in calls may take long"),
    "Function._nodes": ("keras/src/ops/function.py", "functional models fail by value"),
    "Trainer._compile_config": ("keras/src/trainers/trainer.py", _NOT_BY_CONFIG),
    "Trainer._compile_metrics": ("keras/src/trainers/trainer.py", _NOT_BY_CONFIG),
    "Trainer._loss_tracker": ("keras/src/trainers/trainer.py", "replicas are refilled later"),
    "Trainer._compile_loss": ("keras/src/trainers/trainer.py", _NOT_BY_CONFIG),
    "CompileMetrics._flat_metrics": ("keras/src/trainers/compile_utils.py", _NOT_BY_CONFIG),
    "CompileMetrics._flat_weighted_metrics": ("as _flat_metrics", _NOT_BY_CONFIG),
    "Optimizer._trainable_variables": (_OPTIMIZER, _NOT_BY_CONFIG),
    "Optimizer._learning_rate": (_OPTIMIZER, "it is not compared"),
    "Optimizer._var_key": (_OPTIMIZER, "built ones fail by value"),
    "Optimizer._trainable_variables_indices": (_OPTIMIZER, "nothing: it is derived"),
    "RandomInitializer._init_seed": (
        "keras/src/initializers/random_initializers.py",
        "replicas of unbuilt layers start from other random values",
    ),
    "Layer._path": ("keras/src/layers/layer.py", "layers keep the paths of the rebuild"),
    "global_state.object_name_uids": (
        "keras/src/utils/naming.py",
        "sending an object may use up names of layers",
    ),
    "global_state.GLOBAL_STATE_TRACKER": (
        "keras/src/backend/common/global_state.py",
        "workers refuse to be placed with a dtype policy",
    ),
    "global_state.get_global_attribute": (
        "keras/src/backend/common/global_state.py",
        "a thread that receives a model keeps the dtype policy it had",
    ),
    "config.floatx": (
        "keras/src/backend/config.py",
        "while a model of another floatx is rebuilt, all threads have that",
    ),
    "MultiOptimizer._var_to_optimizer_idx": (
        "keras/src/optimizers/multi_optimizer.py",
        "built ones fail by value",
    ),
    "TFSMLayer._reloaded_obj": ("keras/src/export/tfsm_layer.py", "such layers fail by value"),
    "seed_generator.python_random": (
        "keras/src/random/seed_generator.py",
        "a rebuild draws from Python's global random numbers",
    ),
    "IndexLookup.lookup_table": (
        "keras/src/layers/preprocessing/index_lookup.py",
        "tables fail by value",
    ),
    "KerasSaveable": ("keras/src/saving/keras_saveable.py", _NOT_BY_VALUE),
    "Node": ("keras/src/ops/node.py", _NOT_BY_VALUE),
    "Tracker": ("keras/src/utils/tracking.py", _NOT_BY_VALUE),
    "Function": ("keras/src/ops/function.py", _NOT_BY_VALUE),
    "TrackedList": ("keras/src/utils/tracking.py", _NOT_BY_VALUE),
    "CallbackList._executor": (
        "keras/src/callbacks/callback_list.py",
        "lists of callbacks fail by value while a model trains",
    ),
    "in_symbolic_scope": (
        "keras/src/backend/common/symbolic_scope.py",
        "torch runs layers of configs on data, as large as they say, to know their shapes",
    ),
    "ALL_OBJECTS_DICT": (
        "keras/src/activations/__init__.py",
        "functions of Keras's are known by the names it gives them in public alone",
    ),
    "DynamicBackend": ("keras/src/utils/backend_utils.py", _NOT_BY_VALUE),
}

State = dict[str, Any]

#: Methods that ``Layer.__new__`` wraps for each instance, and what else it leaves there.
WRAPPED = frozenset({"build", "quantize"})
MADE = WRAPPED | {"_tracker", "_lock", "_auto_config", "_self_setattr_tracking", "_layers"}
MADE |= {"_trainable_variables", "_non_trainable_variables", "_metrics", "_seed_generators"}

#: Layers that hold a table of TensorFlow's, which nothing can pickle.
LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)


@functools.cache
def functions(registry: str) -> dict[str, Any]:
    """Return the functions that Keras finds by name; its ``get`` would make objects of classes."""
    module = sys.modules.get(f"keras.src.{registry}")
    objects = getattr(module, "ALL_OBJECTS_DICT", None) or vars(getattr(keras, registry))
    public = ("get", "serialize", "deserialize")
    return {
        name: each
        for name, each in objects.items()
        if isinstance(name, str) and isinstance(each, types.FunctionType) and name not in public
    }


def in_symbolic_scope() -> bool:
    """Say whether Keras runs something in this thread for its shapes alone."""
    scope = sys.modules.get("keras.src.backend.common.symbolic_scope")
    return bool(getattr(scope, "in_symbolic_scope", lambda: False)())


def feeds_at_creation() -> bool:
    """Say whether variables can be given their value as they are created."""
    return hasattr(keras.Variable, "_initialize_with_initializer") and hasattr(
        keras.Variable, "_initialize"
    )


def make_functional(cls: Any) -> None:
    """Make a subclass of Model a subclass of Functional, as its first instance would."""
    if not issubclass(cls, Function):
        inject = import_module("keras.src.models.model").inject_functional_model_class
        inject(cls)


def describe(obj: Any) -> str:
    """Say what an object is called in errors, such as ``"layer 'dense' (my.Dense)"``."""
    kind = next((kind for cls, kind in CITIZENS.items() if isinstance(obj, cls)), "object")
    name = f" {name_of(obj)!r}" if name_of(obj) else ""
    return f"{kind}{name} ({full_name(type(obj))})"


def name_of(obj: Any) -> str:
    """Return an object's own name, or an empty string."""
    name = getattr(obj, "name", "")
    return name if isinstance(name, str) else ""


def full_name(cls: Any) -> str:
    """Return the name of a class or function, with its module's."""
    return f"{cls.__module__}.{cls.__qualname__}"


def flatten_layers(model: keras.Layer) -> Iterator[keras.Layer]:
    """Yield the model's layers at every depth, each once, itself left out."""
    if hasattr(model, "_flatten_layers"):
        yield from model._flatten_layers(include_self=False, recursive=True)
        return
    found: dict[int, keras.Layer] = {}
    waiting = list(model.layers)
    while waiting:
        layer = waiting.pop(0)
        if found.setdefault(id(layer), layer) is layer:
            waiting = [*getattr(layer, "layers", ()), *waiting]
    yield from found.values()


def function_of(layer: keras.Layer) -> Any:
    """Return the function inside a functional or Sequential model, or None."""
    function = getattr(layer, "_functional", layer)
    return function if isinstance(function, Function) else None


def nodes(function: Any) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield the nodes of a function's graph by operation and order of calls."""
    for operation in getattr(function, "_operations", ()):
        keys = enumerate(operation._inbound_nodes)
        ours = [node for i, node in keys if f"{id(operation)}_ib-{i}" in function._nodes]
        for i, node in enumerate(ours):
            yield (operation.name, i), node


def unseeded(layers: Sequence[keras.Layer]) -> Iterator[tuple[int, str, Any]]:
    """Yield initializers that drew their own seed: place and attribute of the layer, and it."""
    for i, layer in enumerate(layers):
        for name, value in vars(layer).items():
            if isinstance(value, keras.Initializer) and getattr(value, "_init_seed", 0) is None:
                yield i, name, value


def own(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables a layer holds itself, seeds among them, sublayers' not."""
    seeds = [generator.state for generator in layer._seed_generators]
    return [*layer._trainable_variables, *layer._non_trainable_variables, *seeds]


def watched_items(container: Any) -> list[Any]:
    """Return what is in one of Keras's containers, keys too; nothing of anything else."""
    if not isinstance(container, TRACKED):
        return []
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Return the arguments ``compile`` was called with, as objects."""
    arguments: dict[str, Any] = model._compile_config.config
    return arguments


def assigns_in_build(optimizer: keras.optimizers.Optimizer) -> bool:
    """Say whether building an optimizer changes slots that it made, as ScheduleFreeAdamW's does."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    builds = (vars(cls).get("build") for cls in type(inner).__mro__)
    return any("assign" in build.__code__.co_names for build in builds if build is not None)


def trained_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the variables an optimizer was built for."""
    return list(getattr(optimizer, "inner_optimizer", optimizer)._trainable_variables)


def resolved_metrics(model: keras.Model) -> list[list[str]] | None:
    """Return the classes Keras chose for compiled metrics, None while they are not built.

    Names in order, the metrics' then the weighted metrics', one list for each output.
    """
    compiled = model._compile_metrics
    if compiled is None or not compiled.built:
        return None
    return [
        [type(metric).__name__ for metric in entry.metrics] if entry else []
        for entry in [*compiled._flat_metrics, *compiled._flat_weighted_metrics]
    ]


def built_by_runs(model: keras.Model) -> list[Any]:
    """Return what ``compile`` made, and the first batch builds: metrics, losses, their mean."""
    names = ("_loss_tracker", "_compile_metrics", "_compile_loss")
    return [part for name in names if (part := getattr(model, name, None)) is not None]


def counts_losses(model: keras.Model) -> bool:
    """Say whether the compiled losses hold counters of their own (several outputs)."""
    loss = model._compile_loss
    return bool(loss is not None and loss.built and loss.metrics)


def build_metrics(model: keras.Model, y_true: Any, y_pred: Any) -> None:
    """Create the compiled metrics' variables, as the first batch would."""
    model._compile_metrics.build(y_true, y_pred)


def build_losses(model: keras.Model, y_true: Any, y_pred: Any) -> None:
    """Create the compiled losses' counters, as the first batch would."""
    model._compile_loss.build(y_true, y_pred)


def reduce_backend(obj: Any) -> tuple[Any, ...]:
    """Reduce the backend that augmentation layers hold, which looks itself up for ever."""
    return type(obj), () if obj._backend == keras.backend.backend() else (obj._backend,)
