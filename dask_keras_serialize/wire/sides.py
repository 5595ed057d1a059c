"""Both sides' versions, at the end of an error, for who may not have Keras; and that it is missing.

Where Keras and its backend are there, :func:`dask_keras_serialize.configs.skew.named` says which
differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import islice

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.header import FORMAT, Header, package_version, python_version


def named(header: Header) -> str:
    """Name the versions of who sent an object, and those of this process, without its backend's."""
    sent = ", ".join(
        f"{what:.40} {version:.40}" for what, version in islice(header.versions.items(), 6)
    )
    here = f"python {python_version()}, {_keras()}, {FORMAT} {package_version()}"
    return f"it was sent by {sent or 'unknown versions'}, this is {here}"


@contextmanager
def importing_keras(header: Header) -> Iterator[None]:
    """Turn what importing Keras and its backend raises into an error that names the model."""
    try:
        yield
    except Exception as error:  # ImportError; ValueError for a backend that Keras does not know
        raise DecodeError(
            f"{header.owner}: Keras and its backend {header.backend!r} are needed to open it "
            f"and cannot be imported here ({error}): install them, as with pip install "
            f"{FORMAT}[{header.backend}], and set KERAS_BACKEND; {named(header)}"
        ) from error


def _keras() -> str:
    """Name the version of Keras that is loaded here, else of the one that is installed."""
    loaded = getattr(sys.modules.get("keras"), "version", None)
    try:
        return f"keras {loaded() if callable(loaded) else metadata.version('keras')}"
    except metadata.PackageNotFoundError:
        return "no keras"
