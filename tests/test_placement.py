"""How much of a machine workers take: in processes of their own, for each can be placed once."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import pytest
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster
from distributed.diagnostics import nvml

from dask_keras_serialize import PlaceKeras, PlacementError, backends, devices
from dask_keras_serialize.devices import Limits
from tests import zoo
from tests.conftest import ROOT, local_client, start_cluster, until

HERE = keras.backend.backend()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "theano"}, "backend='theano' is none of"),
        ({"device": -1}, "device=-1 is no number"),
        ({"device": True}, "device=True is no number"),
        ({"device": "cuda"}, "device='cuda' is no number"),
        ({"device": {0: 0, 1: -1}}, "device=-1 is no number"),
        ({"device": {}}, "device={} names no worker"),
        ({"memory": "0.5"}, "memory='0.5' is neither"),
        ({"policy": "float7"}, "float7"),
        ({"memory": "much"}, "memory='much' is no number of bytes"),
        ({"memory": 0.0}, "memory=0.0 is neither"),
        ({"memory": 1.5}, "memory=1.5 is neither"),
        ({"memory": 4}, "memory=4 is neither"),
        ({"device": "cpu", "memory": "growth"}, "memory='growth' is the GPU's"),
        ({"threads": 0}, "threads=0 is no number"),
        ({"threads": "all"}, "threads='all' is no number"),
        ({"policy": 16}, "policy=16 is no name"),
    ],
)
def test_arguments_are_checked_where_they_are_given(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        PlaceKeras(**arguments)


def test_bytes_are_read_as_dask_reads_them():
    assert PlaceKeras(memory="2 GiB").memory == PlaceKeras(memory=2 << 30).memory == 2 << 30
    assert PlaceKeras(memory=0.25).memory == 0.25


@pytest.mark.parametrize(
    ("device", "now", "then"),
    [
        (None, None, None),
        (None, "3,5", "3,5"),
        ("gpu", "3,5", "3"),
        (1, "3,5", "5"),
        (0, "GPU-1f,GPU-2f", "GPU-1f"),
        ("cpu", "3,5", "-1"),
        (2, None, "2"),
    ],
)
def test_a_device_is_counted_among_those_that_the_worker_sees(device, now, then, monkeypatch):
    monkeypatch.setattr(nvml, "device_get_count", lambda: 4)
    assert PlaceKeras(device=device)._visible(now) == then


@pytest.mark.parametrize(("device", "now"), [(2, "3,5"), (4, None), ("gpu", ""), (0, "-1")])
def test_a_device_that_is_not_there(device, now, monkeypatch):
    monkeypatch.setattr(nvml, "device_get_count", lambda: 4)
    with pytest.raises(PlacementError, match=f"device={device!r} is asked for, and . GPUs are"):
        PlaceKeras(device=device)._visible(now)


def test_memory_is_bytes_and_a_part_of_the_card(monkeypatch):
    monkeypatch.setattr(nvml, "one_time", lambda: {"memory-total": 8 << 30, "name": "card"})
    for memory in ("4 GiB", 0.5):
        limits = PlaceKeras(memory=memory)._limits(3)
        assert limits == Limits(nbytes=4 << 30, fraction=0.5, threads=3, tasks=3)
    with pytest.raises(PlacementError, match=f"is more than its GPU's {8 << 30}"):
        PlaceKeras(memory="9 GiB")._limits(1)


@pytest.fixture
def client():
    """A client of two worker processes that have not loaded a backend."""
    with local_client(threads=2) as client:
        yield client


def threads_in_use():
    """Let the backend compute; return how many threads it has for that."""
    import keras

    tasks = Path("/proc/self/task")
    before = {task.name for task in tasks.iterdir()}
    x = keras.ops.ones((1500, 1500))
    keras.ops.convert_to_numpy(x @ x)
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.config.threading.get_intra_op_parallelism_threads()
        case "torch":
            import torch

            return torch.get_num_threads() * 2  # one pool for each of the worker's threads
        case "jax":
            names = {task.name: (task / "comm").read_text() for task in tasks.iterdir()}
            if any("tf_" in name for name in names.values()):
                return sum("Eigen" in name for name in names.values())
            # JAX 0.4.35 names none: it has two pools, and three threads beside them
            return (len(names.keys() - before) - 3) / 2


def policies():
    """Return the default dtype policy on this thread and on another."""
    import keras

    def name():
        return keras.config.dtype_policy().name

    with ThreadPoolExecutor(1) as thread:
        return name(), thread.submit(name).result()


@pytest.mark.cluster
def test_workers_are_placed_before_their_backend_starts(client):
    plugin = PlaceKeras(backend=HERE, device="cpu", policy="mixed_bfloat16")
    client.register_plugin(plugin)
    assert set(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == {"-1"}
    for worker in client.nthreads():
        run = {"workers": [worker], "pure": False}
        assert client.submit(threads_in_use, **run).result() == 2
        assert client.submit(policies, **run).result() == ("mixed_bfloat16", "mixed_bfloat16")
    client.register_plugin(plugin)  # the same again
    model = zoo.build("trained")  # which keeps its own policy
    far = client.submit(lambda m: (m, m.dtype_policy.name), model).result()
    assert far[1] == "float32"
    zoo.assert_same(model, far[0])
    with pytest.raises(PlacementError, match=r"worker tcp://.*policy='mixed_bfloat16', now None"):
        client.register_plugin(PlaceKeras(backend=HERE, device="cpu"))


def test_a_gpu_that_was_chosen_before_is_not_passed_over(monkeypatch):
    class Backend:
        def started(self):
            return False

        def settle(self, limits):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"

        def gpus(self):
            return ["GPU:0"]

    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(devices, "current", Backend)
    monkeypatch.setattr(devices, "driver_gpus", lambda: 1)
    PlaceKeras(device=1)._settle(1, "3,5")
    # such as UCX did, before any plugin: the driver then shows all of them, whatever is set
    monkeypatch.setattr(devices, "driver_gpus", lambda: 2)
    with pytest.raises(PlacementError, match="CUDA shows it 2 GPUs, not the one"):
        PlaceKeras(device=1)._settle(1, "3,5")


@pytest.mark.programs
@pytest.mark.cluster
def test_a_later_worker_that_cannot_is_closed():
    warned = []
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(PlaceKeras(device=3))
        client.subscribe_topic("warn", warned.append)  # in place of warning of it
        cluster.scale(1)
        until(lambda: warned and not client.nthreads(), "it is not closed", 60)
        cluster.scale(0)
    (_, said), *_ = warned
    assert re.match(r"worker tcp://.*device=3 is asked for.*it is closed", said)


@pytest.mark.programs
@pytest.mark.cluster
def test_each_worker_has_a_device_of_its_own(client):
    with pytest.raises(PlacementError, match=r"worker tcp://.* \(1\): .*says nothing of a worker"):
        client.register_plugin(PlaceKeras(device={0: None}))
    client.unregister_worker_plugin(PlaceKeras.name)  # the scheduler keeps it for later workers
    client.restart()
    client.register_plugin(PlaceKeras(device={0: "cpu", 1: None}, threads=None))
    names = client.run(lambda dask_worker: dask_worker.name)
    visible = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert {names[worker]: value for worker, value in visible.items()} == {
        0: "-1",
        1: None,
    }


@pytest.mark.programs
@pytest.mark.cluster
def test_what_dask_cuda_has_set_is_left():
    """As LocalCUDACluster makes them: each worker sees all GPUs, its own first."""
    seen = ["0,1", "1,0"]
    workers = {
        i: {"cls": Nanny, "options": {"nthreads": 1, "env": {"CUDA_VISIBLE_DEVICES": visible}}}
        for i, visible in enumerate(seen)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    with SpecCluster(workers, scheduler) as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        client.register_plugin(PlaceKeras(memory="growth"))
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == seen
        model = zoo.build("trained")
        future = client.scatter(model, broadcast=True)
        for worker in client.nthreads():
            far = client.submit(lambda m: m, future, workers=[worker], pure=False).result()
            zoo.assert_same(model, far)


@pytest.mark.programs
@pytest.mark.cluster
def test_what_a_worker_cannot_do_names_it(client):
    other = next(name for name in backends.NAMES if name != HERE)
    client.run(policies)  # loads Keras
    for arguments, said in [
        ({"device": "gpu"}, "device='gpu' is asked for"),
        ({"device": 7}, "device=7 is asked for"),
        ({"memory": "4 GiB"}, "how much memory its GPU has is not known"),
        ({"policy": "float16"}, "policy='mixed_float3' is none there"),
        ({"backend": other}, f"Keras runs on '{HERE}' there, not on '{other}'"),
    ]:
        expected = rf"worker tcp://.* \(\d\): .*{re.escape(said)}"
        plugin = PlaceKeras(**arguments, threads=None)
        plugin.policy = plugin.policy and "mixed_float3"  # as of a client without Keras
        with pytest.raises(PlacementError, match=expected) as info:
            client.register_plugin(plugin)
        assert "\n" not in str(info.value)
        assert set(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == {None}
    worker = next(iter(client.nthreads()))
    client.submit(threads_in_use, workers=[worker]).result()
    if HERE == "torch":  # which can be told at any time
        for _ in range(8):  # on either of the worker's threads
            assert client.submit(threads_in_use, workers=[worker], pure=False).result() == 2
        client.register_plugin(PlaceKeras(threads=4))
        for _ in range(8):
            assert client.submit(threads_in_use, workers=[worker], pure=False).result() == 4
    else:
        said = rf"worker {worker} .*has started its devices.*client\.restart"
        with pytest.raises(PlacementError, match=said):
            client.register_plugin(PlaceKeras(threads=1))


def placed(dask_worker):
    import keras

    (plugin,) = (each for name, each in dask_worker.plugins.items() if "placement" in name)
    visible = os.getenv("CUDA_VISIBLE_DEVICES")
    return plugin.device, plugin.threads, keras.config.dtype_policy().name, visible


@pytest.mark.more
@pytest.mark.once
@pytest.mark.cluster
def test_a_worker_takes_it_from_its_command_line_and_from_the_config(processes, tmp_path):
    bin_ = Path(sys.executable).parent
    address = start_cluster(processes, bin_, bin_, tmp_path, [])
    processes.start(
        bin_ / "dask", "worker", address, "--nthreads", "2", "--no-dashboard",
        "--local-directory", tmp_path, "--resources", "GPU=1",
        "--preload", "dask_keras_serialize.placement",
        "--policy", "float16", "--threads", "3",
        env={
            "DASK_DASK_KERAS_SERIALIZE__PLACEMENT": "{'device': 'cpu', 'threads': 1}",
            "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    with Client(address) as client:
        client.wait_for_workers(1, timeout=60)
        assert list(client.run(placed).values()) == [("cpu", 3, "float16", "-1")]
        model = zoo.build("trained")
        far = client.submit(lambda m: m, model, resources={"GPU": 1}).result(60)
        zoo.assert_same(model, far)
