"""What arguments in a config ask for: more than there is, a file, or what nobody can count.

Those that are looked at here, wherever they stand, and whoever's class takes them.
"""

from __future__ import annotations

from dask_keras_serialize.limits import names

#: Arguments that are data, or where to read it: a path, which would be this machine's.
_FILES = ("vocabulary", "idf_weights")

#: Arguments that say how many tensors, thresholds, n-grams, copies are made, of whatever is sent.
COUNTS = (
    *("indices_or_sections", "num", "num_thresholds", "ngrams", "n", "num_oov_indices"),
    "power_iterations",
)

#: The same, of the metrics named IoU, which list all classes; an operation may have more of them.
CLASSES = "num_classes"

#: More tensors no operation makes; building that many takes a second. Nor all together so many.
MOST_TENSORS, MOST_ASKED = 10_000, 200_000


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
