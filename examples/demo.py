"""Predict and train on Dask workers with a Keras model, and check every bit of it.

A small CNN learns scikit-learn's handwritten digits here; then the model is scattered,
passed to tasks, trained on a worker and returned, with plain Dask code. Every result is
compared bit by bit with what the same call gives in this process. Exit status 1 if
anything differs.

Run ``python examples/demo.py`` for two worker processes on this machine, or add
``--scheduler tcp://host:8786`` for a cluster that runs already.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# before TensorFlow is imported, here and in the workers started here
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# sums in another order may differ in their last bits: one thread, and no oneDNN, which
# takes its order from the processor (and says so in every process)
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import dask
import numpy as np
from dask.distributed import Client, Future, LocalCluster, as_completed

CHUNKS = 8
BATCH = 45
CLASSES = 10


def predict(chunk: np.ndarray, model: Any) -> np.ndarray:
    """Predict the classes' probabilities of one chunk; runs on a worker."""
    return model.predict(chunk, batch_size=BATCH, verbose=0)


def train(model: Any, x: np.ndarray, y: np.ndarray, epochs: int) -> Any:
    """Train a model further and return it; runs on a worker."""
    model.fit(x, y, batch_size=32, epochs=epochs, shuffle=False, verbose=0)
    return model


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 1437 digits to train with and 360 to predict, 8 x 8 pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype("float32")[..., np.newaxis]
    labels = digits.target.astype("int64")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    held_out = CHUNKS * BATCH
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def build_model() -> Any:
    """Build and compile the CNN."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.3, seed=0),
            layers.Dense(256, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ],
        name="digits",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def state_of(model: Any) -> list[np.ndarray]:
    """Return all that training goes on from: weights, seeds, the optimizer's state."""
    import keras

    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


