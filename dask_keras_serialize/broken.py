"""What a worker holds in place of an object that it cannot open, until a task uses it."""

from __future__ import annotations

from typing import Any

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.whereabouts import read_by_worker


class BrokenObject:
    """What a worker holds in place of an object that it could not open.

    An exception while a worker reads a task would close its stream to the scheduler,
    and the next worker's, and theirs after; while it reads or sends a value, leave the
    task that needs it waiting forever. So the error waits here for the task that uses
    the model, and fails that task alone.
    """

    def __init__(self, error: DecodeError) -> None:
        # its words alone: by its traceback and causes it would keep the message's buffers, and
        # what was rebuilt of the object
        self._said = type(error), str(error)

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


def broken(error: DecodeError) -> BrokenObject:
    """Return what a worker holds in place of an object; raise the error elsewhere."""
    if read_by_worker():
        return BrokenObject(error)
    raise error
