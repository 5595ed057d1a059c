"""Everything private of Keras that we touch, in one place.

Each entry of :data:`KERAS` names what is touched, the upstream file, and what we do
if it is gone. ``tests/test_private.py`` fails, naming the entry, when upstream moves.
What is private of distributed is listed in :mod:`dask_keras_serialize.registration`,
which alone imports it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.ops.function import Function
from keras.src.ops.node import Node
from keras.src.random import seed_generator
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import tracking
from keras.src.utils.backend_utils import DynamicBackend as DynamicBackend
from keras.src.utils.tracking import Tracker as Tracker

from dask_keras_serialize.errors import EncodeError

KERAS = {
    "Variable._initialize_with_initializer": (
        "keras/src/backend/common/variables.py",
        "values are assigned after the rebuild instead of given at creation (slower)",
    ),
    "Variable._initialize": (
        "keras/src/backend/common/variables.py",
        "as above; encoding by value is refused",
    ),
    "Layer._flatten_layers": (
        "keras/src/layers/layer.py",
        "encoding by config is not chosen",
    ),
    "Layer._trainable_variables": (
        "keras/src/layers/layer.py",
        "encoding by config is not chosen",
    ),
    "Function._outputs_struct": (
        "keras/src/ops/function.py",
        "models with built metrics are encoded by value",
    ),
    "Trainer._compile_config": (
        "keras/src/trainers/trainer.py",
        "compiled models are encoded by value",
    ),
    "Trainer._compile_metrics": (
        "keras/src/trainers/trainer.py",
        "models with built metrics are encoded by value",
    ),
    "Trainer._compile_loss": (
        "keras/src/trainers/trainer.py",
        "models with several losses are encoded by value",
    ),
    "seed_generator.python_random": (
        "keras/src/random/seed_generator.py",
        "a rebuild draws from Python's global random numbers",
    ),
    "KerasSaveable": (
        "keras/src/saving/keras_saveable.py",
        "encoding by value is refused",
    ),
    "Node": ("keras/src/ops/node.py", "encoding by value is refused"),
    "Tracker": ("keras/src/utils/tracking.py", "encoding by value is refused"),
    "Optimizer._var_key": (
        "keras/src/optimizers/base_optimizer.py",
        "built optimizers are refused by value",
    ),
    "Function._nodes": ("keras/src/ops/function.py", "functional models are refused by value"),
}

#: Classes whose instances become shells when a model goes by value.
SHELLS: tuple[type, ...] = (KerasSaveable, keras.Variable, keras.KerasTensor, Node, Tracker)

#: Keras's containers that watch what is put into them.
TRACKED = (
    tracking.TrackedList,
    tracking.TrackedDict,
    tracking.TrackedOrderedDict,
    tracking.TrackedSet,
)

State = dict[str, Any]


def feeds_at_creation() -> bool:
    """Say whether variables can be given their value as they are created."""
    return hasattr(keras.Variable, "_initialize_with_initializer") and hasattr(
        keras.Variable, "_initialize"
    )


@contextmanager
def own_random() -> Iterator[None]:
    """Let this thread's unseeded initializers and seeds draw from numbers of their own.

    Python's global state is left alone, for this thread and for others.
    """
    original = getattr(seed_generator, "python_random", None)
    if original is None:
        yield
        return
    seed_generator.python_random = _Draws(original)
    try:
        yield
    finally:
        seed_generator.python_random = original


class _Draws:
    """Stands in for the module ``random``: one thread's numbers apart from the others'."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._thread = threading.get_ident()
        self._own = random.Random()

    def __getattr__(self, name: str) -> Any:
        here = threading.get_ident() == self._thread
        return getattr(self._own if here else self._original, name)


def flatten_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """Yield the model's layers at every depth, each once, itself left out."""
    yield from model._flatten_layers(include_self=False, recursive=True)


