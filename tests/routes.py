"""The routes an object takes, by name, and what tells two of them apart to the bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import joblib
import keras
import numpy as np
from distributed import protocol

from dask_keras_serialize.private import CITIZENS
from tests.catalogue import Citizen


def out_of_band(obj: Any) -> Any:
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(stream, buffers=buffers)


def by_joblib(obj: Any) -> Any:
    file = io.BytesIO()
    joblib.dump(obj, file)
    file.seek(0)
    return joblib.load(file)


def by_dask(obj: Any) -> Any:
    header, frames = protocol.serialize(obj, on_error="raise")
    ours = isinstance(obj, tuple(CITIZENS))
    assert header["serializer"] == ("dask" if ours else "pickle")
    return protocol.deserialize(header, frames)


ROUTES: dict[str, Callable[[Any], Any]] = {
    "dask": by_dask,
    "pickle 5": out_of_band,
    "cloudpickle": lambda obj: cloudpickle.loads(cloudpickle.dumps(obj)),
    "deepcopy": copy.deepcopy,
    "joblib": by_joblib,
}


def make(citizen: Citizen) -> Any:
    keras.utils.set_random_seed(0)
    return citizen.make()


def use(citizen: Citizen, obj: Any) -> dict[str, Any]:
    """Use an object and say all that this gives, comparably."""
    keras.utils.set_random_seed(1)
    return dict(flat(citizen.use(obj), ""))


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield path, len(value)
        for i, part in enumerate(value):
            yield from flat(part, f"{path}[{i}]")
    elif isinstance(value, np.ndarray):
        content = value.tolist() if value.dtype == object else value.tobytes()
        yield path, (value.dtype.str, value.shape, content)
    else:
        yield path, (type(value).__name__, repr(value))
