"""What a test may not leave behind in its process: threads, open files, locks.

The fixture ``nothing_is_left`` compares before and after each test. That nothing of what was
received stays exported is what ``test_leaks.py`` asks.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass

import dask.threaded
from distributed import Client, Worker
from distributed.core import Status

from dask_keras_serialize import aside

#: Threads of pools that a process keeps: distributed's, this package's, asyncio's, loky's.
KEPT = ("Dask-Offload", "Dask-Keras", "asyncio_", "ExecutorManagerThread")

#: Of a cluster that several tests share, and its workers.
OF_CLUSTERS = ("AsyncProcess", "QueueFeederThread", "IO loop", "Profile", "Dask-Default-Threads")


@dataclass
class Standing:
    """What there is in this process."""

    threads: set[threading.Thread]
    files: set[str]
    clients: set[int]
    workers: set[int]


def standing() -> Standing:
    """Look at this process."""
    workers = {id(each) for each in list(Worker._instances) if each.status != Status.closed}
    return Standing(set(threading.enumerate()), open_files(), open_clients(), workers)


def open_clients() -> set[int]:
    """Return the clients of clusters, each by its ``id()``, that are not closed."""
    return {id(client) for client in list(Client._instances) if client.status != "closed"}


def open_files() -> set[str]:
    """Return the files and sockets that are open, by descriptor; none but on Linux."""
    found = set()
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
        # not what packages keep open of their own: fonts, libraries
        kept = ("/dev", "/proc", "/usr", sys.prefix, sys.base_prefix)
        if target.startswith(("/", "socket:")) and not target.startswith(kept):
            found.add(f"file {name}, {target}")
    return found


def locks_held() -> list[str]:
    """Name the locks of this package that a thread has."""
    jax = sys.modules.get("dask_keras_serialize.backends.jax_trainer")
    torch = sys.modules.get("dask_keras_serialize.backends.torch")
    return [
        *(["the lock of rebuilds"] if aside.LOCK.taken else []),
        *("the turn of a model" for turn in list(jax.TURNS.values() if jax else ()) if turn.taken),
        *(["torch's writes"] if torch and "unlocked" not in repr(torch.WRITES) else []),
    ]


def left(before: Standing, seconds: float = 10) -> list[str]:
    """Say what there is more than before, once what ends by itself has had the time for it."""
    deadline = time.monotonic() + seconds
    while (found := _left(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return found


def _left(before: Standing) -> list[str]:
    # whoever shares a client or workers with other tests keeps connections, and workers' threads
    shared = bool(before.clients or before.workers)
    kept = (*KEPT, *OF_CLUSTERS) if shared else KEPT
    pools = [dask.threaded.default_pool]  # of dask.compute without a cluster
    pools += [pool for some in dask.threaded.pools.values() for pool in some.values()]
    threads = set(threading.enumerate()) - before.threads
    threads -= {thread for pool in filter(None, pools) for thread in pool._threads}
    files = {each for each in open_files() - before.files if not (shared and "socket:" in each)}
    return [
        *(f"thread {each.name!r}" for each in threads if not any(k in each.name for k in kept)),
        *(f"open {name}" for name in sorted(files)),
        *("a client" for _ in open_clients() - before.clients),
        *locks_held(),
    ]
