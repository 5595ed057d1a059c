"""What breaks while a model is on its way: processes, disks, memory, the network.

Real processes, each ended in the middle of what its test is named after; then the computation has
ended right, or with an error that says what broke, and what survived, the client that is this
process too, is as it was: no key, no file, no descriptor, no memory more.
"""

import contextlib
import errno
import gc
import itertools
import math
import os
import pickle
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

from dask_keras_serialize import DecodeError
from tests.conftest import ROOT, free_ports, shipped, until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

DASK = Path(sys.executable).parent / "dask"
GIBIBYTE = 1 << 30
MEBIBYTE = 1 << 20


@shipped
def dense(nbytes):
    """Build a model of one kernel, of so many bytes of random numbers: whole mebibytes."""
    import keras  # not a global: a scheduler unpickles this

    rows = 1 << (nbytes.bit_length() // 2 - 1)

    def kernel(shape, dtype):
        numbers = np.random.default_rng(0).random(MEBIBYTE // 4, np.float32)
        # by the backend, in the memory that the variable then keeps
        return keras.ops.reshape(keras.ops.tile(numbers, math.prod(shape) // numbers.size), shape)

    layer = keras.layers.Dense(nbytes // 4 // rows, use_bias=False, kernel_initializer=kernel)
    model = keras.Sequential([keras.Input((rows,)), layer])
    layer.kernel_initializer = keras.initializers.GlorotUniform()
    return model


@shipped
def checksum(model):
    """Sum a model's numbers where they lie: the same wherever it is whole."""
    from dask_keras_serialize import backends  # not a global: a scheduler unpickles this

    def array(variable):
        value = variable.value  # on torch a view copies memory that was received
        return value.detach().numpy() if hasattr(value, "detach") else view(variable)

    view = backends.current()[1].view
    return [(v.path.rpartition("/")[2], float(array(v).sum(dtype="f8"))) for v in model.variables]


class Cluster:
    """A scheduler and workers, each a process of its own, and a client of theirs."""

    def __init__(self, processes, folder, host="127.0.0.1"):
        self._processes, self._folder = processes, folder
        self._host, (self._port,) = host, free_ports(1)
        self.scheduler = self.start_scheduler()
        self.workers = {}
        self.temporary = folder / "temporary"  # where workers' temporary files would lie

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
        self.temporary.mkdir(exist_ok=True)
        env["TMPDIR"] = str(self.temporary)
        self.workers[name] = self._processes.start("bash", "-c", shell, env=env)

    @contextlib.contextmanager
    def client(self):
        with Client(self.address, timeout=60) as client:
            client.wait_for_workers(len(self.workers), timeout=60)
            client.run(warm)  # what is loaded once does not count as left behind
            yield client
        assert not any(self.temporary.iterdir())


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


def assert_nothing_is_left(client, files, memory=100 * MEBIBYTE):
    """The scheduler knows no key, and processes have what they had."""
    gc.collect()  # errors, whose tracebacks hold futures
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
    """Say what processes have, and this one, which keeps the model it has made.

    The scheduler is to be among them wherever it lives on: all that goes by it is to go.
    TensorFlow's allocator would keep its memory: what counts is what sending takes.
    """
    gc.collect()  # the model of the test before, by which this process might have more again
    return {pid: (open_files(pid), resident(pid)) for pid in (os.getpid(), *pids)}


@pytest.mark.parametrize("who", ["worker", "nanny"])
def test_one_is_killed_while_a_worker_receives_a_model(cluster, who):
    cluster.start_worker("a")
    cluster.start_worker("b", nanny=True)
    with cluster.client() as client:
        model = dense(GIBIBYTE)
        before = stands(cluster.scheduler.pid, pid_of(client, "a"))
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
def take_time(mark):
    """Say in a file that a rebuild has begun, and take long over it; not where one has before."""
    if not os.path.exists(mark):
        with open(mark, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)


@shipped
class Slow:
    """Takes its time to be rebuilt, once."""

    def __init__(self, mark):
        self.mark = mark

    def __getstate__(self):
        return self.mark

    def __setstate__(self, mark):
        self.mark = mark
        take_time(mark)


def slow_by_value(client, mark):
    model = dense(MEBIBYTE)
    model.note = Slow(str(mark))
    return model


def slow_by_config(client, mark):
    """A model of Keras's own, and a worker that takes its time over one of its layers."""
    if keras.backend.backend() == "tensorflow":
        words = keras.layers.StringLookup()
        words.set_vocabulary(["a", "b"])  # what a layer is made with is in its config
        model = keras.Sequential([keras.Input((1,), dtype="string"), words])
        where = keras.layers.StringLookup, "load_assets"
    else:  # whose layers have no files
        model, where = dense(MEBIBYTE), (keras.layers.Dense, "build")
    client.run(slow_down, *where, str(mark), workers=[address_of(client, "b")])
    return model


@shipped
def slow_down(cls, method, mark, after=False):
    whole = getattr(cls, method)

    def slowed(self, *arguments):
        if after:
            whole(self, *arguments)
        take_time(mark)
        return None if after else whole(self, *arguments)

    setattr(cls, method, slowed)


ALONE = "worker without a nanny"


@pytest.mark.parametrize(
    ("slow", "who"),
    [
        (slow_by_value, "worker"),
        (slow_by_value, "nanny"),
        (slow_by_config, "worker"),
        (slow_by_config, ALONE),
    ],
)
def test_one_is_killed_while_a_worker_rebuilds_a_model(cluster, tmp_path, slow, who):
    cluster.start_worker("a")
    cluster.start_worker("b", nanny=who != ALONE)
    with cluster.client() as client:
        before = stands(cluster.scheduler.pid, pid_of(client, "a"))
        mark, folder = tmp_path / "mark", tmp_path / "b"
        model = slow(client, mark)
        there = files_in(folder)
        with ThreadPoolExecutor() as threads:
            held = threads.submit(client.scatter, model, workers=["b"], hash=False)
            until(lambda: mark.exists() and mark.read_text(), "no rebuild has begun")
            written = files_in(folder) - there
            assert bool(written) == hasattr(model.layers[-1], "save_assets")
            rebuilds = int(mark.read_text())
            os.kill(cluster.workers["b"].pid if who == "nanny" else rebuilds, signal.SIGKILL)
            # it was nowhere but there
            with pytest.raises(OSError, match=r"(?i)closed|lost|timed out") as lost:
                held.result(timeout=100)
            assert "\n" not in str(lost.value)
        assert not client.run_on_scheduler(keys)
        if who == "nanny":
            until(lambda: not psutil.pid_exists(rebuilds), "a worker outlives its nanny")
        elif who == ALONE:
            # nobody is there to remove its folder, but the next worker that works there:
            # WorkSpace of distributed/diskutils.py, which sees that its lock is nobody's
            cluster.workers["b"].wait(60)
            assert files_in(folder) - there == written
            cluster.start_worker("b")
        client.wait_for_workers(1 if who == "nanny" else 2, timeout=60)
        until(lambda: not files_in(folder) - there, "files stay in the worker's folder")
        again = client.scatter(model, hash=False)
        assert client.submit(checksum, again).result(timeout=60) == checksum(model)
        del again, held, lost
        assert_nothing_is_left(client, before)


def files_in(folder):
    """Return the files in a worker's folder, but for distributed's own locks."""
    return {
        path for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".dirlock")
    }  # fmt: skip


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="others' layers have no files to write"
)
def test_a_client_is_killed_while_it_writes_the_files_of_a_layer(cluster, tmp_path):
    """They stay where temporary files lie: nobody else knows of them; a cluster has nothing of it.

    Who is interrupted removes them (``tempfile.TemporaryDirectory``), who is killed cannot.
    """
    cluster.start_worker("a")
    mark, folder = tmp_path / "mark", tmp_path / "of the client"
    folder.mkdir()
    with cluster.client() as client:
        before = stands(cluster.scheduler.pid, pid_of(client, "a"))
        sender = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), cluster.address, mark],
            cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            until(lambda: mark.exists() and mark.read_text(), "nothing was written")
            written = files_in(folder)
            assert written
        finally:
            sender.kill()
            sender.wait()
        assert files_in(folder) == written
        until(lambda: client.run_on_scheduler(clients) == 1, "the scheduler waits for the client")
        model = dense(MEBIBYTE)
        assert client.submit(checksum, model).result(timeout=60) == checksum(model)
        assert_nothing_is_left(client, before)


WRITER = """
    import sys

    import keras
    from distributed import Client
    from tests import test_faults

    words = keras.layers.StringLookup()
    words.set_vocabulary(["a", "b"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words])
    test_faults.slow_down(keras.layers.StringLookup, "save_assets", sys.argv[2], after=True)
    with Client(sys.argv[1]) as client:
        client.scatter(model, hash=False)
"""


@shipped
def clients(dask_scheduler):
    return sum(name.startswith("Client-") for name in dask_scheduler.clients)


@shipped
class Fails:
    """Cannot be rebuilt in one process."""

    def __init__(self, pid):
        self.pid = pid

    def __setstate__(self, state):
        vars(self).update(state)
        if os.getpid() == self.pid:
            raise RuntimeError("it fails\nin the middle")


def failing_by_value(client, nbytes):
    model = dense(nbytes)
    model.note = Fails(pid_of(client, "b"))
    return model


def failing_by_config(client, nbytes):
    model = dense(nbytes)
    there = [address_of(client, "b")]
    client.run(break_build, model.input_shape[-1], workers=there)
    return model


@shipped
def break_build(width):
    """Have layers of such an input fail when they have their kernel."""
    whole = keras.layers.Dense.build

    def build(self, input_shape):
        whole(self, input_shape)
        if input_shape[-1] == width:
            raise RuntimeError("it fails\nin the middle")

    keras.layers.Dense.build = build


@shipped
def layers_alive():
    """Name this process's layers, when those that nobody has are gone."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), keras.Layer)]
    return sorted(f"{type(each).__name__} {vars(each).get('name')}" for each in found)


def acquaint(client):
    """Have two workers send each other models both ways: what they keep of a first is no leak."""
    for note, (one, other) in itertools.product((None, "by value"), ("ab", "ba")):
        model = dense(MEBIBYTE)
        if note:
            model.note = note
        held = client.scatter(model, workers=[one], direct=True, hash=False)
        sums = client.submit(checksum, held, workers=[other], pure=False)
        assert sums.result(timeout=60) == checksum(model)
        del held, sums
    let_go_of_garbage(client)


@pytest.mark.parametrize("failing", [failing_by_value, failing_by_config])
def test_a_rebuild_fails_in_the_middle_in_a_worker_that_lives_on(cluster, failing):
    """The task that needs the model fails, no other; and the worker keeps nothing of it."""
    for name in "ab":
        cluster.start_worker(name)
    with cluster.client() as client:
        there = {"workers": [address_of(client, "b")]}
        other = dense(MEBIBYTE)
        model = failing(client, 256 * MEBIBYTE)
        acquaint(client)
        before = stands(cluster.scheduler.pid, *(pid_of(client, name) for name in "ab"))
        alive = client.run(layers_alive)
        held = client.scatter(model, workers=["a"], direct=True, hash=False)
        sums = client.submit(checksum, held, **there)
        among = [client.submit(checksum, other, pure=False, **there) for _ in range(4)]
        with pytest.raises(DecodeError, match="it fails") as failed:
            sums.result(timeout=60)
        assert "\n" not in str(failed.value)
        assert client.gather(among) == [checksum(other)] * 4
        # and it is whole where it came from
        whole = client.submit(checksum, held, workers=["a"], pure=False)
        assert whole.result(timeout=60) == checksum(model)
        failed.value.__traceback__ = None  # by which the client's own copy holds the future
        # what stands in the worker for the model has nothing of it; a task keeps its own
        del among
        until(lambda: len(client.run_on_scheduler(keys)) == 3, "tasks that nobody wants")
        let_go_of_garbage(client)
        assert client.run(layers_alive, **there) == {key: alive[key] for key in there["workers"]}
        del held, sums, whole, failed
        assert_nothing_is_left(client, before, memory=50 * MEBIBYTE)
        assert client.run(layers_alive) == alive


@pytest.mark.parametrize("who", ["worker", "nanny"])
def test_one_is_killed_in_a_broadcast(cluster, who):
    """The others get the model; the call ends once nobody wants it for the one that is gone.

    ``Scheduler.replicate`` (dask/distributed#5704) goes on asking a worker that is gone for as
    long as the key is wanted, whatever it is of.
    """
    for name in "ab":
        cluster.start_worker(name)
    cluster.start_worker("c", nanny=who == "nanny")
    with cluster.client() as client, ThreadPoolExecutor() as threads:
        model = dense(512 * MEBIBYTE)
        before = stands(cluster.scheduler.pid, *(pid_of(client, name) for name in "ab"))
        others = {address_of(client, name) for name in "ab"}
        there = pid_of(client, "c")
        victim = there if who == "worker" else cluster.workers["c"].pid
        killed = threads.submit(kill_when_it_grows, there, 100 * MEBIBYTE, victim)
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
        model = dense(GIBIBYTE)
        whole = checksum(model)
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


@pytest.fixture(params=["files may not be larger", "nothing is free"])
def short_of_disk(request, tmp_path):
    """Yield what a worker named "a" is started after, and what it then says of its disk."""
    if request.param == "files may not be larger":  # so that writing fails in the middle
        yield f"ulimit -f {50 * 1024};", "File too large"
        return
    folder = tmp_path / "a"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150m", "none", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system without the right to mount it")
    yield "", "No space left on device"
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_disk_is_full_when_models_are_spilled(cluster, processes, short_of_disk, tmp_path):
    before, says = short_of_disk
    memory = "DASK_DISTRIBUTED__WORKER__MEMORY__"
    limits = {f"{memory}TARGET": "0.2", f"{memory}SPILL": "0.3"}
    limits |= {f"{memory}PAUSE": "False", f"{memory}TERMINATE": "False"}
    limits["TF_ENABLE_ONEDNN_OPTS"] = "0"  # whose allocator keeps what was freed
    cluster.start_worker("a", "--memory-limit", "2GiB", before=before, **limits)
    with cluster.client() as client:
        model = dense(100 * MEBIBYTE)
        stood = stands(cluster.scheduler.pid, pid_of(client, "a"))
        held = [client.submit(made, 100 * MEBIBYTE, i, pure=False) for i in range(8)]
        wait(held, timeout=120)
        tasks = [client.submit(checksum, each) for each in held]
        sums = [asked_again(each) for each in tasks]
        assert [name for ((name, _),) in sums] == ["kernel"] * 8
        assert [total / checksum(model)[0][1] for ((_, total),) in sums] == pytest.approx(
            list(range(1, 9)), rel=1e-5
        )
        assert says in processes.log(1)
        del held, tasks
        assert_nothing_is_left(client, stood, memory=200 * MEBIBYTE)
    cluster.workers["a"].terminate()  # with what is left of spills that failed
    cluster.workers["a"].wait(30)
    assert not [path for path in (tmp_path / "a").rglob("storage/*") if path.is_file()]


def asked_again(task):
    """Return a task's result; where a spilled model is read into memory, others have to go.

    Then that is what fails for want of room on the disk (``zict/buffer.py``): with nothing lost.
    """
    for _ in range(20):
        try:
            return task.result(timeout=60)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG) or "\n" in str(error):
                raise
            error.__traceback__ = None  # by which the client's own copy holds the future
            task.retry()
    return task.result(timeout=60)


@shipped
def made(nbytes, number):
    model = dense(nbytes)
    model.layers[0].kernel.assign(model.layers[0].kernel * (number + 1))
    return model


def test_models_are_more_than_a_worker_may_have(cluster, tmp_path):
    """Rebuilds go on until the nanny ends the worker."""
    cluster.start_worker("a", "--memory-limit", "1500MiB", nanny=True)
    with cluster.client() as client:
        before = stands(cluster.scheduler.pid, cluster.workers["a"].pid)
        mark = tmp_path / "mark"
        task = client.submit(hoard, 100 * MEBIBYTE, str(mark), retries=0)
        with pytest.raises(KilledWorker, match="hoard") as killed:
            task.result(timeout=200)
        assert "\n" not in str(killed.value)
        assert int(mark.read_text()) > 2
        killed.value.__traceback__ = None  # by which the client's own copy holds the future
        client.wait_for_workers(1, timeout=60)
        model = dense(MEBIBYTE)
        assert client.submit(checksum, model).result(timeout=100) == checksum(model)
        del task, killed
        assert_nothing_is_left(client, before)


@shipped
def hoard(nbytes, mark):
    """Rebuild a model again and again; write down how many it is."""
    from dask_keras_serialize.configs import templates  # not a global: a scheduler unpickles this

    packed = pickle.dumps(dense(nbytes), protocol=5)  # in band: each takes memory of its own
    models = []
    while len(models) < 100:
        models.append(pickle.loads(packed))
        with open(mark, "w") as file:
            file.write(str(templates.counts.total()))
        time.sleep(0.3)  # the nanny looks several times a second
    return len(models)


def test_a_worker_has_no_memory_for_a_model_that_arrives(cluster, processes):
    """Rebuilding takes no more: what has arrived is used where it lies."""
    cluster.start_worker("a")
    cluster.start_worker("b")
    with cluster.client() as client:
        model = dense(400 * MEBIBYTE)
        before = stands(cluster.scheduler.pid, *(pid_of(client, name) for name in "ab"))
        there = {"workers": [address_of(client, "b")]}
        client.run(limit_memory, 200 * MEBIBYTE, **there)
        held = client.scatter(model, workers=["a"], direct=True, hash=False)
        sums = client.submit(checksum, held, **there)
        until(lambda: "no memory to receive" in processes.log(2), "there was memory")
        assert not sums.done()
        client.run(limit_memory, None, **there)
        assert sums.result(timeout=60) == checksum(model)
        del held, sums
        assert_nothing_is_left(client, before)


@shipped
def limit_memory(nbytes):
    """Let this process have so many bytes of addresses more, or as many as it likes."""
    import resource

    limit = (
        resource.RLIM_INFINITY if nbytes is None else nbytes + psutil.Process().memory_info().vms
    )
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_the_scheduler_is_killed_while_a_model_goes_through_it(cluster):
    cluster.start_worker("a")
    model = dense(GIBIBYTE)
    with cluster.client() as client, ThreadPoolExecutor() as threads:
        before = stands()
        call = threads.submit(client.scatter, model, hash=False, direct=False)
        kill_when_it_grows(cluster.scheduler.pid, 200 * MEBIBYTE)
        with pytest.raises((OSError, FutureCancelledError)) as lost:
            call.result(timeout=60)
        assert not isinstance(lost.value, TimeoutError)
        assert "\n" not in str(lost.value)
    cluster.workers.pop("a").wait(60)  # which has nobody to work for any more
    cluster.scheduler = cluster.start_scheduler()
    cluster.start_worker("b")
    with cluster.client() as client:
        held = client.scatter(model, hash=False)
        assert client.submit(checksum, held).result(timeout=60) == checksum(model)
        del held, call, lost
        assert_nothing_is_left(client, before)


def test_the_scheduler_is_killed_while_a_worker_receives_a_model(cluster):
    for name in "ab":
        cluster.start_worker(name)
    model = dense(GIBIBYTE)
    with cluster.client() as client:
        before = stands()
        there = pid_of(client, "b")
        held = client.scatter(model, workers=["a"], direct=True, hash=False)
        sums = client.submit(checksum, held, workers=["b"])
        kill_when_it_grows(there, 200 * MEBIBYTE, cluster.scheduler.pid)
        with pytest.raises(FutureCancelledError, match="scheduler-connection-lost"):
            sums.result(timeout=60)
    for name in "ab":
        cluster.workers.pop(name).wait(60)
    cluster.scheduler = cluster.start_scheduler()
    cluster.start_worker("c")
    with cluster.client() as client:
        held = client.scatter(model, hash=False)
        assert client.submit(checksum, held).result(timeout=60) == checksum(model)
        del held, sums
        assert_nothing_is_left(client, before)


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
        model = dense(GIBIBYTE)
        before = stands(cluster.scheduler.pid, here, there)
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
