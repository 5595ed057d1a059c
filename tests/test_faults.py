"""What breaks while a model is on its way: processes, disks, memory, the network.

Real processes, each ended in the middle of what its test is named after; then the computation has
ended right, or with an error that says what broke, and what survived is as it was: no key, no
file, no descriptor, no memory more.
"""

import contextlib
import gc
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest
from distributed import Client, Future, KilledWorker, wait
from distributed.client import FutureCancelledError
from distributed.utils import DequeHandler

from tests.conftest import ROOT, free_ports, shipped

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

DASK = Path(sys.executable).parent / "dask"
GIBIBYTE = 1 << 30
MEBIBYTE = 1 << 20


@shipped
def dense(nbytes):
    """Build a model of one kernel, of random numbers."""
    rows = 1 << (nbytes.bit_length() // 2 - 1)

    def kernel(shape, dtype):
        numbers = np.resize(np.random.default_rng(0).random(1 << 18, np.float32), np.prod(shape))
        return keras.ops.convert_to_tensor(numbers.reshape(shape), dtype)

    layer = keras.layers.Dense(nbytes // 4 // rows, use_bias=False, kernel_initializer=kernel)
    model = keras.Sequential([keras.Input((rows,)), layer])
    layer.kernel_initializer = keras.initializers.GlorotUniform()
    return model


@shipped
def checksum(model):
    """Sum a model's numbers where they lie: the same wherever it is whole."""
    from dask_keras_serialize import backends  # not a global: a scheduler unpickles this

    view = backends.current()[1].view
    return [(v.path.rpartition("/")[2], float(view(v).sum(dtype="f8"))) for v in model.variables]


class Cluster:
    """A scheduler and workers, each a process of its own, and a client of theirs."""

    def __init__(self, processes, folder, host="127.0.0.1"):
        self._processes, self._folder = processes, folder
        self._host, (self._port,) = host, free_ports(1)
        self.scheduler = self.start_scheduler()
        self.workers = {}

    def start_scheduler(self):
        return self._processes.start(
            DASK, "scheduler", "--host", self._host, "--port", self._port, "--no-dashboard",
            env={"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"},
        )  # fmt: skip

    @property
    def address(self):
        return f"tcp://{self._host}:{self._port}"

    def start_worker(self, name, *options, nanny=False, before="", within="", **env):
        """Start one; shell commands before it may limit it, or run it elsewhere."""
        command = [
            DASK, "worker", self.address, "--nthreads", "1", "--no-dashboard", "--name", name,
            "--local-directory", self._folder / name,
            "--nanny" if nanny else "--no-nanny", *options,
        ]  # fmt: skip
        words = " ".join(map(str, command))
        shell = f"{before} exec {within} {words}"
        self.workers[name] = self._processes.start("bash", "-c", shell, env=env)

    @contextlib.contextmanager
    def client(self):
        with Client(self.address, timeout=60) as client:
            client.wait_for_workers(len(self.workers), timeout=60)
            client.run(warm)  # what is loaded once does not count as left behind
            yield client


@shipped
def warm():
    import keras

    keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


@shipped
def holders(dask_scheduler):
    return [{w.address for w in task.who_has or ()} for task in dask_scheduler.tasks.values()]


@shipped
def held_keys(dask_worker):
    return list(dask_worker.data)


@pytest.fixture
def cluster(processes, tmp_path):
    return Cluster(processes, tmp_path)


def pid_of(client, name):
    return client.run(os.getpid, workers=[address_of(client, name)])[address_of(client, name)]


def address_of(client, name):
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return next(address for address, info in workers.items() if info["name"] == name)


def until(condition, what, seconds=90):
    """Wait for something to be so, many times a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid):
    return psutil.Process(pid).memory_info().rss


def kill_when_it_grows(pid, nbytes, victim=None):
    """Kill a process that receives, or another, once it has so many bytes more."""
    before = resident(pid)
    until(lambda: resident(pid) > before + nbytes, "nothing arrived")
    os.kill(victim or pid, signal.SIGKILL)


def let_go_of_garbage(client):
    """Free on workers what Python and distributed keep for a while, whatever it is.

    Models are cycles, which Python's collector frees when it comes round: garbage.py has it come
    before others are rebuilt, distributed when memory is short. And the log that a worker can be
    asked for keeps each error with all frames of its traceback, and so the buffer that was being
    filled when a connection broke.
    """
    time.sleep(1)
    client.run(DequeHandler.clear_all_instances)
    client.run(gc.collect)


def assert_nothing_is_left(client, files, memory=200 * MEBIBYTE):
    """The scheduler knows no key, and workers have what they had."""
    until(lambda: not client.run_on_scheduler(keys), "the scheduler still has keys")
    let_go_of_garbage(client)
    for pid, (descriptors, size) in files.items():
        # a connection or two may be kept in the pool for later
        until(lambda pid=pid, n=descriptors: open_files(pid) <= n + 4, f"{pid} has open files")
        until(lambda pid=pid, n=size: resident(pid) <= n + memory, f"{pid} keeps memory")


@shipped
def keys(dask_scheduler):
    return [key for key, state in dask_scheduler.tasks.items() if state.state != "forgotten"]


def stands(*pids):
    return {pid: (open_files(pid), resident(pid)) for pid in pids}


@pytest.mark.parametrize("who", ["worker", "nanny"])
def test_one_is_killed_while_a_worker_receives_a_model(cluster, who):
    cluster.start_worker("a")
    cluster.start_worker("b", nanny=True)
    with cluster.client() as client:
        before = stands(pid_of(client, "a"))
        model = dense(GIBIBYTE)
        held = client.scatter(model, workers=["a"], direct=True, hash=False)
        there = pid_of(client, "b")
        sums = client.submit(checksum, held, workers=["b"], allow_other_workers=True)
        victim = there if who == "worker" else cluster.workers["b"].pid
        kill_when_it_grows(there, 200 * MEBIBYTE, victim)
        assert sums.result(timeout=120) == checksum(model)
        if who == "worker":
            client.wait_for_workers(2, timeout=60)  # the nanny starts another
        else:
            until(lambda: not psutil.pid_exists(there), "a worker outlives its nanny")
        assert client.submit(checksum, held, pure=False).result(timeout=120) == checksum(model)
        del held, sums
        assert_nothing_is_left(client, before)


@shipped
class Slow:
    """Takes its time to be rebuilt, once, and says that it has begun."""

    def __init__(self, mark):
        self.mark = mark

    def __getstate__(self):
        return self.mark

    def __setstate__(self, mark):
        self.mark = mark
        if not os.path.exists(mark):
            with open(mark, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)


def test_a_worker_is_killed_while_it_rebuilds_a_model(cluster, tmp_path):
    cluster.start_worker("a")
    cluster.start_worker("b", nanny=True)
    with cluster.client() as client:
        before = stands(pid_of(client, "a"))
        model = dense(MEBIBYTE)
        model.note = Slow(str(tmp_path / "mark"))
        mark = Path(model.note.mark)
        with ThreadPoolExecutor() as threads:
            held = threads.submit(client.scatter, model, workers=["b"], hash=False)
            until(lambda: mark.exists() and mark.read_text(), "no rebuild has begun")
            os.kill(int(mark.read_text()), signal.SIGKILL)
            # it was nowhere but there
            with pytest.raises(OSError, match=r"(?i)closed|lost|timed out") as lost:
                held.result(timeout=100)
            assert "\n" not in str(lost.value)
        assert not client.run_on_scheduler(keys)
        client.wait_for_workers(2, timeout=60)
        again = client.scatter(model, hash=False)
        assert client.submit(checksum, again).result(timeout=60) == checksum(model)
        del again
        assert_nothing_is_left(client, before)


def test_a_worker_is_killed_in_a_broadcast(cluster):
    """The others get the model; the call ends once nobody wants it for the one that is gone.

    ``Scheduler.replicate`` (dask/distributed#5704) goes on asking a worker that is gone for as
    long as the key is wanted, whatever it is of.
    """
    for name in "abc":
        cluster.start_worker(name)
    with cluster.client() as client, ThreadPoolExecutor() as threads:
        before = stands(pid_of(client, "a"), pid_of(client, "b"))
        others = {address_of(client, name) for name in "ab"}
        model = dense(512 * MEBIBYTE)
        there = pid_of(client, "c")
        killed = threads.submit(kill_when_it_grows, there, 100 * MEBIBYTE)
        call = threads.submit(client.scatter, model, broadcast=True, hash=False)
        killed.result()
        until(
            lambda: call.done() or client.run_on_scheduler(holders) == [others],
            "the others have no model",
        )
        if call.done() and call.exception():  # the first that it was sent to is gone
            assert isinstance(call.exception(), OSError)
            call = threads.submit(client.scatter, model, broadcast=True, hash=False)
            until(call.done, "it was not sent to two workers")
        (key,) = client.run_on_scheduler(keys)
        held = Future(key, client=client)
        sums = [client.submit(checksum, held, pure=False, workers=[name]) for name in "ab"]
        assert [each.result(timeout=60) for each in sums] == [checksum(model)] * 2
        client.cancel([held], force=True)
        assert call.exception(timeout=60) is None
        del held, sums
        assert_nothing_is_left(client, before)


@shipped
def let_go(dask_worker):
    """Drop what a worker holds, whoever knows of it; return the checksums."""
    from distributed.worker_state_machine import FreeKeysEvent

    sums = [checksum(model) for model in dask_worker.data.values()]
    dask_worker.handle_stimulus(FreeKeysEvent(keys=[*dask_worker.data], stimulus_id="test"))
    return sums


SENDER = """
    import sys

    from distributed import Client
    from tests import test_faults

    model = test_faults.dense(1 << 30)
    with Client(sys.argv[1]) as client:
        print("begins", flush=True)
        client.scatter(model, broadcast=True, hash=False, direct=sys.argv[2] == "direct")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("way", ["direct", "through the scheduler"])
def test_a_client_ends_in_the_middle_of_a_scatter(cluster, how, way):
    """What is whole distributed keeps, with nobody to want it, as it does arrays."""
    for name in "ab":
        cluster.start_worker(name)
    with cluster.client() as client:
        pids = [pid_of(client, name) for name in "ab"]
        before = stands(*pids, cluster.scheduler.pid)
        receivers = pids if way == "direct" else [cluster.scheduler.pid]
        sender = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SENDER), cluster.address, way],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert sender.stdout.readline() == b"begins\n"
            until(
                lambda: any(resident(pid) > before[pid][1] + 100 * MEBIBYTE for pid in receivers),
                "nothing was sent",
            )
            sender.send_signal(how)
            sender.wait(60)
        finally:
            sender.kill()
            sender.stdout.close()
        time.sleep(5)
        whole = checksum(dense(GIBIBYTE))
        for key in client.run_on_scheduler(keys):
            left = Future(key, client=client)
            assert client.submit(checksum, left).result(timeout=60) == whole
            client.cancel([left], force=True)  # nobody else would: who asked for it is gone
            del left
        # or the scheduler was never told what a worker got
        assert all(each == whole for sums in client.run(let_go).values() for each in sums)
        assert_nothing_is_left(client, before)
        model = dense(MEBIBYTE)
        assert client.submit(checksum, model).result(timeout=60) == checksum(model)


def test_the_disk_is_full_when_models_are_spilled(cluster, processes, tmp_path):
    """A limit on the size of files: writing fails in the middle, as where nothing is free."""
    options = ["--memory-limit", "2GiB"]
    memory = "DASK_DISTRIBUTED__WORKER__MEMORY__"
    limits = {f"{memory}TARGET": "0.2", f"{memory}SPILL": "0.3"}
    limits |= {f"{memory}PAUSE": "False", f"{memory}TERMINATE": "False"}
    cluster.start_worker("a", *options, before=f"ulimit -f {50 * 1024};", **limits)
    with cluster.client() as client:
        model = dense(100 * MEBIBYTE)
        held = [client.submit(made, 100 * MEBIBYTE, i, pure=False) for i in range(8)]
        wait(held, timeout=120)
        sums = client.gather([client.submit(checksum, each) for each in held])
        assert [name for ((name, _),) in sums] == ["kernel"] * 8
        assert [total / checksum(model)[0][1] for ((_, total),) in sums] == pytest.approx(
            list(range(1, 9)), rel=1e-5
        )
        del held
    cluster.workers["a"].terminate()
    cluster.workers["a"].wait(30)
    assert "File too large" in processes.log(1)
    assert not [path for path in (tmp_path / "a").rglob("storage/*") if path.is_file()]


@shipped
def made(nbytes, number):
    model = dense(nbytes)
    model.layers[0].kernel.assign(model.layers[0].kernel * (number + 1))
    return model


def test_a_model_is_more_than_a_worker_may_have(cluster):
    cluster.start_worker("a", "--memory-limit", "1500MiB", nanny=True)
    with cluster.client() as client:
        task = client.submit(hoard, 100 * MEBIBYTE, 100, retries=0)
        with pytest.raises(KilledWorker, match="hoard"):
            task.result(timeout=200)
        client.wait_for_workers(1, timeout=60)
        model = dense(MEBIBYTE)
        assert client.submit(checksum, model).result(timeout=100) == checksum(model)


@shipped
def hoard(nbytes, count):
    models = []
    for _ in range(count):
        models.append(dense(nbytes))
        time.sleep(0.3)  # the nanny looks several times a second
    return len(models)


def test_the_scheduler_is_killed_and_started_again(cluster):
    cluster.start_worker("a")
    model = dense(100 * MEBIBYTE)
    with cluster.client() as client:
        held = client.scatter(model, hash=False)
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        with pytest.raises((FutureCancelledError, TimeoutError, OSError)):
            client.submit(checksum, held).result(timeout=30)
    cluster.workers.pop("a").wait(60)  # which has nobody to work for any more
    cluster.scheduler = cluster.start_scheduler()
    cluster.start_worker("b")
    with cluster.client() as client:
        held = client.scatter(model, hash=False)
        assert client.submit(checksum, held).result(timeout=60) == checksum(model)


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Network:
    """Network namespaces on one bridge: what is in two of them can be cut from each other."""

    def __init__(self):
        self._id = f"dks{os.getpid() % 10_000}"
        self._net = f"10.213.{os.getpid() % 250}."
        self.host = self._net + "1"
        self.names = []
        ip("link", "add", self._id, "type", "bridge")
        ip("addr", "add", self.host + "/24", "dev", self._id)
        ip("link", "set", self._id, "up")

    def add(self, name):
        """Add a namespace; return its address and the words to run a command in it."""
        space, here = f"{self._id}{name}", f"{self._id}{name}h"
        self.names.append(name)
        address = self._address(name)
        ip("netns", "add", space)
        ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", here, "master", self._id, "up")
        ip("-n", space, "addr", "add", address + "/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        # a GiB takes ten seconds, so that there is a middle
        tbf = f"tc -n {space} qdisc add dev eth0 root tbf rate 800mbit burst 1mb latency 50ms"
        subprocess.run(shlex.split(tbf), check=True, capture_output=True)
        return address, f"ip netns exec {space}"

    def cut(self, one, other):
        """Have what each sends the other go to a machine that is not there."""
        nowhere = ["lladdr", "02:00:00:00:00:99", "nud", "permanent"]
        self._tell_neighbours(one, other, "replace", *nowhere)

    def mend(self, one, other):
        """Put the two together again."""
        self._tell_neighbours(one, other, "del")

    def _tell_neighbours(self, one, other, what, *how):
        for name, to in ((one, other), (other, one)):
            address = self._address(to)
            ip("-n", self._id + name, "neigh", what, address, "dev", "eth0", *how)

    def _address(self, name):
        return f"{self._net}{self.names.index(name) + 2}"

    def close(self):
        for name in self.names:
            ip("netns", "del", self._id + name)
        ip("link", "del", self._id)


@pytest.fixture
def network():
    try:
        found = Network()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces without the right to make them, and iproute2")
    yield found
    found.close()


def test_the_network_between_two_workers_is_cut(network, processes, tmp_path):
    """In the middle of a model; it comes whole when there is a network again."""
    cluster = Cluster(processes, tmp_path, network.host)
    # the shortest that distributed takes; the default is half a minute
    waits = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s"}
    for name in "ab":
        address, within = network.add(name)
        cluster.start_worker(name, "--host", address, within=within, **waits)
    with cluster.client() as client:
        here, there = (pid_of(client, name) for name in "ab")
        before = stands(here, there)
        model = dense(GIBIBYTE)
        held = client.scatter(model, workers=["a"], direct=True, hash=False)
        sums = client.submit(checksum, held, workers=["b"])
        until(lambda: resident(there) > before[there][1] + 100 * MEBIBYTE, "nothing was sent")
        network.cut("a", "b")
        # the one that waits gives up, and lets go of what it has got
        until(lambda: "Connection timed out" in processes.log(2), "it still waits")
        let_go_of_garbage(client)
        until(lambda: resident(there) < before[there][1] + 50 * MEBIBYTE, "it keeps what it got")
        assert not sums.done()
        assert [*client.run(held_keys, workers=[address_of(client, "b")]).values()] == [[]]
        network.mend("a", "b")
        assert sums.result(timeout=120) == checksum(model)
        del held, sums
        assert_nothing_is_left(client, before)
