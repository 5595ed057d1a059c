"""Pickle that takes Keras's objects for shells: empty at first sight, filled later.

A *shell* is an instance made by ``cls.__new__`` alone. In a pickle it is a persistent
id, ``(number, class)``; what fills it is somebody else's business (``by_value``).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle

from dask_keras_serialize import private
from dask_keras_serialize.backends import Backend
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.private import SHELLS

_PLAIN = (str, int, float, bytes, type(None))


class ShellPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickle by cloudpickle's rules, Keras's objects left out.

    Parameters
    ----------
    file : file
    buffers : list of pickle.PickleBuffer
        Collects what goes out of band.
    backend : Backend
    number : callable
        Takes one of Keras's objects and returns its number.
    for_token : bool
        Make the bytes the same in every process, at the price that nobody can load
        them: strings that are equal but not the same object, the order of sets and
        cloudpickle's random ids of classes would differ.
    """

    def __init__(
        self,
        file: io.BytesIO,
        buffers: list[pickle.PickleBuffer],
        backend: Backend,
        number: Callable[[Any], int],
        for_token: bool,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        self._backend = backend
        self._number = number
        self._for_token = for_token
        self._shells = SHELLS + backend.SHELLS

    def persistent_id(self, obj: Any) -> tuple[int, type] | bytes | None:
        """Name a shell by its number; for tokens, strings and sets by what is in them."""
        if isinstance(obj, self._shells):
            return self._number(obj), type(obj)
        if self._for_token:
            if type(obj) is str:
                return obj.encode(errors="surrogatepass")
            if isinstance(obj, (set, frozenset)) and all(isinstance(each, _PLAIN) for each in obj):
                return repr(sorted(map(repr, obj))).encode(errors="surrogatepass")
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what pickle cannot take, and by cloudpickle's rules what it should not."""
        if isinstance(obj, private.TRACKED):
            return private.reduce_tracked(obj)
        if type(obj) is private.DynamicBackend:
            return private.reduce_backend(obj)
        reduced = self._backend.reduce(obj)
        if reduced is not None:
            return reduced
        reduced = super().reducer_override(obj)
        if self._for_token and isinstance(obj, type) and isinstance(reduced, tuple):
            function, arguments, *rest = reduced
            name = f"{obj.__module__}.{obj.__qualname__}"
            tracker = getattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", {})
            known = tracker.get(obj)
            arguments = tuple(name if known and a == known else a for a in arguments)
            return (function, arguments, *rest)
        return reduced


class ShellUnpickler(pickle.Unpickler):
    """Unpickle, making a shell for each persistent id.

    Parameters
    ----------
    shells : dict of int to object
        Gains every shell by its number.
    file : file
    buffers : sequence of buffers
    backend : Backend
    """

    def __init__(
        self,
        shells: dict[int, Any],
        file: io.BytesIO,
        buffers: Sequence[Any],
        backend: Backend,
    ) -> None:
        super().__init__(file, buffers=buffers)
        self._shells = shells
        self._backend = backend

    def persistent_load(self, pid: tuple[int, type]) -> Any:
        """Return the shell of a number, made at first sight; DecodeError if no such class."""
        number, cls = pid
        shell = self._shells.get(number)
        if shell is None and cls in self._backend.SHELLS:
            shell = self._shells[number] = self._backend.shell(cls)
        elif shell is None:
            if not issubclass(cls, SHELLS):
                raise DecodeError(f"{cls.__qualname__} is not a Keras class")
            # Keras's own __new__, which wraps build(), takes no arguments; a user's might
            new = next(
                vars(base)["__new__"]
                for base in cls.__mro__
                if "__new__" in vars(base) and not _foreign(base)
            )
            shell = self._shells[number] = new(cls)
        return shell


def own_method(cls: type, name: str) -> bool:
    """Say whether a class outside Keras and the backends defines a method."""
    return next((_foreign(base) for base in cls.__mro__ if name in vars(base)), False)


def _foreign(cls: type) -> bool:
    root = cls.__module__.partition(".")[0]
    return root not in ("keras", "tensorflow", "torch", "jax", "flax", "builtins")
