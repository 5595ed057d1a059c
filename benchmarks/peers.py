"""Who is measured in one process: each peer dumps a value and loads it again.

A peer turns a model into a blob and a list of buffers, and those back into a model.
Between the two every buffer is copied to memory of its own, as a comm delivers it. What
the peers claim differs, and so what is compared: a peer that brings back the weights alone
fails with a model that has an optimizer.

Peers of one group share a process (``processes``), one model and its memory, so that
their ratios are of the same memory at the same time; groups keep apart what would get in
each other's way: scikeras and ray change pickle for a whole process.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tempfile
from typing import Any

import cases
import numpy as np
import values

OURS = "dask-keras-serialize"
OURS_FIRST = "dask-keras-serialize, first of its kind"
OURS_PICKLE = "pickle 5, out of band"
KERAS = "Keras's pickle"
SCIKERAS = "scikeras's pickle"
OLD = "distributed's old handler, repaired"
SAFETENSORS = "safetensors and config"
TORCH = "torch Module of the same bytes"
RAY = "ray, with this package"
RAY_KERAS = "ray, Keras's pickle"
CONFIG = "Keras's config alone"
ARRAYS = "numpy arrays"
MEMCPY = "memcpy"

Wire = tuple[Any, list[Any]]


class Peer:
    """One way to turn a model into bytes and back.

    Attributes
    ----------
    name : str
    registered : bool
        Whether this package is, while the peer is at work.
    room : float
        Memory it may need over the model, in models; a guess from above.
    only : tuple of str
        The workloads it is measured on, if not on all: it says the same of others as its
        likes do, and takes long.
    never : tuple of str
        The workloads it is not measured on, for like reasons.
    """

    name = OURS
    registered = True
    room = 2.0
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()

    def open(self) -> None:
        """Import and start what is needed, once in a process."""

    def close(self) -> None:
        """End what `open` started."""

    def source(self, model: Any) -> Any:
        """Return the value that is dumped for a model."""
        return model

    def dump(self, source: Any) -> Wire:
        """Turn the source into a blob and buffers; timed."""
        raise NotImplementedError

    def deliver(self, blob: Any, buffers: list[Any]) -> Wire:
        """Copy to fresh, writeable memory, allocated as distributed's TCP comm does."""
        from distributed.comm import tcp

        arrived = []
        for buffer in (blob, *buffers):
            arrived.append(tcp.host_array(memoryview(buffer).nbytes))
            arrived[-1][:] = memoryview(buffer).cast("B")
        return arrived[0], arrived[1:]

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        """Turn what was delivered into a value; timed."""
        raise NotImplementedError

    def equal(self, source: Any, got: Any) -> str:
        """Say what of the value came back; ValueError if that is not what is claimed."""
        return values.equal(source, got)

    def wire_bytes(self, blob: Any, buffers: list[Any]) -> int | None:
        """Count the bytes between dump and load."""
        return sum(memoryview(part).nbytes for part in (blob, *buffers))

    def views(self, source: Any) -> list[values.Array]:
        """List the arrays whose addresses tell what is copied."""
        return values.arrays(source)


class Dask(Peer):
    """Dask's own way to serialize a value, whoever handles it."""

    def dump(self, source: Any) -> Wire:
        import msgpack
        from distributed.protocol import serialize

        header, frames = serialize(source)
        return msgpack.packb(header, use_bin_type=True), list(frames)

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        import msgpack
        from distributed.protocol import deserialize

        return deserialize(msgpack.unpackb(blob, use_list=False, strict_map_key=False), buffers)


class Pickle(Peer):
    """Pickle, with buffers out of band where a value has any."""

    name = OURS_PICKLE

    def dump(self, source: Any) -> Wire:
        buffers: list[Any] = []
        blob = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
        return blob, [buffer.raw() for buffer in buffers]

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        return pickle.loads(blob, buffers=buffers)


class Keras(Peer):
    """Keras's own ``__reduce__``, with this package out of the way."""

    name = KERAS
    registered = False
    room = 8.0

    def dump(self, source: Any) -> Wire:
        return pickle.dumps(source, protocol=5), []

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        return pickle.loads(blob)


