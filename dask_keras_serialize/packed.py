"""The closed parcel: a packed model that nobody has to open.

Loads neither Keras nor a backend. It pickles again to the bytes it came from,
untouched, so a scheduler passes it on without knowing what is in it; whoever needs
the model opens it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_keras_serialize.errors import DecodeError, MissingPackageError
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
        with importing_keras(self.header):
            from dask_keras_serialize.protocol import decode

        return decode(self.header, self.frames)

    def __getattr__(self, name: str) -> PackedAttribute:
        if name.startswith("__"):  # what Python and Dask ask of any object
            raise AttributeError(name)
        return PackedAttribute(self, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # arrays, not bytes: pickle 5 takes them out of band, joblib maps them
        arrays = [np.frombuffer(frame, np.uint8) for frame in self.frames]
        return unpack, (self._packed_header, *arrays)

    def __sizeof__(self) -> int:
        return self.nbytes

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        from dask.tokenize import normalize_token

        # normalised here: Dask takes what it is given by its str(), which numpy shortens
        arrays = [np.frombuffer(frame, np.uint8) for frame in self.frames]
        return FORMAT, normalize_token([self._packed_header, *arrays])

    def __repr__(self) -> str:
        return (
            f"<PackedModel {self.header.name!r} ({self.header.class_name}), "
            f"{len(self.header.variables)} variables, {self.nbytes} bytes>"
        )


class PackedAttribute:
    """An attribute of a closed model, such as its method ``predict``; as closed.

    A bound method pickles as ``getattr(model, name)``, which a scheduler runs when it
    unpickles a graph.
    """

    def __init__(self, packed: PackedModel, name: str) -> None:
        self._packed = packed
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Open the model and call its method."""
        return getattr(self._packed.open(), self._name)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._packed, self._name)

    def __repr__(self) -> str:
        return f"<{self._name} of {self._packed!r}>"


@contextmanager
def importing_keras(header: Header) -> Iterator[None]:
    """Turn what importing Keras and its backend raises into an error that names the model."""
    try:
        yield
    except Exception as error:  # ImportError; ValueError for a backend that Keras does not know
        raise DecodeError(
            f"{header.owner}: Keras and its backend {header.backend!r} are needed to open it "
            f"and cannot be imported here ({error}): install them, as with pip install "
            f"{FORMAT}[{header.backend}], and set KERAS_BACKEND"
        ) from error


class BrokenModel:
    """What a worker holds in place of a model that it could not open.

    An exception while a worker reads a task would close its stream to the scheduler,
    and the next worker's, and theirs after; while it reads or sends a value, leave the
    task that needs it waiting forever. So the error waits here for the task that uses
    the model, and fails that task alone.
    """

    def __init__(self, error: DecodeError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and Dask ask of any object
            raise AttributeError(name)
        raise self._error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise what opening the model raised."""
        raise self._error

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return BrokenModel, (self._error,)  # as broken where it goes next

    def __repr__(self) -> str:
        return f"<BrokenModel: {self._error}>"

    def _raise(self, *args: Any) -> Any:
        raise self._error

    __str__ = __bool__ = __iter__ = __len__ = __getitem__ = __contains__ = _raise


def unpack(header: bytes, *buffers: object) -> keras.Model | PackedModel | BrokenModel:
    """Unpickle a model; on a scheduler that receives a graph, keep it closed.

    Parameters
    ----------
    header : bytes
    *buffers : objects with the buffer protocol

    Returns
    -------
    keras.Model
        Or, on a scheduler, PackedModel; or, on a worker where it cannot be opened,
        BrokenModel.

    Raises
    ------
    DecodeError
        If it cannot be rebuilt here.
    MissingPackageError
        On a scheduler, if a worker lacks this package.
    """
    scheduler = (_caller("distributed.scheduler", "update_graph") or {}).get("self")
    try:
        packed = PackedModel(header, buffers)
        # threads of one process hand tasks on as they are: nobody unpickles them again
        if scheduler is None or scheduler.address.startswith("inproc://"):
            return packed.open()
    except DecodeError as error:
        return broken(error)
    _require_package(scheduler)
    return packed


def broken(error: DecodeError) -> BrokenModel:
    """Return what a worker holds in place of a model; raise the error elsewhere."""
    if _read_by_worker():
        return BrokenModel(error)
    raise error


def _caller(module: str, function: str) -> dict[str, Any] | None:
    """Return the local variables of a function if it is what calls us on this thread.

    In a LocalCluster client and scheduler share a process, so what tells them apart
    is who calls: ``Scheduler.update_graph`` (``distributed/scheduler.py``) unpickles
    graphs itself, in its coroutine.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return frame.f_locals
        frame = frame.f_back
    return None


def _read_by_worker() -> bool:
    """Say whether a worker's comm is what unpickles (``distributed/comm/utils.py``)."""
    worker = sys.modules.get("distributed.worker")
    if worker is None or not worker.Worker._instances:
        return False
    return _caller("distributed.comm.utils", "_from_frames") is not None


def _require_package(scheduler: Any) -> None:
    """Refuse a graph that workers could not unpickle: they would drop the connection."""
    without = [ws.address for ws in scheduler.workers.values() if FORMAT not in ws.extra]
    if without:
        raise MissingPackageError.on_workers(without, len(scheduler.workers))
