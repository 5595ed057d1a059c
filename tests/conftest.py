"""Fixtures: an environment without Keras, and a cluster of processes of their own."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import IO, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cloudpickle
import keras  # the suite fails where it is missing; nothing is skipped
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_keras_serialize import backends
from tests import leaks

ROOT = Path(__file__).parent.parent

leaks.notice_what_holds_models()

#: The tests of other backends' adapters, which cannot be imported here.
collect_ignore = [f"test_{name}.py" for name in backends.NAMES if name != keras.backend.backend()]
#: That of all of them together, which `make test-together` runs where they all are.
if not all(map(find_spec, (*backends.NAMES, "keras_hub"))):
    collect_ignore += ["test_together.py", "hub.py"]
#: Those with another environment's versions, which `make test-versions` tells where it is.
if "OTHER_PYTHON" not in os.environ:
    collect_ignore += ["test_versions.py"]
#: Those of dask-ml, which `make test-dask-ml` runs where it is.
if not find_spec("dask_ml"):
    collect_ignore += ["test_dask_ml.py", "test_search.py"]


@pytest.fixture(scope="session", autouse=True)
def trained_once() -> None:
    """Train before scikeras does.

    Its ``random_state`` sets TF_DETERMINISTIC_OPS for as long as it trains, which TensorFlow reads
    once, at a process's first training: all that came after would add otherwise than workers do.
    """
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0)


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_looked_at() -> None:
    """Spare Python's collector what there is by now, which takes it a second and more each time.

    Backends are a million objects, and keep more of each model. Tests collect often.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """See that every test ends its threads, closes its files and lets go of locks.

    What several tests share, a cluster say, is there before, for its fixture is of a wider scope.
    """
    before = leaks.standing()
    yield
    assert not leaks.left(before)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout; of a copy, for others may do the same at the same time."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    shutil.copytree(ROOT / "dask_keras_serialize", copy / "dask_keras_serialize")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def core_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, and what it needs alone, into an environment of its own."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", str(wheel)]
    # of the version here: the processes of a cluster want to be of one
    pip += [f"{name}=={version(name)}" for name in ("dask", "distributed")]
    subprocess.run(pip, check=True, capture_output=True, timeout=240)
    return folder / "bin"


class Processes:
    """Processes that are ended, each by its id, whatever happens."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def start(
        self, *command: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        log = (self._logs / f"{len(self._running)}.log").open("wb")
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
        )
        self._running.append((process, log))
        return process

    def log(self, number: int) -> str:
        return (self._logs / f"{number}.log").read_text()

    def stop(self) -> None:
        # one by one, the scheduler last: a worker that it tells to close while a signal does hangs
        for process, log in reversed(self._running):
            process.terminate()
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.stop()


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Wait for something to be so, looking many times a second; fail and say what is not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [str(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="session")
def address(core_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler in an environment without Keras, and two workers with it."""
    folder = tmp_path_factory.mktemp("cluster")
    running = Processes(folder)
    try:
        yield start_cluster(running, core_bin, Path(sys.executable).parent, folder)
    finally:
        running.stop()


def run_example(name: str, output: Path, *arguments: str, timeout: int) -> str:
    """Run an example as a user does, from a folder that is not the checkout; what it prints."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments, "--output", str(output)],
        cwd=output,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@contextmanager
def travelling_by_value(*modules: ModuleType) -> Iterator[None]:
    """Send the code of modules that workers cannot import, such as this suite's."""
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


def shipped(thing: Any) -> Any:
    """Let a function or class travel by value, as one typed into a notebook does."""
    thing.__module__ = "__main__"
    for method in filter(callable, vars(thing).values() if isinstance(thing, type) else ()):
        method.__module__ = "__main__"
    return thing


def run_module(
    name: str, *arguments: object, python: str | Path = sys.executable, **env: str
) -> str:
    """Run one of the tests' modules as a process, to its end; return what it prints.

    For what settles once a backend is imported, or devices are used, and is another here.
    """
    ran = subprocess.run(
        [python, "-W", "ignore", "-m", name, *map(str, arguments)],
        env=os.environ | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def start_cluster(
    running: Processes,
    scheduler: Path,
    worker: Path,
    folder: Path,
    environments: Sequence[dict[str, str]] = ({}, {}),
    scheduler_env: dict[str, str] | None = None,
) -> str:
    """Start `dask scheduler` and a `dask worker` in each environment; return the address."""
    file = folder / "scheduler.json"
    running.start(
        scheduler / "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
        "--scheduler-file", file, env=scheduler_env,
    )  # fmt: skip
    for number, env in enumerate(environments):
        running.start(
            worker / "dask", "worker", "--scheduler-file", file, "--nthreads", "1",
            "--no-dashboard", "--no-nanny", "--local-directory", folder, "--memory-limit", "4GiB",
            "--name", number, env=env,
        )  # fmt: skip
    with Client(scheduler_file=str(file), timeout=60) as client:
        if environments:
            client.wait_for_workers(len(environments), timeout=60)
        address: str = client.scheduler.address
    return address


@contextmanager
def local_client(threads: int = 1) -> Iterator[Client]:
    """A client of a scheduler in this process and two worker processes, backends not loaded."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=threads, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client
