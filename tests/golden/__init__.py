"""Models pickled on each backend, with what they hold and predict: read on every other.

``KERAS_BACKEND=jax python -m tests.golden`` writes those of a backend anew.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tests import zoo

FOLDER = Path(__file__).parent

NAMES = ("trained", "trained functional", "trained two outputs", "recurrent", "nested", "adapted")


def arrays(model: keras.Model) -> list[Any]:
    """Return the values of all variables, those of seeds as far as backends agree on them."""
    values = [(v, keras.ops.convert_to_numpy(v.value)) for v in zoo.variables_of(model)]
    return [a.astype("int64") if "seed" in v.path else a for v, a in values]


def write() -> None:
    """Write the file of this process's backend."""
    content = {}
    for name in NAMES:
        model = zoo.build(name)
        inputs = zoo.inputs_for(model)
        predictions = [np.asarray(each) for each in zoo.predictions(model, inputs)]
        content[name] = pickle.dumps(model, 5), inputs, arrays(model), predictions
    (FOLDER / f"{keras.backend.backend()}.pickle").write_bytes(pickle.dumps(content, 5))


def read(backend: str) -> dict[str, Any]:
    """Read the file of a backend."""
    content: dict[str, Any] = pickle.loads((FOLDER / f"{backend}.pickle").read_bytes())
    return content
