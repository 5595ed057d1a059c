"""One object on its way in by value: its shells, and then what fills them.

See ``by_value`` for what this is part of.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from dask_keras_serialize.backends import Array
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.parts import Rebuilt
from dask_keras_serialize.rebuild import Values, check_fits, rebuilding
from dask_keras_serialize.shells import ShellUnpickler
from dask_keras_serialize.states import Custom, complete, fill


class Arrival:
    """One object on its way in; see :func:`dask_keras_serialize.by_value.load`."""

    def __init__(
        self,
        body: dict[str, Any],
        values: Values,
        extras: list[Array],
        links: Sequence[Rebuilt],
    ) -> None:
        self.values = values
        self.count = int(body["objects"])
        self.shells_first = bool(body["shells-first"])
        self.outside = int(body["outside"])
        writeable = body["writeable"]
        stream, *arrays = extras
        buffers = [
            _with_writeable(array, bool(flag))
            for array, flag in zip(arrays, writeable, strict=True)
        ]
        self.shells: dict[int, Any] = {}
        self.rows: list[int] = []
        self.unpickler = ShellUnpickler(
            self.shells, io.BytesIO(stream.data), buffers, values.backend, links
        )

    def begin(self) -> Any:
        """Return the object, its shell; nothing is in it yet."""
        loaded = self.unpickler.load()
        self.root = loaded[0] if self.shells_first else loaded
        # not the whole name: a class by value arrives without its __qualname__
        if type(self.root).__name__ != self.values.header.class_name.rpartition(".")[2]:
            owner = self.values.header.owner
            raise DecodeError(f"{owner}: the pickle holds a {type(self.root).__qualname__}")
        return self.root

    def finish(self, outside: Sequence[Any]) -> None:
        """Fill all shells; what another pickler carried is there now."""
        header = self.values.header
        if len(outside) != self.outside:
            raise DecodeError(
                f"{header.owner}: it shares {self.outside} objects with what it was pickled "
                f"with, and {len(outside)} are here: unpickle the whole"
            )
        self.unpickler.outside = outside
        with explained(header.owner):
            filled = []
            for _ in range(self.count):
                shell, state = self.unpickler.load()
                filled.append((shell, state))
                if not isinstance(state, Custom):
                    self._fill(*filled[-1])
            complete(filled, self.values.backend)
        if sorted(map(id, self.shells.values())) != sorted(id(shell) for shell, _ in filled):
            raise DecodeError(
                f"{header.owner}: the pickle is not whole: objects are missing or extra"
            )
        if sorted(self.rows) != list(range(len(header.variables))):
            raise DecodeError(f"{header.owner}: the table of variables is not the pickle's")

    def _fill(self, shell: Any, state: Any) -> None:
        row = state.pop("value", None) if isinstance(shell, keras.Variable) else None
        fill(shell, state)
        if row is not None:
            self.rows.append(row)
            check_fits(shell, row, self.values.header)
            shell._initialize(self.values.tensor(row))


def _with_writeable(array: Array, flag: bool) -> Array:
    """Return an array as writeable as it was; a copy if it must be and is not ours."""
    if flag and not array.flags.writeable:
        return array.copy()
    array.flags.writeable = flag
    return array


@contextmanager
def explained(owner: str) -> Iterator[None]:
    """Rebuild, and turn whatever that raises into an error that names the object."""
    with rebuilding():
        try:
            yield
        except DecodeError:
            raise
        except ModuleNotFoundError as error:
            raise DecodeError(
                f"{owner}: it holds code of module {error.name!r}, which is not installed "
                f"here: install it on every worker, or call cloudpickle."
                f"register_pickle_by_value({error.name}) before sending"
            ) from error
        except Exception as error:  # unpickling runs anybody's code
            raise DecodeError(f"{owner}: it cannot be rebuilt by value here: {error!r}") from error