def own(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables a layer holds itself, seeds among them, sublayers' not."""
    seeds = [generator.state for generator in layer._seed_generators]
    return [*layer._trainable_variables, *layer._non_trainable_variables, *seeds]


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Return the arguments ``compile`` was called with, as objects."""
    arguments: dict[str, Any] = model._compile_config.config
    return arguments


def trained_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return the variables an optimizer was built for."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return list(inner._trainable_variables)


def resolved_metrics(model: keras.Model) -> list[list[str]] | None:
    """Return the classes Keras chose for compiled metrics, output by output.

    Returns
    -------
    list of list of str, or None
        Class names in order, the metrics' then the weighted metrics', one list for
        each output; None while they are not built.
    """
    compiled = model._compile_metrics
    if compiled is None or not compiled.built:
        return None
    return [
        [type(metric).__name__ for metric in entry.metrics] if entry else []
        for entry in [*compiled._flat_metrics, *compiled._flat_weighted_metrics]
    ]


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


def reduce_tracked(obj: Any) -> tuple[Any, ...]:
    """Reduce Keras's tracked containers; pickle would fill them before they have a tracker."""
    state = {"tracker": obj.tracker}
    if isinstance(obj, list):
        return type(obj), (), state, iter(obj)
    if isinstance(obj, dict):
        return type(obj), (), state, None, iter(obj.items())
    return type(obj), (list(obj),), state


def reduce_backend(obj: Any) -> tuple[Any, ...]:
    """Reduce the backend that augmentation layers hold, which looks itself up for ever."""
    return type(obj), (obj._backend,)


class _Mender:
    """How one kind of object forgets its caches, and derives again what ids key."""

    def __init__(
        self,
        cls: type | tuple[type, ...],
        drop: Callable[[Any, State], None] = lambda obj, state: None,
        mend: Callable[[Any, State], None] = lambda obj, state: None,
    ) -> None:
        self.cls, self.drop, self.mend = cls, drop, mend


def _drop_wrappers(layer: Any, state: State) -> None:
    # Layer.__new__ wraps these two, and will again (keras/src/layers/layer.py)
    for name in ("build", "quantize"):
        if getattr(state.get(name), "__wrapped__", None) is not None:
            del state[name]
    # tensors and ids of the last call; graph tensors among them
    for name in ("_losses", "_losses_override"):
        if name in state:
            state[name] = []
    if "_loss_ids" in state:
        state["_loss_ids"] = set()


def _drop_functions(model: Any, state: State) -> None:
    for name in ("train_function", "test_function", "predict_function"):
        if name in state:
            state[name] = None


def _drop_nodes(function: Any, state: State) -> None:
    # set of f"{id(operation)}_ib-{index}" (keras/src/ops/function.py, make_node_key)
    operations = {str(id(op)): op for op in function._operations}
    keys = (key.rpartition("_ib-") for key in state.pop("_nodes", ()))
    state["nodes by operation"] = sorted(
        ((function._operations.index(operations[op]), int(index)) for op, _, index in keys)
    )


def _mend_nodes(function: Any, state: State) -> None:
    nodes = vars(function).pop("nodes by operation", ())
    function.__dict__["_nodes"] = {
        f"{id(function._operations[op])}_ib-{index}" for op, index in nodes
    }


def _drop_keys(optimizer: Any, state: State) -> None:
    state.pop("_trainable_variables_indices", None)
    state.pop("_exclude_from_weight_decay_cache", None)
    excluded = state.pop("_exclude_from_weight_decay", None)
    if excluded is not None:
        state["excluded variables"] = [
            v for v in optimizer._trainable_variables if optimizer._var_key(v) in excluded
        ]
        if len(state["excluded variables"]) != len(excluded):
            raise EncodeError(
                f"optimizer {optimizer.name!r} excludes from weight decay variables it does "
                "not train: build it before you send it"
            )


def _mend_keys(optimizer: Any, state: State) -> None:
    attributes = vars(optimizer)
    excluded = attributes.pop("excluded variables", None)
    key = optimizer._var_key
    attributes["_trainable_variables_indices"] = {
        key(v): i for i, v in enumerate(optimizer._trainable_variables)
    }
    if excluded is not None:
        attributes["_exclude_from_weight_decay"] = {key(v) for v in excluded}
        attributes["_exclude_from_weight_decay_cache"] = {}


#: Layers that hold a table of TensorFlow's, which nothing can pickle.
LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)

#: What of a lookup layer is a native resource, or follows from one
#: (keras/src/layers/preprocessing/index_lookup.py).
_NATIVE = (
    "lookup_table",
    "token_counts",
    "token_document_counts",
    "num_documents",
    "idf_weights",
    "idf_weights_const",
    "_mask_key",
    "_mask_value",
)


def _drop_table(layer: Any, state: State) -> None:
    native = [name for name in _NATIVE if state.get(name) is not None]
    for name in native:
        del state[name]
    weights = getattr(layer, "idf_weights_const", None)
    state["native attributes"] = native
    state["vocabulary of the table"] = (
        [str(token) if isinstance(token, str) else int(token) for token in layer.get_vocabulary()],
        None if weights is None else np.asarray(weights),
    )


def _mend_table(layer: Any, state: State) -> None:
    native = vars(layer).pop("native attributes")
    vocabulary, weights = vars(layer).pop("vocabulary of the table")
    config = layer.get_config() | {"vocabulary": None, "name": layer.name}
    twin = type(layer).from_config(config | ({"idf_weights": None} if weights is not None else {}))
    if "lookup_table" in native and len(vocabulary) > twin.vocabulary_size():
        twin.set_vocabulary(vocabulary, *(() if weights is None else (weights,)))
    for name in native:
        if name in vars(twin):
            setattr(layer, name, getattr(twin, name))


def _mend_ids(tracker: Any, state: State) -> None:
    tracker.stored_ids = {
        name: {id(item) for item in store} for name, (_, store) in tracker.config.items()
    }


MENDERS = (
    _Mender(keras.Layer, _drop_wrappers),
    _Mender(LOOKUPS, _drop_table, _mend_table),
    _Mender(keras.Model, _drop_functions),
    _Mender(keras.optimizers.Optimizer, _drop_keys, _mend_keys),
    _Mender(Function, _drop_nodes, _mend_nodes),
    _Mender(Tracker, mend=_mend_ids),
)


def menders(obj: Any) -> Iterator[_Mender]:
    """Yield what to do for an object, at either end."""
    for mender in MENDERS:
        if isinstance(obj, mender.cls):
            yield mender
