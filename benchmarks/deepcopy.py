"""``copy.deepcopy`` of ResNet50 and of a dense GiB, beside Keras's own way, in turn.

Prints one line for each model; every copy is compared with the model, to the bit, after
the clock has stopped. Run it by ``python benchmarks/deepcopy.py``.
"""

from __future__ import annotations

import copy
import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cases
import keras

import dask_keras_serialize


def seconds(model: Any, registered: bool) -> float:
    """Time one deepcopy, by this package or by Keras's own pickle."""
    (dask_keras_serialize.register if registered else dask_keras_serialize.unregister)()
    begin = time.perf_counter()
    twin = copy.deepcopy(model)
    took = time.perf_counter() - begin
    dask_keras_serialize.register()
    for ours, theirs in zip(model.weights, twin.weights, strict=True):
        a, b = (keras.ops.convert_to_numpy(each) for each in (ours, theirs))
        assert a.tobytes() == b.tobytes(), ours.path
    return took


def main() -> None:
    """Print the table."""
    print(f"{'model':20} {'ours':>9} {'Keras':>9} {'ratio':>7}")
    settings = cases.Settings()
    for name, repetitions in ((cases.RESNET, 3), (cases.RESNET_ADAM, 3), (cases.DENSE, 1)):
        model = cases.build(name, settings)
        best = {True: float("inf"), False: float("inf")}
        for _ in range(repetitions):
            for registered in best:
                best[registered] = min(best[registered], seconds(model, registered))
        ratio = best[False] / best[True]
        print(f"{name:24} {best[True]:8.3f}s {best[False]:8.3f}s {ratio:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
