"""Models to a GPU, from it, and on it, beside the device's own copies of one buffer.

Run on a machine with a GPU by ``make test-gpu``, or ``python benchmarks/gpu.py``; prints a table
and writes benchmarks/gpu-BACKEND.json. Every result is compared with the model, to the bit, after
the clock has stopped. Times are the least of several.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the GPU
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import cases
import keras
import numpy as np
from distributed import Client, LocalCluster

from dask_keras_serialize import PlaceKeras, devices, protocol
from dask_keras_serialize.cluster import handlers
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.frames import allocate

NAME = keras.backend.backend()


def ready(value: Any) -> Any:
    """Wait for the GPU; return the value."""
    if NAME == "tensorflow":
        import tensorflow as tf

        tf.test.experimental.sync_devices()
    elif NAME == "jax":
        import jax

        if isinstance(value, (jax.Array, list)):
            jax.block_until_ready(value)
    else:
        import torch

        torch.cuda.synchronize()
    return value


def plain(nbytes: int) -> dict[str, Callable[[], Any]]:
    """Return the backend's own copies of one buffer: to the GPU, from it, on it."""
    host = allocate(nbytes).view("float32")
    host[:] = 1.0
    if NAME == "tensorflow":
        import tensorflow as tf

        lent = tf.experimental.dlpack.from_dlpack(host.__dlpack__())

        def to(device: str, tensor: Any) -> Any:
            with tf.device(device):
                return tf.identity(tensor)

        there = to("GPU:0", lent)
        return {
            "host to device": lambda: to("GPU:0", lent),
            "device to host": lambda: to("CPU:0", there),
            "on the device": lambda: tf.raw_ops.Snapshot(input=there),
        }
    if NAME == "jax":
        import jax

        there = jax.device_put(host)
        return {
            "host to device": lambda: jax.device_put(host),
            # of a new array each time: JAX keeps what NumPy was given
            "device to host": lambda: np.asarray(
                jax.make_array_from_single_device_arrays(there.shape, there.sharding, [there])
            ),
            "on the device": lambda: jax.device_put(there, there.sharding, may_alias=False),
        }
    import torch

    source, there = torch.from_numpy(host), torch.from_numpy(host).cuda()
    pinned = torch.empty(host.shape, pin_memory=True)
    return {
        "host to device": lambda: source.cuda(),
        "device to host": lambda: pinned.copy_(there, non_blocking=True),
        "on the device": lambda: there.clone(),
    }


def seconds(function: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    """Return the least time, of one warm-up fewer, and the last result."""
    best, result = float("inf"), None
    for repetition in range(repetitions + 1):
        result = None
        gc.collect()
        begin = time.perf_counter()
        result = ready(function())
        if repetition:
            best = min(best, time.perf_counter() - begin)
    return best, result


def same(model: Any, replica: Any) -> None:
    """Fail unless two models have the same weights, to the bit, and those on a GPU."""
    for ours, theirs in zip(model.weights, replica.weights, strict=True):
        a, b = (keras.ops.convert_to_numpy(each) for each in (ours, theirs))
        assert a.tobytes() == b.tobytes(), ours.path
        if "float" in theirs.dtype:
            assert any(n in str(theirs.value.device).lower() for n in ("gpu", "cuda")), theirs.path


def moves(model: Any, repetitions: int) -> dict[str, float]:
    """Time a model's ways, in seconds."""
    nbytes = protocol.nbytes(model)
    times = {f"plain, {n}": seconds(f, repetitions)[0] for n, f in plain(nbytes // 4 * 4).items()}

    def arrive(header: Any, frames: list[Any]) -> Any:
        replica = handlers.deserialize_keras(header, frames)
        ready([variable.value for variable in replica.variables])
        return replica

    times["model out, to the host"], (header, frames) = seconds(
        lambda: handlers.serialize_keras(model), repetitions
    )
    received = [bytes(frame) for frame in frames]  # read-only, and at any address
    times["model in, from the host"], replica = seconds(
        lambda: arrive(header, received), repetitions
    )
    same(model, replica)
    times["model out, on the device"], (header, frames) = seconds(
        lambda: handlers.serialize_on_gpu(model), repetitions
    )
    assert any(isinstance(frame, DeviceFrame) for frame in frames)
    times["model in, on the device"], replica = seconds(lambda: arrive(header, frames), repetitions)
    same(model, replica)
    return times


def _predict(model: Any, x: Any) -> Any:
    return model.predict(x, verbose=0)


def cluster(model: Any, workers: int, protocol_name: str) -> dict[str, float]:
    """Time a broadcast to several workers of one GPU, and a prediction of each."""
    x = np.random.default_rng(0).normal(size=(8, *model.input_shape[1:])).astype("float32")
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            protocol=protocol_name,
            dashboard_address=":0",
        ) as local,
        Client(local) as client,
    ):
        client.register_plugin(PlaceKeras(backend=NAME, memory=0.8 / (workers + 1)))
        times = []
        for _ in range(3):  # the first starts the workers' devices
            begin = time.perf_counter()
            future = client.scatter(model, broadcast=True, hash=False)
            tasks = [
                client.submit(_predict, future, x, workers=[address], pure=False)
                for address in client.scheduler_info(n_workers=-1)["workers"]
            ]
            outputs = client.gather(tasks)
            times.append(time.perf_counter() - begin)
            for output in outputs:
                np.testing.assert_array_equal(output, outputs[0])
            back = future.result()
        same(model, back)
        return {f"broadcast to {workers} workers and predict, {protocol_name}": min(times[1:])}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--side", type=int, default=16384, help="of the dense model's kernel")
    arguments = parser.parse_args()
    gpus = devices.current().gpus()
    if not gpus:
        sys.exit(f"no GPU that Keras's backend {NAME!r} can use")
    settings = cases.Settings(dense_bytes=4 * arguments.side**2)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    cards = said.strip().splitlines()
    rows = []

    def report(workload: str, nbytes: int, times: dict[str, float]) -> None:
        for what, took in times.items():
            rows.append({"model": workload, "bytes": nbytes, "what": what, "seconds": took})
            speed = nbytes / took / 1e9
            print(f"{workload:10} {what:45} {1e3 * took:9.2f} ms {speed:8.2f} GB/s", flush=True)

    for workload in (cases.DENSE, cases.RESNET):
        model = cases.build(workload, settings)
        nbytes = protocol.nbytes(model)
        report(workload, nbytes, moves(model, arguments.repetitions))
        if workload == cases.RESNET:
            report(workload, nbytes, cluster(model, arguments.workers, "tcp"))
            if find_spec("distributed_ucxx"):
                report(workload, nbytes, cluster(model, 2, "ucxx"))
    result = {"devices": cards, "used": gpus, **cases.environment(), "rows": rows}
    path = Path(__file__).with_name(f"gpu-{NAME}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))


if __name__ == "__main__":
    main()
