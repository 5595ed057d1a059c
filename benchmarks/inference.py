"""Measure predict against dask-ml's ParallelPostFit: python benchmarks/inference.py [--json FILE].

Ours, and ParallelPostFit around a plain estimator and around one of scikeras, predict on
the same chunks, on the same two worker processes of one thread, in turns. The clock runs from the
call that makes the lazy array until its values are here; one run of each warms up, which traces.
What each gave is compared, after its time was taken, with ``model.predict`` on each chunk here.
Prints a row for each, and the ratio to ours; --json writes the rows. Needs dask-ml and scikeras
(`pip install dask-keras-serialize[dask-ml]`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from sklearn.base import BaseEstimator

#: Rows of the array, rows of a chunk, rows of a batch.
SIZES = ((1600, 32, 32), (3200, 200, 32), (6400, 1600, 32), (6400, 1600, 400))


@dataclass(frozen=True)
class Settings:
    """What decides what is measured; part of every row."""

    seed: int = 20260
    repetitions: int = 5
    workers: int = 2
    threads: int = 1


class Plain(BaseEstimator):
    """What people write to give a Keras model to ParallelPostFit.

    Of one number for each row: of an array's chunks it takes no more (``drop_axis=1``).
    """

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size

    def fit(self, x: Any, y: Any = None) -> Plain:
        return self

    def predict(self, x: Any) -> Any:
        return self.model.predict(x, batch_size=self.batch_size, verbose=0).ravel()


def dense() -> Any:
    """A small network, on rows of 64 numbers."""
    import keras

    layers = keras.layers
    return keras.Sequential(
        [keras.Input((64,)), layers.Dense(64, activation="relu"), layers.Dense(1)], name="dense"
    )


def convolutional() -> Any:
    """A network of five convolutions, on rows that it takes for images of 16 x 16 x 3."""
    import keras

    layers = keras.layers
    stack = [keras.Input((768,)), layers.Reshape((16, 16, 3))]
    for width in (16, 16, 32, 32, 64):
        stack.append(layers.Conv2D(width, 3, padding="same", activation="relu"))
    return keras.Sequential(
        [*stack, layers.GlobalAveragePooling2D(), layers.Dense(1)], name="convolutional"
    )


def peers(model: Any, x: Any, batch_size: int) -> dict[str, Callable[[], Any]]:
    """Return what makes the lazy array, by peer; ours first."""
    from dask_ml.wrappers import ParallelPostFit
    from scikeras.wrappers import KerasRegressor

    from dask_keras_serialize.workflows.inference import predict

    meta = np.empty((0,), "float32")
    few = np.zeros((2, x.shape[1]), "float32"), np.zeros(2, "float32")
    theirs = KerasRegressor(model=model, loss="mse", batch_size=batch_size, verbose=0)
    theirs.initialize(*few)
    plain = ParallelPostFit(Plain(model, batch_size), predict_meta=meta)
    scikeras = ParallelPostFit(theirs, predict_meta=meta)
    return {
        "predict": lambda: predict(model, x, batch_size=batch_size),
        "ParallelPostFit": lambda: plain.predict(x),
        "ParallelPostFit, scikeras": lambda: scikeras.predict(x),
    }


def held(dask_scheduler: Any) -> int:
    """Count the tasks that a scheduler remembers."""
    return len(dask_scheduler.tasks)


def measure(client: Any, settings: Settings, build: Callable[[], Any]) -> list[dict[str, Any]]:
    """Measure all peers on all sizes of one model.

    Parameters
    ----------
    client : distributed.Client
    settings : Settings
    build : callable
        Makes the model.

    Returns
    -------
    list of dict
        A row for each size and peer.
    """
    import dask.array as da
    import keras

    keras.utils.set_random_seed(settings.seed)
    model = build()
    rows = []
    for count, chunk, batch_size in SIZES:
        data = np.random.default_rng(settings.seed).normal(size=(count, model.input_shape[1]))
        x = client.persist(da.from_array(data.astype("float32"), chunks=(chunk, -1)))
        parts = np.split(data.astype("float32"), count // chunk)
        model_here = [model.predict(part, batch_size=batch_size, verbose=0) for part in parts]
        expected = np.concatenate(model_here).ravel()
        taken: dict[str, list[float]] = {}
        for repetition in range(1 + settings.repetitions):
            for peer, make in peers(model, x, batch_size).items():
                began = time.perf_counter()
                found = client.compute(make()).result()
                seconds = time.perf_counter() - began
                while client.run_on_scheduler(held) > len(parts):  # a result kept is not computed
                    time.sleep(0.01)
                if not np.allclose(found.ravel(), expected, rtol=1e-4, atol=1e-5):
                    raise RuntimeError(f"{peer} does not give what model.predict does")
                if repetition:
                    taken.setdefault(peer, []).append(seconds)
                print(f"{model.name} {chunk} {peer} {seconds:.2f} s", file=sys.stderr, flush=True)
        ours = statistics.median(taken["predict"])
        for peer, seconds in taken.items():
            rows.append(
                {
                    "workload": f"{model.name}, {count} rows in chunks of {chunk}",
                    "batch_size": batch_size,
                    "peer": peer,
                    "equal": True,
                    "settings": asdict(settings),
                    "seconds": seconds,
                    "median": statistics.median(seconds),
                    "minimum": min(seconds),
                    "ratio": statistics.median(seconds) / ours,
                    **cases.environment(),
                }
            )
    return rows


def main() -> None:
    """Run the command."""
    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--repetitions", type=int, default=Settings.repetitions)
    options = parser.parse_args()
    settings = Settings(repetitions=options.repetitions)
    rows = []
    with (
        LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=settings.threads,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        for build in (dense, convolutional):
            rows += measure(client, settings, build)
    for row in rows:
        print(
            f"{row['workload']:<45} batches of {row['batch_size']:<4} {row['peer']:<26}"
            f"{row['median']:7.2f} s  {row['ratio']:5.1f}x"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
