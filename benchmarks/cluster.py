"""Through a cluster: a model beside the same bytes as arrays, and without this package.

Scheduler, workers and client are processes of their own on this machine, over TCP
(``daemons``). Kinds of values take turns within each figure, the first turn is warm-up,
and what arrived is hashed, or compared, after the clock has stopped. The list of arrays is
one value under one key: what Dask can do with so many bytes.

Without the package means turned off in all processes for that figure: a model then goes by
Keras's pickle inside a task, and cannot be scattered at all.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import cases
import peers
import processes
import values
from daemons import Cluster, end, map_over, use
from processes import Failed, Row

#: Figures, in the order of the tables, and the workloads that they are measured on.
FIGURES: dict[str, tuple[str, ...]] = {
    "ask": (cases.RESNET, cases.RESNET_ADAM, cases.DENSE),
    "move": (cases.RESNET, cases.DENSE),
    "tasks": (cases.RESNET,),
    "submit": (cases.RESNET,),
    "without": (cases.TINY,),
    "spill": (cases.RESNET, cases.DENSE),
    "predict": (cases.RESNET,),
}

WORKERS = 4

#: Arguments of ``Client.scatter``; a hash reads every byte before it is sent.
SCATTERS: dict[str, dict[str, Any]] = {
    "scatter": {},
    "scatter, hash=False": {"hash": False},
    "scatter, direct, hash=False": {"hash": False, "direct": True},
    "broadcast to 4": {"broadcast": True},
}

#: Of the model that is small enough to go through a cluster without the package.
SMALL = 10 << 20
SMALL_TASKS = 100


def measure(settings: cases.Settings, say: Callable[[str], None]) -> list[Row]:
    """Measure everything that goes through a cluster.

    Parameters
    ----------
    settings : Settings
    say : callable
        Is told what goes on.

    Returns
    -------
    list of dict
        A row for each workload, peer and figure.
    """
    rows: list[Row] = []
    backend = settings.backends[0]
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for workload in settings.workloads:
        figures = [figure for figure, on in FIGURES.items() if workload in on]
        if not figures:
            continue
        process = processes.Process(serve, settings, workload, **quiet)
        with process:
            for figure in figures:
                say(f"{settings.title(workload)}, through a cluster: {figure}")
                try:
                    measured = process.ask(figure)
                except Failed as error:
                    measured = [{"peer": peers.OURS, "figure": figure, "failed": str(error)}]
                title = settings.title(workload)
                rows += [{"workload": title, "backend": backend} | row for row in measured]
                if not process.alive:
                    break
    return rows


def serve(line: Connection, settings: cases.Settings, workload: str) -> None:
    """Measure figures of one workload; runs in the client's process.

    Parameters
    ----------
    line : Connection
        Receives names of FIGURES; sends rows.
    settings : Settings
    workload : str
    """
    logging.disable(logging.CRITICAL)  # distributed's account of what fails is pages long
    warnings.filterwarnings("ignore", message="Sending large graph")
    model = cases.build(workload, settings)
    with contextlib.ExitStack() as stack:
        bench = _Bench(settings, model, stack)
        gc.collect()
        gc.freeze()
        processes.requests(line, lambda figure: list(getattr(bench, figure)()))


class _Bench:
    """What figures have in common: the values in turn, the cluster, once it is needed."""

    def __init__(self, settings: cases.Settings, model: Any, stack: contextlib.ExitStack) -> None:
        self.settings, self.model, self._stack = settings, model, stack
        self.nbytes = values.nbytes(model)
        self.kinds = {peers.OURS: model, peers.ARRAYS: values.weights(model)}
        self._cluster: Cluster | None = None

    def row(self, peer: str, figure: str, seconds: list[float], **more: Any) -> Row:
        row = {"peer": peer, "figure": figure, "weights_bytes": self.nbytes}
        return row | processes.times(seconds) | more

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(Cluster(WORKERS))
            self.client = self._stack.enter_context(self._cluster.client(WORKERS))
            self.client.run(_warm)
            self.workers = sorted(self.client.scheduler_info(n_workers=-1)["workers"])
        return self._cluster

    # what Dask and users ask of a value in their own process

    def ask(self) -> Iterator[Row]:
        from dask.sizeof import sizeof
        from dask.tokenize import tokenize

        for figure, ask in (("tokenize", tokenize), ("sizeof", sizeof)):
            times: dict[str, list[float]] = {kind: [] for kind in self.kinds}
            answers: dict[str, set[Any]] = {kind: set() for kind in self.kinds}
            for turn in range(1 + self.settings.turns):
                for kind, value in self.kinds.items():
                    seconds, answer = _timed(ask, value)
                    answers[kind].add(answer)
                    times[kind] += [seconds] if turn else []
            for kind in self.kinds:
                more = {"answer": max(answers[kind])} if figure == "sizeof" else {}
                same = "the same each time" if len(answers[kind]) == 1 else "another each time"
                yield self.row(kind, figure, times[kind], equal=same, **more)
        yield from self._deepcopy()
        with _off():
            seconds, answer = _timed(sizeof, self.model)
            yield self.row(peers.KERAS, "sizeof", [seconds], answer=answer)
            if self.nbytes < 512 << 20:
                taken = [_timed(tokenize, self.model) for _ in range(2)]
                same = "the same each time" if taken[0][1] == taken[1][1] else "another each time"
                yield self.row(peers.KERAS, "tokenize", [t for t, _ in taken], equal=same)

    def _deepcopy(self) -> Iterator[Row]:
        times: dict[str, list[float]] = {}
        equal = {}
        slow = 1 if self.nbytes >= 512 << 20 else 3
        for turn in range(self.settings.turns):
            for kind in (*self.kinds, peers.KERAS):
                if kind == peers.KERAS and turn >= slow:
                    continue
                value = self.kinds.get(kind, self.model)
                cases.touch((6 if kind == peers.KERAS else 1) * self.nbytes)
                with _off() if kind == peers.KERAS else contextlib.nullcontext():
                    seconds, twin = _timed(copy.deepcopy, value)
                equal[kind] = values.equal(value, twin)
                del twin
                times.setdefault(kind, []).append(seconds)
        for kind, seconds in times.items():
            yield self.row(kind, "deepcopy", seconds, equal=equal[kind])

    # there and back

    def move(self) -> Iterator[Row]:
        assert self.cluster
        kinds = dict(self.kinds)
        if self.nbytes < 512 << 20:
            with contextlib.suppress(ImportError):
                kinds[peers.TORCH] = peers.GROUPS["others"][0]().source(self.model)
        figures = (*SCATTERS, "gather")
        times: dict[tuple[str, str], list[float]] = {
            (kind, figure): [] for figure in figures for kind in kinds
        }
        digests = {kind: values.digest(value) for kind, value in kinds.items()}
        for turn in range(1 + self.settings.turns):
            for figure, arguments in SCATTERS.items():
                for kind, value in kinds.items():
                    arguments = dict(arguments)
                    copies = WORKERS if "broadcast" in arguments else 1
                    if copies == 1:
                        arguments["workers"] = [self.workers[0]]
                    self._make_room(2 + copies)
                    seconds, (future,) = _timed(self.client.scatter, [value], **arguments)
                    times[kind, figure] += [seconds] if turn else []
                    self._check(future, digests[kind], copies)
                    if figure == "scatter, direct, hash=False":
                        self._make_room(3)
                        seconds, back = _timed(self.client.gather, future)
                        values.equal(value, back)
                        del back
                        times[kind, "gather"] += [seconds] if turn else []
                    del future
                    self._wait_until_empty()
        for (kind, figure), seconds in times.items():
            equal = values.ALL if kind == peers.OURS else "arrays"
            yield self.row(kind, figure, seconds, equal=equal)
        with self._off_everywhere():
            try:
                self.client.scatter([self.model], workers=[self.workers[0]])
            except TypeError as error:
                failed = str(processes.reason(error))
                yield {"peer": peers.KERAS, "figure": "scatter", "failed": failed}

    def _make_room(self, copies: int) -> None:
        gc.collect()
        cases.touch(copies * self.nbytes)

    def _check(self, future: Any, expected: str, copies: int) -> None:
        (held,) = self.client.who_has([future]).values()
        if len(held) != copies:
            raise Failed(f"{len(held)} workers hold it")
        tasks = [
            self.client.submit(values.digest, future, pure=False, workers=[worker])
            for worker in held
        ]
        if {task.result() for task in tasks} != {expected}:
            raise Failed("what a worker holds is not what was sent")

    def _wait_until_empty(self) -> None:
        while any(self.client.run(_held).values()):
            time.sleep(0.01)

    # models inside tasks

    def tasks(self) -> Iterator[Row]:
        assert self.cluster
        for kind, value in self.kinds.items():
            yield from self._map(kind, value, self.settings.tasks, self.settings.turns)

    def without(self) -> Iterator[Row]:
        assert self.cluster
        self.model = cases.dense(SMALL)
        cases.fill(self.model, self.settings.seed)
        self.nbytes = values.nbytes(self.model)
        size = cases.readable(SMALL)
        count = min(SMALL_TASKS, self.settings.tasks)
        kinds = {peers.OURS: self.model, peers.ARRAYS: values.weights(self.model)}
        for kind, value in kinds.items():
            for row in self._map(kind, value, count, self.settings.turns):
                yield row | {"workload": f"dense, {size}"}
        with self._off_everywhere():
            for row in self._map(peers.KERAS, self.model, count, 1, warm=False):
                yield row | {"workload": f"dense, {size}"}

    def _map(
        self, kind: str, value: Any, count: int, turns: int, warm: bool = True
    ) -> Iterator[Row]:
        """Map over so many chunks with ``model=value``: all results, and what it costs."""
        seconds, submits, held, peaks = [], [], [], []
        for turn in range(turns + warm):
            gc.collect()
            before = self.client.run_on_scheduler(_resident, True)
            began = time.perf_counter()
            futures = map_over(self.client, count, value)
            submitted = time.perf_counter() - began
            results = self.client.gather(futures)
            took = time.perf_counter() - began
            if results != list(range(count)):
                raise Failed("other results came back")
            now, peak = self.client.run_on_scheduler(_resident, False)
            del futures
            self._wait_until_empty()
            if turn >= warm:
                seconds.append(took)
                submits.append(submitted)
                held.append(now - before[0])
                peaks.append(peak - before[0])
        memory = {"scheduler_bytes": max(held), "scheduler_peak_bytes": max(peaks)}
        yield self.row(kind, f"{count:,} tasks", seconds, equal="results", **memory)
        yield self.row(kind, f"{count:,} tasks, submit", submits)

    def submit(self) -> Iterator[Row]:
        assert self.cluster
        for kind in (*self.kinds, peers.KERAS):
            value = self.kinds.get(kind, self.model)
            off = kind == peers.KERAS
            submits, totals = [], []
            with self._off_everywhere() if off else contextlib.nullcontext():
                for _ in range(2 if off else 1 + self.settings.turns):
                    began = time.perf_counter()
                    future = self.client.submit(use, 1, model=value, pure=False)
                    submits.append(time.perf_counter() - began)
                    future.result()
                    totals.append(time.perf_counter() - began)
                    del future
                    self._wait_until_empty()
            yield self.row(kind, "submit, first: returns after", submits[:1])
            yield self.row(kind, "submit, later: returns after", submits[1:])
            yield self.row(kind, "submit, first: result after", totals[:1])
            yield self.row(kind, "submit, later: result after", totals[1:])

    # workers of their own

    def spill(self) -> Iterator[Row]:
        processes.fits(6 * self.nbytes)
        limit = str(16 * self.nbytes + (4 << 30))
        worker = self.cluster.add("spills", memory_limit=limit)
        try:
            address = self._wait_for("spills")
            times: dict[tuple[str, str], list[float]] = {
                (kind, way): [] for way in ("spill", "back") for kind in self.kinds
            }
            turns = 1 + min(self.settings.turns, 2 if self.nbytes >= 512 << 20 else 5)
            for turn in range(turns):
                for kind, value in self.kinds.items():
                    self._make_room(2)
                    arguments: dict[str, Any] = {"hash": False, "direct": True}
                    (future,) = self.client.scatter([value], workers=[address], **arguments)
                    took = self.client.run(_spill, future.key, workers=[address])[address]
                    self._check(future, values.digest(value), 1)
                    for way, seconds in zip(("spill", "back"), took, strict=True):
                        times[kind, way] += [seconds] if turn else []
                    del future
                    self._wait_until_empty()
            for (kind, way), seconds in times.items():
                equal = values.ALL if kind == peers.OURS else "arrays"
                figure = "spill to disk" if way == "spill" else "back from disk"
                yield self.row(kind, figure, seconds, equal=equal)
        finally:
            self.client.retire_workers(names=["spills"])
            end(worker)

    def predict(self) -> Iterator[Row]:
        """Predict on a worker that has not even imported Keras."""
        assert self.cluster
        shape = tuple(size or 1 for size in self.model.input_shape)
        batch = cases.np.ones(shape, "float32")
        expected = self.model.predict_on_batch(batch)
        for kind in (peers.OURS, peers.KERAS):
            name = f"fresh, {kind}"
            worker = self.cluster.add(name)
            try:
                address = self._wait_for(name)
                off = kind == peers.KERAS
                with self._off_everywhere() if off else contextlib.nullcontext():
                    for when in ("first", "second"):
                        began = time.perf_counter()
                        got = self.client.submit(
                            _predict, self.model, batch, pure=False, workers=[address]
                        ).result()
                        seconds = time.perf_counter() - began
                        if not cases.np.allclose(got, expected, rtol=1e-3, atol=1e-5):
                            raise Failed("other predictions came back")
                        row = self.row(kind, f"predict, {when} on a fresh worker", [seconds])
                        yield row | {"equal": "predictions"}
            finally:
                self.client.retire_workers(names=[name])
                end(worker)

    def _wait_for(self, name: str) -> str:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            for address, worker in workers.items():
                if worker["name"] == name:
                    return str(address)
            time.sleep(0.05)
        raise Failed(f"worker {name} did not come")

    @contextlib.contextmanager
    def _off_everywhere(self) -> Iterator[None]:
        def everywhere(function: Callable[[], None]) -> None:
            self.client.run(function)
            self.client.run_on_scheduler(function)

        everywhere(_unregister)
        try:
            with _off():
                yield
        finally:
            everywhere(_register)


@contextlib.contextmanager
def _off() -> Iterator[None]:
    _unregister()
    try:
        yield
    finally:
        _register()


def _register() -> None:
    import dask_keras_serialize

    dask_keras_serialize.register()


def _unregister() -> None:
    import dask_keras_serialize

    dask_keras_serialize.unregister()


def _timed(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function(*arguments, **keywords)
    return time.perf_counter() - began, result


def _warm() -> None:
    values.digest(cases.tiny())
    gc.collect()
    gc.freeze()  # collecting Keras's objects takes longer than many a repetition


def _predict(model: Any, batch: Any) -> Any:
    return model.predict(batch, verbose=0)


def _held(dask_worker: Any) -> int:
    gc.collect()
    return len(dask_worker.data)


def _resident(reset: bool) -> tuple[int, int]:
    """Return resident size and peak of a process; start a new peak if asked to."""
    if reset:
        processes.start(0, True)
    return processes.resident()


def _spill(key: str, dask_worker: Any) -> tuple[float, float]:
    data = dask_worker.data
    spilled, _ = _timed(data.evict)
    if key not in data.slow:
        raise Failed("it was not spilled")
    gc.collect()  # it is read again only if nobody holds it any more
    back, _ = _timed(data.__getitem__, key)
    return spilled, back
