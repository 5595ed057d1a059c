"""The closed parcel: a packed model that nobody has to open.

Loads neither Keras nor a backend. It pickles again to the bytes it came from,
untouched, so a scheduler passes it on without knowing what is in it; whoever needs
the model opens it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_keras_serialize.errors import MissingPackageError
from dask_keras_serialize.frames import Frame, as_frames
from dask_keras_serialize.header import FORMAT, Header

if TYPE_CHECKING:
    import keras


class PackedModel:
    """A model as its header and frames.

    Parameters
    ----------
    header : bytes
        As :meth:`Header.to_bytes` writes it.
    buffers : sequence of objects with the buffer protocol
        The frames; kept alive, never written to, not copied.

    Raises
    ------
    DecodeError
        If the header is not one this version reads.
    """

    def __init__(self, header: bytes, buffers: Sequence[object]) -> None:
        self.header = Header.from_bytes(header)
        self.frames: list[Frame] = as_frames(buffers, self.header.owner)
        self._packed_header = header

    @property
    def nbytes(self) -> int:
        """Bytes of header and frames."""
        return len(self._packed_header) + sum(frame.nbytes for frame in self.frames)

    def open(self) -> keras.Model:
        """Rebuild the model; imports Keras. Each call makes a new one.

        Raises
        ------
        DecodeError
            If it cannot be rebuilt here.
        """
        from dask_keras_serialize.protocol import decode

        return decode(self.header, self.frames)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # arrays, not bytes: pickle 5 takes them out of band, joblib maps them
        arrays = [np.frombuffer(frame, np.uint8) for frame in self.frames]
        return unpack, (self._packed_header, *arrays)

    def __sizeof__(self) -> int:
        return self.nbytes

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return FORMAT, self._packed_header, [np.frombuffer(f, np.uint8) for f in self.frames]

    def __repr__(self) -> str:
        return (
            f"<PackedModel {self.header.name!r} ({self.header.class_name}), "
            f"{len(self.header.variables)} variables, {self.nbytes} bytes>"
        )


def unpack(header: bytes, *buffers: object) -> keras.Model | PackedModel:
    """Unpickle a model; on a scheduler that receives a graph, keep it closed.

    Parameters
    ----------
    header : bytes
    *buffers : objects with the buffer protocol

    Returns
    -------
    keras.Model, or PackedModel on a scheduler

    Raises
    ------
    DecodeError
        If it cannot be rebuilt here.
    MissingPackageError
        On a scheduler, if a worker lacks this package.
    """
    packed = PackedModel(header, buffers)
    scheduler = _receiving_scheduler()
    if scheduler is None:
        return packed.open()
    _require_package(scheduler, packed.header.owner)
    return packed


def _receiving_scheduler() -> Any:
    """Return the scheduler that is unpickling a graph on this thread, or None.

    In a LocalCluster client and scheduler share a process, so what tells them apart
    is who calls: ``Scheduler.update_graph`` (``distributed/scheduler.py``) unpickles
    graphs itself, in its coroutine.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name == "update_graph"
            and frame.f_globals.get("__name__") == "distributed.scheduler"
        ):
            return frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _require_package(scheduler: Any, owner: str) -> None:
    """Refuse a graph that workers could not unpickle: they would drop the connection."""
    if FORMAT in scheduler.worker_plugins:  # checked and registered on every worker
        return
    without = [ws.address for ws in scheduler.workers.values() if FORMAT not in ws.extra]
    if without:
        raise MissingPackageError(
            f"{owner} cannot be sent: the package {FORMAT} is not installed on "
            f"{len(without)} of {len(scheduler.workers)} workers ({', '.join(without[:3])}): "
            f"pip install {FORMAT} there and restart them"
        )
