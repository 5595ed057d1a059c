"""What is known of an object that was sent, as plain data, and what has to be so again."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from ml_dtypes import finfo  # NumPy's own knows no bfloat16

from tests import zoo

#: The largest difference between predictions, which backends compute in other orders.
TOLERANCE = 1e-5
#: In half precision: so many of its last places, as a machine computes in it or rounds to it.
LASTS = 4


def of(obj: Any) -> Any:
    """Return what is known of an object: of a tuple, of each, and what they share."""
    if isinstance(obj, tuple):
        return [list(map(of, obj)), shared(obj)]
    found: dict[str, Any] = {"class": type(obj).__name__, "name": getattr(obj, "name", None)}
    if isinstance(obj, keras.Model):
        variables = zoo.variables_of(obj)
        found |= of_model(obj)
    else:
        own = [obj] if isinstance(obj, keras.Variable) else getattr(obj, "variables", ())
        variables = [v for v in own if isinstance(v, keras.Variable)]
        found |= {"config": plain_config(obj), "words": vocabularies(obj)}
    counted = isinstance(obj, keras.random.SeedGenerator | keras.KerasTensor)
    if counted or "functional" in str(found["name"]):
        found["name"] = found["config"] = None  # where it is made
    if isinstance(obj, keras.Optimizer):
        found |= of_optimizer(obj)
    found["variables"] = [[v.path, tuple(v.shape), width(v.dtype), v.trainable] for v in variables]
    found["values"] = arrays(variables)
    if keras.ops.is_tensor(obj) and not isinstance(obj, keras.Variable):
        found = {"values": [keras.ops.convert_to_numpy(obj)]}
    return found


def of_model(model: keras.Model) -> dict[str, Any]:
    layers, names = list(model._flatten_layers()), chosen(model)
    found: dict[str, Any] = {
        "built": [model.built, model.compiled],
        "policy": model.dtype_policy.name,
        "layers": [
            [type(each).__name__, id(each) in names and each.name, each.trainable]
            for each in layers
        ],
        "words": [vocabularies(layer) for layer in layers],
        "graphs": [graph(layer) for layer in layers],
        "history": plain_history(vars(model).get("history")),
    }
    if model.compiled:
        found["metrics"] = [[type(metric).__name__, metric.name] for metric in model.metrics]
        found |= of_optimizer(model.optimizer)
    return found


def chosen(model: keras.Model) -> set[int]:
    """Return the layers whose names users choose; what is inside of others is counted."""
    inside = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    return {*map(id, model.layers)}.union(*map(chosen, inside))


def of_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's rate or schedule, what it decays, and whose turn each variable is."""
    rate = getattr(optimizer, "_learning_rate", None)
    is_number = isinstance(rate, keras.Variable)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # the outer lists them or not
    trained = optimizer._trainable_variables if optimizer.built else ()
    chosen = getattr(optimizer, "_var_to_optimizer_idx", None)
    decays = getattr(optimizer, "weight_decay", None)
    return {
        "rate": float(rate) if is_number else [type(rate).__name__, plain_config(rate)],
        "decayed": [v.path for v in trained if decays and optimizer._use_weight_decay(v)],
        "trained": [v.path for v in trained],
        "places": [optimizer._get_variable_index(v) for v in trained],
        "chosen": chosen and [chosen.get(optimizer._var_key(v)) for v in trained],
    }


def graph(layer: Any) -> Any:
    """Return a functional model's operations, and which are called at each depth, how often."""
    function = getattr(layer, "_functional", None) or layer
    depths = getattr(function, "_nodes_by_depth", None)
    if depths is None:
        return None
    return [
        [[type(op).__name__, op.name, len(op._inbound_nodes)] for op in function._operations],
        len(function._nodes),
        [[depth, [node.operation.name for node in nodes]] for depth, nodes in depths.items()],
        [[t._keras_history.operation.name, t._keras_history[1:]] for t in function.outputs],
    ]


def vocabularies(layer: Any) -> Any:
    """Return a layer's vocabulary, and those of layers it holds."""
    held = [layer] if hasattr(layer, "get_vocabulary") else getattr(layer, "lookups", ())
    return [[*each.get_vocabulary()] for each in held]


def plain_history(history: Any) -> Any:
    """Return what ``fit`` left, or what a user put in its place."""
    if isinstance(history, keras.callbacks.History):
        return [history.history, getattr(history, "epoch", None), history.params]
    return dict(history) if isinstance(history, dict) else history  # not one that Keras watches


