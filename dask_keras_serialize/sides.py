"""Both sides' versions, at the end of an error, for who may not have Keras.

Where Keras and its backend are there, :func:`dask_keras_serialize.skew.named` says which differ.
"""

from __future__ import annotations

import sys
from importlib import metadata
from itertools import islice

from dask_keras_serialize.header import FORMAT, Header, package_version, python_version


def named(header: Header) -> str:
    """Name the versions of who sent an object, and those of this process, without its backend's."""
    sent = ", ".join(
        f"{what:.40} {version:.40}" for what, version in islice(header.versions.items(), 6)
    )
    here = f"python {python_version()}, {_keras()}, {FORMAT} {package_version()}"
    return f"it was sent by {sent or 'unknown versions'}, this is {here}"


def _keras() -> str:
    """Name the version of Keras that is loaded here, else of the one that is installed."""
    loaded = getattr(sys.modules.get("keras"), "version", None)
    try:
        return f"keras {loaded() if callable(loaded) else metadata.version('keras')}"
    except metadata.PackageNotFoundError:
        return "no keras"
