"""What a test may not leave behind: threads, processes, descriptors, servers, locks.

The fixture ``nothing_is_left`` compares before and after each test. That nothing of what was
received stays exported is what ``test_leaks.py`` asks.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dask.threaded
import keras
import psutil
from distributed import Client, Scheduler, Worker
from distributed.core import Status

from dask_keras_serialize.cluster import offload
from dask_keras_serialize.rebuilding.turns import Turn
from dask_keras_serialize.workflows import batches
from dask_keras_serialize.workflows.holding import Held

#: How the names of threads begin of pools that a process keeps: distributed's
#: (``distributed/utils.py``), those of event loops, joblib's (``joblib/externals/loky``).
KEPT = ("Dask-Offload", "asyncio_", "ExecutorManagerThread")

#: Of a cluster that several tests share, and its workers.
OF_CLUSTERS = ("AsyncProcess", "QueueFeederThread", "IO loop", "Profile", "Dask-Default-Threads")

#: Modules that keep a pipe open for as long as a process lives: to the process that counts shared
#: memory and semaphores, which Python starts with the first process that it spawns, as a nanny
#: does (``multiprocessing/resource_tracker.py``), and joblib a second one of its own
#: (``joblib/externals/loky/backend/resource_tracker.py``).
TRACKERS = ("multiprocessing.resource_tracker", "joblib.externals.loky.backend.resource_tracker")

PACKAGE = "dask_keras_serialize"

#: What holds a model for a workflow, as long as it lives.
HOLDING: weakref.WeakSet[Held] = weakref.WeakSet()

_LOCKS = (type(threading.Lock()), type(threading.RLock()), Turn)


@dataclass
class Standing:
    """What there is in this process."""

    threads: set[threading.Thread]
    processes: set[int]
    files: Counter[str]
    servers: set[int]


def standing() -> Standing:
    """Look at this process."""
    return Standing(set(threading.enumerate()), children(), open_files(), set(open_servers()))


def children() -> set[int]:
    """Return the ids of the processes that this one started, and has not waited for."""
    return {each.pid for each in psutil.Process().children()}


def open_servers() -> dict[int, Any]:
    """Return the clients, workers and schedulers that are not closed, each by its ``id()``."""
    every = [each for cls in (Client, Worker, Scheduler) for each in list(cls._instances)]
    return {id(each): each for each in every if each.status not in ("closed", Status.closed)}


def open_files() -> Counter[str]:
    """Count what is open, files, sockets, pipes and all else, by its name; none but on Linux."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
        # fonts of a picture, which matplotlib/font_manager.py keeps
        if "/mpl-data/fonts/" not in target:
            found[target] += 1
    return found


def pipes(files: Counter[str]) -> int:
    """Count the ends of pipes among what is open."""
    return sum(n for name, n in files.items() if name.startswith("pipe:"))


def trackers() -> list[Any]:
    """Return what has the pipes, and the processes at their other ends, that a process keeps."""
    modules = filter(None, map(sys.modules.get, TRACKERS))
    every = (module._resource_tracker for module in modules)
    return [each for each in every if each._fd is not None]


def pool_of_joblib() -> set[int]:
    """Return the ids of the processes that joblib keeps, and renews when they have grown."""
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    pool = loky._executor if loky else None
    return set(pool._processes or ()) if pool else set()


def layers_alive() -> list[str]:
    """Name the layers that there are, when those that nobody has are gone."""
    gc.collect()
    # by type(): asking some of torch's objects for their class warns
    found = [each for each in gc.get_objects() if issubclass(type(each), keras.Layer)]
    return sorted(f"{type(each).__name__} {vars(each).get('name')}" for each in found)


