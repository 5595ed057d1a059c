"""Examines a running cluster: asks every process, and sends a model to each worker and back.

Workers load Keras and start their backends for it, as they would for their first model; so place
them before (:mod:`dask_keras_serialize.placement`). The scheduler loads nothing. All that is left
behind on it is released.

As plain values, such as ``dask keras doctor --json`` prints, an examination is ``{"ok": bool,
"processes": [...], "findings": [...]}``. A process has ``who``, ``role`` ("client", "scheduler"
or "worker"), and what it said of itself: ``name`` of a worker, number of ``workers`` of the
scheduler, ``python``, ``dask``, ``distributed``, ``package`` (this one's version or null),
``registered``, what :func:`dask_keras_serialize.cluster.checkup.look` returns (of versions, of
``host``, ``cores``, ``threads``, ``gpus`` and their ``memory``; of a scheduler only what
:func:`dask_keras_serialize.cluster.checkup.scheduler` does), ``round-trip`` in seconds; or
``error``, ``keras-error`` and ``round-trip-error``, each one line. A finding has ``who``,
``fact`` (what is marked), ``level`` ("failure" or "note"), ``what`` and ``way-out``. Without
failures the cluster is ``ok``.
"""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

from distributed import Client

from dask_keras_serialize import registration
from dask_keras_serialize.cluster import checkup
from dask_keras_serialize.cluster.verdict import Finding, Process, judge
from dask_keras_serialize.errors import UnreachableError, one_line
from dask_keras_serialize.packed import Parcel
from dask_keras_serialize.wire.header import FORMAT

T = TypeVar("T")

#: Models on their way at the same time: this process opens them, in the time that each has.
_AT_ONCE = 32

