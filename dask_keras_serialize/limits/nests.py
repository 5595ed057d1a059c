"""What it costs that something in a config is in something else: paths, errors, axes."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

#: Letters of all paths: honest ones have some hundred each.
MOST_LETTERS = 3 * 10**7

#: Letters in which Keras may word an error of a layer, anew for each of those that it is in, with
#: all that is in each of them (``deserialize_keras_object``); or so many times all that was sent.
MOST_WORDS, MOST_WORDS_OF_ONE = 10**8, 32

#: Lists, one in the other: a tensor has no more axes, and TensorFlow ends the process for one of
#: 255 (``ConvertToEagerTensor``).
MOST_LISTS = 64
_MANY_LISTS = re.compile(rf"(?:\[[^][{{}}]*+){{{MOST_LISTS + 1}}}")

#: Objects in a layer, in one another: an initializer in a schedule of a loss's, and so on.
_IN_A_LAYER = 6

#: Letters of a number, and what stands around a value.
_LETTERS = 8


class Nest(NamedTuple):
    """How deep a config is.

    Attributes
    ----------
    longest : int
        Letters of the longest path that names of objects in objects make.
    letters : int
        Those of all paths.
    words : int
        Letters of an error for each object that something is in, with all in it, and of what
        errors of those in it say.
    size : int
        Letters of the config.
    lists : int
        How many lists are in one another, with nothing else between.
    """

    longest: int
    letters: int
    words: int
    size: int
    lists: int

    @property
    def refusal(self) -> str | None:
        """Why it is not to be built."""
        if self.letters > MOST_LETTERS:
            return (
                f"the names of its layers, one in the other, make paths of {self.letters} letters"
            )
        if self.words > max(MOST_WORDS, MOST_WORDS_OF_ONE * self.size):
            return "it has too much in too many layers, one in the other"
        if self.lists > MOST_LISTS:
            return f"it has lists in lists, {self.lists} in all, and no tensor so many axes"
        return None


def look_at(config: Any) -> Nest:
    """Look at a whole config once.

    Returns
    -------
    Nest
    """
    longest = letters = words = size = most = 0
    waiting: list[tuple[Any, int, int, int]] = [(config, 0, 0, 0)]
    while waiting:
        value, before, depth, lists = waiting.pop()
        lists = 0 if isinstance(value, dict) else lists + 1
        most = max(most, lists)
        if isinstance(value, dict):
            inner = value.get("config")
            depth += "class_name" in value
            name = inner.get("name") if isinstance(inner, dict) else None
            before += len(name) + 1 if isinstance(name, str) else 0
            letters += before if name else 0
            longest = max(longest, before)
        parts = value.values() if isinstance(value, dict) else value
        # keys are counted with what they stand for
        here = sum(map(len, value)) if isinstance(value, dict) else 0
        here += sum(len(each) if isinstance(each, str) else _LETTERS for each in parts)
        size += here
        words += here * depth * (depth + 1) // 2
        inside = [each for each in parts if isinstance(each, (dict, list))]
        waiting += [(each, before, depth, lists) for each in inside]
    return Nest(longest, letters, words, size, most)


def is_shallow(text: str) -> bool:
    """Say, of a config that Keras wrote, that nothing is too deep in it; if in doubt, no."""
    if _MANY_LISTS.search(text):
        return False
    depth = _IN_A_LAYER + text.count('"layers": ') + text.count('"layer": ')
    return len(text) * depth * (depth + 1) // 2 <= MOST_WORDS
