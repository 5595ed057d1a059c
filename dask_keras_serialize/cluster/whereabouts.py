"""Where our code runs: in a worker's process or not, and who called it on this thread.

Loads nothing of distributed: who has not loaded it is none of its processes. What is private of it
here is listed in :mod:`dask_keras_serialize.registration`.
"""

from __future__ import annotations

import sys
import tempfile
from types import FrameType
from typing import Any


def caller(module: str, function: str) -> dict[str, Any] | None:
    """Return the local variables of a function if it is what calls us on this thread.

    In a LocalCluster client and scheduler share a process, so what tells them apart
    is who calls: ``Scheduler.update_graph`` (``distributed/scheduler.py``) unpickles
    graphs itself, in its coroutine.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return frame.f_locals
        frame = frame.f_back
    return None


def read_by_worker() -> bool:
    """Say whether a worker's comm is what unpickles (``distributed/comm/utils.py``)."""
    return bool(_living("worker")) and caller("distributed.comm.utils", "_from_frames") is not None


def temporary_folder() -> str:
    """Return where a file may lie for a while: on a worker, in the folder that it works in.

    A process that is killed removes nothing. What is in a worker's folder its nanny removes
    (``distributed/nanny.py``), or the next worker that starts there (``distributed/diskutils.py``).
    Where the scheduler is in the process too, files may be wanted longer than the worker lives.
    """
    workers = () if _living("scheduler") else _living("worker")
    folders = (getattr(worker, "local_directory", None) for worker in workers)
    return next(filter(None, folders), None) or tempfile.gettempdir()


def _living(what: str) -> list[Any]:
    """Return the workers, or schedulers, of this process that are not closed."""
    module = sys.modules.get(f"distributed.{what}")
    if module is None:
        return []
    instances = getattr(getattr(module, what.capitalize(), None), "_instances", ())
    while True:
        try:
            return [each for each in instances if each.status.name != "closed"]
        except RuntimeError:  # another thread has started or closed one meanwhile
            continue
