"""A Hyperband search over Keras models, by three ways in turn, and what one call of it costs.

``python benchmarks/search.py`` runs dask-ml's HyperbandSearchCV on two worker processes, over
scikeras with Keras's own pickle (this package installed, but off), over scikeras with this package,
and over its WarmClassifier; each in processes of its own. Then, in one process, what a search does
with a candidate at each step, ``copy.deepcopy``, ``partial_fit`` and ``score``, beside the same
training and prediction by a Keras model that is warm already; how much of it is the copy; and what
a step takes with a candidate that comes from another worker, pickled, in place of a copy. Scores
are compared after the clock has stopped: all ways have to give the same.

It needs the ``dask-ml`` extra. ``--calls`` measures the steps alone, on any backend, without
dask-ml.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import cases
import numpy as np

KERAS = "scikeras, Keras's pickle"
OURS = "scikeras, dask-keras-serialize"
WARM = "WarmClassifier"
WAYS = (KERAS, OURS, WARM)
BARE = "the model alone"

#: Units of the hidden layers in the steps that are measured one by one.
WIDTHS = (32, 1024)
BATCH = 207
#: How often a candidate is moved.
MOVES = 5


def build(hidden: int, rate: float) -> Any:
    """Build an MLP for the digits whose first weights are always the same."""
    import keras

    def dense(units: int, activation: str, seed: int) -> Any:
        first = keras.initializers.GlorotUniform(seed=seed)
        return keras.layers.Dense(units, activation, kernel_initializer=first)

    layers = [dense(hidden, "relu", 1), dense(hidden, "relu", 2), dense(10, "softmax", 3)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    return model


def estimator(way: str, **settings: Any) -> Any:
    """Make what a way searches with."""
    if way == WARM:
        from dask_keras_serialize.workflows.estimators import WarmClassifier as Classifier
    else:
        from scikeras.wrappers import KerasClassifier as Classifier
    settings = {"hidden": 32, "rate": 0.001} | settings
    return Classifier(
        build, **settings, batch_size=32, verbose=0, random_state=0, fit__shuffle=False
    )


def digits() -> tuple[cases.Array, cases.Array]:
    """Return 7 batches of digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32")[: 7 * BATCH], y[: 7 * BATCH]


def count_bytes() -> None:
    """Count, from now on, what this process writes to others."""
    from distributed.comm.tcp import TCP

    if not hasattr(TCP, "written"):
        write = TCP.write

        async def counting(self: Any, *args: Any, **kwargs: Any) -> int:
            nbytes: int = await write(self, *args, **kwargs)
            TCP.written += nbytes
            return nbytes

        TCP.write = counting
    TCP.written = 0


def counted() -> int:
    """Return the bytes."""
    from distributed.comm.tcp import TCP

    return int(TCP.written)


def count_calls() -> None:
    """Count, from now on, the calls of partial_fit in this process; speculative ones too."""
    from scikeras.wrappers import KerasClassifier

    if not hasattr(KerasClassifier, "calls"):
        partial_fit = KerasClassifier.partial_fit

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            KerasClassifier.calls += 1
            return partial_fit(self, *args, **kwargs)

        KerasClassifier.partial_fit = counting
    KerasClassifier.calls = 0


def calls() -> int:
    """Return the calls."""
    from scikeras.wrappers import KerasClassifier

    return int(KerasClassifier.calls)


def _warm_up(way: str) -> None:
    x, y = digits()
    estimator(way, hidden=2).partial_fit(x[:BATCH], y[:BATCH], classes=range(10)).score(x, y)


def search(way: str, max_iter: int) -> dict[str, Any]:
    """Run the search by one way, in this process and two workers; return its row."""
    import dask
    import dask.array as da
    from dask_ml.model_selection import HyperbandSearchCV
    from distributed import Client, LocalCluster

    x, y = digits()
    batches = da.from_array(x, chunks=(BATCH, -1)), da.from_array(y, chunks=BATCH)
    parameters = {"hidden": [32, 64, 128, 256, 512], "rate": np.logspace(-4, -2, 9).tolist()}
    hyperband = HyperbandSearchCV(estimator(way), parameters, max_iter=max_iter, random_state=0)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.run(_warm_up, way)
        client.run(count_calls)
        client.run(count_bytes)
        count_bytes()
        busy = time.process_time() + sum(client.run(time.process_time).values())
        began = time.perf_counter()
        # what `adaptive_search` does, but for importing this package, which turns it on
        with dask.config.set(scheduler=client.get):
            hyperband.fit(*batches, classes=list(range(10)))
        seconds = time.perf_counter() - began
        busy = time.process_time() + sum(client.run(time.process_time).values()) - busy
        nbytes = counted() + sum(client.run(counted).values())
        ran = sum(client.run(calls).values())
    history = hyperband.history_
    return {
        "what": "search",
        "way": way,
        "max_iter": max_iter,
        "seconds": seconds,
        "cpu_seconds": busy,
        "bytes": nbytes,
        "candidates": len(hyperband.model_history_),
        "partial_fit_calls": hyperband.metadata_["partial_fit_calls"],
        "partial_fit_calls_run": ran,
        "partial_fit_median": statistics.median(row["partial_fit_time"] for row in history),
        "score_median": statistics.median(row["score_time"] for row in history),
        "best_score": float(hyperband.best_score_),
        "scores": sorted(
            (str(row["model_id"]), row["partial_fit_calls"], float(row["score"])) for row in history
        ),
        "ours": "dask_keras_serialize.pickling" in sys.modules,
        **cases.environment(),
    }


