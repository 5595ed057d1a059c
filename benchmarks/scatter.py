"""The whole scatter: a model to another process, against a list of equal arrays.

One worker process on this machine, over TCP, as ``LocalCluster`` makes it; scheduler
and client share the other process. Without ``direct`` the bytes go from the client by
way of the scheduler, which is Dask's default. The clock stops when ``scatter``
returns, which is after the worker has rebuilt the value. The list of arrays is one
value under one key. Keras is loaded in the worker, and a tiny model sent, beforehand.
After each repetition a task on the worker hashes what it got.
"""

from __future__ import annotations

import gc
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import cases

if TYPE_CHECKING:
    from distributed import Client

MODEL = "model"
ARRAYS = "list of arrays"

VALUES = (MODEL, ARRAYS)

#: Arguments of ``Client.scatter``; a hash reads every byte before it is sent.
VARIANTS: dict[str, dict[str, bool]] = {
    "default": {},
    "hash=False": {"hash": False},
    "direct, hash=False": {"hash": False, "direct": True},
}


def serve(connection: Connection, settings: cases.Settings, workload: str) -> None:
    """Measure all values and variants of one workload, a repetition at each request.

    Parameters
    ----------
    connection : Connection
        Sends what the rows of this process have in common; then sends a repetition
        whenever it receives anything but None.
    settings : Settings
    workload : str
        One of ``cases.WORKLOADS``.
    """
    from distributed import Client, LocalCluster

    model = cases.build(workload, settings)
    arrays = cases.weights(model)
    expected = cases.digest(arrays)
    nbytes = sum(array.nbytes for array in arrays)
    room = 4 * nbytes  # one for the scheduler, two for the worker, one to spare
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(_warm)
        small = cases.tiny()
        for value in (small, cases.weights(small)):
            for arguments in VARIANTS.values():
                _scatter(client, value, arguments, cases.digest(value), 0)
        connection.send({"weights_bytes": nbytes, **cases.environment()})
        while connection.recv() is not None:
            connection.send(
                {
                    (name, variant): _scatter(client, value, arguments, expected, room)
                    for variant, arguments in VARIANTS.items()
                    for name, value in zip(VALUES, (model, arrays), strict=True)
                }
            )


def _warm() -> None:
    cases.digest(cases.tiny())


def _scatter(
    client: Client, value: Any, arguments: dict[str, bool], expected: str, room: int
) -> float:
    gc.collect()
    cases.touch(room)
    began = time.perf_counter()
    future = client.scatter([value], **arguments)[0]
    seconds = time.perf_counter() - began
    if client.submit(cases.digest, future, pure=False).result() != expected:
        raise RuntimeError("what the worker holds is not what was sent")
    del future
    while any(client.run(_held).values()):
        time.sleep(0.01)
    return seconds


def _held(dask_worker: Any) -> int:
    gc.collect()
    return len(dask_worker.data)
