"""What is wrong with a cluster, by what its processes say: facts -> findings, and nothing else.

A process is a dict of plain values, see :mod:`dask_keras_serialize.cluster.doctor`; the client's
comes first, and what is said of the others is measured against it; workers on one host are measured
against what they have to share. Failures are what loses or refuses models; notes are what may be
meant so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dask_keras_serialize.wire.header import FORMAT, minor

Process = dict[str, Any]
Level = Literal["failure", "note"]


#: What a check finds: in which column, how bad, what, and the way out.
_Found = tuple[str, Level, str, str]

_SAME = "install the same version of {} everywhere"
_INSTALL = f"pip install {FORMAT}[tensorflow] there, or [jax] or [torch]"


class Others(NamedTuple):
    """What a process is held against, beside the client.

    Attributes
    ----------
    here : list of dict
        The processes of workers on its host.
    backends : set of str
        Of all workers.
    """

    here: list[Process]
    backends: set[str]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes
    ----------
    who : str
        The process, such as ``"worker tcp://10.0.0.2:40001"``.
    fact : str
        Which of its facts is marked, such as ``"python"``; ``"who"`` for the process as such.
    level : {"failure", "note"}
    what : str
    way_out : str
    """

    who: str
    fact: str
    level: Level
    what: str
    way_out: str


def judge(processes: Sequence[Process]) -> list[Finding]:
    """Say what is wrong.

    Parameters
    ----------
    processes : sequence of dict
        The client's, the scheduler's, and every worker's.

    Returns
    -------
    list of Finding
        In the order of the processes; empty if all is well.
    """
    client = processes[0]
    here = _neighbours(processes)
    workers = [each for each in processes if each["role"] == "worker"]
    backends = {each["backend"] for each in workers if each.get("backend")}
    return [
        Finding(process["who"], *finding)
        for process in processes
        for check in _CHECKS
        for finding in check(process, client, Others(here.get(process["who"], []), backends))
    ]


def _neighbours(processes: Sequence[Process]) -> dict[str, list[Process]]:
    """Return for each worker that says where it is the processes of workers on its host."""
    workers = [each for each in processes if each["role"] == "worker" and each.get("host")]
    hosts: dict[str, dict[Any, Process]] = {}
    for worker in workers:
        # one process may hold several workers, which share its backend
        hosts.setdefault(worker["host"], {}).setdefault(worker.get("pid", worker["who"]), worker)
    lists = {host: list(on_host.values()) for host, on_host in hosts.items()}
    return {worker["who"]: lists[worker["host"]] for worker in workers}


