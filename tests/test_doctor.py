"""The doctor, on real clusters: what is right passes, what is wrong is named with the way out."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner
from distributed import Client
from distributed.diagnostics import nvml
from distributed.protocol import dask_serialize

from dask_keras_serialize import cli, devices, views
from dask_keras_serialize.cluster import checkup, doctor
from dask_keras_serialize.cluster.verdict import judge
from dask_keras_serialize.pickling import pack
from tests import zoo
from tests.conftest import start_cluster
from tests.test_cluster import environment_without_us, shipped

pytestmark = pytest.mark.once

HERE = keras.backend.backend()
BIN = Path(sys.executable).parent


def run(*arguments):
    return CliRunner().invoke(cli.keras, ["doctor", *map(str, arguments)])


def keys_left(client):
    """Wait a moment for what the doctor's client held to be forgotten."""

    def left(dask_scheduler):
        return [key for key in dask_scheduler.tasks if "doctor" in str(key)]

    for _ in range(50):
        if not (keys := client.run_on_scheduler(left)):
            break
        time.sleep(0.1)
    return keys


@pytest.mark.programs
@pytest.mark.cluster
def test_a_cluster_that_is_right(client, address):
    done = subprocess.run(
        [BIN / "dask", "keras", "doctor", address, "--timeout", "120"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    columns, me, scheduler, *workers = done.stdout.splitlines()[:5]
    assert columns.split() == " ".join(views._FACTS.values()).split()
    assert me.split()[2] == keras.version()
    assert scheduler.split()[3:5] == ["-", "-"]
    for worker in workers:
        assert worker.split()[:5] == [
            "worker", worker.split()[1], me.split()[1], keras.version(), HERE,
        ]  # fmt: skip
        assert worker.endswith(" ms")
        assert " ours " in worker
        assert "cpu, " in worker
    assert "!" not in done.stdout
    assert not client.run_on_scheduler(lambda: "keras" in sys.modules)
    assert keys_left(client) == []


@pytest.mark.more
@pytest.mark.cluster
def test_for_programs(address, tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    done = run("--scheduler-file", file, "--json", "--timeout", 120)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["ok"] is True
    assert [finding for finding in found["findings"] if finding["level"] == "failure"] == []
    me, scheduler, *workers = found["processes"]
    assert (me["role"], scheduler["role"], scheduler["workers"]) == ("client", "scheduler", 2)
    assert scheduler["keras-loaded"] is False
    assert {worker["name"] for worker in workers} == {0, 1}
    for worker in workers:
        assert worker["round-trip"] > 0
        assert worker["backend"] == HERE
        assert worker["handlers"] == {}
        assert (worker["host"], worker["gpus"]) == (me["host"], [])
        assert worker["pid"] != me["pid"]
        assert worker["cores"] == me["cores"] == int(me["affinity"], 16).bit_count()
    threads = sum(worker["threads"] or worker["cores"] for worker in workers)
    marked = [finding["who"] for finding in found["findings"] if finding["fact"] == "devices"]
    assert marked == [worker["who"] for worker in workers if threads > me["cores"]]


@pytest.mark.cluster
def test_a_client_without_keras(core_bin, address):
    done = subprocess.run(
        [core_bin / "dask", "keras", "doctor", address, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (failure,) = [each for each in found["findings"] if each["level"] == "failure"]
    assert failure["who"] == "client"
    assert "No module named 'keras'" in failure["what"]
    assert "no model was sent" in failure["what"]
    assert "pip install" in failure["way-out"]


@pytest.mark.programs
@pytest.mark.cluster
def test_workers_that_are_wrong_each_in_its_way(core_bin, processes, tmp_path):
    """One without the package, one not registered, one busy, one stopped; and one that is right."""
    off = {"DASK_DASK_KERAS_SERIALIZE__REGISTER": "False"}
    address = start_cluster(processes, core_bin, BIN, tmp_path, [{}, {}, off, {}])
    processes.start(
        environment_without_us(tmp_path) / "dask", "worker", address, "--name", "4",
        "--no-dashboard", "--no-nanny", "--local-directory", tmp_path, env={"PYTHONPATH": ""},
    )  # fmt: skip
    done_file = tmp_path / "done"
    with Client(address) as client:
        client.wait_for_workers(5, timeout=60)
        pids = client.run(os.getpid)
        info = client.scheduler_info(n_workers=-1)["workers"]
        by_name = {int(told["name"]): worker for worker, told in info.items()}
        right, busy, _, stopped, _ = (by_name[i] for i in range(5))
        # they load it together, and the doctor need not wait for that
        client.gather([client.submit(load, i, workers=[w]) for i, w in enumerate((right, busy))])
        blocker = client.submit(until_exists, str(done_file), workers=[busy])
        os.kill(pids[stopped], signal.SIGSTOP)
        try:
            start = time.monotonic()
            done = run(address, "--json", "--timeout", 4)
            assert time.monotonic() - start < 20
        finally:
            os.kill(pids[stopped], signal.SIGCONT)
            done_file.touch()
        blocker.result(timeout=60)
        assert keys_left(client) == []
        # that it was asked has not registered it: the next doctor is to find it as well
        assert client.run(eval, checkup.GLANCE)[by_name[2]]["registered"] is False
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert found["ok"] is False
    failures = {
        each["who"].removeprefix("worker "): each
        for each in found["findings"]
        if each["level"] == "failure"
    }
    assert failures.keys() == {by_name[i] for i in range(1, 5)}, json.dumps(failures)
    for number, what, way_out in [
        (1, "no model came back: no answer in 4 s: it is busy, or gone", "--timeout"),
        (2, "not registered", "dask-keras-serialize.register: true"),
        (3, "it cannot be asked: no answer in 4 s", "--timeout"),
        (4, "the package dask-keras-serialize is not installed", "pip install"),
    ]:
        assert what in failures[by_name[number]]["what"]
        assert way_out in failures[by_name[number]]["way-out"]
    workers = {each["who"]: each for each in found["processes"]}
    assert workers[f"worker {right}"]["round-trip"] > 0
    assert workers[f"worker {by_name[4]}"]["python"]
    text = views.examination(found["processes"], judge(found["processes"]))
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("worker")}
    assert " - ! " in rows[by_name[4]]
    for line in (line for line in text.splitlines() if line.startswith("! ")):
        assert line.startswith("! worker tcp://")


@shipped
def load(i):
    import keras

    return keras.backend.backend()


@shipped
def until_exists(file):
    import os
    import time

    while not os.path.exists(file):
        time.sleep(0.1)


@pytest.mark.programs
@pytest.mark.cluster
def test_a_cluster_without_workers(processes, tmp_path):
    address = start_cluster(processes, BIN, BIN, tmp_path, [])
    done = run(address)
    assert done.exit_code == 1
    assert "it has no workers -> start some: dask worker" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["tcp://127.0.0.1:1", "--timeout", "0.5"],
        ["nonsense"],
        ["nothing://127.0.0.1:1"],
        ["--scheduler-file", "setup.cfg"],
    ],
)
def test_no_scheduler_is_one_line(arguments, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    done = run(*arguments)
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("Error: ")
    assert arguments[0] in line or "setup.cfg" in line
    assert line.endswith("is it running, and is that its address?") or "setup.cfg" in line


def test_which_cluster_has_to_be_said(monkeypatch):
    done = run()
    assert done.exit_code == 2
    assert "which cluster?" in done.output


# what is judged


def facts(role, **others):
    same = {"python": "3.11.7", "dask": "2026.8.0", "distributed": "2026.8.0", "package": "0.1.0"}
    same |= {"who": role, "role": role, "registered": True}
    if role != "scheduler":
        same |= {"keras": "3.15.1", "backend": "jax", "backend-version": "1", "handlers": {}}
    return same | others


CLIENT, SCHEDULER, WORKER = facts("client"), facts("scheduler", workers=1), facts("worker")


def test_nothing_is_wrong():
    assert judge([CLIENT, SCHEDULER, WORKER]) == []
    assert judge([CLIENT, SCHEDULER | {"keras": "3.9.0"}, WORKER]) == []
    assert judge([CLIENT, SCHEDULER, facts("worker", python="3.11.9")]) == []
    assert judge([CLIENT, SCHEDULER, WORKER | {"backend-version": "1.0.1"}]) != []
    assert judge([CLIENT | {"backend-version": "1.0"}, WORKER | {"backend-version": "1.0.1"}]) == []
    assert views.examination([CLIENT, SCHEDULER, WORKER], []).endswith("\nall is well")


@pytest.mark.parametrize(
    ("role", "said", "fact", "level", "what", "way_out"),
    [
        ("worker", {"python": "3.12.1"}, "python", "failure", "python is 3.12.1, the client's 3.11",
         "same minor version of python"),
        ("scheduler", {"python": "3.12.1"}, "python", "failure", "python is 3.12.1", "minor"),
        ("worker", {"keras": "3.9.0"}, "keras", "failure", "keras is 3.9.0, the client's 3.15.1",
         "same minor version of keras"),
        ("worker", {"keras": "3.15.2"}, "keras", "note", "keras is 3.15.2, the client's 3.15.1",
         "same version of keras"),
        ("worker", {"backend-version": "2"}, "backend", "note", "jax is 2, the client's 1",
         "same minor version of jax"),
        ("worker", {"dask": "2026.7.0"}, "dask", "note", "dask is 2026.7.0", "version of dask"),
        ("scheduler", {"distributed": "1"}, "distributed", "note", "distributed is 1", "same"),
        ("worker", {"package": "0.2.0"}, "package", "failure", "is 0.2.0, the client's 0.1.0",
         "same version of dask-keras-serialize"),
        ("scheduler", {"package": None, "registered": None}, "package", "failure",
         "not installed", "pip install dask-keras-serialize there"),
        ("worker", {"package": None, "registered": None}, "package", "failure",
         "not installed", "pip install dask-keras-serialize there"),
        ("worker", {"registered": False}, "handler", "failure", "not registered",
         "dask-keras-serialize.register: true"),
        ("scheduler", {"registered": False}, "handler", "note", "not registered", "register: true"),
        ("client", {"registered": False}, "handler", "note", "not registered", "import dask_keras"),
        ("worker", {"handlers": {"Model.__reduce_ex__": "other.f"}}, "handler", "failure",
         "Model.__reduce_ex__ is other.f, not ours", "imports 'other'"),
        ("worker", {"backend": "torch"}, "backend", "failure",
         "backend is torch, the client's jax, and workers differ", "KERAS_BACKEND=jax"),
        ("worker", {"idle-gpus": 1}, "devices", "failure", "the driver has 1 GPU, and jax finds",
         "install the GPU build of jax"),
        ("worker", {"keras-error": "ImportError: no"}, "keras", "failure", "cannot be loaded",
         "pip install"),
        ("worker", {"round-trip-error": "lost"}, "round-trip", "failure", "lost", "log"),
        ("scheduler", {"workers": 0}, "who", "failure", "no workers", "dask worker"),
    ],
)  # fmt: skip
def test_what_differs_is_judged(role, said, fact, level, what, way_out):
    processes = [each | (said if each["role"] == role else {}) for each in (CLIENT, SCHEDULER)]
    processes += [WORKER | (said if role == "worker" else {}), facts("worker", who="another")]
    (finding,) = judge(processes)
    assert (finding.who, finding.fact, finding.level) == (role, fact, level)
    assert what in finding.what
    assert way_out in finding.way_out
    marked = [line for line in views.examination(processes, [finding]).splitlines() if line]
    mark = {"failure": " !", "note": " ~"}[level]
    assert [mark in line for line in marked[1:5]] == [each["who"] == role for each in processes]
    assert marked[-2].startswith(f"{mark.strip()} {role}: ")
    assert marked[-1] == f"1 {level}"


def test_workers_that_all_have_another_backend_may_be_meant_so():
    (finding,) = judge([CLIENT, SCHEDULER, WORKER | {"backend": "torch"}])
    assert (finding.fact, finding.level) == ("backend", "note")


def on_host(**others):
    """Facts of a worker that has all of a host of 4 cores to itself."""
    place = {"host": "one", "cores": 4, "affinity": "f", "threads": None, "gpus": []}
    return facts("worker", **place | {"visible-gpus": None} | others)


def judge_workers(*workers):
    """Judge workers on one host, if they do not say otherwise, each in a process of its own."""
    named = [{"pid": i} | each | {"who": f"worker {i}"} for i, each in enumerate(workers)]
    here = on_host(pid=-1) | {"who": "client", "role": "client"}
    return judge([here, SCHEDULER | {"host": "one"}, *named])


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([{}], None),
        ([{}, {}], "2 workers of one host compute with 8 threads, on 4 cores"),
        ([{}, {"host": "another"}], None),
        ([{"pid": 7}, {"pid": 7}], None),
        ([{"threads": 2}, {"threads": 2}], None),
        ([{"threads": 2}, {"threads": 3}], "with 5 threads, on 4 cores"),
        ([{"threads": 1}] * 5, "5 workers of one host compute with 5 threads, on 4 cores"),
        ([{"threads": 4}, {"threads": 1}], "with 5 threads, on 4 cores"),
        ([{"threads": 9}], None),
        # cores of their own, by the system
        ([{"cores": 2, "affinity": "3"}, {"cores": 2, "affinity": "c"}], None),
        ([{"cores": 2, "affinity": "3"}, {"cores": 2, "affinity": "3"}], "4 threads, on 2 cores"),
        ([{"cores": 1, "affinity": "1"}] * 2, "2 threads, on 1 core"),
        ([{"affinity": None}, {"affinity": None}], "with 8 threads, on 4 cores"),
        ([{"affinity": None, "threads": 2}] * 2, None),
    ],
)
def test_workers_that_share_cores(workers, said):
    findings = judge_workers(*[on_host(**each) for each in workers])
    assert len(findings) == (len(workers) if said else 0)
    for i, finding in enumerate(findings):
        assert (finding.who, finding.fact, finding.level) == (f"worker {i}", "devices", "note")
        assert finding.what.endswith(said)
        assert 'PlaceKeras(threads="worker")' in finding.way_out


def test_a_worker_without_keras_shares_no_cores():
    broken = on_host(**{"keras-error": "ImportError: no"})
    del broken["threads"], broken["gpus"]
    (finding,) = judge_workers(on_host(), broken)
    assert finding.fact == "keras"


GROWS, ALL, PART = "as needed", "all at once", "{} of the card's at once"


@pytest.mark.parametrize(
    ("workers", "marked"),
    [
        ([(1, None, ALL)], []),
        ([(1, None, ALL), (1, None, ALL)], [0, 1]),
        ([(1, None, ALL), (1, None, GROWS)], [0, 1]),
        ([(1, None, GROWS), (1, None, GROWS)], []),
        ([(1, None, PART.format("0.75")), (1, None, PART.format("0.75"))], [0, 1]),
        ([(1, None, PART.format("0.75")), (1, None, GROWS)], [0, 1]),
        ([(1, None, PART.format(".5")), (1, None, PART.format("0.5"))], []),
        ([(1, None, PART.format(".25")), (1, None, GROWS)], []),
        ([(1, None, "512 MiB"), (1, None, "512 MiB")], []),
        ([(1, "0", ALL), (1, "1", ALL)], []),
        ([(1, "1", ALL), (1, "0", ALL), (1, "1", ALL)], [0, 2]),
        ([(1, "0", ALL), (1, None, ALL)], [0, 1]),
        # dask-cuda: its own first, and all of them
        ([(1, "0,1", ALL), (1, "1,0", ALL)], []),
        ([(2, "0,1", ALL), (2, "1,0", ALL)], [0, 1]),
        ([(1, "GPU-a", ALL), (1, " GPU-a", ALL)], [0, 1]),
        ([(0, None, ""), (0, None, "")], []),
    ],
)
def test_workers_that_share_a_gpu(workers, marked):
    def worker(number, visible, memory, **others):
        gpus = [f"GPU:{i}" for i in range(number)]
        said = {"gpus": gpus, "visible-gpus": visible, "memory": memory, "threads": 1}
        return on_host(**said | others)

    findings = judge_workers(*[worker(*each) for each in workers])
    assert [finding.who for finding in findings] == [f"worker {i}" for i in marked]
    for finding in findings:
        assert (finding.fact, finding.level) == ("devices", "failure")
        assert "2 workers of one host share a GPU" in finding.what
        assert "at once" in finding.what
        for way_out in ('PlaceKeras(memory="growth")', "limit", "device={name: number}"):
            assert way_out in finding.way_out
    apart = [worker(*each, host=str(i)) for i, each in enumerate(workers)]
    in_one_process = [worker(*each, pid=1) for each in workers]
    assert judge_workers(*apart) == judge_workers(*in_one_process) == []


def test_who_does_not_answer_is_judged_by_that_alone():
    silent = {"who": "worker a", "role": "worker", "error": "no answer in 3 s"}
    (finding,) = judge([CLIENT, SCHEDULER, silent])
    assert (finding.fact, finding.level) == ("who", "failure")


def test_many_of_a_kind_are_one_line():
    workers = [facts("worker", who=f"worker {i}", keras="3.9.0") for i in range(100)]
    processes = [CLIENT, SCHEDULER, *workers]
    shown = views.examination(processes, judge(processes))
    assert shown.count("the client's") == 1
    assert "! worker 0, worker 1, worker 2 and 97 more: keras is 3.9.0" in shown
    assert shown.endswith("100 failures")


def test_a_table_shows_no_control_characters():
    worker = facts("worker", devices="\x1b[31mcpu\n")
    assert "\\x1b[31mcpu\\n" in views.examination([CLIENT, SCHEDULER, worker], [])


# what a process says of itself


def test_who_took_a_slot_is_named():
    def theirs(obj):
        raise NotImplementedError

    before = dask_serialize.dispatch(keras.Sequential)
    dask_serialize.register(keras.Sequential, theirs)
    try:
        (name,) = checkup.look()["handlers"].items()
    finally:
        dask_serialize.register(keras.Sequential, before)
    assert name[0] == "dask_serialize of Sequential"
    assert name[1].startswith("tests.test_doctor.")
    assert checkup.look()["handlers"] == {}


def test_gpus_that_nobody_uses(monkeypatch):
    monkeypatch.setattr(nvml, "device_get_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert checkup.look()["idle-gpus"] == 2
    for none_meant in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none_meant)
        assert "idle-gpus" not in checkup.look()


def test_where_a_process_runs(monkeypatch):
    here = devices.current()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(here, "threads", lambda: 5)
    monkeypatch.setattr(here, "memory", lambda: "as needed")
    said = checkup.look()
    assert said["host"] == platform.node()
    assert said["pid"] == os.getpid()
    assert 1 <= said["cores"] <= os.cpu_count()
    assert (said["threads"], said["gpus"], said["visible-gpus"]) == (5, [], "3")
    assert "memory" not in said
    monkeypatch.setattr(here, "gpus", lambda: ["GPU:0"])
    said = checkup.look()
    assert (said["gpus"], said["memory"]) == (["GPU:0"], "as needed")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    said = checkup.look()
    assert (said["cores"], said["affinity"]) == (os.cpu_count(), None)


def test_keras_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    assert "ModuleNotFoundError" in checkup.look()["keras-error"]


def test_devices_in_words(monkeypatch):
    here = devices.current()
    assert devices.describe().startswith("cpu, ")
    for threads, said in ((None, "cpu, all cores"), (1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
        monkeypatch.setattr(here, "threads", lambda threads=threads: threads)
        assert devices.describe() == said
    monkeypatch.setattr(here, "gpus", lambda: ["GPU:0"])
    for how, said in memories(monkeypatch):
        with monkeypatch.context() if how is None else how:
            assert devices.describe() == f"GPU:0, memory {said}"


def memories(monkeypatch):
    """Yield how memory may have been limited before the devices started, and what is said."""

    @contextlib.contextmanager
    def patched(*patches, **env):
        with monkeypatch.context() as patch:
            for patch_arguments in patches:
                patch.setattr(*patch_arguments, raising=False)  # not every torch tells its cap
            for name, value in env.items():
                patch.setenv(name, value)
            yield

    match HERE:
        case "jax":
            yield patched(), "0.75 of the card's at once"
            yield patched(XLA_PYTHON_CLIENT_MEM_FRACTION=".25"), ".25 of the card's at once"
            yield patched(XLA_PYTHON_CLIENT_PREALLOCATE="false"), "as needed"
            yield patched(XLA_PYTHON_CLIENT_ALLOCATOR="platform"), "as needed"
        case "torch":
            import torch

            cap = "get_per_process_memory_fraction"
            yield patched((torch.cuda, cap, lambda: 1.0)), "as needed"
            yield patched((torch.cuda, cap, lambda: 0.25)), "as needed, up to 0.25 of the card's"
        case "tensorflow":
            import tensorflow as tf

            config = tf.config
            limit = [config.LogicalDeviceConfiguration(memory_limit=512)]
            gpu = (config, "get_visible_devices", lambda kind: [kind])
            whole = (config, "get_logical_device_configuration", lambda gpu: None)
            part = (config, "get_logical_device_configuration", lambda gpu: limit)
            not_grown = (config.experimental, "get_memory_growth", lambda gpu: None)
            grown = (config.experimental, "get_memory_growth", lambda gpu: True)
            yield patched(gpu, whole, not_grown), "all at once"
            yield patched(gpu, whole, grown), "as needed"
            yield patched(gpu, part, not_grown), "512 MiB"
            grows = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
            yield patched(gpu, whole, not_grown, **grows), "as needed"


def test_a_model_that_comes_back_otherwise_is_noticed():
    model = doctor._specimen()
    sent = pack(model)
    assert sent.header.encoding == "config"
    assert doctor._difference(sent, pack(model)) is None
    kernel = model.variables[0]
    kernel.assign(kernel.value * -1)
    assert doctor._difference(sent, pack(model)) == f"value of variable '{kernel.path}'"
    assert doctor._difference(sent, pack(zoo.build("trained"))) == "config"
