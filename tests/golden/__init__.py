"""Models pickled on each backend, with what they hold and predict: read on every other.

``KERAS_BACKEND=jax python -m tests.golden`` writes those of a backend anew, and those by value into
``by-value``, which only the same minor versions of Python and Keras can read. With ``write FOLDER``
it writes all that can change backend, those by value too; with ``write-all FOLDER`` those as well
that cannot; and with ``check FOLDER`` it reads all that is there, of every backend, and prints as
JSON what became of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import skew
from tests import zoo

FOLDER = Path(__file__).parent

#: The largest difference between predictions, which backends compute in other orders.
TOLERANCE = 1e-5
#: In half precision: so many of its last places.
LASTS = 4

NAMES = ("trained", "trained functional", "trained two outputs", "recurrent", "nested", "adapted")

BY_VALUE = ("trained subclassed", "trained with setstate", "lambda and custom layer")

#: Those that hold what only the backend has where they are made.
BOUND = {*zoo.IN_TENSORFLOW, "trained under float64", "trained under mixed_float16"}

#: What backends compute otherwise: torch alone takes NumPy's numbers for Python's.
_OTHERWISE = {"trained under bfloat16", "a number of NumPy's"}

#: Have no inputs yet.
_UNBUILT = {name for name in zoo.ALL if "unbuilt" in name or "argument" in name}


def models() -> dict[str, Callable[[], keras.Model]]:
    """Return what makes each model that can change backend."""
    makers = every_model()
    for name in (BOUND | _OTHERWISE) & makers.keys():
        del makers[name]
    if find_spec("keras_hub"):
        from tests import hub

        makers |= {name: lambda name=name: hub.backbone(name) for name in hub.BACKBONES}
        if keras.backend.backend() != "tensorflow":  # there its tokenizer keeps a tf.name_scope
            makers["task"] = hub.classifier
    return makers


def every_model() -> dict[str, Callable[[], keras.Model]]:
    """Return what makes each model that has inputs."""
    return {name: lambda name=name: zoo.build(name) for name in zoo.ALL if name not in _UNBUILT}


def arrays(model: keras.Model) -> list[Any]:
    """Return the values of all variables, those of seeds as far as backends agree on them."""
    values = [(v, keras.ops.convert_to_numpy(v.value)) for v in zoo.variables_of(model)]
    return [a.astype("int64") if "seed" in v.path else plain(a) for v, a in values]


def plain(array: Any) -> Any:
    """Return an array that can be pickled between versions.

    One of bfloat16 from another ml_dtypes changes what this process takes for bfloat16.
    """
    return array.astype("float32") if array.dtype.kind == "V" else array


def inputs_for(model: keras.Model) -> Any:
    """Make a batch the model takes, of NumPy's arrays."""
    if type(model).__module__.startswith("keras_hub"):
        from tests import hub

        return hub.inputs_for(model)
    return keras.tree.map_structure(np.asarray, zoo.inputs_for(model))


def predictions(model: keras.Model, inputs: Any) -> list[Any]:
    """Return what a model makes of a batch, which leaves no state behind."""
    return [
        plain(np.asarray(keras.ops.convert_to_numpy(each)))
        for each in keras.tree.flatten(model(inputs, training=False))
    ]


def write(folder: Path, makers: dict[str, Callable[[], keras.Model]]) -> None:
    """Write the file of this process's backend."""
    content: dict[str, Any] = {}
    for name, make in makers.items():
        model = make()
        inputs = inputs_for(model)
        sent = pickle.dumps(model, 5)
        content[name] = sent, inputs, arrays(model), predictions(model, inputs)
    (folder / f"{keras.backend.backend()}.pickle").write_bytes(pickle.dumps(content, 5))


def write_by_value(folder: Path) -> None:
    """Write the file of what goes by value, with the versions that it was written by."""
    write(folder, {name: zoo.ALL[name] for name in BY_VALUE})
    content = read(folder, keras.backend.backend()) | {"versions": skew.versions()}
    (folder / f"{keras.backend.backend()}.pickle").write_bytes(pickle.dumps(content, 5))


def read(folder: Path, backend: str) -> dict[str, Any]:
    """Read the file of a backend."""
    content: dict[str, Any] = pickle.loads((folder / f"{backend}.pickle").read_bytes())
    return content


def check(name: str, sent: bytes, inputs: Any, values: list[Any], predicted: list[Any]) -> float:
    """Fail unless a model arrives and goes on; return by how much its predictions differ."""
    model = pickle.loads(sent)
    for ours, theirs in zip(arrays(model), values, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    most = 0.0
    for ours, theirs in zip(predictions(model, inputs), predicted, strict=True):
        assert ours.dtype == theirs.dtype
        last = float(np.finfo(ours.dtype).eps) if ours.dtype.kind == "f" else 0.0
        within = max(TOLERANCE, LASTS * last)
        np.testing.assert_allclose(ours, theirs, atol=within, rtol=within)
        most = max(most, float(np.abs(ours.astype("float64") - theirs).max()))
    if "trained" in name:  # and it trains on, with the optimizer it came with
        assert model.compiled
        assert int(model.optimizer.iterations) > 0
        target = zoo.TARGETS[zoo.TARGET.get(name, "sparse")]
        model.fit(zoo.X, target, batch_size=16, verbose=0)
        assert np.isfinite(model.history.history["loss"]).all()
    return most


def check_all(folder: Path) -> dict[str, dict[str, float | str]]:
    """Check all models of every backend; return their differences, or what was wrong."""
    found: dict[str, dict[str, float | str]] = {}
    for backend in sorted(path.stem for path in folder.glob("*.pickle")):
        for name, sent in read(folder, backend).items():
            try:
                found.setdefault(backend, {})[name] = check(name, *sent)
            except Exception as error:  # reported by name, whatever it is; the next is checked too
                found.setdefault(backend, {})[name] = repr(error)
    return found
