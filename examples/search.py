"""Search for the best Keras model on Dask workers, by dask-ml's Hyperband.

Candidates with other widths, dropouts and learning rates learn scikit-learn's handwritten digits
batch by batch. Hyperband trains all of them a little, and goes on with the best: workers copy,
score and exchange the models all the while. Exit status 1 if the winner does not hold what it
promised, on digits that nobody has seen.

Needs ``pip install dask-keras-serialize[dask-ml,tensorflow-cpu] matplotlib``. Run
``python examples/search.py`` for two worker processes on this machine, or add
``--scheduler tcp://host:8786`` for a cluster that runs already.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

# before TensorFlow is imported, here and in the workers started here
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster, get_worker
from dask_ml.model_selection import HyperbandSearchCV

from dask_keras_serialize.workflows.estimators import WarmClassifier
from dask_keras_serialize.workflows.searching import adaptive_search

CLASSES = 10
BATCH = 207
SCORES = "search-scores"

PARAMETERS = {
    "hidden": [8, 16, 32, 64, 128],
    "dropout": [0.0, 0.2, 0.4, 0.6],
    "learning_rate": np.logspace(-4, -1, 13).tolist(),
}


def build(hidden: int, dropout: float, learning_rate: float) -> Any:
    """Build and compile a candidate; runs on a worker."""
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((64,)),
            layers.Dense(hidden, activation="relu"),
            layers.Dropout(dropout),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy")
    return model


def score(candidate: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Score a candidate, and tell who looks on; runs on a worker."""
    accuracy = float(candidate.score(x, y))
    get_worker().log_event(SCORES, accuracy)
    return accuracy


def predict(candidate: Any, x: np.ndarray) -> np.ndarray:
    """Predict the digits' labels; runs on a worker."""
    return candidate.predict(x)


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 1449 digits to search with and 348 to judge by, 64 pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order]
    seen = 7 * BATCH
    return x[:seen], y[:seen], x[seen:], y[seen:]


