"""Which part of an object cannot travel, by its path: for errors only."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any


def culprit(
    state: Any, travels: Callable[[Any], Exception | None]
) -> tuple[str, Any, Exception] | None:
    """Find the smallest part of a state that cannot travel.

    Parameters
    ----------
    state : object
        Usually the dict of an object's attributes.
    travels : callable
        Takes a value; returns what pickling it raises, or None.

    Returns
    -------
    path : str
        Such as ``"notes['log']"`` or ``"helper.lock"``.
    part : object
    error : Exception

    or None, if every part travels by itself.
    """
    found, path, seen = None, "", set[int]()
    value: Any = state
    step: Callable[[Any], Iterator[tuple[str, Any]]] = _attributes
    while id(value) not in seen:
        seen.add(id(value))
        for name, part in step(value):
            error = travels(part)
            if error is not None:
                found, path = (f"{path}{name}".lstrip("."), part, error), f"{path}{name}"
                value, step = part, _children
                break
    return found


def sentence(owner: str, found: tuple[str, Any, Exception], where: str, what: str) -> str:
    """Say of what :func:`culprit` found that it cannot travel or be copied, and the way out."""
    path, value, cause = found
    return (
        f"{owner}: attribute {path}{where}, a {type(value).__name__}, cannot {what} "
        f"({cause}): make it in a method, or leave it out by __getstate__"
    )


def _attributes(state: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        # last, what TensorFlow keeps of all attributes
        names = sorted(state, key=lambda name: str(name).startswith("_self_"))
        yield from ((f".{name}", state[name]) for name in names)
    else:
        yield from _children(state)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
        yield from ((f", key {key!r}", key) for key in value)
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((f".args[{i}]", part) for i, part in enumerate(value.args))
        yield from ((f".keywords[{key!r}]", part) for key, part in value.keywords.items())
    elif isinstance(value, types.FunctionType):
        yield from _code(value)
    elif isinstance(value, type):
        yield from ((f".{name}", part) for name, part in vars(value).items())
    else:
        plain = object.__getstate__(value)
        for attributes in plain if isinstance(plain, tuple) else (plain,):
            if isinstance(attributes, dict):
                yield from ((f".{name}", part) for name, part in attributes.items())
        yield from ((f".args[{i}]", part) for i, part in enumerate(getattr(value, "args", ())))


def _code(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f" of a function that closes over {name}", cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    for i, default in enumerate(function.__defaults__ or ()):
        yield f" of a function with default {i}", default
    for name in code.co_names:
        if name in function.__globals__:
            yield f" of a function that uses the global {name}", function.__globals__[name]
