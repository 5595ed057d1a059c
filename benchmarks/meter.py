"""One repetition of a peer: its times, its memory, what it copied, what came back.

Memory is the process's peak resident size over where it stood when the clock started
(``VmHWM``, reset through ``/proc/self/clear_refs``; None where that is missing). Extra
is what is over the weights themselves: out, over the model; in, over one copy of them,
so that received bytes and a model beside them make 100 %.

Copied, or made, are the bytes between the two that do not lie in the model's own memory,
and those of the result that do not lie in what was received: told by address.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import cases
import numpy as np
import peers
import values

Row = dict[str, Any]

#: Bytes of memory that are left to everybody else.
SPARE = 1 << 30


class MeasuringError(Exception):
    """Says in one line why there is nothing to show."""


def reason(error: BaseException) -> MeasuringError:
    """Say in one line what went wrong."""
    if isinstance(error, MeasuringError):
        return error
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return MeasuringError(text if len(text) <= 160 else f"{text[:157]}...")


def times(seconds: list[float]) -> Row:
    """Put seconds into a row, with the median and the least of them."""
    rounded = [float(f"{each:.4g}") for each in seconds]
    return {"seconds": rounded, "median": statistics.median(rounded), "minimum": min(rounded)}


def fits(nbytes: float) -> None:
    """Raise MeasuringError where so much memory is not to be had."""
    import psutil

    available = psutil.virtual_memory().available
    if nbytes + SPARE > available:
        need, there = (cases.readable(each) for each in (nbytes, available))
        raise MeasuringError(f"needs about {need} of memory, {there} was available")


def repeat(peer: peers.Peer, model: Any, nbytes: int, memory: bool) -> Row:
    """Measure a peer once, both ways; the memory too, and what was copied, if asked to."""
    source = peer.source(model)
    room = int(min(peer.room, 7) * nbytes)
    before = start(room, memory)
    began = time.perf_counter()
    blob, buffers = peer.dump(source)
    seconds_out = time.perf_counter() - began
    row_out: Row = {"seconds": seconds_out, "extra_bytes": extra(memory, before)}
    wire = peer.wire_bytes(blob, buffers)
    views = peer.views(source)
    copied = wire is not None and bool(views)
    if memory and copied:
        sent = [np.frombuffer(each, np.uint8) for each in buffers]
        row_out["copied_bytes"] = values.elsewhere(sent, views) + len(memoryview(blob))
    views = sent = []

    blob, buffers = peer.deliver(blob, buffers)
    before = start(room, memory)
    began = time.perf_counter()
    copy = peer.load(blob, buffers)
    seconds_in = time.perf_counter() - began
    extra_in = extra(memory, before - (wire or 0) + nbytes)
    row_in: Row = {"seconds": seconds_in, "extra_bytes": extra_in}
    if memory and copied:
        arrived = [np.asarray(each) for each in (blob, *buffers)]
        row_in["copied_bytes"] = values.elsewhere(peer.views(copy), arrived)
        arrived = []
    del blob, buffers
    row_in["equal"] = peer.equal(source, copy)
    common = {"wire_bytes": wire}
    return {"out": row_out | common, "in": row_in | common}


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


def resident() -> tuple[int, int]:
    """Return the resident size and its peak; nothing where they cannot be read."""
    if not Path("/proc/self/status").exists():
        return 0, 0
    return _status("VmRSS"), _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