class Report:
    """Prints steps with their times, and keeps count of the comparisons."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step_number = 0
        self.compared = 0
        self.different = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print a title, then how long what is inside took."""
        self.step_number += 1
        print(f"\n[{self.step_number}/{self.steps}] {title}", flush=True)
        start = time.perf_counter()
        yield
        print(f"      {time.perf_counter() - start:.1f} s", flush=True)

    def say(self, text: str) -> None:
        """Print a line of the current step."""
        print(f"      {text}", flush=True)

    def compare(self, what: str, got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Print whether two lists of arrays are the same, to the last bit."""
        self.compared += 1
        same = len(got) == len(expected) and all(
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            for a, b in zip(got, expected, strict=True)
        )
        nbytes = sum(array.nbytes for array in expected)
        if same:
            self.say(f"bit-equal: {what} ({nbytes:,} bytes)")
        else:
            self.different += 1
            self.say(f"DIFFERENT: {what}, {_largest_difference(got, expected)}")

    def watch(self, futures: Sequence[Future]) -> None:
        """Show how many futures are done, until all are."""
        live = sys.stdout.isatty()
        for done, _ in enumerate(as_completed(futures), start=1):
            if live or done == len(futures):
                bar = "#" * done + "." * (len(futures) - done)
                print(
                    f"{chr(13) if live else ''}      [{bar}] {done}/{len(futures)} chunks",
                    end="\n" if done == len(futures) else "",
                    flush=True,
                )


def _largest_difference(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str:
    if [a.shape for a in got] != [b.shape for b in expected]:
        return "not even of the same shapes"
    largest = max(
        float(np.max(np.abs(a.astype("float64") - b.astype("float64")), initial=0))
        for a, b in zip(got, expected, strict=True)
    )
    return f"by {largest:.2g} at most"


def connect(scheduler: str | None, stack: contextlib.ExitStack) -> Client:
    """Connect to a cluster, or start one of two processes with a thread each."""
    if scheduler is None:
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        )
        return stack.enter_context(Client(stack.enter_context(cluster)))
    client = stack.enter_context(Client(scheduler, timeout="30s"))
    client.wait_for_workers(1, timeout=60)
    return client


def without_gpu(client: Client) -> list[str]:
    """Return the addresses of the workers that compute as this process does."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [address for address, row in workers.items() if "GPU" not in row["resources"]]


def predict_all(model: Any, chunks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Predict all chunks in this process."""
    return [predict(chunk, model) for chunk in chunks]


def accuracy(predictions: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """Return the share of right predictions."""
    return float(np.mean(np.concatenate(predictions).argmax(axis=1) == labels))


class Outcome(NamedTuple):
    """What the steps give: the model a worker trained, the test digits, its predictions."""

    model: Any
    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


def run(client: Client, report: Report, epochs: int) -> Outcome:
    """Go through the steps."""
    with report.step("Train here, on scikit-learn's digits"):
        x, y, x_test, y_test = load_digits()
        model = train(build_model(), x, y, epochs)
        chunks = np.split(x_test, CHUNKS)
        expected = predict_all(model, chunks)
        report.say(f"{len(x)} digits to train with, {len(x_test)} to predict")
        report.say(
            f"{model.count_params():,} parameters, accuracy {accuracy(expected, y_test):.1%}"
        )

    workers = without_gpu(client)
    with dask.annotate(workers=workers):
        with report.step(f"Scatter the model to {len(workers)} workers, predict by its future"):
            future = client.scatter(model, broadcast=True, workers=workers)
            holders = client.who_has([future])[future.key]
            report.say(f"workers that hold the model: {len(holders)}")
            futures = client.map(predict, chunks, model=future)
            report.watch(futures)
            report.compare("predictions", client.gather(futures), expected)
            report.compare("the model, gathered again", state_of(future.result()), state_of(model))

        with report.step("Predict with the model as a plain argument"):
            futures = client.map(predict, chunks, model=model)
            report.watch(futures)
            report.compare("predictions", client.gather(futures), expected)
            delayed = dask.delayed(predict)(chunks[0], model)
            report.compare("one chunk by dask.delayed", [delayed.compute()], expected[:1])

        with report.step(f"Train {epochs} more epochs on a worker, and here"):
            future = client.submit(train, model, x, y, epochs)
            local = train(copy.deepcopy(model), x, y, epochs)
            trained = future.result()
            report.compare("weights, optimizer, dropout seed", state_of(trained), state_of(local))
            predictions = predict_all(trained, chunks)
            report.compare("predictions after training", predictions, predict_all(local, chunks))
            report.say(f"accuracy {accuracy(predictions, y_test):.1%}")
    return Outcome(trained, x_test, y_test, np.concatenate(predictions))


def ship(model: Any) -> dict[str, tuple[int, float]]:
    """Measure bytes and seconds of a model's way there and back, ours and Keras's own."""

    def installed() -> int:
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
        pickle.loads(data, buffers=buffers)
        return len(data) + sum(buffer.raw().nbytes for buffer in buffers)

    def keras_own() -> int:
        # what pickle asks for where nothing else is installed
        function, arguments = model.__reduce__()[:2]
        data = pickle.dumps(arguments, protocol=5)
        function(*pickle.loads(data))
        return len(data)

    return {
        "dask-keras-serialize": _measure(installed),
        "Keras's own pickle": _measure(keras_own),
    }


def _measure(call: Callable[[], int], times: int = 5) -> tuple[int, float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        nbytes = call()
        seconds.append(time.perf_counter() - start)
    return nbytes, min(seconds)


def draw(
    path: Path,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    costs: dict[str, tuple[int, float]],
) -> None:
    """Draw some digits with their predicted labels, and what shipping the model costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    predicted = predictions.argmax(axis=1)
    one_of_each = [int(np.flatnonzero(labels == label)[0]) for label in range(CLASSES)]
    least_sure = predictions.max(axis=1).argsort()[:CLASSES]
    wrong = int((predicted != labels).sum())

    figure = plt.figure(figsize=(11, 6.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.06)
    top.suptitle(
        f"{len(images) - wrong} of {len(images)} digits right, by the model a Dask worker trained",
        fontsize=14,
    )
    rows = top.subplots(2, CLASSES)
    for axes, i in zip(rows.flat, [*one_of_each, *least_sure], strict=True):
        right = predicted[i] == labels[i]
        axes.imshow(images[i, ..., 0], cmap="gray_r")
        title = f"{predicted[i]}" if right else f"{predicted[i]}, is {labels[i]}"
        axes.set_title(title, fontsize=13, color="black" if right else "tab:red")
        axes.set(xticks=[], yticks=[])
    rows[0, 0].set_ylabel("one of each", fontsize=11)
    rows[1, 0].set_ylabel("least sure", fontsize=11)

    bottom.suptitle("The trained model and its optimizer: packed, and opened again", fontsize=14)
    panels = zip(
        bottom.subplots(1, 2, sharey=True),
        ("time there and back, best of 5 [ms]", "size [MB]"),
        ([1e3 * seconds for _, seconds in costs.values()], [n / 1e6 for n, _ in costs.values()]),
        ("{:.0f} ms", "{:.2f} MB"),
        strict=True,
    )
    for axes, unit, values, form in panels:
        bars = axes.barh(list(costs), values, color=("tab:blue", "tab:gray"), height=0.6)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=11)
        axes.set_xlabel(unit)
        axes.set_xlim(0, 1.25 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scheduler", metavar="ADDRESS", help="use the cluster of this scheduler")
    parser.add_argument("--epochs", type=int, default=4, help="of each of the two trainings")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for demo.png (default: examples/output)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = Report(steps=6)
    with contextlib.ExitStack() as stack:
        where = arguments.scheduler or "two worker processes of one thread"
        with report.step(f"Connect to {where}"):
            client = connect(arguments.scheduler, stack)
            workers = client.scheduler_info(n_workers=-1)["workers"]
            report.say(f"workers: {len(workers)}")
        outcome = run(client, report, arguments.epochs)
    with report.step("Measure what shipping the model costs, and draw"):
        costs = ship(outcome.model)
        for name, (nbytes, seconds) in costs.items():
            report.say(f"{name:<22}{1e3 * seconds:6.0f} ms there and back, {nbytes / 1e6:.2f} MB")
        path = arguments.output / "demo.png"
        draw(path, outcome.images, outcome.labels, outcome.predictions, costs)
        report.say(f"picture: {path}")
    took = f"{time.perf_counter() - start:.0f} s"
    if report.different:
        print(f"\n{report.different} of {report.compared} comparisons DIFFER ({took})")
        return 1
    print(f"\nAll {report.compared} comparisons are bit-equal ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