class Scikeras(Keras):
    """Scikeras's ``__reduce__``, which importing it puts in the place of Keras's."""

    name = SCIKERAS
    only = (cases.RESNET, cases.TINY)

    def open(self) -> None:
        import keras
        import scikeras  # noqa: F401 - importing it is what changes keras.Model

        if "scikeras" not in keras.Model.__reduce__.__module__:
            raise RuntimeError("keras.Model is not pickled by scikeras")


class Old(Dask):
    """distributed/protocol/keras.py, which fails since Keras 3, with its calls mended.

    It sends the config without what ``compile`` did, and what ``get_weights`` gives.
    """

    name = OLD
    never = (cases.DENSE, cases.DENSE_BIG)
    registered = False
    room = 4.0

    def dump(self, source: Any) -> Wire:
        import keras

        config = keras.saving.serialize_keras_object(source)
        config.pop("compile_config", None)
        blob, frames = super().dump(source.get_weights())
        return json.dumps([config, blob.hex()]).encode(), frames

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        import keras

        config, header = json.loads(bytes(blob))
        arrays = super().load(bytes.fromhex(header), buffers)
        model = keras.saving.deserialize_keras_object(config)
        model.set_weights(arrays)
        return model


class Safetensors(Peer):
    """Keras's config beside all variables in a safetensors blob, by hand."""

    name = SAFETENSORS
    registered = False
    room = 5.0

    def dump(self, source: Any) -> Wire:
        import keras
        from safetensors.numpy import save

        config = keras.saving.serialize_keras_object(source)
        variables = enumerate(values.variables(source))
        arrays = {str(i): np.asarray(each.numpy()) for i, each in variables}
        return json.dumps(config).encode(), [save(arrays)]

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        import keras
        from safetensors.numpy import load

        model = keras.saving.deserialize_keras_object(json.loads(bytes(blob)))
        arrays = load(bytes(buffers[0]))
        for i, variable in enumerate(values.variables(model)):
            variable.assign(arrays[str(i)])
        return model


class Torch(Dask):
    """A torch Module that holds a parameter for each variable, by Dask's handlers."""

    name = TORCH
    room = 3.0

    def source(self, model: Any) -> Any:
        import torch

        module = torch.nn.Module()
        for i, array in enumerate(values.arrays(model)):
            half = "bfloat16" in str(array.dtype)
            tensor = torch.from_numpy(np.array(array.view(np.int16) if half else array))
            tensor = tensor.view(torch.bfloat16) if half else tensor
            learns = tensor.dtype.is_floating_point
            module.register_parameter(f"p{i}", torch.nn.Parameter(tensor, requires_grad=learns))
        return module


class Ray(Peer):
    """``ray.put`` and ``ray.get``: into ray's store of shared memory, and out of it."""

    name = RAY
    room = 4.0
    only = (cases.RESNET, cases.BERT, cases.TINY, cases.DENSE)

    def open(self) -> None:
        import logging

        import psutil
        import ray

        if ray.is_initialized():
            return
        Ray.folder = tempfile.mkdtemp(prefix="ray-")
        store = min(6 << 30, psutil.virtual_memory().available // 3)
        with contextlib.redirect_stderr(io.StringIO()):
            ray.init(
                num_cpus=1,
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=Ray.folder,
            )

    def close(self) -> None:
        import ray

        if ray.is_initialized():
            ray.shutdown()
            shutil.rmtree(Ray.folder, ignore_errors=True)

    def dump(self, source: Any) -> Wire:
        import ray

        return ray.put(source), []

    def deliver(self, blob: Any, buffers: list[Any]) -> Wire:
        return blob, buffers  # ray has it

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        import ray

        return ray.get(blob)

    def wire_bytes(self, blob: Any, buffers: list[Any]) -> None:
        return None


class RayKeras(Ray):
    name = RAY_KERAS
    registered = False
    room = 8.0
    only = (cases.RESNET,)


class Ours(Dask):
    """Dask's family of serializers: what scatter, gather and spill call."""


class OursFirst(Ours):
    """The same, where the process has not seen the architecture before (``templates.py``)."""

    name = OURS_FIRST
    only = (cases.RESNET, cases.RESNET_ADAM, cases.EFFICIENTNET, cases.LAYERS, cases.DENSE)

    def load(self, blob: Any, buffers: list[Any]) -> Any:
        from dask_keras_serialize.configs import templates

        with templates.forgotten():
            return super().load(blob, buffers)
