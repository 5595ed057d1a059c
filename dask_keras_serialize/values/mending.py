"""What objects forget when they go by value, and derive again when they arrive.

Caches are left out of a state: traced functions, losses of the last call, tables of
TensorFlow's. What Keras keys by ``id()`` is written by place, and keyed again. Each
case is a row of :data:`MENDERS`; the names it touches are listed in
:data:`dask_keras_serialize.private.KERAS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import keras
import numpy as np

from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.private import (
    LOOKUPS,
    WRAPPED,
    Function,
    KerasHistory,
    KerasSaveable,
    Node,
    State,
    Tracker,
    describe,
)
from dask_keras_serialize.values.shells import own_method


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
    for name in WRAPPED:  # made again for the replica
        if getattr(state.get(name), "__wrapped__", None) is not None:
            del state[name]
    # tensors and ids of the last call; graph tensors among them
    for name in ("_losses", "_losses_override"):
        if name in state:
            state[name] = []
    if "_loss_ids" in state:
        state["_loss_ids"] = set()


def _drop_functions(model: Any, state: State) -> None:
    # and what fit keeps for as long as it runs, to validate by: callbacks send the model meanwhile
    state.pop("_eval_epoch_iterator", None)
    # where values lay, up to Keras 3.13 (keras/src/backend/jax/trainer.py): told again by the next
    for kind in ("trainable", "non_trainable", "optimizer", "metrics"):
        state.pop(f"_{kind}_variable_shardings", None)
    for name in ("train_function", "test_function", "predict_function"):
        if name in state:
            state[name] = None


def _drop_calls(operation: Any, state: State) -> None:
    # All calls ever made of it, by which every layer holds every model it was used in.
    # Those that belong to what travels are reached through functions and tensors.
    for name in ("_inbound_nodes", "_outbound_nodes"):
        if name in state:
            state[name] = []


def _drop_stores(owner: Any, state: State) -> None:
    # lists that its tracker has too: the tracker may come with another pickled object
    tracker = state.get("_tracker")
    # a __setstate__ would miss them
    if isinstance(tracker, Tracker) and not own_method(type(owner), "__setstate__"):
        names = {id(store): name for name, (_, store) in tracker.config.items()}
        stores = {name: names[id(v)] for name, v in state.items() if id(v) in names}
        for name in stores:
            del state[name]
        state["stores of the tracker"] = stores


def _mend_stores(owner: Any, state: State) -> None:
    for name, store in vars(owner).pop("stores of the tracker", {}).items():
        owner.__dict__[name] = owner._tracker.config[store][1]


def _drop_place(node: Any, state: State) -> None:
    state["place"] = _place(node)


def _mend_node(node: Any, state: State) -> None:
    # as Node.__init__ does (keras/src/ops/node.py)
    node.operation._inbound_nodes.append(node)
    for tensor in node.arguments.keras_tensors:
        history = vars(tensor).get("made by")
        operation = history[0].operation if history else None
        if history is None and "_keras_history" in vars(tensor):
            operation = tensor._keras_history.operation
        if operation is not None:
            operation._outbound_nodes.append(node)


def _drop_history(tensor: Any, state: State) -> None:
    history = state.get("_keras_history")
    if history is not None and history.operation is not None:
        del state["_keras_history"]
        node = history.operation._inbound_nodes[history.node_index]
        state["made by"] = node, history.tensor_index


def _mend_history(tensor: Any, state: State) -> None:
    made = vars(tensor).pop("made by", None)
    if made is not None:
        node, index = made
        tensor._keras_history = KerasHistory(node.operation, _place(node), index)


def _drop_nodes(function: Any, state: State) -> None:
    # set of f"{id(operation)}_ib-{index}" (keras/src/ops/function.py, make_node_key)
    operations = {str(id(op)): i for i, op in enumerate(function._operations)}
    keys = (key.rpartition("_ib-") for key in state.pop("_nodes", ()))
    places = sorted((operations[op], int(index)) for op, _, index in keys)
    state["nodes"] = [function._operations[op]._inbound_nodes[index] for op, index in places]


def _mend_nodes(function: Any, state: State) -> None:
    nodes = vars(function).pop("nodes", ())
    function.__dict__["_nodes"] = {f"{id(node.operation)}_ib-{_place(node)}" for node in nodes}


def _place(node: Any) -> int:
    place: int = node.operation._inbound_nodes.index(node)
    return place


def _drop_keys(optimizer: Any, state: State) -> None:
    state.pop("_trainable_variables_indices", None)
    state.pop("_exclude_from_weight_decay_cache", None)
    chosen = state.pop("_var_to_optimizer_idx", None)  # MultiOptimizer
    if chosen is not None:
        state["optimizer of each"] = [
            chosen.get(optimizer._var_key(v)) for v in optimizer._trainable_variables
        ]


def _drop_excluded(optimizer: Any, state: State, variables: Sequence[Any]) -> None:
    excluded = state.pop("_exclude_from_weight_decay", None)
    if excluded is not None:
        known = {optimizer._var_key(v): v for v in (*variables, *optimizer._trainable_variables)}
        state["excluded variables"] = [known[key] for key in sorted(excluded) if key in known]
        if len(state["excluded variables"]) != len(excluded):
            raise EncodeError(
                f"optimizer {optimizer.name!r} excludes from weight decay variables that are "
                "not sent with it: build it before you send it, or send its model"
            )


def _mend_keys(optimizer: Any, state: State) -> None:
    attributes = vars(optimizer)
    excluded = attributes.pop("excluded variables", None)
    key = optimizer._var_key
    attributes["_trainable_variables_indices"] = {
        key(v): i for i, v in enumerate(optimizer._trainable_variables)
    }
    chosen = attributes.pop("optimizer of each", None)
    if chosen is not None:
        attributes["_var_to_optimizer_idx"] = {
            key(v): i
            for v, i in zip(optimizer._trainable_variables, chosen, strict=True)
            if i is not None
        }
    if excluded is not None:
        attributes["_exclude_from_weight_decay"] = {key(v) for v in excluded}
        attributes["_exclude_from_weight_decay_cache"] = {}


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


#: Tables of what a layer was shown and has not yet made a vocabulary of.
_COUNTS = ("token_counts", "token_document_counts")


def _drop_table(layer: Any, state: State) -> None:
    native = [name for name in _NATIVE if state.get(name) is not None]
    tables = {name: state[name].export() for name in _COUNTS if name in native}
    documents = state.get("num_documents")
    for name in native:
        del state[name]
    weights = getattr(layer, "idf_weights_const", None)
    state["native attributes"] = native
    state["vocabulary of the table"] = (
        _vocabulary(layer),
        None if weights is None else np.asarray(weights),
    )
    state["counts of the table"] = (
        {name: [part.numpy() for part in parts] for name, parts in tables.items()},
        None if documents is None else int(documents),
    )


def _vocabulary(layer: Any) -> list[Any]:
    # what get_vocabulary() does, but that it reads by the layer's encoding what
    # TensorFlow always writes as UTF-8
    if int(layer.lookup_table.size()) == 0:  # export() fails on one that is not initialised
        keys = values = np.empty(0, object)
    else:
        keys, values = (each.numpy() for each in layer.lookup_table.export())
    tokens, indices = (values, keys) if layer.invert else (keys, values)
    known = dict(zip(indices.tolist(), tokens.tolist(), strict=True))
    vocabulary = [known.get(i, layer.oov_token) for i in range(layer.vocabulary_size())]
    if layer.mask_token is not None and layer.output_mode == "int":
        vocabulary[0] = layer.mask_token
    try:
        return [t.decode("utf-8") if isinstance(t, bytes) else t for t in vocabulary]
    except UnicodeDecodeError as error:
        raise EncodeError(
            f"layer {layer.name!r} has a token in its vocabulary that is not UTF-8 ({error}): "
            "give it a vocabulary of str"
        ) from None


def _mend_table(layer: Any, state: State) -> None:
    try:
        import_module("tensorflow")
    except ImportError:
        raise DecodeError(
            f"{describe(layer)} keeps its table in TensorFlow on every backend, which is not "
            "installed here: install it on every worker"
        ) from None
    native = vars(layer).pop("native attributes")
    vocabulary, weights = vars(layer).pop("vocabulary of the table")
    counts, documents = vars(layer).pop("counts of the table")
    # Keras's own class: a user's may be made of other arguments
    cls: Any = next(base for base in type(layer).__mro__ if base in LOOKUPS)
    config = cls.get_config(layer) | {"vocabulary": None, "name": layer.name}
    twin = cls.from_config(config | ({"idf_weights": None} if weights is not None else {}))
    if "lookup_table" in native and len(vocabulary) > twin.vocabulary_size():
        # Keras fills weights up to max_tokens itself
        twin.set_vocabulary(vocabulary, *(() if weights is None else (weights[: len(vocabulary)],)))
    for name, parts in counts.items():
        if name in vars(twin) and len(parts[0]):
            getattr(twin, name).insert(*parts)
    if documents and "num_documents" in vars(twin):
        twin.num_documents.assign(documents)
    for name in native:
        if name in vars(twin):
            setattr(layer, name, getattr(twin, name))


def _drop_executor(callbacks: Any, state: State) -> None:
    # its threads, between the beginning and the end of training
    if state.get("_executor") is not None:
        state |= {"_executor": None, "_futures": [], "had an executor": True}


def _mend_executor(callbacks: Any, state: State) -> None:
    if vars(callbacks).pop("had an executor", False):
        callbacks._executor = ThreadPoolExecutor()  # as CallbackList._on_begin


#: What belongs to one object alone, and that a copy of it does not have either.
OWN = (
    _Mender(keras.Layer, _drop_wrappers),
    _Mender(keras.Operation, _drop_calls),
    _Mender(keras.Model, _drop_functions),
)

#: In the order in which objects are mended. Trackers come before, see :func:`mend_trackers`.
MENDERS = (
    *OWN,
    _Mender(KerasSaveable, _drop_stores, _mend_stores),
    _Mender(LOOKUPS, _drop_table, _mend_table),
    _Mender(keras.optimizers.Optimizer, _drop_keys, _mend_keys),
    _Mender(Node, _drop_place, _mend_node),
    _Mender(keras.KerasTensor, _drop_history, _mend_history),
    _Mender(Function, _drop_nodes, _mend_nodes),
    _Mender(keras.callbacks.CallbackList, _drop_executor, _mend_executor),
)


def drop(obj: Any, state: State, variables: Sequence[Any] = ()) -> None:
    """Leave out of an object's state what it can derive again, and write ids by place.

    Parameters
    ----------
    obj : object
    state : dict
        Changed.
    variables : sequence of keras.Variable
        Those that travel with it, as far as they are known.
    """
    for mender in MENDERS:
        if isinstance(obj, mender.cls):
            mender.drop(obj, state)
    if isinstance(obj, keras.optimizers.Optimizer):
        _drop_excluded(obj, state, variables)


def forget(obj: Any, state: State) -> None:
    """Leave out of an object's state only what belongs to that very object."""
    for mender in OWN:
        if isinstance(obj, mender.cls):
            mender.drop(obj, state)


def mend_trackers(filled: Sequence[tuple[Any, Any]]) -> None:
    """Let trackers track again, before any code sets an attribute."""
    for obj, _ in filled:
        if isinstance(obj, Tracker):
            obj.stored_ids = {
                name: {id(item) for item in store} for name, (_, store) in obj.config.items()
            }


def mend(filled: Sequence[tuple[Any, State]]) -> None:
    """Derive again what :func:`drop` left out, when all objects are filled.

    Parameters
    ----------
    filled : sequence of (object, dict)
        With the state each was filled from.
    """
    classes = {type(obj) for obj, _ in filled}
    for mender in MENDERS:
        its = {cls for cls in classes if issubclass(cls, mender.cls)}
        ours = [each for each in filled if type(each[0]) in its] if its else []
        if mender.cls is Node:  # calls of one operation in the order they were made
            ours.sort(key=lambda each: int(vars(each[0]).pop("place")))
        for obj, state in ours:
            mender.mend(obj, state)
