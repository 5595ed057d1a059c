"""A cluster of real processes: a scheduler, workers that come when they are asked for.

Started by Dask's own commands, over TCP on this machine, without nannies and dashboards;
each ended by its id. Workers find this folder's modules, so that functions travel by
reference.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)

#: What no timing should depend on. ``Client.scatter`` says that ``broadcast`` needs the active
#: memory manager off: every two seconds it drops replicas, which are then sent anew.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error",
    "DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
}


class Cluster:
    """A scheduler and its workers, ended with the context.

    Parameters
    ----------
    workers : int
        To start with, of one thread each and without a memory limit.
    """

    def __init__(self, workers: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dask-bench-")
        self.file = str(Path(self._folder.name) / "scheduler.json")
        self._running: list[subprocess.Popen[bytes]] = []
        self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", self.file,
        )  # fmt: skip
        for number in range(workers):
            self.add(str(number))

    def add(self, name: str, memory_limit: str = "0") -> subprocess.Popen[bytes]:
        """Start a worker; with a limit it has a SpillBuffer, on the disk of the temp folder."""
        return self._start(
            "worker", "--scheduler-file", self.file, "--nthreads", "1", "--no-dashboard",
            "--no-nanny", "--local-directory", self._folder.name,
            "--memory-limit", memory_limit, "--name", name,
        )  # fmt: skip

    def client(self, workers: int) -> Any:
        """Connect; wait for so many workers."""
        from distributed import Client

        client = Client(scheduler_file=self.file, timeout=60)
        if workers:
            client.wait_for_workers(workers, timeout=120)
        return client

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
        with Path(self._folder.name, f"{len(self._running)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _QUIET | {"PYTHONPATH": path},
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._running.append(process)
        return process

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running[1:]:
            process.terminate()
        for process in reversed(self._running):  # the scheduler last
            end(process)
        self._folder.cleanup()


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def map_over(client: Any, count: int, value: Any) -> list[Any]:
    """Map a task over so many chunks, all with ``model=value``; return the futures.

    Arrays are made a task of their own by hand, as this package does with models: given as
    they are, distributed 2026.8 makes its scheduler fail (see ``registration.py``).
    """
    if isinstance(value, list):
        value = client.submit(_same, value, pure=False)
    return list(client.map(use, range(count), model=value, pure=False))


def use(chunk: int, model: Any) -> int:
    """Be the task that has a model for an argument."""
    return chunk


def _same(value: Any) -> Any:
    return value


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process; kill it if it does not mind."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
