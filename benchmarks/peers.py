"""Who is measured: each peer dumps a model and loads it again, in its own process.

A peer turns a model into one blob and a list of buffers, and those back into a model.
Between the two, every buffer is copied to memory of its own, as a comm delivers it,
and the sender's is dropped; that copy is not timed (``scatter`` times the whole way).
Every process first takes a tiny model both ways, then the real one if it is measured
more than once. Memory is read in a repetition of its own, whose times do not count,
because giving free memory back to the system first makes the next allocation slower;
only where there is a single repetition does it give both. Memory that a peer may need
is touched beforehand, see ``cases.touch``.

Memory is the process's peak resident size over where it stood when the clock started
(``VmHWM``, reset through ``/proc/self/clear_refs``; None where that is missing). Extra
is what is over the weights themselves: out, over the model; in, over one copy of them,
so that received bytes and a model beside them make 100 %.
"""

from __future__ import annotations

import ctypes
import gc
import pickle
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cases
import numpy as np

OURS = "dask-keras-serialize"
OURS_PICKLE = "pickle 5, out of band"
KERAS = "Keras's pickle"
MEMCPY = "memcpy"

#: In the order of the tables.
PEERS = (OURS, OURS_PICKLE, KERAS, MEMCPY)

#: Get one repetition of the dense model, see ``cases.Settings.repetitions_of``.
SLOW = (KERAS,)

#: How many times the weights a peer is given of memory that is ready to use.
ROOM = {OURS: 2, OURS_PICKLE: 2, KERAS: 7, MEMCPY: 2}

Wire = tuple[Any, list[Any]]
Dump = Callable[[Any], Wire]
Load = Callable[[Any, list[Any]], Any]


def _ours() -> tuple[Dump, Load]:
    """Dask's family of serializers: what scatter, gather and spill call."""
    import keras
    import msgpack
    from distributed.protocol import dask_deserialize, dask_serialize

    import dask_keras_serialize

    dask_keras_serialize.register()

    def dump(model: Any) -> Wire:
        header, frames = dask_serialize(model)
        return msgpack.packb(header, use_bin_type=True), frames

    def load(blob: Any, buffers: list[Any]) -> Any:
        header = msgpack.unpackb(blob, use_list=False)
        return dask_deserialize.dispatch(keras.Model)(header, buffers)

    return dump, load


def _ours_pickle() -> tuple[Dump, Load]:
    """Pickle with the package registered: what a task graph takes."""
    import dask_keras_serialize

    dask_keras_serialize.register()

    def dump(model: Any) -> Wire:
        buffers: list[Any] = []
        blob = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
        return blob, [buffer.raw() for buffer in buffers]

    return dump, lambda blob, buffers: pickle.loads(blob, buffers=buffers)


def _keras() -> tuple[Dump, Load]:
    """Keras's own ``__reduce__``, with the package out of the way."""
    import keras

    import dask_keras_serialize

    dask_keras_serialize.unregister()
    if "__reduce_ex__" in vars(keras.Model):
        raise RuntimeError("keras.Model still has a reducer that is not Keras's")

    return lambda model: (pickle.dumps(model, protocol=5), []), lambda blob, _: pickle.loads(blob)


def _memcpy(model: Any) -> tuple[Dump, Load]:
    """Copy the same bytes once each way: the limit of whoever has to copy."""
    arrays = cases.weights(model)

    def load(_: Any, buffers: list[Any]) -> list[cases.Array]:
        pairs = zip(arrays, buffers, strict=True)
        return [np.array(b, np.uint8).view(a.dtype).reshape(a.shape) for a, b in pairs]

    return lambda _: (b"", [np.array(a) for a in arrays]), load


def _peer(name: str, model: Any) -> tuple[Dump, Load]:
    if name == MEMCPY:
        return _memcpy(model)
    return {OURS: _ours, OURS_PICKLE: _ours_pickle, KERAS: _keras}[name]()


def serve(connection: Connection, settings: cases.Settings, workload: str, name: str) -> None:
    """Measure one peer on one workload, a repetition at each request.

    Parameters
    ----------
    connection : Connection
        Sends what the rows of this process have in common; then receives, again and
        again, whether to read memory, and sends a repetition; ends at None.
    settings : Settings
    workload, name : str
        One of ``cases.WORKLOADS`` and one of ``PEERS``.
    """
    model = cases.build(workload, settings)
    arrays = cases.weights(model)
    expected, nbytes = cases.digest(arrays), sum(array.nbytes for array in arrays)
    del arrays
    small = cases.tiny()
    dump, load = _peer(name, small)
    load(*_deliver(*dump(small)))
    dump, load = _peer(name, model)
    connection.send({"weights_bytes": nbytes, **cases.environment()})
    while (memory := connection.recv()) is not None:
        room = ROOM[name] * nbytes
        connection.send(_repeat(dump, load, model, expected, nbytes, room, memory))


def _repeat(
    dump: Dump, load: Load, model: Any, expected: str, nbytes: int, room: int, memory: bool
) -> dict[str, Any]:
    before = start(room, memory)
    began = time.perf_counter()
    blob, buffers = dump(model)
    seconds_out = time.perf_counter() - began
    extra_out = extra(memory, before)
    wire = [memoryview(part).nbytes for part in (blob, *buffers)]

    blob, buffers = _deliver(blob, buffers)
    before = start(room, memory)
    began = time.perf_counter()
    copy = load(blob, buffers)
    seconds_in = time.perf_counter() - began
    extra_in = extra(memory, before - sum(wire) + nbytes)
    del blob, buffers
    if cases.digest(copy) != expected:
        raise RuntimeError("what came back is not what was sent")
    common = {"wire_bytes": sum(wire), "buffers": len(wire) - 1}
    return {
        "out": {"seconds": seconds_out, "extra_bytes": extra_out, **common},
        "in": {"seconds": seconds_in, "extra_bytes": extra_in, **common},
    }


def _deliver(blob: Any, buffers: list[Any]) -> Wire:
    """Copy to fresh, writeable memory, allocated as distributed's TCP comm does."""
    from distributed.comm import tcp

    arrived = []
    for buffer in (blob, *buffers):
        arrived.append(tcp.host_array(memoryview(buffer).nbytes))
        arrived[-1][:] = memoryview(buffer).cast("B")
    return arrived[0], arrived[1:]


def start(room: int, memory: bool) -> int:
    """Collect garbage, make room; to read memory, trim, reset the peak, return the size."""
    gc.collect()
    cases.touch(room)
    if not memory or not Path("/proc/self/clear_refs").exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def extra(memory: bool, before: int) -> int | None:
    """Return how far the peak went above a size; None where it is not read."""
    if not memory or not Path("/proc/self/clear_refs").exists():
        return None
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
