"""How costs grow: with layers, bytes, workers and tasks, a model beside arrays.

Out and in are measured in one process, as in ``processes``; the rest through a cluster of
real processes. Of many workers several share a process, as Worker objects with their own
TCP connections and threads: they say what the scheduler and the way cost, while their
rebuilds share its cores. A curve's slope is fitted where both axes are logarithmic, over
its upper part: 1 is linear.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import cases
import limits
import meter
import numpy as np
import peers
import processes
import values
from bed import check
from daemons import Cluster, map_over, use
from meter import MeasuringError, Row

import dask_keras_serialize

#: The part of a curve that the slope is of: from its end down to a 32nd of it.
UPPER = 32

#: Above it, a curve is called steeper than linear.
STEEP = 1.1

#: Seconds after which a curve of a slow peer is not followed further.
ENOUGH = 2.0

#: Processes that many workers share.
HOSTS = 2

#: Of the model that is sent to many workers, or into many tasks.
SMALL = 1 << 20

CURVES = ("layers", "bytes", "workers", "tasks")


def measure(settings: cases.Settings, say: Callable[[str], None]) -> list[Row]:
    """Measure all curves, as ``cluster.measure``: a row for each abscissa, peer and figure."""
    backend = settings.backends[0]
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    rows: list[Row] = []
    points = {"layers": settings.layers, "bytes": settings.sizes}
    points |= {"workers": settings.workers, "tasks": settings.counts}
    with processes.Process(serve, settings, **environment) as process:
        for curve in CURVES:
            for x in points[curve]:
                common = {"workload": f"against {curve}", "curve": curve, "x": x}
                common |= {"backend": backend}
                say(f"{x:,} {curve}")
                try:
                    rows += [common | row for row in process.ask(curve, x)]
                except MeasuringError as error:
                    rows.append(
                        common | {"peer": peers.OURS, "figure": curve, "failed": str(error)}
                    )
                if not process.alive:
                    return rows
    return rows


def slope(points: list[tuple[float, float]]) -> float | None:
    """Fit the slope of the upper part of a curve, both axes logarithmic.

    Parameters
    ----------
    points : list of tuple of float
        Abscissas and times, both positive.

    Returns
    -------
    float or None
        1 for a cost in proportion; None of less than two points.
    """
    end = max((x for x, _ in points), default=0)
    upper = [(x, y) for x, y in points if x * UPPER >= end]
    if len({x for x, _ in upper}) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(upper, float)).T, 1)[0])


def serve(line: Connection, settings: cases.Settings) -> None:
    """Measure points of curves; runs in the client's process.

    Parameters
    ----------
    line : Connection
        Receives a curve and an abscissa; sends rows.
    settings : Settings
    """
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="Sending large graph")
    with contextlib.ExitStack() as stack:
        bench = _Bench(settings, stack)
        processes.requests(line, lambda curve, x: list(getattr(bench, curve)(x)))


class _Bench:
    def __init__(self, settings: cases.Settings, stack: contextlib.ExitStack) -> None:
        self.settings, self._stack = settings, stack
        self._peers = [
            peers.Ours(),
            peers.OursFirst(),
            limits.Config(),
            limits.Arrays(),
            peers.Keras(),
        ]
        self._slow: set[tuple[str, str]] = set()
        self._clients: dict[str, Any] = {}
        self._hosts: list[processes.Process] = []
        self._hosted = 0

    def layers(self, count: int) -> Iterator[Row]:
        model = cases.many_layers(count)
        cases.fill(model, self.settings.seed)
        yield from self._there_and_back("layers", model)

    def bytes(self, nbytes: int) -> Iterator[Row]:
        meter.fits(8 * nbytes)
        model = cases.dense(nbytes, self.settings.seed)
        yield from self._there_and_back("bytes", model)
        yield from self._turns("scatter", model, self._scatter, "checksums")

    def workers(self, count: int) -> Iterator[Row]:
        client = self._client("hosted", 0)
        self._host(client, count)
        model = cases.dense(SMALL, self.settings.seed)
        yield from self._turns("broadcast", model, self._broadcast, "checksums")
        yield from self._turns("a task on each", model, self._task_on_each, "results")

    def tasks(self, count: int) -> Iterator[Row]:
        model = cases.dense(SMALL, self.settings.seed)

        def run(value: Any) -> float:
            client = self._client("four", 4)
            began = time.perf_counter()
            results = client.gather(map_over(client, count, value))
            seconds = time.perf_counter() - began
            if results != list(range(count)):
                raise MeasuringError("other results came back")
            return seconds

        yield from self._turns("map", model, run, "results")

    def _there_and_back(self, curve: str, model: Any) -> Iterator[Row]:
        """Measure out and in, the peers in turn."""
        nbytes = values.nbytes(model)
        gc.collect()
        gc.freeze()
        taken: dict[str, list[Row]] = {}
        # enough for more than one time of 1,000 layers, on which the end of a curve depends
        left = dict.fromkeys([peer.name for peer in self._peers], 5 * self.settings.seconds)
        for turn in range(1 + min(3, self.settings.repetitions)):
            for peer in self._peers:
                if left[peer.name] <= 0 or (curve, peer.name) in self._slow:
                    continue
                with _registered(peer.registered):
                    # the third time an architecture is cloned, and the clone compared
                    for _ in range(4 if turn == 0 and peer.name == peers.OURS else 1):
                        row = meter.repeat(peer, model, nbytes, False)
                seconds = row["out"]["seconds"] + row["in"]["seconds"]
                left[peer.name] -= seconds
                if seconds > ENOUGH and peer.name == peers.KERAS:
                    self._slow.add((curve, peer.name))
                if turn == 1:  # the first was warm-up
                    taken[peer.name] = []
                taken.setdefault(peer.name, []).append(row)
        gc.unfreeze()
        for name, rows in taken.items():
            for figure in ("out", "in"):
                seconds = meter.times([row[figure]["seconds"] for row in rows])
                equal = rows[-1]["in"]["equal"]
                yield {
                    "peer": name,
                    "figure": figure,
                    "weights_bytes": nbytes,
                    "equal": equal,
                } | seconds

    def _turns(
        self, figure: str, model: Any, run: Callable[[Any], float], equal: str
    ) -> Iterator[Row]:
        """Measure something of a model and of its arrays, in turns; `run` compares too."""
        kinds = {peers.OURS: model, peers.ARRAYS: values.weights(model)}
        times: dict[str, list[float]] = {}
        for turn in range(1 + self.settings.turns):
            for kind, value in kinds.items():
                if sum(times.get(kind, ())) > self.settings.seconds:
                    continue
                gc.collect()
                cases.touch(3 * values.nbytes(model))
                seconds = run(value)
                if turn == 1:  # the first was warm-up, unless it took so long that it is all
                    times[kind] = []
                times.setdefault(kind, []).append(seconds)
        for kind, seconds in times.items():
            row = {"peer": kind, "figure": figure, "weights_bytes": values.nbytes(model)}
            yield row | {"equal": equal} | meter.times(seconds)

    def _scatter(self, value: Any) -> float:
        client = self._client("four", 4)
        began = time.perf_counter()
        (future,) = client.scatter([value], hash=False)
        seconds = time.perf_counter() - began
        check(client, future, values.checksum(value), 1)
        return seconds

    def _broadcast(self, value: Any) -> float:
        client = self._clients["hosted"]
        began = time.perf_counter()
        (future,) = client.scatter([value], broadcast=True, hash=False)
        seconds = time.perf_counter() - began
        check(client, future, values.checksum(value), self._hosted)
        return seconds

    def _task_on_each(self, value: Any) -> float:
        client = self._clients["hosted"]
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        (future,) = client.scatter([value], broadcast=True, hash=False)
        began = time.perf_counter()
        futures = [
            client.submit(use, number, model=future, pure=False, workers=[worker])
            for number, worker in enumerate(workers)
        ]
        results = client.gather(futures)
        seconds = time.perf_counter() - began
        if results != list(range(len(workers))):
            raise MeasuringError("other results came back")
        return seconds

    def _client(self, name: str, workers: int) -> Any:
        if name not in self._clients:
            cluster = self._stack.enter_context(Cluster(workers))
            client = self._stack.enter_context(cluster.client(workers))
            client.run(_warm)
            self._clients[name] = client
        return self._clients[name]

    def _host(self, client: Any, count: int) -> None:
        """Add workers, in a few processes, until there are so many."""
        if not self._hosts:
            self._hosts = [
                self._stack.enter_context(processes.Process(host, client.scheduler.address))
                for _ in range(HOSTS)
            ]
        more = [(count - self._hosted + i) // HOSTS for i in range(HOSTS)]
        for process, number in zip(self._hosts, more, strict=True):
            process.tell(number)
        for process in self._hosts:
            process.answer()
        until = time.monotonic() + 120
        while len(client.scheduler_info(n_workers=-1)["workers"]) < count:
            if time.monotonic() > until:
                raise MeasuringError("workers did not come")
            time.sleep(0.05)
        self._hosted = count


def host(line: Connection, scheduler: str) -> None:
    """Run workers in this process, so many more at each request."""
    from distributed import Worker

    logging.disable(logging.CRITICAL)
    cases.tiny()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    workers: list[Any] = []

    def do(what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, loop).result()

    async def start(count: int) -> list[Any]:
        options = {"nthreads": 1, "memory_limit": 0, "dashboard": False}
        return list(await asyncio.gather(*(Worker(scheduler, **options) for _ in range(count))))

    async def close() -> None:
        await asyncio.gather(*(worker.close(nanny=False) for worker in workers))

    def more(count: int) -> int:
        workers.extend(do(start(count)))
        return len(workers)

    try:
        processes.requests(line, more)
    finally:
        with contextlib.suppress(Exception):
            do(asyncio.wait_for(close(), 10))


@contextlib.contextmanager
def _registered(wanted: bool) -> Iterator[None]:
    if not wanted:
        dask_keras_serialize.unregister()
    try:
        yield
    finally:
        dask_keras_serialize.register()


def _warm() -> None:
    cases.tiny()
    gc.collect()
    gc.freeze()
