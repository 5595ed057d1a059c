"""What this package adds to what Keras's objects hold, where they go by value.

The rest of the pickle is as Keras and Python have it, of any version.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dask_keras_serialize.values import by_value
from dask_keras_serialize.values.states import ITEMS, Custom, attributes_of

#: Says which attributes TensorFlow wrapped: Keras's versions differ in which they have.
BY_VERSION = ("wrapped by tensorflow",)


class Id(NamedTuple):
    """What names an object in a pickle."""

    reference: Any
    cls: type
    marks: tuple[Any, ...]


class Reads(pickle.Unpickler):
    """Reads a pickle without making what it is of."""

    def persistent_load(self, pid: Any) -> Any:
        return Id(pid[0], pid[1], pid[2:])


def to(obj: Any) -> dict[str, Any]:
    """Return what is added to the states of an object's parts, and which code of ours is named."""
    if isinstance(obj, tuple):
        return {str(i): to(each) for i, each in enumerate(obj)}
    body, _, (stream, *buffers), parts, _ = by_value.dump(obj)
    file = io.BytesIO(stream.tobytes())
    reader = Reads(file, buffers=map(np.ndarray.tobytes, buffers))
    root = reader.load()
    states: dict[str, Any] = {}
    marks = {root.marks} if isinstance(root, Id) else set()
    for _ in range(body["objects"]):
        pid, state = reader.load()
        marks.add(pid.marks)
        if isinstance(state, Custom):
            continue
        for key in state.keys() - attributes_of(parts()[pid.reference]).keys():
            kind = "list" if key == ITEMS else shape(state[key])  # of Keras's and users' own
            states.setdefault(key, []).extend([kind] if kind not in states.get(key, []) else [])
    file.seek(0)
    words = []
    while file.tell() < len(stream):
        words += [word for _, word, _ in pickletools.genops(file) if isinstance(word, str)]
    named = {pair for pair in pairwise(words) if pair[0].startswith("dask_keras_serialize")}
    return {
        "states": {key: sorted(kinds) for key, kinds in sorted(states.items())},
        "marks": sorted(map(list, marks)),
        "named": sorted(map(list, named)),
    }


def of_any_version(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what follows from the version of Keras that made the object."""
    if "states" not in found:
        return {key: of_any_version(each) for key, each in found.items()}
    states = {key: kinds for key, kinds in found["states"].items() if key not in BY_VERSION}
    return found | {"states": states}


def shape(value: Any) -> str:
    """Return what a value is made of."""
    if isinstance(value, Id):
        return "id"
    if isinstance(value, dict):
        kinds = {f"{shape(k)}: {shape(v)}" for k, v in value.items()}
        return f"{{{', '.join(sorted(kinds))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(shape, value))})"
    if isinstance(value, list):
        return f"[{', '.join(sorted(set(map(shape, value))))}]"
    return type(value).__name__
