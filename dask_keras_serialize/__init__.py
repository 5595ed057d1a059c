"""Keras models as first-class Dask values.

Installed, it works by itself: ``client.scatter(model)``, models as arguments and as
results, ``pickle``, ``copy.deepcopy``. Importing it registers as well, for processes
where the config turned that off. Loads neither Keras nor a backend.
"""

from importlib import import_module

from dask_keras_serialize.errors import (
    BusyError,
    DecodeError,
    EncodeError,
    KerasSerializeError,
    MissingPackageError,
    PlacementError,
)
from dask_keras_serialize.packed import PackedObject, Parcel
from dask_keras_serialize.registration import (
    imported_by_dask,
    register,
    registered,
    unregister,
)
from dask_keras_serialize.wire.header import package_version

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
    "Snapshot",
    "WarmKeras",
    "adaptive_search",
    "fit_rounds",
    "inspect",
    "pack",
    "predict",
    "register",
    "registered",
    "unregister",
]


#: Where what needs distributed or Keras is, which a plain pickle and a scheduler do not.
_LATE = {
    "PlaceKeras": "dask_keras_serialize.placement",
    "RegisterKeras": "dask_keras_serialize.cluster.plugin",
    "Snapshot": "dask_keras_serialize.workflows.replicas",
    "WarmKeras": "dask_keras_serialize.cluster.warmup",
    "adaptive_search": "dask_keras_serialize.workflows.searching",
    "fit_rounds": "dask_keras_serialize.workflows.averaging",
    "inspect": "dask_keras_serialize.inside",
    "pack": "dask_keras_serialize.pickling",
    "predict": "dask_keras_serialize.workflows.inference",
}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "pack":
        import_module("keras")  # whose import installs `pickling`, which must be whole by then
    return getattr(import_module(_LATE[name]), name)


if not imported_by_dask():  # else the config decides, in registration.on_dask_import
    register()
