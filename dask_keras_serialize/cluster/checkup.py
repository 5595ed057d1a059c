"""What one process of a cluster says of itself, as plain values: runs there, asked by ``doctor``.

Two ways to ask. :data:`GLANCE` is text, the same to every version of Python, that imports nothing:
for any process, and above all those without this package, or with it unregistered, which
importing it would change. :func:`worker` and :func:`scheduler` are functions of this module, by
reference, for those that the first found registered. Only workers load Keras for it.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from distributed import protocol
from distributed.diagnostics import nvml

from dask_keras_serialize import backends, devices, placement
from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.errors import one_line

Facts = dict[str, Any]

#: For ``eval``: versions of what is loaded, and whether the package is registered.
GLANCE = """{
    "python": __import__("platform").python_version(),
    "dask": __import__("dask").__version__,
    "distributed": __import__("distributed").__version__,
    **(lambda ours, header: {
        "package": header.package_version() if header else None,
        "registered": ours.registered() if ours else None,
    })(*map(__import__("sys").modules.get, (
        "dask_keras_serialize.registration", "dask_keras_serialize.wire.header"
    ))),
}"""


async def worker() -> Facts:
    """Look at a worker's process, on another thread: loading Keras takes long.

    Returns
    -------
    dict
        See :func:`look`.
    """
    return await asyncio.to_thread(look)


def scheduler() -> Facts:
    """Look at a scheduler's process, which has no need of Keras.

    Returns
    -------
    dict
        ``keras``, its version or None, and ``keras-loaded``; it is not loaded for that.
    """
    return {"keras": _version("keras"), "keras-loaded": "keras" in sys.modules}


def look() -> Facts:
    """Look at this process, and start Keras's backend and its devices.

    Returns
    -------
    dict
        ``keras``, ``keras-loaded``, ``backend``, ``backend-version``, ``handlers`` (by the slot
        that is not ours, the full name of the function in it), ``devices`` in words, ``threads``
        of a computation (None for all cores), names of the ``gpus`` in use, how their ``memory``
        is taken, and ``idle-gpus``, how many the driver has that Keras finds none of, though it
        may; ``keras-error`` where Keras cannot be loaded. And where it runs: ``host``, ``pid``,
        ``cores``, how many it may use, ``affinity``, which (a mask, in hexadecimal digits; None
        where the system does not say), ``visible-gpus``, what ``CUDA_VISIBLE_DEVICES`` is.
    """
    facts: Facts = {"keras": _version("keras"), **_place()}
    try:
        import keras

        name, backend = backends.current()
        facts |= {"backend": name, "backend-version": backend.version()}
        facts |= {"devices": devices.describe(), "handlers": _taken(keras)}
        here = devices.current()
        facts |= {"threads": here.threads(), "gpus": here.gpus()}
        if facts["gpus"]:
            facts["memory"] = here.memory()
        elif not placement.forbids_gpus():
            facts["idle-gpus"] = nvml.device_get_count()  # 0 without NVML's Python package
    except Exception as error:  # whatever importing a backend raises
        facts["keras-error"] = one_line(error)
    return facts | {"keras-loaded": "keras" in sys.modules}


def _place() -> Facts:
    """Say where this process runs, and what of the machine it may use."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "cores": len(cores) if cores else os.cpu_count() or 1,
        "affinity": f"{sum(1 << core for core in cores):x}" if cores else None,
        "visible-gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def give_back(model: Any) -> Any:
    """Return what a worker was sent; the task of a round trip.

    Raises
    ------
    DecodeError
        If the worker could not open it.
    """
    if isinstance(model, BrokenObject):
        model()
    return model


def _taken(keras: Any) -> dict[str, str]:
    """Name the functions that stand in our slots, if they are not ours, as Dask would find them."""
    from dask_keras_serialize.pickling import reduce_object

    found: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    for cls in (keras.Model, keras.Sequential):
        found |= {
            f"dask_serialize of {cls.__name__}": (
                protocol.dask_serialize.dispatch(cls),
                serialize_keras,
            ),
            f"dask_deserialize of {cls.__name__}": (
                protocol.dask_deserialize.dispatch(cls),
                deserialize_keras,
            ),
            f"{cls.__name__}.__reduce_ex__": (cls.__reduce_ex__, reduce_object),
        }
    return {
        slot: f"{there.__module__}.{there.__qualname__}"
        for slot, (there, ours) in found.items()
        if there is not ours
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
