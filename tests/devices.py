"""Models on several devices, of which a CPU can pretend to have some; run by test_devices.py.

``python -m tests.devices DEVICES write FILE``, ``read FILE [distributed]`` or ``elsewhere -``.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import keras
import numpy as np

from dask_keras_serialize import backends
from tests import zoo
from tests.pretending import counting_host_bytes

devices, what, file, *rest = sys.argv[1:]
assert distributed  # by being imported it registers us

X, Y = zoo.X, zoo.TARGETS["sparse"]


def normed() -> keras.Model:
    """Make a model that holds averages, which replicas of it average."""
    parts = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(4)]
    return keras.Sequential([keras.Input((zoo.WIDTH,)), *parts])


def trained(make: Callable[[], keras.Model]) -> keras.Model:
    model = make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(X, Y, batch_size=16, verbose=0)
    return model


def models() -> list[keras.Model]:
    """Make a model that goes by config and one that goes by value, spread over the devices."""
    makers = [normed, lambda: zoo.Subclassed((16,))]
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(sharded())
        return [trained(make) for make in makers]
    import tensorflow as tf

    with mirroring().scope():
        mirrored = [trained(make) for make in makers]
    with tf.device("CPU:1"):
        placed = trained(normed)
    assert placed.layers[0].kernel.value.device.endswith("CPU:1")
    return [*mirrored, placed]


@functools.cache
def mirroring() -> Any:
    """Return a strategy of all devices; the keys of two in one process would clash."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(int(devices))])


def sharded() -> Any:
    """Split kernels over half of the devices, batches over the other."""
    mesh = keras.distribution.DeviceMesh((2, int(devices) // 2), ["batch", "model"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def places(model: keras.Model) -> set[str]:
    """Say where the values are."""
    values = [variable.value for variable in model.variables]
    if keras.backend.backend() == "jax":
        return {f"{len(value.sharding.device_set)} devices" for value in values}
    return {type(value).__name__ for value in values}


def predictions(model: keras.Model) -> Any:
    # not predict(), where each mirrored replica has moving averages of its own: what travels are
    # the first one's, as in get_weights()
    return keras.ops.convert_to_numpy(model(X, training=False))


def write() -> None:
    content = []
    for model in models():
        sent = pickle.dumps(model, 5)
        # NumPy's copy, which JAX would keep beside an array that is gathered
        assert all(getattr(v.value, "_npy_value", None) is None for v in model.variables)
        content.append((sent, model.get_weights(), predictions(model)))
        print(places(model))
    Path(file).write_bytes(pickle.dumps(content))


def read() -> None:
    if "distributed" in rest and keras.backend.backend() == "jax":
        keras.distribution.set_distribution(sharded())
    for sent, weights, predicted in pickle.loads(Path(file).read_bytes()):
        model = arrived(sent)
        for ours, theirs in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        print(places(model))
        np.testing.assert_allclose(predictions(model), predicted, atol=1e-6)
        steps = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
        model.fit(X, Y, batch_size=16, verbose=0)
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 2 * steps
        assert np.isfinite(model.history.history["loss"]).all()


def arrived(sent: bytes) -> keras.Model:
    scope: Any = contextlib.nullcontext()
    if "distributed" in rest and keras.backend.backend() == "tensorflow":
        scope = mirroring().scope()
    with scope:
        model: keras.Model = pickle.loads(sent)
    return model


def elsewhere() -> None:
    """Send a model to the second device, and from there back, without copies on the host."""
    model = trained(lambda: keras.Sequential([keras.Input((zoo.WIDTH,)), keras.layers.Dense(9000)]))
    sent = pickle.dumps(model, 5)
    _, backend = backends.current()
    with keras.device("cpu:1"):
        moved = pickle.loads(sent)
    kernel = moved.layers[0].kernel
    device = str(kernel.value.device)  # "/job:.../device:CPU:1", "TFRT_CPU_1"
    assert device.endswith("1"), device
    with counting_host_bytes() as counted:
        backend.views(moved.variables)
    assert counted[0] < zoo.WIDTH * 9000 * 4 / 2
    back = pickle.loads(pickle.dumps(moved, 5))
    for ours, theirs in zip(back.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


if __name__ == "__main__":
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # nothing that is imported may have started TensorFlow's devices before
        logical = [tf.config.LogicalDeviceConfiguration()] * int(devices)
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], logical
        )
    {"write": write, "read": read, "elsewhere": elsewhere}[what]()
