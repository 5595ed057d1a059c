"""What Keras makes objects with where nobody says: its floatx and its dtype policy.

Keras keeps the one for the process and the other for each thread; a model that arrives needs its
sender's in the thread that rebuilds it, and a worker one policy in all. What is touched is listed
in :data:`dask_keras_serialize.private.KERAS`.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import keras


@contextmanager
def policy_in_this_thread(policy: keras.DTypePolicy) -> Iterator[None]:
    """Have Keras's dtype policy be another in this thread; then what it was, or still unset.

    Keras itself sets it, by floatx, when somebody asks for it: a later floatx would change nothing.
    """
    state: Any = import_module("keras.src.backend.common.global_state")
    try:
        before = state.get_global_attribute("dtype_policy")
        put_back = state.set_global_attribute
    except AttributeError:
        before = keras.config.dtype_policy()
        put_back = lambda _, policy: keras.config.set_dtype_policy(policy)  # noqa: E731
    try:  # from here on: an interrupt may come as soon as it is set
        keras.config.set_dtype_policy(policy)
        yield
    finally:
        put_back("dtype_policy", before)


def set_policy_everywhere(policy: keras.DTypePolicy) -> bool:
    """Make a dtype policy the default of every thread; ``keras.config`` does so for its own.

    Parameters
    ----------
    policy : keras.DTypePolicy

    Returns
    -------
    bool
        False where this Keras does not keep it as known, and nothing was done.

    Notes
    -----
    ``keras.utils.clear_session()`` forgets it, as any other.
    """
    state: Any = import_module("keras.src.backend.common.global_state")
    tracker = getattr(state, "GLOBAL_STATE_TRACKER", None)
    if not isinstance(tracker, threading.local):
        return False

    class Everywhere(threading.local):
        dtype_policy = policy

    everywhere = Everywhere()
    vars(everywhere).update(vars(tracker))
    vars(everywhere).pop("dtype_policy", None)
    state.GLOBAL_STATE_TRACKER = everywhere
    return keras.config.dtype_policy() is policy


class _Threads(threading.local):
    """The floatx of each thread; None where it is the process's."""

    floatx: str | None = None


_threads = _Threads()


def can_hook(function: Any) -> bool:
    """Say whether other code can stand in for that of a function without arguments."""
    code = getattr(function, "__code__", None)
    return code is not None and not code.co_freevars and not code.co_argcount


#: What returns the process's, whatever code the function has now.
_of_the_process: Any = keras.config.floatx
if can_hook(_of_the_process):
    _of_the_process = types.FunctionType(_of_the_process.__code__, _of_the_process.__globals__)


def floatx() -> str:
    """Return the floatx of this thread."""
    found: str = _threads.floatx or _of_the_process()
    return found


@contextmanager
def floatx_in_this_thread(name: str) -> Iterator[None]:
    """Have Keras's floatx be another in this thread: one of those that ``set_floatx`` takes.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock. Keras's modules import the
    function that returns it, so what is hooked is that function's code
    (``keras/src/backend/config.py``). Where it cannot be, floatx is another in all threads.
    """
    function: Any = keras.config.floatx
    if can_hook(function):  # though it be the same: another thread may set another meanwhile
        original, outer = function.__code__, _threads.floatx
        try:
            function.__code__ = _hooked.__code__  # as it is already in a rebuild inside another
            _threads.floatx = name
            yield
        finally:
            _threads.floatx = outer
            function.__code__ = original
    else:
        before = function()
        try:
            keras.config.set_floatx(name)
            yield
        finally:
            keras.config.set_floatx(before)


def _hooked() -> str:
    # it runs with the globals of Keras's module
    import sys

    return sys.modules["dask_keras_serialize.configs.defaults"].floatx()  # type: ignore[no-any-return]
