"""What arguments in a config ask for: more than there is, a file, a class by its registered name.

Those that are looked at here, wherever they stand, and whoever's class takes them.
"""

from __future__ import annotations

from dask_keras_serialize import names

#: Arguments that are data, or where to read it: a path, which would be this machine's.
_FILES = ("vocabulary", "idf_weights")

#: Arguments that say how many tensors, thresholds, n-grams, copies are made, of whatever is sent.
COUNTS = ("indices_or_sections", "num", "num_thresholds", "ngrams", "n", "num_oov_indices")

#: The same, of the metrics named IoU, which list all classes; an operation may have more of them.
CLASSES = "num_classes"

#: Keys under which a string is no name of a class: Keras looks none of them up.
_NO_NAMES = frozenset({"name", "vocabulary", "input_layers", "output_layers", "layers"})

#: More tensors no operation makes; building that many takes a second. Nor all together so many.
MOST_TENSORS, MOST_ASKED = 10_000, 200_000


def found_by_name(value: object, hidden: frozenset[str]) -> str | None:
    """Say which string in arguments Keras would look up among the classes registered here."""
    waiting = [value] if hidden else []
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and each in hidden:
            return f"{each!r} is what this process registered, not Keras's own"
        if isinstance(each, list):
            waiting += each
        # a node inside is looked at by itself
        elif isinstance(each, dict) and (
            each is value or not {"class_name", "config"} <= each.keys()
        ):
            waiting += [inner for key, inner in each.items() if key not in _NO_NAMES]
    return None


def costly(name: str, inner: object) -> str | None:
    """Say which argument of a class asks for more than there is, and how."""
    if not isinstance(inner, dict):
        return None
    for key in _FILES:
        if isinstance(inner.get(key), str):
            return f"{key} of {name} is a file of another machine"
        words = inner.get(key)
        if isinstance(words, list) and names.lopsided([e for e in words if isinstance(e, str)]):
            return f"one word in the {key} of {name} is too long"
    for key in (*COUNTS, CLASSES) if name.endswith("IoU") else COUNTS:
        if isinstance(inner.get(key), int | float) and inner[key] > MOST_TENSORS:
            return f"{key} of {name} asks for {inner[key]} at once"
    return None


def asked(inner: object) -> float:
    """Return how many tensors, thresholds and so on an object's arguments ask for together."""
    given = [inner.get(key) for key in COUNTS] if isinstance(inner, dict) else []
    return sum(each for each in given if isinstance(each, int | float) and 0 < each <= MOST_TENSORS)
