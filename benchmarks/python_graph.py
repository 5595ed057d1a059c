"""Measure the Python objects around models: python benchmarks/python_graph.py.

``sizeof(model)`` is the weights' bytes plus an estimate of everything around them, so
much for a model, each of its layers and each of its variables:
``dask_keras_serialize.protocol.GRAPH_BYTES``. Here tracemalloc counts the real thing,
for models as they are built and as they arrive, over a range of layers and variables;
a least-squares fit of the relative error is printed beside the constants. Weights are
not counted: they lie in the backend's memory or in numpy's, which tracemalloc tells
from Python's own. Takes a few minutes: tracing is slow.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

SEED = 20260


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import cases
    import keras

    from dask_keras_serialize.protocol import GRAPH_BYTES

    keras.utils.set_random_seed(SEED)
    models = _models()
    rows = []
    for name, build in models.items():
        packed = pickle.dumps(build(), protocol=5)
        for how, make in (("built", build), ("arrived", lambda p=packed: pickle.loads(p))):
            rows.append({"model": name, "how": how, **_measure(make), **cases.environment()})
    fits = {how: _fit([row for row in rows if row["how"] == how]) for how in ("built", "arrived")}
    fits["both"] = _fit(rows)
    fits["GRAPH_BYTES"] = np.array(GRAPH_BYTES, float)
    print(_text(rows, fits))
    if options.json:
        record = {name: [round(value) for value in fit] for name, fit in fits.items()}
        options.json.write_text(json.dumps({"fits": record, "rows": rows}, indent=1) + "\n")


def _models() -> dict[str, Callable[[], keras.Model]]:
    import keras

    def dense(layers: int, compiled: bool = False) -> keras.Model:
        model = keras.Sequential(
            [keras.layers.Input((4,)), *[keras.layers.Dense(4) for _ in range(layers)]]
        )
        if compiled:
            model.compile(optimizer="adam", loss="mse")
            model.optimizer.build(model.trainable_variables)
        return model

    def relu(layers: int) -> keras.Model:
        inputs = outputs = keras.Input((4,))
        for _ in range(layers):
            outputs = keras.layers.ReLU()(outputs)
        return keras.Model(inputs, outputs)

    def small_cnn() -> keras.Model:
        block = [keras.layers.Conv2D(4, 3, padding="same"), keras.layers.BatchNormalization()]
        block += [keras.layers.ReLU(), keras.layers.MaxPooling2D()]
        return keras.Sequential([keras.layers.Input((32, 32, 3)), *block, keras.layers.Flatten()])

    applications = keras.applications
    return {
        "1 Dense": lambda: dense(1),
        "8 Dense": lambda: dense(8),
        "64 Dense": lambda: dense(64),
        "8 Dense, Adam": lambda: dense(8, compiled=True),
        "64 Dense, Adam": lambda: dense(64, compiled=True),
        "small CNN": small_cnn,
        "64 ReLU": lambda: relu(64),
        "MobileNetV2": lambda: applications.MobileNetV2(weights=None, alpha=0.35),
        "EfficientNetB0": lambda: applications.EfficientNetB0(weights=None),
        "DenseNet121": lambda: applications.DenseNet121(weights=None),
        "ResNet50": lambda: applications.ResNet50(weights=None),
    }


def _measure(make: Callable[[], keras.Model]) -> dict[str, int]:
    from dask_keras_serialize.configs.by_config import variables_of

    make()  # names, caches and whatever else stays behind
    gc.collect()
    tracemalloc.start()
    model = make()
    gc.collect()
    # domain 0 is Python's own; numpy traces arrays, weights among them, in another
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, 0)])
    tracemalloc.stop()
    return {
        "bytes": sum(trace.size for trace in snapshot.traces),
        "layers": sum(1 for _ in model._flatten_layers()),
        "variables": len(variables_of(model)),
    }


def _fit(rows: list[dict[str, Any]]) -> Any:
    """Fit bytes = base + a * layers + b * variables, every model counting alike."""
    counts = np.array([[1, row["layers"], row["variables"]] for row in rows], float)
    measured = np.array([row["bytes"] for row in rows], float)
    return np.linalg.lstsq(counts / measured[:, None], np.ones(len(rows)), rcond=None)[0]


def _text(rows: list[dict[str, Any]], fits: dict[str, Any]) -> str:
    lines = [f"{'model':15} {'how':8} {'layers':>6} {'variables':>9} {'KiB':>8}  estimate"]
    for row in rows:
        counts = (1, row["layers"], row["variables"])
        estimate = float(np.dot(counts, fits["GRAPH_BYTES"])) / row["bytes"]
        lines.append(
            f"{row['model']:15} {row['how']:8} {row['layers']:6} {row['variables']:9} "
            f"{row['bytes'] / 1024:8.0f} {estimate:8.2f}x"
        )
    lines.append("")
    lines.append(f"{'bytes':12} {'base':>8} {'layer':>8} {'variable':>8}  worst, mean error")
    for name, fit in fits.items():
        own = [row for row in rows if name not in ("built", "arrived") or row["how"] == name]
        errors = [
            abs(float(np.dot((1, row["layers"], row["variables"]), fit)) / row["bytes"] - 1)
            for row in own
        ]
        cells = " ".join(f"{value:8.0f}" for value in fit)
        lines.append(f"{name:12} {cells}  {max(errors):.0%}, {np.mean(errors):.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
