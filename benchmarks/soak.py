"""Models without end through workers: python benchmarks/soak.py [--seconds 600] [--threads 2].

In each round models of three kinds (a functional one with its trained optimizer, a subclassed one
by value, a dense one of 16 MiB), of other numbers each time, go the ways that models go: scattered
and gathered; broadcast; as a task's argument, run there and returned; spilled and read again, for
the workers keep less in memory than there is. So do four of architectures that no process has seen
before, each three times: what arrives a third time is cloned from a template. Of these a worker
remembers REMEMBERED here, not a thousand, so that the first rounds fill what a process may keep.
Some of what arrived is called, as one here is. All are dropped after their checksums were
compared, and after each round every process says how much memory it has once it has given back
what is free, how many descriptors, threads and live objects of Keras, and how many models this
package has rebuilt there.

At the end the first third of the rounds is left out, in which pools and caches fill. Exit status 1
where over the others memory grew by more than a twentieth, or in a worker by more than KEPT bytes
for each model rebuilt in it, by its slope (the median of those between any two rounds: Theil and
Sen's), or where anything else was more by a few at the end. Models that workers fill are deep
copies; these, and what comes back to the client, do not count as rebuilt.

Nothing is trained on the way, nor does it ``predict``: what is measured is this package. Keras on
TensorFlow keeps some MB of each model that a process trains, and a third of one of each that
predicts, on a cluster or not; ``--train N`` says how much, by training N pairs of models here, one
after the other, without any serialization; ``--predict N`` the same of models that only predict.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

WORKERS = 4

#: Of each process, beside how much it has: how many were rebuilt there.
REBUILT = "rebuilt"

#: What there may be more at the end than after a third: memory, a part; the rest, a number.
MEMORY_PART, NUMBER = 0.05, 8

#: Bytes that a worker may keep of a model rebuilt in it: pools settle for as long as it runs.
KEPT = 20_000

#: Architectures in each round that are in no other; how many a process remembers of them, and of
#: distributed's messages.
NEW, REMEMBERED = 4, 40


def build(seed: int) -> list[Any]:
    """Build the three; train two of them."""
    import keras

    keras.utils.set_random_seed(seed)

    class Sub(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = keras.layers.Dense(64, activation="relu")
            self.out = keras.layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.out(self.hidden(x))

    inputs = keras.Input((32,))
    x = keras.layers.Dropout(0.1)(keras.layers.Dense(64, activation="relu")(inputs))
    functional = keras.Model(inputs, keras.layers.Dense(3)(x))
    subclassed = Sub()
    rows = np.random.default_rng(seed).normal(size=(64, 32)).astype("float32")
    for model in (functional, subclassed):
        model.compile("adam", "mse")
        model.fit(rows, np.zeros((64, 3)), verbose=0)
    dense = keras.Sequential(
        [
            keras.Input((2048,)),
            keras.layers.Dense(2048, use_bias=False, kernel_initializer="normal"),
        ]
    )
    return [functional, subclassed, dense]


def checksum(model: Any) -> list[float]:
    """Sum every variable."""
    values = [*model.variables, *(model.optimizer.variables if model.compiled else ())]
    return [float(np.asarray(each).sum(dtype="f8")) for each in values]


def run(model: Any) -> tuple[list[float], Any]:
    """Run a model; return its checksum and the model."""
    width = model.inputs[0].shape[-1] if getattr(model, "inputs", None) else 32
    model(np.ones((4, width), np.float32))
    return checksum(model), model


def refill(model: Any, number: int) -> None:
    """Give a model other numbers."""
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(number).random(variable.shape, np.float32))


def batch_for(model: Any) -> Any:
    """Make a batch that a model takes."""
    width = model.inputs[0].shape[-1] if getattr(model, "inputs", None) else 32
    return np.ones((4, width), np.float32)


def called(model: Any) -> Any:
    """Return what a model makes of a batch; not by ``predict``, of which Keras keeps traces."""
    import keras

    return keras.ops.convert_to_numpy(model(batch_for(model), training=False))


def predict(model: Any) -> Any:
    """Have a model predict, as users do."""
    return model.predict(batch_for(model), verbose=0)


def kept_of(use: Callable[[int], Any], count: int) -> float:
    """Use so many models by Keras alone; return the bytes kept of each use."""
    before = 0
    for number in range(-5, count):
        use(number)
        if number == -1:
            before = stand()["memory"]
    return (stand()["memory"] - before) / count


class Counted:
    """A function of any thread's, and how often it has returned."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.lock, self.returned = function, threading.Lock(), 0

    def __call__(self, *arguments: Any) -> Any:
        result = self.function(*arguments)
        with self.lock:
            self.returned += 1
        return result


