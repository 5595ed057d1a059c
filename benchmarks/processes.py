"""Processes that measure: one for each group of peers, their repetitions in turns.

A process is started from nothing for a group and a backend, takes one workload after the
other, and is asked for one repetition at a time, so that one is at work and all see the
same machine. Where a workload is large, the groups have it one after another. Every peer
first takes a tiny model both ways, then the real one, with memory read: those times do
not count unless they are the only ones, because giving free memory back to the system
first makes the next allocation slower. Memory that a peer may need is touched beforehand,
see ``cases.touch``.

What fails is a row with its reason, a process that dies too.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cases
import limits
import meter
import peers
import values
from meter import MeasuringError, Row

#: Seconds after which a process that does not answer is ended.
PATIENCE = 240.0


class Process:
    """A process started from nothing, and the line to it; ended with the context.

    Parameters
    ----------
    target : callable
        Of this folder's; gets its end of the line, then the arguments.
    environment : dict of str to str
        Set in the process from its start.
    """

    def __init__(self, target: Callable[..., None], *arguments: object, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, there = context.Pipe()
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._process = context.Process(target=target, args=(there, *arguments))
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        there.close()

    def tell(self, *request: Any) -> None:
        """Send a request, and do not wait."""
        with contextlib.suppress(BrokenPipeError):
            self._line.send(request)

    def answer(self, patience: float = PATIENCE) -> Any:
        """Wait for the answer to the eldest request; MeasuringError says why there is none."""
        if not self._line.poll(patience):
            self.end(now=True)
            raise MeasuringError(f"took longer than {patience:.0f} s")
        try:
            answer = self._line.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            raise MeasuringError(
                f"its process died, exit status {self._process.exitcode}"
            ) from None
        if isinstance(answer, MeasuringError):
            raise answer
        return answer

    def ask(self, *request: Any) -> Any:
        """Send a request, and wait for the answer."""
        self.tell(*request)
        return self.answer()

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.is_alive()

    def end(self, now: bool = False) -> None:
        """End it; politely, unless it has to be now."""
        if not now:
            with contextlib.suppress(OSError):
                self._line.send(None)
            self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def requests(line: Connection, answer: Callable[..., Any]) -> None:
    """Answer requests until None comes, in a process; what is raised is sent as MeasuringError."""
    with contextlib.suppress(OSError):  # where memory runs out, this is what should end
        Path("/proc/self/oom_score_adj").write_text("500")
    while (request := line.recv()) is not None:
        try:
            line.send(answer(*request))
        except Exception as error:  # a peer's, whatever it is: it becomes a row
            line.send(meter.reason(error))


def measure(settings: cases.Settings, backend: str, say: Callable[[str], None]) -> list[Row]:
    """Measure all peers of a backend on all its workloads.

    Parameters
    ----------
    settings : Settings
    backend : str
        The first of the settings' gets all groups and workloads.
    say : callable
        Is told what goes on.

    Returns
    -------
    list of dict
        A row for each workload, peer and figure, "out" or "in".
    """
    first = backend == settings.backends[0]
    rows = []
    running: dict[str, Process] = {}
    try:
        for workload in settings.workloads:
            if not first and workload not in cases.ON_ALL_BACKENDS:
                continue
            chosen = {g: limits.chosen(g, workload, first) for g in limits.GROUPS}
            chosen = {group: names for group, names in chosen.items() if names}
            large = settings.is_large(workload)
            if large:  # to have all of the memory, and give all of it back
                _end(running)
            for some in [{g: n} for g, n in chosen.items()] if large else [chosen]:
                names = ", ".join(some) if large else "all groups"
                say(f"{settings.title(workload)}, {backend}: {names}")
                for group in some:
                    if group not in running or not running[group].alive:
                        running[group] = Process(
                            serve, settings, group, KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3"
                        )
                of = {name: group for group, names in some.items() for name in names}
                rows += _workload(settings, workload, backend, running, of)
                if large:
                    _end(running)
    finally:
        _end(running)
    return rows


def _end(running: dict[str, Process]) -> None:
    for process in running.values():
        process.end()
    running.clear()


def _workload(
    settings: cases.Settings,
    workload: str,
    backend: str,
    running: dict[str, Process],
    of: dict[str, str],
) -> list[Row]:
    running = {group: running[group] for group in dict.fromkeys(of.values())}
    large = settings.is_large(workload)
    common: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for process in running.values():
        process.tell("build", workload)
    for group, process in running.items():
        try:
            common[group] = process.answer()
        except MeasuringError as error:
            failed |= {name: str(error) for name in of if of[name] == group}
    memory: dict[str, Row] = {}
    timed: dict[str, list[Row]] = {name: [] for name in of}
    spent = dict.fromkeys(of, 0.0)
    repetitions = min(3, settings.repetitions) if large else settings.repetitions
    for repetition in range(1 + repetitions):
        for name, group in of.items():
            enough = spent[name] > settings.seconds
            if name == peers.KERAS and not large:
                enough &= repetition > 2  # everything is held against it: not one time alone
            if name in failed or enough:
                continue
            try:
                for _ in range(2 if name == peers.OURS and repetition == 0 else 0):
                    running[group].ask("repeat", name, False)  # from the third time on: clones
                row = running[group].ask("repeat", name, repetition == 0)
            except MeasuringError as error:
                failed[name] = str(error)
                continue
            seconds = row["out"]["seconds"] + row["in"]["seconds"]
            if repetition == 0:
                memory[name] = row
                # of what takes so long with a large model, the warm-up has to do
                slow = large and seconds > 2 * settings.seconds
                spent[name] = settings.seconds + 1 if slow else 0.0
            else:
                timed[name].append(row)
                spent[name] += seconds
    for process in running.values():
        if process.alive:
            process.ask("drop")
    rows = []
    for name, group in of.items():
        for figure in ("out", "in"):
            row = {"workload": settings.title(workload), "peer": name, "figure": figure}
            row |= {"backend": backend, "weights_bytes": common.get(group, {}).get("bytes")}
            if name in failed:
                rows.append(row | {"failed": failed[name]})
                continue
            counted = timed[name] or [memory[name]]
            rows.append(
                row
                | {key: value for key, value in memory[name][figure].items() if key != "seconds"}
                | meter.times([each[figure]["seconds"] for each in counted])
            )
    return rows


def serve(line: Connection, settings: cases.Settings, group: str) -> None:
    """Measure the peers of a group; runs in a process of its own.

    Parameters
    ----------
    line : Connection
        Receives ("build", workload), ("repeat", peer, whether to read memory), ("drop",).
    settings : Settings
    group : str
        One of ``limits.GROUPS``.
    """
    import dask_keras_serialize

    everybody = {kind.name: kind() for kind in limits.GROUPS[group]}
    if not any(peer.registered for peer in everybody.values()):
        dask_keras_serialize.unregister()
    opened: dict[str, str | None] = {}
    held: dict[str, Any] = {}

    def answer(what: str, *arguments: Any) -> Any:
        if what == "drop":
            held.clear()
            gc.unfreeze()
            return gc.collect()
        if what == "build":
            meter.fits(3 * settings.bytes_of(arguments[0]))
            held["model"] = model = cases.build(arguments[0], settings)
            held["bytes"] = values.nbytes(model)
            gc.collect()
            gc.freeze()  # collecting Keras's objects takes longer than many a repetition
            return {"bytes": held["bytes"]}
        name, memory = arguments
        peer = everybody[name]
        (dask_keras_serialize.register if peer.registered else dask_keras_serialize.unregister)()
        if name not in opened:
            try:
                gc.collect()  # or what another peer brought back stays for good
                peer.open()
                gc.freeze()
                meter.repeat(peer, cases.tiny(), 0, False)
                opened[name] = None
            except Exception as error:  # missing, or broken in any way: it becomes a row
                opened[name] = str(meter.reason(error))
        if (failure := opened[name]) is not None:
            raise MeasuringError(failure)
        gc.collect()  # what came back the last time is in cycles
        meter.fits(peer.room * held["bytes"])
        return meter.repeat(peer, held["model"], held["bytes"], memory)

    try:
        requests(line, answer)
    finally:
        held.clear()
        for name, peer in everybody.items():
            if name in opened:
                peer.close()


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Give a function that prints to stderr what goes on, and since when."""
    began = time.perf_counter()

    def say(what: str) -> None:
        passed = int(time.perf_counter() - began)
        print(f"{passed // 60:3}:{passed % 60:02}  {what}", file=sys.stderr, flush=True)

    yield say
    say("done")
