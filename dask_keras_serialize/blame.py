"""Which part of an object cannot travel, by its path: for errors only."""

from __future__ import annotations

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


def _attributes(state: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        yield from ((f".{name}", value) for name, value in state.items())
    else:
        yield from _children(state)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            try:
                yield f" of a function that closes over {name}", cell.cell_contents
            except ValueError:  # not yet assigned
                continue
    else:
        attributes: dict[str, Any] = getattr(value, "__dict__", {})
        if isinstance(attributes, dict):
            yield from ((f".{name}", part) for name, part in attributes.items())
