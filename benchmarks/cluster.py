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
import functools
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import asked
import cases
import fresh
import meter
import peers
import processes
import values
from bed import WORKERS, Bed, check, resident, timed
from daemons import map_over, use
from meter import MeasuringError, Row

#: Arguments of ``Client.scatter``; a hash reads every byte before it is sent.
SCATTERS: dict[str, dict[str, Any]] = {
    "scatter": {},
    "scatter, direct, hash=False": {"hash": False, "direct": True},
    "broadcast to 4": {"broadcast": True},
}

#: The way to scatter after which values are gathered again, which takes the least time.
FASTEST = "scatter, direct, hash=False"

#: Seconds after which three turns do.
ENOUGH = 20.0

#: Figures, in the order of the tables, and the workloads that they are measured on.
FIGURES: dict[str, tuple[str, ...]] = {
    "ask": (cases.RESNET, cases.LAYERS, cases.DENSE),
    **dict.fromkeys(SCATTERS, (cases.RESNET, cases.DENSE)),
    FASTEST: (cases.RESNET, cases.LAYERS, cases.DENSE),
    "refused": (cases.RESNET,),
    "tasks": (cases.RESNET,),
    "submit": (cases.RESNET,),
    "spill": (cases.RESNET, cases.DENSE),
    "predict": (cases.RESNET,),
    "without": (cases.RESNET,),
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
                except MeasuringError as error:
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
        bed = Bed(settings, model, stack)
        gc.collect()
        gc.freeze()
        processes.requests(line, lambda figure: list(RUN[figure](bed)))


def move(bed: Bed, figure: str) -> Iterator[Row]:
    """Scatter in one way of SCATTERS, the kinds in turn; gather too, after the fastest.

    With ``settings.turns`` or, once so many seconds are spent, with three.
    """
    meter.fits((WORKERS + 5) * bed.nbytes)  # on its way it is in three processes more
    assert bed.cluster
    kinds = dict(bed.kinds)
    if bed.nbytes < 512 << 20:
        with contextlib.suppress(ImportError):
            kinds[peers.TORCH] = peers.Torch().source(bed.model)
    arguments = dict(SCATTERS[figure])
    copies = WORKERS if "broadcast" in arguments else 1
    if copies == 1:
        arguments["workers"] = [bed.workers[0]]
    figures = (figure, "gather") if figure == FASTEST else (figure,)
    times: dict[tuple[str, str], list[float]] = {(k, f): [] for f in figures for k in kinds}
    sums = {kind: values.checksum(value) for kind, value in kinds.items()}
    equal = {kind: values.ALL if kind == peers.OURS else "arrays" for kind in kinds}
    began = time.perf_counter()
    for turn in range(1 + bed.settings.turns):
        if turn > 3 and time.perf_counter() - began > ENOUGH:
            break
        for kind, value in kinds.items():
            bed.make_room(2 + copies)
            seconds, (future,) = timed(bed.client.scatter, [value], **arguments)
            times[kind, figure] += [seconds] if turn else []
            check(bed.client, future, sums[kind], copies)
            if "gather" in figures:
                bed.make_room(3)
                seconds, back = timed(bed.client.gather, future)
                equal[kind] = values.equal(value, back)
                del back
                times[kind, "gather"] += [seconds] if turn else []
            del future
            bed.wait_until_empty()
    for (kind, name), taken in times.items():
        yield bed.row(kind, name, taken, equal=equal[kind])


def refused(bed: Bed) -> Iterator[Row]:
    """Try to scatter without the package."""
    assert bed.cluster
    with bed.off_everywhere():
        try:
            bed.client.scatter([bed.model], workers=[bed.workers[0]])
        except TypeError as error:
            failed = str(meter.reason(error))
            yield {"peer": peers.KERAS, "figure": "scatter", "failed": failed}


def tasks(bed: Bed) -> Iterator[Row]:
    """Map with a model for an argument."""
    assert bed.cluster
    for kind, value in bed.kinds.items():
        yield from _map(bed, kind, value, bed.settings.tasks, min(3, bed.settings.turns))


def without(bed: Bed) -> Iterator[Row]:
    """Map with a model that is small enough for Keras's pickle, on and off."""
    assert bed.cluster
    bed.model = cases.dense(SMALL, bed.settings.seed)
    bed.nbytes = values.nbytes(bed.model)
    size = cases.readable(SMALL)
    count = min(SMALL_TASKS, bed.settings.tasks)
    kinds = {peers.OURS: bed.model, peers.ARRAYS: values.weights(bed.model)}
    for kind, value in kinds.items():
        for row in _map(bed, kind, value, count, bed.settings.turns):
            yield row | {"workload": f"dense, {size}"}
    with bed.off_everywhere():
        for row in _map(bed, peers.KERAS, bed.model, count, 1, warm=False):
            yield row | {"workload": f"dense, {size}"}


def _map(
    bed: Bed, kind: str, value: Any, count: int, turns: int, warm: bool = True
) -> Iterator[Row]:
    """Map over so many chunks with ``model=value``: all results, and what it costs."""
    seconds, submits, held, peaks = [], [], [], []
    for turn in range(turns + warm):
        gc.collect()
        before = bed.client.run_on_scheduler(resident, True)
        began = time.perf_counter()
        futures = map_over(bed.client, count, value)
        submitted = time.perf_counter() - began
        results = bed.client.gather(futures)
        took = time.perf_counter() - began
        if results != list(range(count)):
            raise MeasuringError("other results came back")
        now, peak = bed.client.run_on_scheduler(resident, False)
        del futures
        bed.wait_until_empty()
        if turn >= warm:
            seconds.append(took)
            submits.append(submitted)
            held.append(now - before[0])
            peaks.append(peak - before[0])
    memory = {"scheduler_bytes": max(held), "scheduler_peak_bytes": max(peaks)}
    yield bed.row(kind, f"{count:,} tasks", seconds, equal="results", **memory)
    yield bed.row(kind, f"{count:,} tasks, submit", submits)


def submit(bed: Bed) -> Iterator[Row]:
    """Submit one task, the first time and later: what the caller waits, and for the result."""
    assert bed.cluster
    for kind in (*bed.kinds, peers.KERAS):
        value = bed.kinds.get(kind, bed.model)
        off = kind == peers.KERAS
        submits, totals = [], []
        with bed.off_everywhere() if off else contextlib.nullcontext():
            for _ in range(2 if off else 1 + bed.settings.turns):
                began = time.perf_counter()
                future = bed.client.submit(use, 1, model=value, pure=False)
                submits.append(time.perf_counter() - began)
                future.result()
                totals.append(time.perf_counter() - began)
                del future
                bed.wait_until_empty()
        yield bed.row(kind, "submit, first: returns after", submits[:1])
        yield bed.row(kind, "submit, later: returns after", submits[1:])
        yield bed.row(kind, "submit, first: result after", totals[:1])
        yield bed.row(kind, "submit, later: result after", totals[1:])


#: By the names in FIGURES; each takes a Bed.
RUN: dict[str, Callable[[Bed], Iterator[Row]]] = {
    "ask": asked.ask,
    **{name: functools.partial(move, figure=name) for name in SCATTERS},
    "refused": refused,
    "tasks": tasks,
    "submit": submit,
    "without": without,
    "spill": fresh.spill,
    "predict": fresh.predict,
}