def plain_config(obj: Any) -> Any:
    """Return those settings of an object that are numbers and strings."""
    try:
        config = obj.get_config()
    except (AttributeError, NotImplementedError):
        return None
    return {k: v for k, v in config.items() if v is None or type(v) in (int, float, str, bool)}


def shared(parts: tuple[Any, ...]) -> list[list[str]]:
    """Return what each of a tuple is of the first, and what variables it shares with it."""
    whole = parts[0]
    if not isinstance(whole, keras.Model):
        return []
    layers = list(whole._flatten_layers())
    named = {f"layer {layer.name}": layer for layer in layers}
    named |= {f"seed of {layer.name}": g for layer in layers for g in layer._seed_generators}
    named |= {f"operation {op.name}": op for op in whole._operations}
    tensors = [t for op in whole._operations for node in op._inbound_nodes for t in node.outputs]
    named |= {f"tensor {i}": tensor for i, tensor in enumerate(tensors)}
    variables = zoo.variables_of(whole)
    named |= {f"variable {v.path}": v for v in variables}
    named |= {f"metric {metric.name}": metric for metric in whole.metrics}
    named |= {"optimizer": whole.optimizer, "history": whole.history, "loss": whole.loss}
    found = []
    for part in parts[1:]:
        its = {id(v) for v in getattr(part, "variables", ())}
        if isinstance(part, keras.Model):  # which shares a graph, and layers, too
            its |= {*map(id, part._flatten_layers()), *map(id, part.outputs)}
            its |= set(map(id, getattr(part, "operations", ())))
        ours = [name for name, each in named.items() if each is part or id(each) in its]
        graphs = [getattr(other, "_functional", None) for other in parts]
        found.append([*ours, *(f"graph of {i}" for i, each in enumerate(graphs) if each is part)])
    return found


def width(dtype: str) -> str:
    """Return a dtype as far as backends agree on it: each has its own integers."""
    return "int" if dtype in ("int32", "int64", "uint32") else dtype


def arrays(variables: list[keras.Variable]) -> list[Any]:
    """Return values, integers as far as backends agree on them."""
    values = [(v, np.asarray(keras.ops.convert_to_numpy(v.value))) for v in variables]
    return [a.astype("int64") if width(v.dtype) == "int" else plain(a) for v, a in values]


def plain(array: Any) -> Any:
    """Return an array that can be pickled between versions.

    One of bfloat16 from another ml_dtypes changes what this process takes for bfloat16.
    """
    return array.astype("float32") if array.dtype.kind == "V" else array


def predictions(model: keras.Model, inputs: Any) -> list[Any]:
    """Return what a model makes of a batch, which leaves no state behind."""
    return [
        plain(np.asarray(keras.ops.convert_to_numpy(each)))
        for each in keras.tree.flatten(model(inputs, training=False))
    ]


def step(model: keras.Model, inputs: Any, targets: Any) -> list[Any]:
    """Train on a batch, once; return what that makes of all variables but seeds' states."""
    model.run_eagerly = keras.backend.backend() != "jax"  # faster, for one
    model.fit(inputs, targets, batch_size=len(inputs), shuffle=False, verbose=0)
    assert np.isfinite(model.history.history["loss"]).all()
    variables = [v for v in zoo.variables_of(model) if "seed" not in v.path]
    return [*arrays(variables), *(np.array(v) for v in model.history.history.values())]


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """Fail unless plain data is equal, arrays to the bit."""
    if isinstance(theirs, np.ndarray):
        np.testing.assert_array_equal(ours, theirs, where, strict=True)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same(a, b, f"{where}/{i}")
    else:
        assert ours == theirs, where


def tolerance(model: keras.Model) -> float:
    """Return how far apart two backends may be in what they compute of a model."""
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    coarsest = max(float(finfo(dtype).eps) for dtype in dtypes if "float" in dtype)
    return max(TOLERANCE, LASTS * coarsest)


def close(ours: list[Any], theirs: list[Any], least: float = TOLERANCE) -> float:
    """Fail unless arrays are equal as far as backends compute alike; return by how much not."""
    most = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        if a.dtype.kind not in "fc":
            np.testing.assert_array_equal(a, b)
            continue
        within = max(least, LASTS * float(np.finfo(a.dtype).eps))
        np.testing.assert_allclose(a, b, atol=within, rtol=within)
        most = max([most, *np.abs(a.astype("float64") - b).ravel()])
    return most
