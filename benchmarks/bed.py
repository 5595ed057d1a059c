"""A client, its cluster and the values that take turns: what figures have in common.

A bed is made for one workload. Its values are the model, and the same bytes as a list of
numpy arrays, which is one value under one key: what Dask can do with so many bytes. The
cluster starts when it is first asked for. Whether a model travels without this package is
decided in all its processes at once.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import cases
import meter
import peers
import values
from daemons import Cluster
from meter import MeasuringError, Row

#: Of the cluster, to begin with.
WORKERS = 4


class Bed:
    """What figures have in common: the values in turn, the cluster, once it is needed."""

    def __init__(self, settings: cases.Settings, model: Any, stack: contextlib.ExitStack) -> None:
        self.settings, self.model, self._stack = settings, model, stack
        self.nbytes = values.nbytes(model)
        self.kinds = {peers.OURS: model, peers.ARRAYS: values.weights(model)}
        self._cluster: Cluster | None = None

    def row(self, peer: str, figure: str, seconds: list[float], **more: Any) -> Row:
        row = {"peer": peer, "figure": figure, "weights_bytes": self.nbytes}
        return row | meter.times(seconds) | more

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(Cluster(WORKERS))
            self.client = self._stack.enter_context(self._cluster.client(WORKERS))
            self.client.run(_warm)
            self.workers = sorted(self.client.scheduler_info(n_workers=-1)["workers"])
        return self._cluster

    def make_room(self, copies: int) -> None:
        gc.collect()
        cases.touch(copies * self.nbytes)

    def wait_until_empty(self) -> None:
        while any(self.client.run(_held).values()):
            time.sleep(0.01)

    def wait_for(self, name: str) -> str:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            for address, worker in workers.items():
                if worker["name"] == name:
                    return str(address)
            time.sleep(0.05)
        raise MeasuringError(f"worker {name} did not come")

    @contextlib.contextmanager
    def off_everywhere(self) -> Iterator[None]:
        def everywhere(function: Callable[[], None]) -> None:
            self.client.run(function)
            self.client.run_on_scheduler(function)

        everywhere(_unregister)
        try:
            with off():
                yield
        finally:
            everywhere(_register)


def check(client: Any, future: Any, expected: str, copies: int) -> None:
    """Compare what so many workers hold with a checksum of what was sent."""
    (held,) = client.who_has([future]).values()
    if len(held) != copies:
        raise MeasuringError(f"{len(held)} workers hold it")
    tasks = [
        client.submit(values.checksum, future, pure=False, workers=[worker]) for worker in held
    ]
    if {task.result() for task in tasks} != {expected}:
        raise MeasuringError("what a worker holds is not what was sent")


@contextlib.contextmanager
def off() -> Iterator[None]:
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


def timed(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function(*arguments, **keywords)
    return time.perf_counter() - began, result


def _warm() -> None:
    values.digest(cases.tiny())
    gc.collect()
    gc.freeze()  # collecting Keras's objects takes longer than many a repetition


def _held(dask_worker: Any) -> int:
    gc.collect()
    return len(dask_worker.data)


def resident(reset: bool) -> tuple[int, int]:
    """Return resident size and peak of a process; start a new peak if asked to."""
    if reset:
        meter.start(0, True)
    return meter.resident()