def locks() -> Iterator[tuple[str, Any]]:
    """Yield every lock that this package has, its modules', their objects' and models', by a name.

    Of objects those that a module has, those that threads share, and all that hold a model.
    """
    owners: list[tuple[str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE:
            own = [(f"{name}.{each}", value) for each, value in vars(module).items()]
            owners += [(name, module), *(pair for pair in own if type(pair[1]).__module__ == name)]
    owners += [("what threads share", each) for each in list(batches._SHARED.values())]
    owners += [("what holds a model", each) for each in list(HOLDING)]
    for name, owner in owners:
        found = vars(owner).items() if hasattr(owner, "__dict__") else ()
        yield from ((f"{name}.{each}", lock) for each, lock in found if isinstance(lock, _LOCKS))
    jax = sys.modules.get(f"{PACKAGE}.backends.jax_trainer")
    yield from (("the turn of a model", turn) for turn in list(jax.TURNS.values() if jax else ()))


def notice_what_holds_models() -> None:
    """Have :func:`locks` know of every ``Held`` that is made from now on."""
    make = Held.__init__

    def noticed(self: Held) -> None:
        make(self)
        HOLDING.add(self)

    Held.__init__ = noticed


def locks_held() -> list[str]:
    """Name the locks of this package that cannot be had, whatever they say of themselves."""
    # a Turn whose owner was interrupted before it could say so is held, and says that it is not
    every = [(name, lock._lock if isinstance(lock, Turn) else lock) for name, lock in locks()]
    return refused(every)


def refused(every: list[tuple[str, Any]]) -> list[str]:
    """Name the locks that a new thread or this one cannot have.

    A new one, for who has an RLock may take it again; and this one, for the new thread may have
    got the number of one that ended with an RLock.
    """
    found: dict[str, None] = {}

    def try_all() -> None:
        for name, lock in every:
            if lock.acquire(blocking=False):
                lock.release()
            else:
                found[name] = None

    thread = threading.Thread(target=try_all, name="tries locks")
    thread.start()
    thread.join()
    try_all()
    return list(found)


def left(before: Standing, seconds: float = 10) -> list[str]:
    """Say what there is more than before, once what ends by itself has had the time for it."""
    deadline = time.monotonic() + seconds
    while (found := _left(before)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return found


def _left(before: Standing) -> list[str]:
    # whoever shares a client or workers with other tests keeps connections, and workers' threads
    servers = open_servers()
    shared = [each for key, each in servers.items() if key in before.servers]
    pools = [dask.threaded.default_pool]  # of dask.compute without a cluster
    pools += [pool for some in dask.threaded.pools.values() for pool in some.values()]
    # our own has so many at most; others of its name are nobody's
    pools += [offload._threads]
    threads = set(threading.enumerate()) - before.threads
    threads -= {thread for pool in filter(None, pools) for thread in pool._threads}
    if shared:  # a worker's threads have its name before theirs
        threads = {each for each in threads if not any(part in each.name for part in OF_CLUSTERS)}
    kept = trackers()
    processes = children() - before.processes - {each._pid for each in kept} - pool_of_joblib()
    if shared:  # a nanny starts its worker again
        processes = set()
    standing = open_files() - Counter(os.readlink(f"/proc/self/fd/{each._fd}") for each in kept)
    files = standing - before.files
    # a nanny that starts its worker again has other pipes to the new one, and as many
    if shared and pipes(standing) <= pipes(before.files):
        files = Counter({name: n for name, n in files.items() if not name.startswith("pipe:")})
    if shared and any(each.startswith("socket:") for each in files):
        for each in connections(ports_of(shared)):
            files.pop(each, None)
    return [
        *(f"thread {each.name!r}" for each in threads if not each.name.startswith(KEPT)),
        *(f"process {number}" for number in processes),
        *(f"open {name}" + (f", {n} times" if n > 1 else "") for name, n in sorted(files.items())),
        *(f"a {type(servers[key]).__name__}" for key in servers.keys() - before.servers),
        *locks_held(),
    ]


def ports_of(servers: list[Any]) -> set[int]:
    """Return the ports at which the clusters of clients and workers listen."""
    addresses = []
    for each in servers:
        if isinstance(each, Client):
            workers = each.scheduler_info(n_workers=-1)["workers"]
            addresses += [each.scheduler.address, *workers]
            addresses += [worker.get("nanny") for worker in workers.values()]
        else:
            addresses += [each.address, getattr(each, "scheduler", each).address]
    ports = (str(address).rpartition(":")[2] for address in addresses)
    return {int(port) for port in ports if port.isdecimal()}


def connections(ports: set[int]) -> set[str]:
    """Return the sockets with an end at one of these ports, as ``open_files`` names them."""
    found = set()
    for each in psutil.Process().net_connections("inet"):
        if ports & {end.port for end in (each.laddr, each.raddr) if end}:
            try:
                found.add(os.readlink(f"/proc/self/fd/{each.fd}"))
            except OSError:  # it is closed by now
                continue
    return found