def prepare() -> None:
    """Count from now on what this package rebuilds here, whatever way it came; remember less."""
    from dask_keras_serialize import protocol
    from dask_keras_serialize.configs import templates

    protocol._decode = Counted(protocol._decode)
    templates.REMEMBERED = REMEMBERED


def wait_for_release(client: Any, seconds: float = 10) -> None:
    """Wait until workers have heard that nobody wants a round's models; what stays is counted."""
    end = time.monotonic() + seconds
    while any(client.run(holds).values()) and time.monotonic() < end:
        time.sleep(0.05)


def holds(dask_worker: Any) -> int:
    """Return how many tasks a worker knows."""
    return len(dask_worker.state.tasks)


def stand() -> dict[str, int]:
    """Say what a process has."""
    import keras

    from dask_keras_serialize import protocol

    gc.collect()
    if sys.platform == "linux":  # what is free goes back: only what is kept counts
        ctypes.CDLL(None).malloc_trim(0)
    kinds = (keras.Layer, keras.Variable)
    process = psutil.Process()
    return {
        "memory": process.memory_info().rss,
        "files": process.num_fds(),
        "threads": threading.active_count(),
        # by type(): asking some of torch's objects for their class warns
        "objects": sum(issubclass(type(each), kinds) for each in gc.get_objects()),
        REBUILT: getattr(protocol._decode, "returned", 0),
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=2, help="of each worker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    parser.add_argument(
        "--train", type=int, default=0, metavar="N", help="train N pairs by Keras alone"
    )
    parser.add_argument(
        "--predict", type=int, default=0, metavar="N", help="predict with N models by Keras alone"
    )
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if options.train:
        kept_bytes = kept_of(lambda _: build(0), options.train)
        print(f"{kept_bytes / 1e6:.1f} MB kept of two models trained")
        return 0
    if options.predict:
        kept_bytes = kept_of(lambda number: predict(new_architecture(number)), options.predict)
        print(f"{kept_bytes / 1e3:.1f} kB kept of a model that predicted")
        return 0
    # on some processors TensorFlow multiplies by oneDNN, which keeps hundreds of MB, in steps
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import dask
    from distributed import Client, LocalCluster

    # what is over a tenth of it is spilled: twelve dense models stay
    dask.config.set(
        {
            "distributed.worker.memory.target": 0.1,
            "distributed.worker.memory.spill": 0.7,
            # of which workers keep what was seen in each of the last thousand seconds
            "distributed.worker.profile.enabled": False,
            # of the last thousand messages below 1 MB that went to each peer every one is kept,
            # with the models in it: distributed/batched.py, recent_message_log
            "distributed.admin.low-level-log-length": REMEMBERED,
        }
    )
    kinds = build(0)
    rounds: list[dict[str, Any]] = []
    models = 0
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=options.threads, memory_limit="2 GiB",
                     dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        client.run(prepare)
        began = time.monotonic()
        while time.monotonic() - began < options.seconds:
            models += one_round(client, workers, kinds, len(rounds))
            wait_for_release(client)
            found = {"client": stand(), **client.run(stand)}
            rounds.append({"seconds": time.monotonic() - began, "models": models, "found": found})
            report(rounds[-1])
    if options.json:
        options.json.write_text(json.dumps(rounds))
    rebuilt = sum(each[REBUILT] for each in rounds[-1]["found"].values())
    print(
        f"{models} models moved, {rebuilt} of them rebuilt in workers, in "
        f"{rounds[-1]['seconds']:.0f} s, {len(rounds)} rounds"
    )
    settled = rounds[len(rounds) // 3 :]
    grown = growth(settled)
    print("\n".join(grown) or "nothing grew")
    return 1 if grown else 0


def one_round(client: Any, workers: list[str], models: list[Any], number: int) -> int:
    """Send models every way, compare what arrives, drop them; return how many moved."""
    for model in models:
        refill(model, number)
    expected = [checksum(model) for model in models]
    moved = 0
    for worker in workers:
        held = client.scatter(models, workers=[worker], hash=False)
        assert [checksum(each) for each in client.gather(held)] == expected
        moved += 2 * len(models)
    held = client.scatter(models, broadcast=True, hash=False)
    sums = [
        client.submit(checksum, each, workers=[w], pure=False) for w in workers for each in held
    ]
    assert client.gather(sums) == expected * len(workers)
    moved += len(models) * len(workers)
    there = workers[number % len(workers)]  # each in its turn
    found = client.gather([client.submit(called, m, workers=[there], pure=False) for m in held])
    for one, model in zip(found, models, strict=True):
        np.testing.assert_allclose(one, called(model), rtol=1e-4, atol=1e-4)
    back = client.gather([client.submit(run, each, pure=False) for each in held])
    assert [sums for sums, _ in back] == [checksum(model) for _, model in back]
    moved += 2 * len(models)
    dense = held[-1]
    del held, sums, back
    fresh = [new_architecture(number * NEW + i) for i in range(NEW)]
    expected = [checksum(model) for model in fresh]
    for _ in range(3):
        sums = [
            client.submit(checksum, each, workers=[w], pure=False)
            for w in workers
            for each in fresh
        ]
        assert client.gather(sums) == expected * len(workers)
        moved += len(fresh) * len(workers)
    # one that nobody has called before
    one = client.submit(called, fresh[0], workers=[there], pure=False).result()
    np.testing.assert_allclose(one, called(fresh[0]), rtol=1e-4, atol=1e-4)
    moved += 1
    # 40 of 16 MiB: more than workers keep, so most are spilled, and read again
    many = [client.submit(filled, dense, i, pure=False) for i in range(40)]
    assert client.gather([client.submit(checksum, each) for each in many]) == [
        [float(i) * 2048 * 2048] for i in range(40)
    ]
    return moved + 2 * len(many)


def new_architecture(number: int) -> Any:
    """Build a model like no other number's, of the same names and shapes: TensorFlow keeps each."""
    import keras

    inputs = keras.Input((32,), name="inputs")
    x = keras.layers.Rescaling(1.0 + number / 1000, name="scaled")(inputs)
    x = keras.layers.Dense(8 + number % 10, name="hidden")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="outputs")(x), name="new")