def steps(repetitions: int) -> list[dict[str, Any]]:
    """Time a search's step with one candidate, by all ways in turn; return their rows."""
    import dask_keras_serialize
    from dask_keras_serialize.workflows.replicas import POOL

    def turn_on(way: str) -> None:
        if way == KERAS:
            dask_keras_serialize.unregister()
        else:
            dask_keras_serialize.register()

    x, y = digits()
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]
    rows = []
    for width in WIDTHS:
        seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, BARE)}
        copies: dict[str, list[float]] = {way: [] for way in WAYS}
        moved: dict[str, list[float]] = {way: [] for way in WAYS}
        scores: dict[str, list[float]] = {way: [] for way in seconds}
        candidates = {
            way: estimator(way, hidden=width).partial_fit(*batches[0], classes=range(10))
            for way in WAYS
        }
        bare = build(width, 0.001)
        for number in range(-1, repetitions):  # the first warms up
            batch = batches[number % len(batches)]
            for way in seconds:
                turn_on(way)
                began = time.perf_counter()
                if way == BARE:
                    bare.fit(*batch, batch_size=32, shuffle=False, verbose=0)
                    predicted = bare.predict(batches[0][0], batch_size=32, verbose=0)
                    score = float(np.mean(predicted.argmax(axis=1) == batches[0][1]))
                else:
                    candidate = copy.deepcopy(candidates[way])
                    copied = time.perf_counter() - began
                    candidate.partial_fit(*batch, classes=range(10))
                    score = float(candidate.score(*batches[0]))
                    candidates[way] = candidate
                if number >= 0:
                    seconds[way].append(time.perf_counter() - began)
                    scores[way].append(score)
                if number >= 0 and way != BARE:
                    copies[way].append(copied)
        for way in WAYS * MOVES:
            turn_on(way)
            began = time.perf_counter()
            sent = pickle.dumps(candidates[way], 5)
            POOL.clear()  # there is no replica of it on the other worker
            came = pickle.loads(sent)
            came.partial_fit(*batches[0], classes=range(10)).score(*batches[0])
            moved[way].append(time.perf_counter() - began)
        dask_keras_serialize.register()
        if any(scores[way] != scores[WARM] for way in WAYS):
            raise RuntimeError(f"the ways differ in what they learn: {scores}")
        common = {"what": "step", "width": width, **cases.environment()}
        rows += [
            {
                "way": way,
                "seconds": times,
                "median": statistics.median(times),
                "copies": copies.get(way),
                "moved": moved.get(way),
                **common,
            }
            for way, times in seconds.items()
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for people."""
    lines = []
    searches = [row for row in rows if row["what"] == "search"]
    if searches:
        heads = ("way", "wall", "cpu", "moved", "calls", "run", "partial_fit", "score", "best")
        lines.append("{:32} {:>8} {:>8} {:>10} {:>6} {:>5} {:>12} {:>8} {:>7}".format(*heads))
        for row in searches:
            if "error" in row:
                lines.append(f"{row['way']:32} {row['error']}")
                continue
            lines.append(
                f"{row['way']:32} {row['seconds']:6.1f} s {row['cpu_seconds']:6.1f} s "
                f"{row['bytes'] / 2**20:6.1f} MiB "
                f"{row['partial_fit_calls']:6} {row['partial_fit_calls_run']:5} "
                f"{1e3 * row['partial_fit_median']:9.0f} ms {1e3 * row['score_median']:5.0f} ms "
                f"{row['best_score']:7.1%}"
            )
        lines.append("")
    steps = [row for row in rows if row["what"] == "step"]
    for row in steps:
        (bare,) = [
            other["median"]
            for other in steps
            if (other["width"], other["way"]) == (row["width"], BARE)
        ]
        over = ""
        if row["way"] != BARE:
            copied, moved = (statistics.median(row[what]) for what in ("copies", "moved"))
            over = (
                f"  {1e3 * (row['median'] - bare):6.0f} ms over it, {1e3 * copied:5.0f} of it the "
                f"copy; from another worker {1e3 * (moved - bare):6.0f}"
            )
        lines.append(
            f"step, {row['width']:4} units, {row['backend']:10} {row['way']:32} "
            f"{1e3 * row['median']:6.0f} ms{over}"
        )
    return "\n".join(lines)


def _in_process(*arguments: str, **env: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--calls", action="store_true", help="the steps alone, without dask-ml")
    parser.add_argument("--max-iter", type=int, default=9, help="of Hyperband")
    parser.add_argument("--repetitions", type=int, default=10, help="of each step")
    parser.add_argument("--search", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.search:
        print(json.dumps(search(arguments.search, arguments.max_iter)))
        return 0
    if arguments.steps:
        print(json.dumps(steps(arguments.repetitions)))
        return 0
    rows = []
    for way in () if arguments.calls else WAYS:
        print(f"search: {way}", file=sys.stderr, flush=True)
        row = _in_process(
            "--search", way, "--max-iter", str(arguments.max_iter),
            DASK_DASK_KERAS_SERIALIZE__REGISTER=str(way != KERAS),
        )  # fmt: skip
        rows.append({"what": "search", "way": way, "error": row} if isinstance(row, str) else row)
        print(table(rows[-1:]), file=sys.stderr, flush=True)
    print("steps", file=sys.stderr, flush=True)
    found = _in_process("--steps", "--repetitions", str(arguments.repetitions))
    if isinstance(found, str):
        raise RuntimeError(found)
    rows += found
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    results = [row["scores"] for row in rows if "scores" in row]
    if any(result != results[0] for result in results):
        print("\nThe ways' scores DIFFER")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
