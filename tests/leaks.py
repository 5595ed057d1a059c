"""What a test may not leave behind in its process: threads, open files, locks.

``conftest.py`` compares before and after each test. That nothing of what was received stays
exported is what ``test_leaks.py`` asks.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass

from dask_keras_serialize import aside

#: Threads that libraries start once in a process, and keep.
KEPT = ("Dask-Offload", "pymp", "IO loop", "Profile", "tqdm", "asyncio_", "QueueManager", "Thread-")


@dataclass
class Standing:
    """What there is in this process."""

    threads: set[threading.Thread]
    files: dict[str, str]


def standing() -> Standing:
    """Look at this process."""
    return Standing(set(threading.enumerate()), open_files())


def open_files() -> dict[str, str]:
    """Return the files and sockets that are open, by descriptor; none but on Linux."""
    found = {}
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
        if target.startswith(("socket:", "/")) and not target.startswith(("/dev", "/proc", "/usr")):
            found[f"{name} {target}"] = target
    return found


def left(before: Standing, seconds: float = 10) -> list[str]:
    """Say what there is more than before, once what ends by itself has had the time for it."""
    deadline = time.monotonic() + seconds
    while (found := _left(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return found


def _left(before: Standing) -> list[str]:
    threads = set(threading.enumerate()) - before.threads
    return [
        *(f"thread {each.name!r}" for each in threads if not each.name.startswith(KEPT)),
        *(f"open file {name}" for name in open_files().keys() - before.files.keys()),
        *(["the lock of rebuilds"] if "unlocked" not in repr(aside.LOCK) else []),
    ]
