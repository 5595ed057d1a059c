"""One object on its way out by value: the pickle of all it holds, and its parts.

Objects are numbered as they are met, and their states pickled one after the other, so
nothing nests deeper than one state does. See ``by_value`` for what this is part of.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends, private
from dask_keras_serialize.backends import Array
from dask_keras_serialize.blame import blame, culprit
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.outside import Outside
from dask_keras_serialize.parts import Description, Key, Reference
from dask_keras_serialize.private import Tracker
from dask_keras_serialize.shells import ShellPickler
from dask_keras_serialize.states import attributes_of, next_place, state_of


class Departure:
    """One object on its way out; see :func:`dask_keras_serialize.by_value.dump`."""

    def __init__(
        self,
        root: Any,
        for_token: bool,
        links: Mapping[int, tuple[Any, Key | None]],
        seen: Sequence[Any],
        outside: Outside | None,
    ) -> None:
        self.root = root
        self.owner = private.describe(root)
        self.for_token = for_token
        self.outside = outside
        self.links = links
        self.linked: list[Any] = []
        self.stream = io.BytesIO()
        self.buffers: list[pickle.PickleBuffer] = []
        self.objects: list[Any] = list(seen)
        self.variables: list[keras.Variable] = []
        self.index: dict[int, int] = {id(obj): i for i, obj in enumerate(seen)}
        self.holders: dict[int, Any] = {}
        self.waiting: list[int] = []
        self.numbered = 0
        #: Whose state is being pickled.
        self.current: Any = None
        self.predicates: dict[types.CodeType, Any] = {}
        self.backend = backends.current()[1]
        self.pickler = self._new_pickler(self.stream, self.buffers)

    def run(self, all_shells_first: bool) -> Description:
        """Describe the object.

        Parameters
        ----------
        all_shells_first : bool
            Name those seen before their states, so that they can be made before any is
            filled.

        Raises
        ------
        EncodeError
            If something it holds cannot be pickled; names the attribute.
        """
        try:
            if all_shells_first and self.outside is not None:
                with self.outside.kept_in():  # a reader has nothing of that yet
                    self.pickler.dump((self.root, *self.objects))
            else:
                self.pickler.dump(self.root)
        except Exception as error:
            found = culprit([type(self.root)], self._error_of)
            path = f" ({found[0].removeprefix('[0]')} of its class)" if found else ""
            raise EncodeError(f"{self.owner} cannot travel: {error}{path}") from error
        done = 0
        while done < len(self.objects):  # pickling a state finds more objects
            self.current = obj = self.objects[self._next()]
            try:
                state = self._state(obj)
            except EncodeError as error:
                raise EncodeError(f"{self.owner}: {error}") from error
            if self.for_token and isinstance(state, dict):
                state = dict(sorted(state.items()))  # what was mended comes last
            try:
                # with the object: one seen in an earlier pickle may not be named before
                self.pickler.dump((obj, state))
            except Exception as error:
                raise EncodeError(self._blame(obj, state, error)) from error
            done += 1
        raw = [buffer.raw() for buffer in self.buffers]
        body = {
            "objects": done,
            "shells-first": all_shells_first,
            "writeable": [not view.readonly for view in raw],
            "code": sorted(map(list, self.pickler.code.items())),
        }
        stream: Array = np.frombuffer(self.stream.getbuffer(), np.uint8)
        extras = [stream, *(np.frombuffer(view, np.uint8) for view in raw)]
        parts: dict[Key, Any] = dict(enumerate(self.objects))
        left_out = self.outside.objects if self.outside is not None else []
        body["outside"] = len(left_out)
        return Description(body, self.variables, extras, lambda: parts, self.linked, left_out)

    def _next(self) -> int:
        """Choose the object whose state comes next."""
        self.waiting += range(self.numbered, len(self.objects))
        self.numbered = len(self.objects)
        return self.waiting.pop(next_place(self.objects[number] for number in self.waiting))

    def _new_pickler(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> ShellPickler:
        outside = self.outside.number if self.outside is not None else _nowhere
        return ShellPickler(
            file, buffers, self.backend, self._refer, self.root, self.for_token, outside
        )

    def _refer(self, obj: Any) -> Reference:
        """Return what names an object: its number, a new one at first sight, or a link."""
        number = self.index.get(id(obj))
        if number is not None:
            return number
        if id(obj) in self.links:
            parcel, key = self.links[id(obj)]
            if parcel not in self.linked:
                self.linked.append(parcel)
            return self.linked.index(parcel), key
        # caches __slotnames__ on the class, which changes the class's own pickle:
        # now, or tokens would differ from the first to the second (as in dask/tokenize.py)
        copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
        number = self.index[id(obj)] = len(self.objects)
        self.objects.append(obj)
        self.holders[id(obj)] = self.current
        return number

    def _state(self, obj: Any) -> Any:
        """Return what fills an object's shell, as it is pickled."""
        state = state_of(obj, self.backend, self.variables)
        if self.outside is not None:
            self.outside.offer_attributes(obj, state)
        if isinstance(obj, keras.Variable) and obj._value is not None:
            state["value"] = len(self.variables)
            self.variables.append(obj)
        elif isinstance(obj, Tracker):
            # its predicates are lambdas without closures, made anew for every layer:
            # send one for each place in Keras's source
            state["config"] = {
                name: (self.predicates.setdefault(test.__code__, test), store)
                for name, (test, store) in obj.config.items()
            }
        return state

    def _blame(self, obj: Any, state: Any, error: Exception) -> str:
        """Say which attribute of an object cannot travel."""
        while isinstance(obj, private.TRACKED) and obj is not self.root:
            obj = self.holders[id(obj)]  # whose attribute it is
            state = attributes_of(obj)
        return blame(self.owner, obj, self.root, state, error, self._error_of)

    def _error_of(self, value: Any) -> Exception | None:
        try:
            self._new_pickler(io.BytesIO(), []).dump(value)
        except Exception as error:
            return error
        return None


def _nowhere(obj: Any) -> None:
    """Leave nothing out."""
