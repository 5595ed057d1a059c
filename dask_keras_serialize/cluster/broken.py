"""What a worker holds in place of an object that it cannot open, until a task uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dask_keras_serialize.cluster.whereabouts import read_by_worker
from dask_keras_serialize.errors import DecodeError


class BrokenObject:
    """What a worker holds in place of an object that it could not open.

    An exception while a worker reads a task would close its stream to the scheduler,
    and the next worker's, and theirs after; while it reads or sends a value, leave the
    task that needs it waiting forever. So the error waits here for the task that uses
    the model, and fails that task alone.

    For the scheduler this worker has the value then, and the active memory manager may drop it
    everywhere else. So it is kept as it was sent, closed, and sent on so.

    Parameters
    ----------
    error : DecodeError
    header : dict, optional
        As it was sent.
    frames : sequence of objects with the buffer protocol, or ``__cuda_array_interface__``
        Kept alive, never written to.
    """

    def __init__(
        self,
        error: DecodeError,
        header: dict[str, Any] | None = None,
        frames: Sequence[Any] = (),
    ) -> None:
        # its words alone: by its traceback and causes it would keep what was rebuilt of the object
        self._said = type(error), str(error)
        self._sent = header, tuple(frames)

    @property
    def _error(self) -> DecodeError:
        kind, words = self._said
        return kind(words)

    def __getattr__(self, name: str) -> Any:
        # what Python, Dask and notebooks ask of any object
        if name.startswith(("__", "_repr_", "_ipython_")):
            raise AttributeError(name)
        if read_by_worker():  # a bound method, got while the task that calls it is unpickled
            return BrokenObject(self._error)
        raise self._error

    def __sizeof__(self) -> int:
        buffers = (getattr(each, "nbytes", None) or len(each) for each in self._sent[1])
        return object.__sizeof__(self) + sum(buffers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise what opening the model raised."""
        raise self._error

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return broken, (self._error,)  # on a worker; who asks for it elsewhere is told

    def __repr__(self) -> str:
        return f"<BrokenObject: {self._error}>"

    def _raise(self, *args: Any) -> Any:
        raise self._error

    __str__ = __bool__ = __iter__ = __len__ = __getitem__ = __contains__ = _raise


def broken(
    error: DecodeError, header: dict[str, Any] | None = None, frames: Sequence[Any] = ()
) -> BrokenObject:
    """Return what a worker holds in place of an object; raise the error elsewhere."""
    if read_by_worker():
        return BrokenObject(error, header, frames)
    raise error


def serialize_broken(obj: BrokenObject) -> tuple[dict[str, Any], list[Any]]:
    """Serialize for Dask's family of serializers what could not be opened: as it was sent.

    Raises
    ------
    NotImplementedError
        If it is not known: pickle then takes the error.
    """
    header, frames = obj._sent
    if header is None:
        raise NotImplementedError("all that is known of it is its error")
    return header, list(frames)
