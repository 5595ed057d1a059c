"""What it costs that objects in a config are in others: paths, and what errors say of them."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Letters of all paths: honest ones have some hundred each.
MOST_LETTERS = 3 * 10**7

#: Letters in which Keras may word an error of a layer, anew for each of those that it is in, with
#: all that is in each of them (``deserialize_keras_object``); or so many times all that was sent.
MOST_WORDS, MOST_WORDS_OF_ONE = 10**8, 32

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
    """

    longest: int
    letters: int
    words: int
    size: int

    @property
    def refusal(self) -> str | None:
        """Why it is not to be built."""
        if self.letters > MOST_LETTERS:
            return (
                f"the names of its layers, one in the other, make paths of {self.letters} letters"
            )
        if self.words > max(MOST_WORDS, MOST_WORDS_OF_ONE * self.size):
            return "it has too much in too many layers, one in the other"
        return None


def look_at(config: Any) -> Nest:
    """Look at a whole config once.

    Returns
    -------
    Nest
    """
    longest = letters = words = size = 0
    waiting: list[tuple[Any, int, int]] = [(config, 0, 0)]
    while waiting:
        value, before, depth = waiting.pop()
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
        waiting += [(each, before, depth) for each in parts if isinstance(each, (dict, list))]
    return Nest(longest, letters, words, size)


def is_shallow(text: str) -> bool:
    """Say, of a config that Keras wrote, that errors cannot say too much; if in doubt, no."""
    depth = _IN_A_LAYER + text.count('"layers": ') + text.count('"layer": ')
    return len(text) * depth * (depth + 1) // 2 <= MOST_WORDS
