"""Objects of Keras's made aside: no seed is drawn for them that a user would have drawn.

Keras draws a seed from Python's global random numbers for every unseeded initializer and
seed generator, and counts up names. Sending or receiving a model must change neither
(what is touched is listed in :data:`dask_keras_serialize.private.KERAS`).
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from dask_keras_serialize.errors import BusyError
from dask_keras_serialize.rebuilding.turns import Turn, at_forks

#: Held while Keras's source of random numbers is ours, which is for all of a rebuild.
LOCK = Turn()

#: Seconds that a thread waits for it, and an event loop, without which whoever holds the lock may
#: be unable to go on: what is rebuilt is anybody's code, and may ask a cluster for something.
PATIENCE, PATIENCE_OF_A_LOOP = 600.0, 30.0

at_forks(LOCK, PATIENCE_OF_A_LOOP)


@contextmanager
def aside() -> Iterator[None]:
    """Make objects of Keras's that are nobody's: no seed is drawn for them, no name used up."""
    with own_random(), own_names():
        yield


@contextmanager
def own_names() -> Iterator[None]:
    """Let this thread count names up, and then back to where they were."""
    try:
        state = import_module("keras.src.backend.common.global_state")
        names = state.get_global_attribute("object_name_uids")
    except (ImportError, AttributeError):
        yield
        return
    before = dict(names or {})
    try:
        yield
    finally:
        names = state.get_global_attribute("object_name_uids")
        if names is not None:  # the first name makes it
            names.clear()
            names.update(before)


@contextmanager
def own_random() -> Iterator[None]:
    """Let this thread's unseeded initializers and seeds draw from numbers of their own.

    Python's global state is left alone, for this thread and for others. One thread at a
    time: two that put back what they found in turn would leave one's numbers in place.
    """
    with _locked():
        try:
            seed_generator: Any = import_module("keras.src.random.seed_generator")
            original = seed_generator.python_random
        except (ImportError, AttributeError):
            yield
            return
        try:
            seed_generator.python_random = _Draws(original)
            yield
        finally:
            seed_generator.python_random = original


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock; BusyError if who holds it never gives it back."""
    try:
        asyncio.get_running_loop()
        patience = PATIENCE_OF_A_LOOP
    except RuntimeError:
        patience = PATIENCE
    with LOCK.held(patience) as ours:
        if not ours:
            raise BusyError(
                "another thread of this process has been rebuilding a Keras object for "
                f"{patience:.0f} s: if its code asks the cluster for something as it is rebuilt, "
                "let it do that later"
            )
        yield


class _Draws:
    """Stands in for the module ``random``: one thread's numbers apart from the others'."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._thread = threading.get_ident()
        self._own = random.Random()

    def __getattr__(self, name: str) -> Any:
        here = threading.get_ident() == self._thread
        return getattr(self._own if here else self._original, name)
