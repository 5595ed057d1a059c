"""On workers of their own: to disk and back, and the first predictions of a process.

The disk is that of the folder for temporary files, by way of the worker's SpillBuffer, as
Dask does when memory runs short, but when told to. Predictions are asked of workers that
have not even imported Keras.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import cases
import meter
import peers
import values
from bed import Bed, check, timed
from daemons import end
from meter import MeasuringError, Row


def spill(bed: Bed) -> Iterator[Row]:
    """Spill a value to disk, and read it back, in turns."""
    meter.fits(6 * bed.nbytes)
    limit = str(16 * bed.nbytes + (4 << 30))
    worker = bed.cluster.add("spills", memory_limit=limit)
    try:
        address = bed.wait_for("spills")
        times: dict[tuple[str, str], list[float]] = {
            (kind, way): [] for way in ("spill", "back") for kind in bed.kinds
        }
        sums = {kind: values.checksum(value) for kind, value in bed.kinds.items()}
        turns = 1 + min(bed.settings.turns, 1 if bed.nbytes >= 512 << 20 else 5)
        for turn in range(turns):
            for kind, value in bed.kinds.items():
                bed.make_room(4)  # the file too is in memory
                arguments: dict[str, Any] = {"hash": False, "direct": True}
                (future,) = bed.client.scatter([value], workers=[address], **arguments)
                took = bed.client.run(_spill, future.key, workers=[address])[address]
                check(bed.client, future, sums[kind], 1)
                for way, seconds in zip(("spill", "back"), took, strict=True):
                    times[kind, way] += [seconds] if turn else []
                del future
                bed.wait_until_empty()
        for (kind, way), seconds in times.items():
            equal = values.ALL if kind == peers.OURS else "arrays"
            figure = "spill to disk" if way == "spill" else "back from disk"
            yield bed.row(kind, figure, seconds, equal=equal)
    finally:
        bed.client.retire_workers(names=["spills"])
        end(worker)


def predict(bed: Bed) -> Iterator[Row]:
    """Predict on a worker that has not even imported Keras."""
    assert bed.cluster
    shape = tuple(size or 1 for size in bed.model.input_shape)
    batch = cases.np.ones(shape, "float32")
    expected = bed.model.predict_on_batch(batch)
    for kind in (peers.OURS, peers.KERAS):
        name = f"fresh, {kind}"
        worker = bed.cluster.add(name)
        try:
            address = bed.wait_for(name)
            off = kind == peers.KERAS
            with bed.off_everywhere() if off else contextlib.nullcontext():
                for when in ("first", "second"):
                    began = time.perf_counter()
                    got = bed.client.submit(
                        _predict, bed.model, batch, pure=False, workers=[address]
                    ).result()
                    seconds = time.perf_counter() - began
                    if not cases.np.allclose(got, expected, rtol=1e-3, atol=0):
                        raise MeasuringError("other predictions came back")
                    row = bed.row(kind, f"predict, {when} on a fresh worker", [seconds])
                    yield row | {"equal": "predictions, to 0.1%"}
        finally:
            bed.client.retire_workers(names=[name])
            end(worker)


def _predict(model: Any, batch: Any) -> Any:
    return model.predict(batch, verbose=0)


def _spill(key: str, dask_worker: Any) -> tuple[float, float]:
    data = dask_worker.data
    spilled, _ = timed(data.evict)
    if key not in data.slow:
        raise MeasuringError("it was not spilled")
    gc.collect()  # it is read again only if nobody holds it any more
    back, _ = timed(data.__getitem__, key)
    return spilled, back
