"""The limits that peers are held against, and who shares a process with whom.

Nobody who uses configs is faster than Keras's walk of the config alone, nobody who uses
Dask than the same bytes as numpy arrays, nobody who copies than memcpy. They stand in one
process with what is ours, in turn with it, so that these ratios are of the same moment.
"""

from __future__ import annotations

import json
from typing import Any

import cases
import numpy as np
import peers
import values


class Config(peers.Peer):
    """``serialize_keras_object`` and its counterpart: what whoever uses configs has to do."""

    name = peers.CONFIG
    # the big one is of one layer too, but drawing its initial numbers leaves TensorFlow's
    # oneDNN allocator with memory for three of it, which no other peer can have
    never = (cases.DENSE_BIG,)

    def dump(self, source: Any) -> peers.Wire:
        import keras

        return keras.saving.serialize_keras_object(source), []

    def deliver(self, blob: Any, buffers: list[Any]) -> peers.Wire:
        return json.loads(json.dumps(blob)), buffers  # it empties the dict it is given

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        import keras

        return keras.saving.deserialize_keras_object(blob)

    def equal(self, source: Any, got: Any) -> str:
        import keras

        one, two = (json.dumps(keras.saving.serialize_keras_object(m)) for m in (source, got))
        if one != two:
            raise ValueError("another config came back")
        return "config"

    def wire_bytes(self, blob: Any, buffers: list[Any]) -> int:
        return len(json.dumps(blob))

    def views(self, source: Any) -> list[values.Array]:
        return []


class Arrays(peers.Dask):
    """The same bytes as a list of numpy arrays: the limit of whoever uses Dask."""

    name = peers.ARRAYS

    def source(self, model: Any) -> Any:
        return values.weights(model)


class Memcpy(peers.Peer):
    """Copy the same bytes once each way: the limit of whoever has to copy."""

    name = peers.MEMCPY
    room = 2.0

    def source(self, model: Any) -> Any:
        self.likes = [(each.dtype, each.shape) for each in values.arrays(model)]
        return values.arrays(model)

    def dump(self, source: Any) -> peers.Wire:
        return b"", [np.array(each).reshape(-1).view(np.uint8) for each in source]

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        return [
            np.array(buffer, np.uint8).view(dtype).reshape(shape)
            for buffer, (dtype, shape) in zip(buffers, self.likes, strict=True)
        ]


#: Those that share a process, in the order of the tables.
GROUPS: dict[str, tuple[type[peers.Peer], ...]] = {
    "ours": (peers.Ours, peers.OursFirst, peers.Pickle, Config, Arrays, Memcpy),
    "keras": (peers.Keras, peers.Old, peers.Safetensors),
    "scikeras": (peers.Scikeras,),
    "others": (peers.Torch, peers.Ray, peers.RayKeras),
}

#: Those that are measured on backends beside the first too.
FEWER = (peers.OURS, peers.OURS_FIRST, peers.CONFIG, peers.KERAS)


def chosen(group: str, workload: str, first: bool) -> list[str]:
    """Name the peers of a group that are measured on a workload, by a first backend or not."""
    return [
        peer.name
        for peer in GROUPS[group]
        if (not peer.only or workload in peer.only) and workload not in peer.never
        if first or peer.name in FEWER
    ]
