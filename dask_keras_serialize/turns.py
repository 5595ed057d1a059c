"""Locks that are not lost to an interrupt of who waits for them.

Python interrupts a thread that waits for a lock (``PyThreadState_SetAsyncExc``, or Ctrl-C) as
``acquire`` returns: it has the lock then, and no assignment has told so. Written the usual way,
with ``acquire`` before the ``try``, nobody gives it back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """A lock that its thread may take again, and that nobody waits for longer than he says."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None

    @property
    def taken(self) -> bool:
        """Whether a thread has it."""
        return self._owner is not None

    @contextmanager
    def held(self, seconds: float) -> Iterator[bool]:
        """Hold the lock.

        Parameters
        ----------
        seconds : float
            To wait for it at most.

        Yields
        ------
        bool
            Whether it is held; if not, another thread still has it.
        """
        me = threading.get_ident()
        if self._owner == me:
            yield True
            return
        try:
            mine = self._lock.acquire(timeout=seconds)
            if mine:
                self._owner = me
            yield mine
        finally:
            if self._owner == me:
                self._owner = None
            # whether or not ``mine`` could be set: who has not got it is told so
            # not ``suppress``: an interrupt in its own lines would leave the lock held
            try:  # noqa: SIM105
                self._lock.release()
            except RuntimeError:
                pass
