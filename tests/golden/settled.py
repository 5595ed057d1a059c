"""Objects without chance: every number is assigned, every name is counted from nothing.

Numbers come from NumPy's frozen generator, by the path of their variable; what a run leaves that
depends on the machine is replaced.
"""

from __future__ import annotations

import collections
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state

WIDTH = 8
UIDS = "object_name_uids"


@contextmanager
def names_from_nothing() -> Iterator[None]:
    """Count Keras's automatic names anew, and go on later where they were."""
    before = global_state.get_global_attribute(UIDS)
    global_state.set_global_attribute(UIDS, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(UIDS, before or collections.defaultdict(int))


def numbers(*shape: int, seed: int = 0, least: int = -32) -> Any:
    """Return float32 numbers that every machine and NumPy makes the same; blocks that repeat."""
    block = np.random.RandomState(seed).randint(least, 33, min(int(np.prod(shape)), 500))
    return np.resize(block / 64, shape).astype("float32")


def settle(obj: Any, variables: list[keras.Variable]) -> Any:
    """Give variables numbers by their paths, and history too."""
    for variable in variables:
        name = variable.path.rpartition("/")[2]
        if variable.dtype == "string" or "learning_rate" in name:
            continue
        # older Kerases write "SGD" and "rmsprop" where newer ones have "sgd" and "rm_sprop"
        seed = zlib.crc32(variable.path.lower().replace("_", "").encode())
        kind = keras.backend.is_float_dtype(variable.dtype)
        weight = name in ("kernel", "bias", "beta", "recurrent_kernel", "embeddings")
        values = numbers(*variable.shape, seed=seed, least=-32 if weight else 1)
        variable.assign(values if kind else (abs(values) * 64).astype("int64"))
    history = getattr(obj, "history", None)
    for i, series in enumerate(history.history.values() if history else ()):
        series[:] = [(i + 1) / 2**n for n in range(len(series))]
    return obj


def settled(model: keras.Model, x: Any, y: Any) -> keras.Model:
    """Train a model, so that all it makes of that is there, and replace every number."""
    model.run_eagerly = keras.backend.backend() != "jax"  # faster, for two steps
    model.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0)
    model.run_eagerly = False
    found = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return settle(model, list({id(v): v for v in found}.values()))


def seeded(model: keras.Model) -> keras.Model:
    """Say what initializers drew."""
    for i, layer in enumerate(model._flatten_layers(include_self=False)):
        for value in vars(layer).values():
            if isinstance(value, keras.Initializer) and hasattr(value, "_init_seed"):
                value.seed = 1000 + i
    return model


def batch() -> tuple[Any, Any]:
    return numbers(4, WIDTH, seed=1), np.array([0, 1, 2, 1])


def two_targets() -> tuple[Any, Any]:
    return numbers(4, WIDTH, seed=1), {"p": np.array([0, 1, 2, 1]), "q": numbers(4, 1, seed=2)}


def steps() -> tuple[Any, Any]:
    return numbers(4, 5, 2, seed=3), numbers(4, 2, seed=4)
