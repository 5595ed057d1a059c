"""Clients of workers that have a GPU, and tasks for those; run by test_gpu.py.

``CUDA_VISIBLE_DEVICES=-1 python -m tests.gpu SCHEDULER WORKERS MEMORY``: one that has none.
``python -m tests.gpu ucxx``: of a cluster that sends a GPU's memory. UCX keeps threads and files
of the process that used it.
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from distributed import Client, LocalCluster

from dask_keras_serialize import PlaceKeras, devices
from dask_keras_serialize.configs.by_config import variables_of
from tests import zoo

X = np.random.default_rng(0).normal(size=(64, 256)).astype("float32")


def build() -> keras.Model:
    """Make a model with large variables and small ones, trained by an optimizer with slots."""
    keras.utils.set_random_seed(0)
    parts = [keras.layers.Dense(1024, activation="relu"), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((256,)), *parts, keras.layers.Dense(10)])
    model.compile("adam", "mse")
    model.fit(X, np.ones((64, 10)), verbose=0)
    return model


def on_gpu(model: keras.Model) -> bool:
    """Say whether all of a model's weights are on a GPU; counters may stay on the host."""
    floats = [v for v in variables_of(model) if "float" in v.dtype]
    return all(is_gpu(v.value.device) for v in floats)


def is_gpu(device: Any) -> bool:
    return any(name in str(device).lower() for name in ("gpu", "cuda"))


def at_work(model: keras.Model) -> tuple[bool, bool, Any, keras.Model]:
    """Say where a model is as a task starts, and where it runs; return it too."""
    before = on_gpu(model)
    output = model(X, training=False)
    return before, is_gpu(output.device), keras.ops.convert_to_numpy(output), model


def take(nbytes: int) -> str:
    """Take so much of the GPU's memory; return what is said against it."""
    import keras

    try:
        value = keras.ops.ones(nbytes // 4, "float32")
        assert float(value[-1]) == 1.0  # a maximum of it takes as much again on JAX
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(scheduler: str, workers: int, memory: int) -> None:
    assert devices.current().gpus() == [], "the client has a GPU"
    model = build()
    with Client(scheduler) as client:
        client.wait_for_workers(workers, timeout=120)
        client.register_plugin(PlaceKeras(memory=memory))
        addresses = list(client.nthreads())
        scattered = client.scatter(model, broadcast=True)
        for sent in (model, scattered):
            for address in addresses:
                task = client.submit(at_work, sent, workers=[address], pure=False)
                before, after, output, back = task.result()
                assert before, "it is not on the GPU as the task starts"
                assert after, "it does not run there"
                here = keras.ops.convert_to_numpy(model(X, training=False))
                np.testing.assert_allclose(output, here, atol=1e-2)
                zoo.assert_same(model, back)
        # all at the same time
        for part, fits in ((memory // 2, True), (2 * memory, False)):
            said = client.gather(
                [client.submit(take, part, workers=[a], pure=False) for a in addresses]
            )
            assert all((text == "") is fits for text in said), said


def by_ucx() -> None:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, protocol="ucxx", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(PlaceKeras(memory=2 << 30))
        first, second = client.nthreads()
        made = client.submit(build, workers=[first])
        before, _, _, back = client.submit(at_work, made, workers=[second]).result()
        assert before, "it is not on the GPU as the task starts"
        zoo.assert_same(made.result(), back)


if __name__ == "__main__":
    if sys.argv[1:] == ["ucxx"]:
        by_ucx()
    else:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
