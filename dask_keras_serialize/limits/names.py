"""Names in configs, and regular expressions that Keras looks for in them: what both may cost.

Every layer keeps a path of the names that it is in. Some arguments are patterns, which a config may
thus have Keras look for in every name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dask_keras_serialize.limits import nests
from dask_keras_serialize.limits.kinds import DATA, NUMBERS

#: Arguments, lists or the keys of a dict, that Keras takes for regular expressions; groups that are
#: repeated, have extensions or are referred to, which make some of them take for ever; and what
#: repeats a part: each of those may try every place in a name.
_ARGUMENTS, _REPEATED = ("exclude_layers", "policy_map"), re.compile(r"\)\s*[*+?{]|\(\?|\\[1-9]")
_QUANTIFIERS, MOST_PLACES = re.compile(r"[*+?{]"), 10**9

#: Half of a surrogate pair, or a whole one, in JSON.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

#: Letters of a vocabulary with what fills the shorter words: of an honest one some ten for each.
MOST_PADDED, MOST_PADDING = 10**7, 50

#: What it costs to look for a pattern at all, as if it were so many places; for one that ``re``
#: compiles each time, as it does where there are more than it remembers.
_CALL, _COMPILED = 500, 50_000


def objects(text: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return a config that is JSON, and of all its objects what Keras builds each by.

    Raises
    ------
    TypeError, ValueError, RecursionError
        If it is no JSON, or not of text.
    """
    if not escapes_text(text):
        raise ValueError("half of a surrogate pair")
    named: list[dict[str, Any]] = []

    def note(node: dict[str, Any]) -> dict[str, Any]:
        if "class_name" in node and "config" in node:
            named.append(node)
        return node

    return json.loads(text, object_hook=note), named


def are_text(names: str) -> bool:
    """Say whether names can be written down: not with half of a surrogate pair in them."""
    try:
        names.encode()
    except UnicodeEncodeError:
        return False
    return True


def escapes_text(text: str) -> bool:
    """Say the same of the strings in JSON, all of ASCII."""
    if not _SURROGATE.search(text):
        return True
    return are_text(json.dumps(json.loads(text), ensure_ascii=False))


def refused(text: str, paths: Iterable[str]) -> str | None:
    """Say for what in a config who receives it will refuse it, as :func:`too_costly`.

    A model may have been built with such and work: its sender has it go by value then.
    """
    if not escapes_text(text):
        return "a name in it is half of a surrogate pair"
    has_patterns = any(f'"{key}": {opening}"' in text for key in _ARGUMENTS for opening in "[{")
    if nests.is_shallow(text) and not has_patterns:
        return None
    return too_costly(*objects(text), paths)


def too_costly(
    config: dict[str, Any], named: list[dict[str, Any]], paths: Iterable[str]
) -> str | None:
    """Say which names, nests or regular expressions may take all memory, or for ever.

    Patterns are looked for in names of layers, their paths and variables', which ``paths`` are. An
    optimizer looks for all of its own in those of all variables; a map of policies is asked for one
    after the other.
    """
    configs = [node["config"] for node in named if isinstance(node["config"], dict)]
    paths = [*config["paths"], *paths]
    known = [each for each in (*(c.get("name") for c in configs), *paths) if isinstance(each, str)]
    nest = nests.look_at(config)
    if nest.refusal:
        return nest.refusal
    longest = max(nest.longest, *map(len, known), 0)
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
                places = math.comb(longest + parts + 1, parts + 1) * _ways(pattern)
                of_these += places + (_COMPILED if len(patterns) > 256 else _CALL)
            if key == "policy_map":
                most_of_maps = max(most_of_maps, of_these)
            else:
                spent += of_these
            if (spent + most_of_maps) * len(known) > MOST_PLACES:
                return f"the patterns of {key!r}, {str(given)[:60]!r}, may take for ever"
    return None


def lopsided(words: Sequence[str | bytes]) -> bool:
    """Say whether words take much more as NumPy's array, each of the longest's size (UTF-32)."""
    longest = max(map(len, words), default=0)
    padded, letters = longest * len(words), sum(map(len, words))
    return padded > MOST_PADDED and padded > MOST_PADDING * letters


def elements(values: list[Any]) -> list[str | bytes]:
    """Return what NumPy's array of nested lists would hold, as text; of no other objects."""
    elements: list[str | bytes] = []
    waiting = list(values)
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if str(each.get("class_name")) not in DATA | NUMBERS:
                return []
            each = each.get("config")
            waiting += each.values() if isinstance(each, dict) else [each]
        elif isinstance(each, list):
            waiting += each
        else:
            elements.append(each if isinstance(each, str) else "")
    return elements


def twice(inner: object) -> str | None:
    """Say which of a model's layers has another's name: older Kerases look for its calls for ever.

    ``functional_from_config`` in ``keras/src/models/functional.py``.
    """
    layers = inner.get("layers") if isinstance(inner, dict) else None
    seen: set[str] = set()
    for each in layers if isinstance(layers, list) else ():
        name = each.get("name") if isinstance(each, dict) and "inbound_nodes" in each else None
        if isinstance(name, str):
            if name in seen:
                return f"two of its layers are named {name!r}"
            seen.add(name)
    return None


def _ways(pattern: str) -> int:
    """Return in how many ways a pattern's alternatives may be chosen, at most."""
    bars = pattern.count("|")
    # those in groups combine, with each other and in one group after the other
    return 2 ** min(bars, 100) if "(" in pattern else 1 + bars
