"""Train a model in rounds of averaging, on digits that stay on the workers that have them.

Two worker processes have scikit-learn's handwritten digits, unevenly and of different classes.
Each round trains a replica on each worker's own; the weights meet in a mean, and go out again.
Beside it: a model trained on one worker's digits alone, as long, and an ensemble of every worker's
model. Exit status 1 if the averaged model is not the better one of it and the lone one.

Run ``python examples/averaging.py``.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

# before TensorFlow is imported, here and in the workers started here
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
from dask.distributed import Client, LocalCluster

from dask_keras_serialize.workflows.averaging import fit_rounds

HELD_OUT = 360
CLASSES = 10
EPOCHS = 2

Part = tuple[np.ndarray, np.ndarray]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return all digits, 8 x 8 pixels in [0, 1], and what they are, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = (digits.images / 16).astype("float32")[..., np.newaxis]
    return images[order], digits.target.astype("int64")[order]


def load_part(number: int) -> Part:
    """Load what one worker has; runs there, so that the digits are nowhere else.

    The first has most of the digits from 0 to 5, the other those from 4 to 9, and fewer.
    """
    images, labels = (each[HELD_OUT:] for each in load_digits())
    first = (labels < 4) | ((labels < 6) & (np.arange(len(labels)) % 2 == 0))
    own = np.flatnonzero(first if number == 0 else ~first)
    own = own if number == 0 else own[: len(own) * 2 // 3]
    return images[own], labels[own]


def describe(part: Part) -> tuple[int, list[int]]:
    """Say how many digits of each class a part has; runs on a worker."""
    return len(part[1]), np.bincount(part[1], minlength=CLASSES).tolist()


def build_model() -> Any:
    """Build and compile the CNN."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.2, seed=0),
            layers.Dense(64, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ],
        name="digits",
    )
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    return model


def train(model: Any, part: Part) -> float:
    """Train a replica on what its worker has; return the loss."""
    x, y = part
    fitted = model.fit(x, y, batch_size=32, epochs=EPOCHS, shuffle=False, verbose=0)
    return float(fitted.history["loss"][-1])


def train_alone(model: Any, part: Part, rounds: int) -> tuple[Any, list[float]]:
    """Train a model on one part only; return it, and its accuracy after each round."""
    x, y = (each[:HELD_OUT] for each in load_digits())
    reached = []
    for _ in range(rounds):
        train(model, part)
        reached.append(accuracy(model.predict(x, verbose=0), y))
    return model, reached


def predict(model: Any, x: np.ndarray) -> np.ndarray:
    """Predict the classes' probabilities; runs on a worker."""
    return model.predict(x, verbose=0)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right predictions."""
    return float(np.mean(predicted.argmax(axis=1) == labels))


def rebuilt_and_moved(dask_worker: Any) -> tuple[int, int, int]:
    """Count models rebuilt and filled, and bytes from other workers; runs on a worker."""
    from dask_keras_serialize.workflows.replicas import counts

    moved = sum(message["total"] for message in dask_worker.transfer_incoming_log)
    return counts["rebuilt"], counts["filled"] + counts["kept"], moved


def run(client: Client, rounds: int) -> dict[str, list[float]]:
    """Train in all three ways; return the accuracies after each round."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    parts = [
        client.submit(load_part, number, workers=[worker], pure=False)
        for number, worker in enumerate(workers)
    ]
    sizes = []
    for number, (size, classes) in enumerate(client.gather(client.map(describe, parts))):
        print(f"      worker {number} has {size} digits; of 0 to 9: {classes}")
        sizes.append(size)
    x, y = (each[:HELD_OUT] for each in load_digits())
    model = build_model()
    start = copy.deepcopy(model)
    nbytes = sum(weight.nbytes for weight in model.get_weights())

    print(f"\n[2/4] {rounds} rounds of averaging, {EPOCHS} epochs each", flush=True)
    averaged = []

    def on_round(number: int, losses: list[float]) -> None:
        averaged.append(accuracy(predict(model, x), y))
        bar = "#" * (number + 1) + "." * (rounds - number - 1)
        said = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"      [{bar}] losses {said}; accuracy {averaged[-1]:.1%}", flush=True)

    began = time.perf_counter()
    fit_rounds(model, train, parts, rounds=rounds, weights=sizes, on_round=on_round, client=client)
    print(f"      {time.perf_counter() - began:.1f} s")
    counted = client.run(rebuilt_and_moved).values()
    rebuilt, filled, moved = (sum(each) for each in zip(*counted, strict=True))
    print(f"      models rebuilt: {rebuilt}, replicas filled with new weights: {filled}")
    print(
        f"      from worker to worker: {moved:,} bytes, {moved / nbytes / rounds:.1f} times the "
        f"weights ({nbytes:,} bytes) a round; the digits stayed"
    )

    print(f"\n[3/4] Each worker's digits alone, {rounds * EPOCHS} epochs", flush=True)
    futures = [client.submit(train_alone, start, part, rounds, pure=False) for part in parts]
    models = [client.submit(lambda trained: trained[0], future) for future in futures]
    reached = client.gather([client.submit(lambda trained: trained[1], each) for each in futures])
    lone = {f"worker {number} alone": each for number, each in enumerate(reached)}
    mean = np.mean(client.gather(client.map(predict, models, x=x)), axis=0)
    return {"averaged": averaged, **lone, "ensemble": [accuracy(mean, y)]}


def draw(path: Path, accuracies: dict[str, list[float]]) -> None:
    """Draw accuracy over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, reached in accuracies.items():
        numbers = range(1, len(reached) + 1)
        if len(reached) > 1 or name != "ensemble":
            axes.plot(numbers, reached, marker="o", linewidth=3 if name == "averaged" else 1.5,
                      label=name)  # fmt: skip
        else:
            axes.axhline(reached[0], color="tab:gray", linestyle="--", label="ensemble of the two")
    axes.set(xlabel="round", ylabel=f"accuracy on {HELD_OUT} digits that no worker has",
             title="Two workers, each with digits of its own", ylim=(0, 1))  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the example; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for averaging.png (default: examples/output)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    print("[1/4] Two worker processes of one thread, each with digits of its own", flush=True)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        accuracies = run(client, arguments.rounds)
    for name, reached in accuracies.items():
        print(f"      {name:<16}{reached[-1]:6.1%}")
    print("\n[4/4] Draw", flush=True)
    path = arguments.output / "averaging.png"
    draw(path, accuracies)
    print(f"      picture: {path}")
    averaged = accuracies["averaged"][-1]
    lone = max(reached[-1] for name, reached in accuracies.items() if "alone" in name)
    took = f"{time.perf_counter() - start:.0f} s"
    if averaged <= lone:
        print(f"\nThe averaged model is NOT better than one of a worker alone ({took})")
        return 1
    print(f"\nThe averaged model is right on {averaged - lone:.1%} more than a lone one ({took})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
