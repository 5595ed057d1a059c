"""Regular expressions in configs, and how long looking for them may take.

Keras takes some arguments for such, which a config may thus have it look for in every name.
"""

from __future__ import annotations

import math
import re
from typing import Any

from dask_keras_serialize.header import Header

#: Arguments, lists or the keys of a dict, that Keras takes for regular expressions; groups that are
#: repeated or have extensions, which make some of them take for ever; and what repeats a part: each
#: of those may try every place in a name.
_ARGUMENTS, _REPEATED = ("exclude_layers", "policy_map"), re.compile(r"\)\s*[*+?{]|\(\?")
_QUANTIFIERS, MOST_PLACES = re.compile(r"[*+?{]"), 10**9

#: What it costs to look for a pattern at all, as if it were so many places; for one that ``re``
#: compiles each time, as it does where there are more than it remembers.
_CALL, _COMPILED = 500, 50_000


def too_costly(config: dict[str, Any], named: list[dict[str, Any]], header: Header) -> str | None:
    """Say which regular expressions may take for ever, in the names that there are.

    They are looked for in names of layers, their paths and variables'. An optimizer looks for all
    of its own in those of all variables; a map of policies is asked for one after the other.
    """
    configs = [node["config"] for node in named if isinstance(node["config"], dict)]
    paths = [*config["paths"], *(entry.path for entry in header.variables)]
    names = [each for each in (*(c.get("name") for c in configs), *paths) if isinstance(each, str)]
    longest = max(_longest_path(config), *map(len, names), 0)
    spent, most_of_maps = 0, 0
    for inner in configs:
        for key in _ARGUMENTS:
            given = inner.get(key)
            patterns = list(given) if isinstance(given, (list, dict)) else [given]
            of_these = 0
            for pattern in (each for each in patterns if isinstance(each, str)):
                if _REPEATED.search(pattern):
                    return f"the pattern {pattern!r} may take for ever"
                parts = min(len(_QUANTIFIERS.findall(pattern)), 100)
                # each part may end anywhere behind the one before, or where that does
                places = math.comb(longest + parts + 1, parts + 1)
                of_these += places + (_COMPILED if len(patterns) > 256 else _CALL)
            if key == "policy_map":
                most_of_maps = max(most_of_maps, of_these)
            else:
                spent += of_these
            if (spent + most_of_maps) * len(names) > MOST_PLACES:
                return f"the patterns of {key!r}, {str(given)[:60]!r}, may take for ever"
    return None


def _longest_path(config: dict[str, Any]) -> int:
    """Return the letters of the longest path that names of objects in objects make."""
    longest = 0
    waiting: list[tuple[Any, int]] = [(config, 0)]
    while waiting:
        value, before = waiting.pop()
        if isinstance(value, dict):
            inner = value.get("config")
            name = inner.get("name") if isinstance(inner, dict) else None
            before += len(name) + 1 if isinstance(name, str) else 0
        longest = max(longest, before)
        parts = value.values() if isinstance(value, dict) else value
        waiting += [(each, before) for each in parts if isinstance(each, (dict, list))]
    return longest
