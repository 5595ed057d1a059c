"""What arguments in a config ask for: more than there is, a file, or what nobody can count.

Those that are looked at here, wherever they stand, and whoever's class takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dask_keras_serialize.limits import names

#: Arguments that are data, or where to read it: a path, which would be this machine's.
_FILES = ("vocabulary", "idf_weights")

#: Arguments that say how many tensors, thresholds, n-grams, copies are made, of whatever is sent.
COUNTS = (
    *("indices_or_sections", "num", "num_thresholds", "ngrams", "n", "num_oov_indices"),
    "power_iterations",
)

#: Cells whose size is asked for twice of those in them (``keras/src/layers/rnn``).
STACKED = "StackedRNNCells"

#: What lookups repeat as often as ``num_oov_indices`` says; letters of it.
_REPEATED, MOST_LETTERS = ("oov_token", "mask_token"), 1000

#: One more of COUNTS, of the metrics named IoU, which list all classes; an operation may have more.
CLASSES = "num_classes"

#: Whole numbers say how large something is, but for those of these arguments, which are values. No
#: layer is larger, but where a variable has an axis like it, whose bytes were sent.
MOST_NUMBER = 10**7
_VALUES = frozenset(
    {
        "seed", "salt", "value", "values", "mean", "variance", "vocabulary", "bin_boundaries",
        "num_bins", "num_tokens", "mask_token", "mask_value", "oov_token", "scale", "offset",
        "x_min", "x_max", "initial", "posinf", "neginf", "nan", "fill_value", "constant_values",
        "max_value", "value_range", "default_value",
        "decay_steps", "first_decay_steps", "warmup_steps", "boundaries", "inbound_nodes",
    }
)  # fmt: skip
#: Those in JSON that may be larger; in a word, too.
_NUMBER = re.compile(r'(?<![\d.\-])(?<!"seed": )(?<!"salt": )\d{8,}(?![\d.e])')

#: So many variables more than were sent may be made in a rebuild, and dropped.
SPARE = 100

#: Of all Normalizations together: features of their inputs.
MOST_FEATURES = 10**7

#: More tensors no operation makes; building that many takes a second. Nor all together so many.
MOST_TENSORS, MOST_ASKED = 10_000, 200_000


def costly(name: str, inner: object) -> str | None:
    """Say which argument of a class asks for more than there is, and how."""
    if not isinstance(inner, dict):
        return None
    if inner.get("stateful"):
        return f"{name} has states as large as its batch"
    if inner.get("output_mode") == "tf_idf":
        return f"{name} has weights of documents, for as many words as it says, in no config"
    for key, value in inner.items():
        if key in _FILES and isinstance(value, str):
            return f"{key} of {name} is a file of another machine"
        if isinstance(value, list) and names.lopsided(names.elements(value)):
            return f"one word in the {key} of {name} is too long"
    cells = inner.get("cells") if name == STACKED else None
    if any(each.get("class_name") == name for each in cells or () if isinstance(each, dict)):
        return f"{name} are in {name}, whose sizes take twice as long to know at each depth"
    for key in _REPEATED:
        if isinstance(inner.get(key), str) and len(inner[key]) > MOST_LETTERS:
            return f"the {key} of {name} is too long"
    for key in (*COUNTS, CLASSES) if name.endswith("IoU") else COUNTS:
        if isinstance(inner.get(key), int | float) and inner[key] > MOST_TENSORS:
            return f"{key} of {name} asks for {inner[key]} at once"
    return None


def too_large(model: object, shapes: Iterable[Iterable[int]]) -> str | None:
    """Say which number in a model's config is larger than what was sent for it.

    Parameters
    ----------
    model : dict
        Its config.
    shapes : iterable of tuple of int
        Of all variables that were sent.
    """
    axes = {length for shape in map(tuple, shapes) if 0 not in shape for length in shape}
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(inner, each) for inner, each in value.items() if inner not in _VALUES]
        elif isinstance(value, list | tuple):
            waiting += [(key, each) for each in value]
        elif isinstance(value, int) and value > MOST_NUMBER and value not in axes:
            return f"{key!r} in it is {value}, larger than any axis of its variables"
    return None


def may_be_too_large(text: str) -> bool:
    """Say whether to look for such numbers in a config as JSON."""
    return _NUMBER.search(text) is not None


def too_much(asked: float) -> str | None:
    """Say that all of a config's arguments together ask for too much."""
    if asked > MOST_ASKED:
        return f"its arguments ask for more than {MOST_ASKED} together"
    return None


def asked(inner: object) -> float:
    """Return how many tensors, thresholds and so on an object's arguments ask for together."""
    given = [inner.get(key) for key in COUNTS] if isinstance(inner, dict) else []
    return sum(each for each in given if isinstance(each, int | float) and 0 < each <= MOST_TENSORS)
