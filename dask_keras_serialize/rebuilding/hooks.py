"""Methods of Keras's that do something else in one thread, for as long as it rebuilds a model.

They sit on classes that other threads use too: for those they stay as they were.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def in_this_thread(cls: Any, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Have this thread call something else for a method.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock.

    Parameters
    ----------
    cls : type
        Or a module, with functions for methods.
    name : str
    instead : callable
        Called with the method as a function, and with what that would have been called with: the
        instance first, or the class if it is a class method.
    """
    inherited = name not in vars(cls)
    whole = inspect.getattr_static(cls, name)
    original: Callable[..., Any] = getattr(whole, "__func__", whole)
    thread = threading.get_ident()

    @functools.wraps(original)
    def method(*arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() == thread:
            return instead(original, *arguments, **keywords)
        return original(*arguments, **keywords)

    try:  # from here on: an interrupt may come as soon as it is set
        setattr(cls, name, classmethod(method) if isinstance(whole, classmethod) else method)
        yield
    finally:
        if not inherited:
            setattr(cls, name, whole)
        elif name in vars(cls):
            delattr(cls, name)