_RUNNING = "is it running, and is that its address?"


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes
    ----------
    processes : list of dict
        The client, the scheduler, every worker.
    findings : list of Finding
    """

    processes: list[Process]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; notes may be there."""
        return all(finding.level != "failure" for finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain values; see the module's docstring."""
        findings = [
            {
                "who": finding.who,
                "fact": finding.fact,
                "level": finding.level,
                "what": finding.what,
                "way-out": finding.way_out,
            }
            for finding in self.findings
        ]
        return {"ok": self.ok, "processes": self.processes, "findings": findings}


def examine(address: str, *, timeout: float = 30.0) -> Examination:
    """Examine a running cluster.

    Parameters
    ----------
    address : str
        Of the scheduler.
    timeout : float
        Seconds for the connection, and for each answer of each process. All processes are asked
        at the same time.

    Returns
    -------
    Examination

    Raises
    ------
    UnreachableError
        If there is no scheduler, or it stops answering.
    """
    return asyncio.run(_examine(address, timeout))


async def _examine(address: str, timeout: float) -> Examination:
    client = await _connect(address, timeout)
    try:
        info = await _within(timeout, client.scheduler.identity(n_workers=-1))
        facts, scheduler, *workers = await asyncio.gather(
            asyncio.to_thread(_client),
            _ask(client, None, timeout),
            *[_ask(client, worker, timeout) for worker in info["workers"]],
        )
        scheduler["workers"] = len(workers)
        for worker, told in zip(workers, info["workers"].values(), strict=True):
            worker["name"] = told["name"]
        if "keras-error" not in facts and scheduler.get("package", True):
            await _send(client, workers, timeout)
    except OSError as error:
        raise UnreachableError(
            f"the scheduler at {address} is gone: {_why(error, timeout)}: {_RUNNING}"
        ) from None
    finally:
        await client.close(timeout=min(timeout, 5.0))
    processes = [facts, scheduler, *workers]
    return Examination(processes, judge(processes))


async def _connect(address: str, timeout: float) -> Client:
    client = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # versions that differ: that is for us to say
            client = Client(address, asynchronous=True, set_as_default=False, timeout=timeout)
            return await _within(timeout, client)
    except Exception as error:  # whatever a transport raises
        if client is not None:
            await client.close(timeout=1)
        why = f"{_why(error, timeout)}: {_RUNNING}"
        raise UnreachableError(f"cannot connect to {address}: {why}") from None


def _why(error: Exception, timeout: float) -> str:
    return f"no answer in {timeout:g} s" if isinstance(error, TimeoutError) else one_line(error)


def _client() -> Process:
    """Look at this process, which has to be registered to send anything."""
    facts: Process = {"who": "client", "role": "client", **eval(checkup.GLANCE)}
    registration.register()
    return facts | checkup.look()


async def _ask(client: Client, worker: str | None, timeout: float) -> Process:
    """Ask the scheduler, or a worker by its address, for its facts; what goes wrong is one."""
    role = "scheduler" if worker is None else "worker"
    facts: Process = {"who": f"{role} {worker or client.scheduler.address}", "role": role}

    async def run(function: Any, *arguments: Any) -> Any:
        if worker is None:
            return await client.run_on_scheduler(function, *arguments)
        return (await client.run(function, *arguments, workers=[worker]))[worker]

    try:
        facts |= await _within(timeout, run(eval, checkup.GLANCE))
        if facts["registered"]:
            facts |= await _within(timeout, run(getattr(checkup, role)))
    except Exception as error:  # whatever it raised there
        facts["error"] = f"it cannot be asked: {_why(error, timeout)}"
    return facts


async def _send(client: Client, workers: Sequence[Process], timeout: float) -> None:
    """Send a model to every worker that is ready for one; twice, and take the second time."""
    from dask_keras_serialize.pickling import pack

    model = _specimen()
    expected = pack(model)
    turns = asyncio.Semaphore(_AT_ONCE)

    async def send(worker: Process) -> bool:
        worker.pop("round-trip", None)
        address = worker["who"].split()[1]
        try:
            async with turns:
                seconds, twin = await _round_trip(client, model, address, timeout)
            if difference := _difference(expected, pack(twin)):
                worker["round-trip-error"] = f"a model came back with another {difference}"
            else:
                worker["round-trip"] = seconds
        except Exception as error:  # whatever it raised there
            why = _why(error, timeout)
            if isinstance(error, TimeoutError):
                why += ": it is busy, or gone"
            worker["round-trip-error"] = f"no model came back: {why}"
        return "round-trip" in worker

    ready = [w for w in workers if w.get("registered") and not {"error", "keras-error"} & w.keys()]
    # many at once, for some may be stuck; then one after the other, to see how long it takes
    arrived = await asyncio.gather(*map(send, ready))
    gc.collect()  # which takes longer than a round trip, in one of those to be measured
    for worker, well in zip(ready, arrived, strict=True):
        if well:
            await send(worker)


async def _round_trip(
    client: Client, model: Any, address: str, timeout: float
) -> tuple[float, Any]:
    """Scatter a model to a worker, and let a task there return it; keep none of it."""
    key = f"{FORMAT}-doctor-{uuid4().hex}"
    futures: list[Any] = []

    async def there_and_back() -> Any:
        sent = await client.scatter({f"{key}-out": model}, workers=[address], hash=False)
        futures.extend(sent.values())
        futures.append(
            client.submit(
                checkup.give_back, *futures, workers=[address], key=f"{key}-back", pure=False
            )
        )
        return await futures[-1]

    start = time.perf_counter()
    try:
        twin = await _within(timeout, there_and_back())
        return time.perf_counter() - start, twin
    finally:
        for future in futures:
            future.release()


async def _within(timeout: float, answer: Awaitable[T]) -> T:
    async with asyncio.timeout(timeout):
        return await answer


def _specimen() -> Any:
    """Make a small model that has some of everything: weights, seeds, totals, an optimizer."""
    import keras

    layers = [
        keras.Input((8,)),
        keras.layers.Dense(16, "relu", kernel_initializer=keras.initializers.GlorotNormal(seed=1)),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(3, "softmax", kernel_initializer=keras.initializers.Orthogonal(seed=2)),
    ]
    model = keras.Sequential(layers, name="doctor")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    return model


def _difference(sent: Parcel, back: Parcel) -> str | None:
    """Name the first thing in which two models differ, by any bit."""
    if sent.config != back.config:
        return "config"
    if len(sent.variables) != len(back.variables):
        return "number of variables"
    for a, b in zip(sent.variables, back.variables, strict=True):
        if (a.path, a.shape, a.dtype, a.trainable) != (b.path, b.shape, b.dtype, b.trainable):
            return f"variable {b.path!r} in place of {a.path!r}"
        if _bytes(sent, a) != _bytes(back, b):
            return f"value of variable {a.path!r}"
    return None


def _bytes(parcel: Parcel, variable: Any) -> bytes:
    frame, offset, nbytes = variable.location
    return bytes(memoryview(parcel.frames[frame])[offset : offset + nbytes])