class Progress:
    """A line on the terminal that grows with each score; where there is none, a line for each."""

    WIDTH = 32

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.best = 0.0
        self.start = time.perf_counter()

    def __call__(self, event: tuple[float, float]) -> None:
        """Take an event of a worker's: when, and which score."""
        self.done += 1
        self.best = max(self.best, event[1])
        live = sys.stdout.isatty()
        if live or self.done == self.total or self.done % 10 == 0:
            print(("\r" if live else "") + self.line(), end="" if live else "\n", flush=True)

    def line(self) -> str:
        """Say how far the search is."""
        filled = min(self.WIDTH, self.WIDTH * self.done // self.total)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        seconds = time.perf_counter() - self.start
        scores = f"{self.done:{len(str(self.total))}}/{self.total} scores"
        return f"      [{bar}] {scores}, best {self.best:5.1%}, {seconds:3.0f} s"


def scores_to_come(search: HyperbandSearchCV) -> int:
    """Count how often a search will score: all after the first call, and before each decision."""
    total = 0
    for bracket in search.metadata["brackets"]:
        decisions, candidates = bracket["decisions"], bracket["n_models"]
        total += sum(candidates // search.aggressiveness**i for i in range(len(decisions)))
        if decisions[0] > 1:
            total += candidates
    return total


def connect(scheduler: str | None, stack: contextlib.ExitStack) -> Client:
    """Connect to a cluster, or start one of two processes with a thread each."""
    if scheduler is None:
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        )
        return stack.enter_context(Client(stack.enter_context(cluster)))
    client = stack.enter_context(Client(scheduler, timeout="30s"))
    client.wait_for_workers(1, timeout=60)
    return client


def find(client: Client, x: np.ndarray, y: np.ndarray, max_iter: int) -> HyperbandSearchCV:
    """Search, and show how far it is."""
    candidate = WarmClassifier(
        build, hidden=32, dropout=0.2, learning_rate=0.001, batch_size=32, verbose=0
    )
    search = HyperbandSearchCV(
        candidate, PARAMETERS, max_iter=max_iter, scoring=score, random_state=0
    )
    batches = da.from_array(x, chunks=(BATCH, -1)), da.from_array(y, chunks=BATCH)
    plan = search.metadata
    print(f"      {plan['n_models']} candidates, {plan['partial_fit_calls']} calls of partial_fit")
    progress = Progress(scores_to_come(search))
    client.subscribe_topic(SCORES, progress)
    try:
        with adaptive_search():
            search.fit(*batches, classes=list(range(CLASSES)))
    finally:
        client.unsubscribe_topic(SCORES)
        print(flush=True)
    return search


def draw(path: Path, search: HyperbandSearchCV) -> None:
    """Draw how each candidate learned, and where the good ones are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5), width_ratios=(1.25, 1), layout="constrained"
    )
    colours = plt.get_cmap("viridis")
    norm = plt.Normalize(0, 100)
    histories = search.model_history_
    best_name = search.cv_results_["model_id"][search.best_index_]
    # the best above the others
    for name, rows in sorted(histories.items(), key=lambda item: item[0] == best_name):
        best = name == best_name
        left.plot(
            [row["partial_fit_calls"] for row in rows],
            [100 * row["score"] for row in rows],
            color="tab:red" if best else colours(norm(100 * rows[-1]["score"])),
            linewidth=2.5 if best else 1.2,
            marker="o",
            markersize=4,
            label="the best" if best else None,
        )
    left.set_xlabel("calls of partial_fit")
    left.set_ylabel("digits right, of the search's own test set [%]")
    left.set_title(f"{len(histories)} candidates: most are stopped early")
    left.legend(frameon=False, loc="lower right")
    left.grid(alpha=0.3)

    last = [rows[-1] for rows in histories.values()]
    jitter = np.random.default_rng(0).uniform(0.94, 1.06, len(last))
    points = right.scatter(
        [row["params"]["learning_rate"] for row in last],
        [row["params"]["hidden"] * by for row, by in zip(last, jitter, strict=True)],
        s=[20 + 25 * row["partial_fit_calls"] for row in last],
        c=[100 * row["score"] for row in last],
        cmap=colours,
        norm=norm,
        edgecolors="black",
        linewidths=0.5,
    )
    chosen = search.best_params_
    right.scatter(
        chosen["learning_rate"], chosen["hidden"], marker="*", s=260, color="tab:red", zorder=3
    )
    right.set_xscale("log")
    right.set_yscale("log", base=2)
    right.set_yticks(PARAMETERS["hidden"], [str(width) for width in PARAMETERS["hidden"]])
    right.set_xlabel("learning rate")
    right.set_ylabel("units in the hidden layer")
    right.set_title("Where the good ones are; larger: trained longer")
    figure.colorbar(points, ax=right, label="digits right when stopped [%]")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the search; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scheduler", metavar="ADDRESS", help="use the cluster of this scheduler")
    parser.add_argument("--max-iter", type=int, default=9, help="calls that a candidate may get")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for search.png (default: examples/output)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    x, y, x_new, y_new = load_digits()
    with contextlib.ExitStack() as stack:
        where = arguments.scheduler or "two worker processes of one thread"
        print(f"\n[1/3] Connect to {where}", flush=True)
        client = connect(arguments.scheduler, stack)
        print(f"\n[2/3] Search, with {len(x)} digits in batches of {BATCH}", flush=True)
        search = find(client, x, y, arguments.max_iter)
        for name, value in sorted(search.best_params_.items()):
            print(f"      {name:<14} {value:.4g}")
        print("\n[3/3] Judge the winner, and draw", flush=True)
        here = search.best_estimator_.predict(x_new)
        there = client.submit(predict, search.best_estimator_, x_new).result()
    promised, right = search.best_score_, float(np.mean(here == y_new))
    print(f"      {promised:.1%} right in the search, {right:.1%} of {len(x_new)} new digits")
    draw(arguments.output / "search.png", search)
    print(f"      picture: {arguments.output / 'search.png'}")
    took = f"{time.perf_counter() - start:.0f} s"
    if not np.array_equal(here, there):
        print(f"\nThe winner predicts otherwise on a worker ({took})")
        return 1
    if right < promised - 0.1:
        print(f"\nThe winner does NOT hold what it promised ({took})")
        return 1
    print(f"\nThe winner holds what it promised, here and on a worker ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
