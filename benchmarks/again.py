"""Models of one architecture, one after the other, through a cluster: python benchmarks/again.py.

What clones (``templates.py``) are for, with and without them, in turns: models that differ in
their values alone are scattered to one worker over TCP, predict there for the first time,
are spilled to disk and read again, and are gathered. Without means that every model is rebuilt by
its config, on both sides. Each figure is the median over the models, of one model; what was
gathered is compared, bit for bit, after the clock has stopped. Set ``KERAS_BACKEND`` to choose
the backend.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

FIGURES = ("scatter", "first predict", "spill", "read again", "gather")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=5, help="in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import cases
    import keras
    from distributed import Client, LocalCluster

    rows = []
    quiet = {"processes": True, "dashboard_address": ":0", "memory_limit": "8GiB"}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
    ):
        for workload in (cases.RESNET, cases.EFFICIENTNET):
            model = cases.build(workload, cases.Settings())
            taken: dict[bool, dict[str, list[float]]] = {
                clones: defaultdict(list) for clones in (False, True)
            }
            for turn in range(1 + options.turns):
                for clones, figures in taken.items():
                    client.run(use_clones, clones)
                    use_clones(clones)
                    for _ in range(2 if turn == 0 else options.models):
                        one = measure(client, model)
                        for name in FIGURES if turn else ():
                            figures[name].append(one[name])
            for name in FIGURES:
                without, cloned = (statistics.median(taken[clones][name]) for clones in taken)
                rows.append(
                    {"workload": workload, "figure": name, "without": without, "cloned": cloned}
                )
    print(f"{keras.backend.backend()}: seconds a model, median of {options.turns * options.models}")
    print(f"{'model':16} {'':14} {'by config':>10} {'cloned':>8} {'ratio':>6}")
    for row in rows:
        ratio = row["without"] / row["cloned"]
        print(
            f"{row['workload']:16} {row['figure']:14} {row['without']:10.3f} {row['cloned']:8.3f} "
            f"{ratio:5.1f}x"
        )
    if options.json:
        head = {"backend": keras.backend.backend(), **cases.environment()}
        options.json.write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")


def measure(client: Any, model: Any) -> dict[str, float]:
    """Take one model, of values that none had before, the whole way."""
    import keras
    import values

    kernel = model.trainable_variables[0]
    kernel.assign(keras.ops.convert_to_numpy(kernel) + 1)
    expected = values.digest(model)
    seconds = {}
    gc.collect()
    began = time.perf_counter()
    future = client.scatter(model, hash=False)
    seconds["scatter"] = time.perf_counter() - began
    seconds["first predict"] = client.submit(predict, future, pure=False).result()
    seconds["spill"], seconds["read again"] = client.run(spill, key=future.key).popitem()[1]
    gc.collect()
    began = time.perf_counter()
    back = client.gather(future)
    seconds["gather"] = time.perf_counter() - began
    if values.digest(back) != expected:
        raise RuntimeError("what was gathered is not what was sent")
    return seconds


def use_clones(wanted: bool) -> None:
    """Rebuild by config alone in this process, or as the package does."""
    from dask_keras_serialize import protocol
    from dask_keras_serialize.configs import by_config, templates

    protocol.templates = templates if wanted else by_config


def predict(model: Any) -> float:
    """Time the first prediction of a model."""
    import numpy as np

    batch = np.zeros((1, *model.input_shape[1:]), "float32")
    began = time.perf_counter()
    model.predict(batch, verbose=0)
    return time.perf_counter() - began


def spill(key: str, dask_worker: Any) -> tuple[float, float]:
    """Time the way of a worker's value to disk, and back."""
    data = dask_worker.data
    gc.collect()
    began = time.perf_counter()
    while key in data.fast:
        data.evict()
    out = time.perf_counter() - began
    gc.collect()  # it is read again only if nobody holds it any more
    began = time.perf_counter()
    data[key]
    return out, time.perf_counter() - began


if __name__ == "__main__":
    main()
