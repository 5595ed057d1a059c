"""What a round of averaging costs beside training: ``fit_rounds``, and sending whole models.

Two worker processes on this machine, of one thread each; "training" is one ``predict_on_batch``.
By hand, each round sends the mean model to both workers as an argument of ``client.submit``, gets
both models back, and averages their weights here. Both ways start from the same model; the first
round, which builds and traces, is left out of both. Afterwards a checksum says that the means are
those of a local computation, to the bit. Run it by ``python benchmarks/averaging.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import numpy as np
import values

SEED = 20260


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("ResNet50", "MobileNetV2"), default="ResNet50")
    parser.add_argument("--rounds", type=int, default=5, help="timed ones, of each way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    import keras
    from distributed import Client, LocalCluster

    keras.utils.set_random_seed(SEED)
    model = getattr(keras.applications, options.model)(weights=None)
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    nbytes = sum(weight.nbytes for weight in model.get_weights())
    start = model.get_weights()
    expected = _expected(start, options.rounds + 1)
    rows = []
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(cases.tiny)  # loads the backend
        workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        parts = [
            client.submit(_part, number, workers=[worker], pure=False)
            for number, worker in enumerate(workers)
        ]
        client.gather([client.submit(_known, part) for part in parts])
        for way, run in (("fit_rounds", _rounds), ("whole models", _whole)):
            model.set_weights(start)
            seconds = run(client, model, parts, options.rounds)
            if values.digest(model.get_weights()) != expected:
                raise RuntimeError(f"{way}: the mean is another one than here")
            rows.append(
                {
                    "model": options.model,
                    "way": way,
                    "weights_bytes": nbytes,
                    "rounds": options.rounds,
                    "seconds": seconds,
                    **cases.environment(),
                }
            )
            print(
                f"{options.model:12} {way:14} {min(seconds):7.3f} s a round at best, "
                f"{np.median(seconds):7.3f} s by the median",
                flush=True,
            )
    ours, whole = (float(np.median(row["seconds"])) for row in rows)
    print(f"{options.model:12} ratio {whole / ours:.1f}x, weights of {nbytes / 2**20:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def touch(model: Any, part: tuple[int, Any]) -> None:
    """Run a model once, and change a weight by what the part says: the mean has to show it."""
    number, batch = part
    model.predict_on_batch(batch)
    last = model.weights[-1]
    last.assign_add(np.full(tuple(last.shape), number + 1, "float32"))


def touched(model: Any, part: tuple[int, Any]) -> Any:
    """Do the same with a model that was sent, and return it."""
    touch(model, part)
    return model


def _expected(start: list[Any], rounds: int) -> str:
    """Compute here what the rounds come to: the last weight grows by the mean of 1 and 2."""
    last = start[-1]
    for _ in range(rounds):
        trained = [last + np.float32(number + 1) for number in range(2)]
        last = np.mean([each.astype("float64") for each in trained], axis=0).astype("float32")
    return values.digest([*start[:-1], last])


def _part(number: int) -> tuple[int, Any]:
    rng = np.random.default_rng(number)
    return number, rng.random((1, 224, 224, 3), np.float32)


def _known(part: tuple[int, Any]) -> int:
    return part[0]


def _rounds(client: Any, model: Any, parts: list[Any], rounds: int) -> list[float]:
    from dask_keras_serialize.workflows.averaging import fit_rounds

    clock = [time.perf_counter()]
    fit_rounds(
        model, touch, parts, rounds=rounds + 1, client=client,
        on_round=lambda number, logs: clock.append(time.perf_counter()),
    )  # fmt: skip
    return [float(each) for each in np.diff(clock)[1:]]


def _whole(client: Any, model: Any, parts: list[Any], rounds: int) -> list[float]:
    from dask_keras_serialize.workflows.means import mean_weights

    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        futures = [client.submit(touched, model, part, pure=False) for part in parts]
        trained = client.gather(futures)
        model.set_weights(mean_weights([each.get_weights() for each in trained], [1, 1]))
        seconds.append(time.perf_counter() - began)
        del futures, trained
    return seconds[1:]


if __name__ == "__main__":
    main()
