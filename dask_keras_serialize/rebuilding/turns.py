"""Locks that are not lost to an interrupt of who waits for them.

Python interrupts a thread that waits for a lock (``PyThreadState_SetAsyncExc``, or Ctrl-C) as
``acquire`` returns: it has the lock then, and no assignment has told so. Written the usual way,
with ``acquire`` before the ``try``, nobody gives it back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class Turn:
    """A lock that its thread may take again, and that nobody waits for longer than he says."""

    _lock: threading.RLock
    _owner: int | None

    def __init__(self) -> None:
        self.free()

    def free(self) -> None:
        """Forget who has it: for a process that has not got that thread."""
        self._lock = threading.RLock()
        self._owner = None

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
            if self._owner == me == threading.get_ident():  # not who collects what never ended
                self._owner = None
            # whether or not ``mine`` could be set: who has not got it is told so
            # not ``suppress``: an interrupt in its own lines would leave the lock held
            try:  # noqa: SIM105
                self._lock.release()
            except RuntimeError:
                pass


def at_forks(turn: Turn, seconds: float) -> None:
    """Have forks wait for a turn, so that no process begins in the middle of somebody's.

    What is held then is held for good in the new process, which has not got the thread that holds
    it; and what that thread had changed meanwhile stays so. ``multiprocessing`` forks, up to Python
    3.13, and so do ``concurrent.futures`` and Keras's data sets; ``subprocess`` does not.

    Parameters
    ----------
    turn : Turn
    seconds : float
        To wait at most; then the new process's turn is a free one, and the rest as it was.
    """
    threads = threading.local()

    def before() -> None:
        threads.stack = ExitStack()
        threads.got = threads.stack.enter_context(turn.held(seconds))

    def in_parent() -> None:
        threads.stack.close()

    def in_child() -> None:
        threads.stack.close()
        if not threads.got:
            turn.free()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)