def _answer(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if process.get("workers") == 0:
        yield "who", "failure", "it has no workers", "start some: dask worker ADDRESS"
    if process.get("error"):
        way_out = "look into its log, restart it, or wait longer by --timeout"
        yield "who", "failure", process["error"], way_out


def _package(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if "package" not in process:  # it did not answer
        return
    here = process["package"]
    if here is None:
        install = f"pip install {FORMAT} there, and restart it"
        yield "package", "failure", f"the package {FORMAT} is not installed", install
    elif here != client["package"]:
        same = f"install the same version of {FORMAT} everywhere"
        yield "package", "failure", _differs(FORMAT, here, client["package"]), same


def _registered(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if process.get("registered") is not False:
        return
    setting = f"set {FORMAT}.register: true in Dask's config there and restart it"
    what = "Keras models are not registered: Dask's config turns it off"
    match process["role"]:
        case "worker":
            plugin = "client.register_plugin(dask_keras_serialize.RegisterKeras())"
            yield "handler", "failure", what, f"{setting}, or {plugin}"
        case "client":
            way_out = f"import dask_keras_serialize in every program, or {setting}"
            yield "handler", "note", what, way_out
        case _:
            # which passes models on all the same
            yield "handler", "note", what, setting


def _handlers(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    for slot, name in process.get("handlers", {}).items():
        module = name.partition(".")[0]
        way_out = (
            f"leave out what imports {module!r} there, or call dask_keras_serialize.unregister() "
            "and register() after it"
        )
        yield "handler", "failure", f"{slot} is {name}, not ours", way_out


def _versions(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    for name, roles in (("python", ("worker", "scheduler")), ("keras", ("worker",))):
        here, there = process.get(name), client.get(name)
        if process["role"] in roles and here and there and minor(here) != minor(there):
            what = f"{_differs(name, here, there)}: functions and models by value need the same"
            yield name, "failure", what, f"install the same minor version of {name} everywhere"
        elif name == "keras" and process["role"] in roles and here and there and here != there:
            yield name, "note", _differs(name, here, there), _SAME.format(name)
    for name in ("dask", "distributed"):
        here, there = process.get(name), client.get(name)
        if here and here != there:
            yield name, "note", _differs(name, here, there), _SAME.format(name)


def _keras(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if error := process.get("keras-error"):
        what = f"Keras cannot be loaded: {error}"
        if process["role"] == "client":
            what += "; so no model was sent"
        yield "keras", "failure", what, _INSTALL


def _backend(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    here, there = process.get("backend"), client.get("backend")
    if here and there and here != there:
        way_out = f"set KERAS_BACKEND={there} there, if models are bound to theirs"
        if len(others.backends) == 1:
            yield "backend", "note", _differs("backend", here, there), way_out
        else:
            what = f"{_differs('backend', here, there)}, and workers differ"
            yield "backend", "failure", what, f"set KERAS_BACKEND={there} there, and restart it"
    version, other = process.get("backend-version"), client.get("backend-version")
    if here and here == there and version and other and minor(version) != minor(other):
        way_out = f"install the same minor version of {here} everywhere"
        yield "backend", "note", _differs(here, version, other), way_out


def _gpus(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if process["role"] == "worker" and (idle := process.get("idle-gpus")):
        name = process["backend"]
        what = f"the driver has {idle} GPU{'' if idle == 1 else 's'}, and {name} finds none"
        way_out = (
            f"install the GPU build of {name} there, or say that none is meant: "
            "PlaceKeras(device='cpu')"
        )
        yield "devices", "failure", what, way_out


def _shared_gpus(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    for gpu in _used(process):
        sharing = [each for each in others.here if gpu in _used(each)]
        at_once = [part for each in sharing if (part := _at_once(each)) is not None]
        # who takes it as needed may count on as much as any other
        needed = sum(at_once) + (len(sharing) - len(at_once)) / max(1, len(sharing))
        if len(sharing) > 1 and at_once and needed > 1.001:
            how = ", ".join(sorted({str(each["memory"]) for each in sharing}))
            what = f"{_together(sharing)} share a GPU, and take its memory: {how}"
            way_out = (
                'place them before they get a model: client.register_plugin(PlaceKeras(memory="'
                'growth")), or a limit, or a GPU of its own for each: device={name: number}'
            )
            yield "devices", "failure", what, way_out
            return


def _used(process: Process) -> list[str]:
    """Name the GPUs that a process uses, the same in every process of its host."""
    number = len(process.get("gpus", ()))
    visible = process.get("visible-gpus")
    if visible is None:
        return [str(i) for i in range(number)]
    return [name.strip() for name in visible.split(",")][:number]


def _at_once(process: Process) -> float | None:
    """Return the part of a card's memory that a process takes at once."""
    memory = str(process.get("memory", ""))
    if part := re.match(r"(\d*\.?\d+) of the card's at once", memory):
        return float(part[1])
    return 1.0 if "at once" in memory else None


def _threads(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    computing = [each for each in others.here if "threads" in each]
    if len(computing) < 2 or "threads" not in process:
        return
    masks = [each.get("affinity") for each in computing]
    cores = max(each["cores"] for each in computing)
    if all(masks):  # they may be kept apart, each on cores of its own
        union = 0
        for mask in masks:
            union |= int(str(mask), 16)
        cores = union.bit_count()
    threads = sum(each["threads"] or each["cores"] for each in computing)
    if threads > cores:
        what = (
            f"{_together(computing)} compute with {threads} threads, "
            f"on {cores} core{'' if cores == 1 else 's'}"
        )
        way_out = (
            "limit them before they get a model: "
            'client.register_plugin(PlaceKeras(threads="worker")), or threads=1'
        )
        yield "devices", "note", what, way_out


def _together(workers: Sequence[Process]) -> str:
    # without their names: of hosts that are alike, all are one line
    return f"{len(workers)} workers of one host"


def _round_trip(process: Process, client: Process, others: Others) -> Iterator[_Found]:
    if error := process.get("round-trip-error"):
        way_out = "look into its log; if it is busy, wait for its tasks, or longer by --timeout"
        yield "round-trip", "failure", error, way_out


_CHECKS: tuple[Callable[[Process, Process, Others], Iterator[_Found]], ...] = (
    _answer,
    _package,
    _registered,
    _handlers,
    _versions,
    _keras,
    _backend,
    _gpus,
    _shared_gpus,
    _threads,
    _round_trip,
)


def _differs(name: str, here: str, there: str | None) -> str:
    return f"{name} is {here}, the client's {there}"
