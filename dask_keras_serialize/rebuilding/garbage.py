"""Replicas that nobody holds any more: freed before they fill the memory.

A Keras model is a cycle of references: dropped, it waits for Python's garbage collector, which
counts objects, not bytes, and takes one of few layers for nothing to run for, a GiB or not: some
hundred of them pass before it looks. So it is counted here what of all that was rebuilt lives, in
bytes, and the collector run, before more is rebuilt, when they have grown by as much as
:data:`GROWTH` allows. What is young is collected first, which takes milliseconds; all of it, which
takes some tenths of a second, only where that was not enough.

It pauses while a model is packed or rebuilt, which makes many objects that all live.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: By how many bytes, and what part of what was alive after the last time, rebuilt objects may
#: grow before the collector runs.
GROWTH, PART = 256 << 20, 0.25

#: What was rebuilt and lives, with its bytes, by the ``id()`` of the reference: references are
#: compared by what they refer to, which may have an opinion on that. Callbacks may come at any
#: moment, in any thread: each step here is one of the dict's own.
_alive: dict[int, tuple[weakref.ref[Any], int]] = {}

#: Bytes that were alive when the collector ran last, as the one item.
_left = [0]


def watch(obj: Any, nbytes: int) -> None:
    """Count what was rebuilt until it is freed.

    Parameters
    ----------
    obj : object
        Kept by a weak reference, if it takes any.
    nbytes : int
        What is freed with it.
    """
    try:
        reference = weakref.ref(obj, _forget)
    except TypeError:  # such as some tensors, which are in no cycle
        return
    _alive[id(reference)] = reference, nbytes


def alive() -> int:
    """Return the bytes of all that was rebuilt in this process and is not freed."""
    # not what is gone and could not say so: what interrupts a callback is swallowed by Python
    return sum(nbytes for reference, nbytes in list(_alive.values()) if reference() is not None)


def make_room(nbytes: int) -> None:
    """Run the collector if so much more would be too much, and the user has not turned it off.

    Parameters
    ----------
    nbytes : int
        That are about to be rebuilt.
    """
    if not (gc.isenabled() or _is_paused()):
        return
    for generation in (1, 2):
        if alive() + nbytes <= _left[0] + max(GROWTH, PART * _left[0]):
            return
        gc.collect(generation)
    _left[0] = alive()


@contextmanager
def paused() -> Iterator[None]:
    """Let the collector wait, until no thread is in here any more."""
    pause = object()
    try:
        with _pausing:
            if not _pauses:
                _collects[0] = gc.isenabled()
            _pauses.add(pause)
            gc.disable()
        yield
    finally:
        with _pausing:
            _pauses.discard(pause)
            if _collects[0] and not _pauses:
                gc.enable()


def _is_paused() -> bool:
    """Say whether the collector is off for nothing but a pause."""
    return bool(_pauses) and _collects[0]


def _none_paused() -> None:
    """Forget the pauses of threads that a process that was forked has not got."""
    global _pausing
    _pausing = threading.RLock()
    if _is_paused():
        gc.enable()
    _pauses.clear()


#: Held for the steps of a pause's beginning and end; again by what a collection runs meanwhile.
_pausing = threading.RLock()

#: Pauses under way; and whether the collector was on before the first of them, as the one item.
_pauses: set[object] = set()
_collects = [True]

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_none_paused)


def _forget(reference: weakref.ref[Any]) -> None:
    _alive.pop(id(reference), None)
