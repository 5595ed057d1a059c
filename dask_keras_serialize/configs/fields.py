"""The fields of a config, and of which types each may be: what ``by_config.dump`` writes.

Some of what they hold becomes attributes, names of files or places in lists. What Keras builds by
the rest is looked at in ``vetting``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

#: What ``keras.config.set_floatx`` takes.
_FLOATX = ("bfloat16", "float16", "float32", "float64")


#: How deep a history may be nested, which Python compares and writes down by recursion.
MOST_DEEP = 50


def _rows(*kinds: type | tuple[type, ...]) -> Callable[[object], bool]:
    """Return what says whether a value is a list of rows of such fields."""
    return lambda value: (
        isinstance(value, list)
        and all(
            isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds))
            for row in value
        )
    )


def _each(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(each, kinds) for each in value)


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _history(value: object) -> bool:
    # its keys become attributes
    kinds = {"history": dict, "epoch": list, "params": dict | None}
    return value is None or (
        isinstance(value, dict)
        and value.keys() <= kinds.keys()
        and all(isinstance(each, kinds[key]) for key, each in value.items())
        and not _is_deeper(value, MOST_DEEP)
    )


def _is_deeper(value: object, most: int) -> bool:
    """Say whether lists and dicts are nested deeper than ``most``."""
    level: list[Any] = [value]
    depth = 0
    while level and depth <= most:
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [e for part in parts for e in part if isinstance(e, (dict, list))]
        depth += 1
    return bool(level)


def _seeds(value: Any) -> bool:
    rows = _rows(int, str, int)(value)
    return rows and all(place >= 0 and 0 <= seed < 2**63 for place, _, seed in value)


def _asset(value: Any) -> bool:
    named = _rows(int, str)(value)
    return named and all(re.fullmatch(r"\w[\w.-]{0,200}", name) for _, name in value)


def _trainer(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() >= {"optimizer-built", "scaled", "metrics", "losses", "attributes"}
        and isinstance(value["attributes"], dict)
        and all(isinstance(v, (bool, int, str, type(None))) for v in value["attributes"].values())
    )


#: The fields of a config, and what says whether a value may be one's.
FIELDS: dict[str, Callable[[object], bool]] = {
    "model": _is(dict),
    "policy": _is(dict, str),
    "floatx": lambda value: value in _FLOATX,
    "frozen": _each(int),
    "seeds": _seeds,
    "paths": _each(str, type(None)),
    "compile": _is(dict, type(None)),
    "trainer": _trainer,
    "history": _history,
    "assets": _asset,
}
