"""Keras models as first-class Dask values.

Installed, it works by itself: ``client.scatter(model)``, models as arguments and as
results, ``pickle``, ``copy.deepcopy``. Importing it registers as well, for processes
where the config turned that off. Loads neither Keras nor a backend.
"""

from dask_keras_serialize.errors import (
    BusyError,
    DecodeError,
    EncodeError,
    KerasSerializeError,
    MissingPackageError,
    PlacementError,
)
from dask_keras_serialize.header import package_version
from dask_keras_serialize.packed import PackedObject, Parcel
from dask_keras_serialize.registration import (
    imported_by_dask,
    register,
    registered,
    unregister,
)

__version__ = package_version()

__all__ = [
    "BusyError",
    "DecodeError",
    "EncodeError",
    "KerasSerializeError",
    "MissingPackageError",
    "PackedObject",
    "Parcel",
    "PlaceKeras",
    "PlacementError",
    "RegisterKeras",
    "WarmKeras",
    "inspect",
    "pack",
    "register",
    "registered",
    "unregister",
]


def __getattr__(name: str) -> object:
    # distributed and Keras, which a plain pickle and a scheduler do not need
    if name == "RegisterKeras":
        from dask_keras_serialize.plugin import RegisterKeras

        return RegisterKeras
    if name == "PlaceKeras":
        from dask_keras_serialize.placement import PlaceKeras

        return PlaceKeras
    if name == "WarmKeras":
        from dask_keras_serialize.warmup import WarmKeras

        return WarmKeras
    if name == "inspect":
        from dask_keras_serialize.inside import inspect

        return inspect
    if name == "pack":
        from dask_keras_serialize.pickling import pack

        return pack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not imported_by_dask():  # else the config decides, in registration.on_dask_import
    register()
