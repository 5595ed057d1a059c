"""Time and bytes for Dask's fine performance metrics, under names of our own.

Where distributed is loaded, its ``context_meter`` (``distributed/metrics.py``) tells whoever has
asked: a worker, of what it does for a task, for another worker or for its disk. Its dashboard shows
them beside its own ``serialize`` and ``deserialize``, of which ours are subtracted:

- ``keras-pack``: an object taken apart; bytes of its frames.
- ``keras-rebuild``: an object put together, but for
- ``keras-place``: values put into variables, on the device where those are; their bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACK, REBUILD, PLACE = "keras-pack", "keras-rebuild", "keras-place"


@contextmanager
def meter(label: str) -> Iterator[None]:
    """Count the seconds that the context takes, without those counted inside of it."""
    meters = _context_meter()
    if meters is None:
        yield
        return
    with meters.meter(label):
        yield


def count(label: str, value: float, unit: str) -> None:
    """Count ``value`` of a unit, "seconds" or "bytes"."""
    meters = _context_meter()
    if meters is not None:
        meters.digest_metric(label, value, unit)


def _context_meter() -> Any:
    return getattr(sys.modules.get("distributed.metrics"), "context_meter", None)
