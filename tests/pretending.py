"""A GPU to pretend: memory of the host that an adapter takes for a GPU's."""

from __future__ import annotations

import ctypes
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from dask_keras_serialize import backends
from dask_keras_serialize.wire import cuda

NAME, BACKEND = backends.current()
ADAPTER: Any = BACKEND


def variables_go_to_a_gpu(patch: pytest.MonkeyPatch, *, copies: bool = True) -> None:
    """Let the adapter believe that Keras puts new variables on a GPU.

    TensorFlow then copies nothing from the host to the host, unless ``copies``: what is made of
    memory that is not aligned must not be computed with.
    """
    if NAME == "torch":
        import torch

        patch.setattr(ADAPTER, "_device", lambda: torch.device("cpu"))
        patch.setattr(ADAPTER, "_takes_frames", lambda: True)
        patch.setattr(ADAPTER, "_adopted", _adopted)
    else:
        patch.setattr(ADAPTER, "_is_gpu", lambda device: True)
    if NAME == "tensorflow":
        patch.setattr(ADAPTER, "_device", lambda: "/job:localhost/replica:0/task:0/device:CPU:0")
        if copies:
            patch.setattr(ADAPTER, "_to", _copied)
    patch.setattr(cuda, "DEVICE_TYPE", 1)  # kDLCPU


def variables_lie_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Let the adapter believe that all variables do."""
    patch.setattr(ADAPTER, "on_gpu", lambda variable: True)
    patch.setattr(cuda, "DEVICE_TYPE", 1)


def _copied(device: str, tensor: Any) -> Any:
    import tensorflow as tf

    return tf.constant(tensor.numpy())


class _Host:
    def __init__(self, frame: Any) -> None:
        self.frame = frame
        interface = dict(frame.__cuda_array_interface__)
        assert not interface["data"][1], "torch takes no read-only memory of a GPU"
        del interface["stream"]
        self.__array_interface__ = interface


def _adopted(frame: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(_Host(frame)))


class Received:
    """What a comm receives into, as rmm's buffers: a GPU's memory that can be fetched."""

    def __init__(self, frame: Any, *, readonly: bool = False) -> None:
        address, nbytes = frame.address, frame.nbytes
        self.memory = np.empty(nbytes + 64, np.uint8)
        self.memory = self.memory[-self.memory.ctypes.data % 64 :][:nbytes]
        ctypes.memmove(self.memory.ctypes.data, address, nbytes)
        self.nbytes = nbytes
        self.fetched = 0
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": (1,),
            "data": (self.memory.ctypes.data, readonly),
        }

    def copy_to_host(self) -> Any:
        self.fetched += 1
        return self.memory.copy()


@contextmanager
def counting_host_bytes() -> Iterator[list[int]]:
    """Put into a list the most bytes that NumPy and Python had allocated at a time meanwhile."""
    counted: list[int] = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield counted
        counted.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
