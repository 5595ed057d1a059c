"""Configs of a newer Keras, which name arguments that the one here does not take yet.

Keras's classes gain arguments, whose defaults mean what was so before, and a config holds them all:
3.15's Dense has a ``quantization_config``, always, which 3.11's refuses. None is left out, and the
defaults in :data:`SINCE_OLDEST`; any other value may mean something that this Keras cannot do, even
False, and is refused by it.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import keras

from dask_keras_serialize import backends
from dask_keras_serialize.wire.header import FORMAT, Header, minor, package_version, python_version

#: Arguments that Keras's classes gained after ``backends.OLDEST_KERAS``, whose default, not None,
#: is what was so before. Not those of Muon, which computes otherwise since.
SINCE_OLDEST: dict[str, dict[str, Any]] = {
    "BatchNormalization": {"renorm": False, "renorm_momentum": 0.99},
    "GroupQueryAttention": {"use_gate": False},
    "MultiHeadAttention": {"use_gate": False},
    "IntegerLookup": {"oov_method": "floormod"},
    "StringLookup": {"oov_method": "floormod"},
}


def is_newer(header: Header) -> bool:
    """Say whether an object was sent by a newer minor version of Keras than is here."""
    try:
        theirs, here = (
            tuple(map(int, minor(version)))
            for version in (header.versions.get("keras", ""), keras.version())
        )
    except ValueError:  # it says none
        return False
    return theirs > here


def versions() -> dict[str, str]:
    """Return this process's versions of what a header names: Python, Keras, backend, package."""
    name, backend = backends.current()
    return {
        "python": python_version(),
        "keras": keras.version(),
        name: backend.version(),
        FORMAT: package_version(),
    }


def named(header: Header) -> str:
    """Name both sides' versions of all that differs, and the way out, as the end of an error."""
    here = versions()
    theirs = {what: header.versions.get(what, "of no version") for what in here}
    if header.backend in backends.NAMES and header.backend != keras.backend.backend():
        del here[keras.backend.backend()]
    differ = [what for what, version in here.items() if theirs[what] != version]
    if not differ:
        both = ", ".join(f"{what} {version}" for what, version in here.items())
        return f"both sides run {both}: report it with the model's config"
    sent = ", ".join(f"{what} {theirs[what]:.40}" for what in differ)
    found = ", ".join(f"{what} {here[what]}" for what in differ)
    return f"it was sent by {sent}, this is {found}: use the same on both sides"


def leave_out_unused(cls: type, config: dict[str, Any]) -> None:
    """Take out of a class's config the arguments that it does not take and that do nothing."""
    taken, defaults = _arguments(cls), SINCE_OLDEST.get(cls.__name__, {})
    for key in config.keys() - taken:
        if config[key] is None or (key in defaults and config[key] == defaults[key]):
            del config[key]


@functools.lru_cache(1024)
def _arguments(cls: type) -> frozenset[str]:
    """List what a class and its bases take by name."""
    return frozenset(
        name
        for base in cls.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    )


def in_short(error: Exception) -> str:
    """Say in one line what Keras said of a config, but not the config, which it repeats."""
    last = str(error).rpartition("Exception encountered: ")[2]
    text = re.sub(r"\s+", " ", last).strip()
    return f"{type(error).__name__}: {text[:400]}"
