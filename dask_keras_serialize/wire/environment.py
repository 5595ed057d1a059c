"""Whether what was sent can be read by the Python, Keras and backend of this process.

By config an object goes from any to any; by value it needs the same minor versions of Python and
Keras, and the same backend where its code is bound to one.
"""

from __future__ import annotations

import keras
from dask import config

from dask_keras_serialize import backends
from dask_keras_serialize.errors import DecodeError, KerasSerializeError
from dask_keras_serialize.wire import sides
from dask_keras_serialize.wire.header import FORMAT, Header, minor, python_version


def check(header: Header) -> None:
    """Raise if an object cannot be read here, whatever is in its frames.

    Parameters
    ----------
    header : Header

    Raises
    ------
    DecodeError
        Names both sides' versions of all that has to be the same and is not.
    """
    try:
        here, _ = backends.current()
    except KerasSerializeError as error:
        raise DecodeError(f"{header.owner}: {error}; {sides.named(header)}") from None
    if header.backend not in backends.NAMES:
        raise DecodeError(f"{header.owner}: sent from an unknown backend {header.backend!r}")
    if header.encoding == "config":
        return
    if config.get(f"{FORMAT}.by-value", True) is not True:  # "no" is no True either
        code = ", ".join(name for name, _ in header.code) or "none"
        raise DecodeError(
            f"{header.owner}: it travels by value, which runs pickle, and the setting "
            f"{FORMAT}.by-value forbids that here; code of its own that it names: {code}"
        )
    if header.backend != here:
        _check_unbound(header, here)
    ours = {"python": python_version(), "keras": keras.version()}
    theirs = {what: header.versions.get(what, "of an unknown version") for what in ours}
    differ = [what for what in ours if minor(theirs[what]) != minor(ours[what])]
    if differ:
        sent = " and ".join(f"{what} {theirs[what]:.40}" for what in differ)
        found = " and ".join(f"{what} {ours[what]}" for what in differ)
        raise DecodeError(
            f"{header.owner}: sent by value from {sent}, which {found} here cannot read: use the "
            f"same minor version{'s' * (len(differ) > 1)} on both sides"
        )


def _check_unbound(header: Header, here: str) -> None:
    """Raise DecodeError if an object's code is bound to the backend that it comes from."""
    try:
        bound = [(str(owner), str(code)) for owner, code in header.body.get("bound", ())]
    except (TypeError, ValueError) as error:
        raise DecodeError(f"{header.owner}: malformed header: {error!r}; send it again") from None
    for part, code in bound[:1]:
        whose = "it" if part == header.owner else f"its {part}"
        raise DecodeError(
            f"{header.owner}: {whose} is bound to the backend {header.backend!r} by {code}, but "
            f"Keras runs on {here!r} in this process: write that with keras.ops, or set "
            f"KERAS_BACKEND to {header.backend!r} here"
        )