def filled(model: Any, number: int) -> Any:
    """Copy a model, and fill the copy with one number."""
    twin = copy.deepcopy(model)
    for variable in twin.variables:
        variable.assign(np.full(variable.shape, number, np.float32))
    return twin


def report(row: dict[str, Any]) -> None:
    """Print a line for a round: the most of any worker, and the client."""
    workers = [each for name, each in row["found"].items() if name != "client"]
    print(
        f"{row['seconds']:6.0f} s {row['models']:7} models"
        + "".join(f"  {key} {row['found']['client'][key]} / {max(w[key] for w in workers)}"
                  for key in workers[0]),
        flush=True,
    )  # fmt: skip


def growth(rounds: list[dict[str, Any]]) -> list[str]:
    """Say what every process has more of."""
    if len(rounds) < 6:
        return ["too few rounds to say: give it more seconds"]
    grown = []
    for who in rounds[-1]["found"]:
        for key in rounds[-1]["found"][who].keys() - {REBUILT}:
            values = [each["found"][who][key] for each in rounds]
            if key == "memory":
                limit, more = MEMORY_PART * values[0], slope(values) * len(values)
            else:
                half = len(values) // 2
                limit = NUMBER
                more = statistics.median(values[half:]) - statistics.median(values[:half])
            if more > limit:
                grown.append(f"{who}: {key} of {values[0]} grew by {more:.0f}")
    most = max(kept(rounds, who) for who in rounds[-1]["found"] if who != "client")
    print(most)
    if most.of_a_model > KEPT:
        grown.append(f"that is more than {KEPT} bytes for each model")
    return grown


def slope(values: list[int]) -> float:
    """Return by how much values grow from one to the next: Theil and Sen's estimate."""
    return statistics.median(
        (values[j] - values[i]) / (j - i)
        for i in range(len(values))
        for j in range(i + 1, len(values))
    )


class Kept(NamedTuple):
    """What a worker keeps of the models that were rebuilt in it, in bytes, by that slope."""

    of_a_model: float
    of_a_round: float
    models: float

    def __str__(self) -> str:
        return (
            f"the steepest worker grows by {self.of_a_round:.0f} bytes a round, "
            f"{self.of_a_model:.0f} for each of {self.models:.0f} models rebuilt in it"
        )


def kept(rounds: list[dict[str, Any]], worker: str) -> Kept:
    """Return what a worker keeps."""
    found = [each["found"][worker] for each in rounds]
    models = (found[-1][REBUILT] - found[0][REBUILT]) / (len(rounds) - 1)
    of_a_round = slope([each["memory"] for each in found])
    return Kept(of_a_round / models, of_a_round, models)


if __name__ == "__main__":
    sys.exit(main())
