"""Objects by value: the graph of all they hold through pickle, variables as frames.

For what a config cannot carry: subclasses of Model, custom layers, losses, metrics and training
steps, Python attributes; and for every object that is no model. Every Keras object becomes a
*shell*, made empty by ``cls.__new__`` and filled from its own ``__dict__``; inside a state, other
Keras objects are persistent ids that name their shells. So no chain of layers nests deeper than
pickle can recurse, cycles close by themselves, and Keras's constructors and ``__reduce__`` never
run. Variables are left out of the pickle: they are the table's. Code that the other side cannot
import travels by cloudpickle's rules.

It needs the same minor versions of Python and Keras on both sides, and code that is not bound
to another backend (``binding``, ``translation``); and it runs pickle: load only what you trust.

Caches are dropped (traced functions, losses of the last call) and what Keras keys by
``id()`` is mended; see ``mending``. Objects that lie in another parcel of the same
pickle are named there, not sent again; see ``parts``.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import types
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends, private
from dask_keras_serialize.backends import Array
from dask_keras_serialize.configs import skew
from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.parts import Description, Key, Rebuilt, Reference
from dask_keras_serialize.private import MISSING, Tracker
from dask_keras_serialize.rebuilding.rebuild import Values, check_fits, rebuilding
from dask_keras_serialize.values.binding import Bindings
from dask_keras_serialize.values.blame import culprit, sentence
from dask_keras_serialize.values.shells import ShellPickler, ShellUnpickler, import_named
from dask_keras_serialize.values.states import (
    Custom,
    attributes_of,
    complete,
    fill,
    has_value,
    next_place,
    state_of,
)
from dask_keras_serialize.values.translation import missing, translation_from


def dump(
    root: Any,
    *,
    for_token: bool = False,
    links: Mapping[int, tuple[Any, Key | None]] = MappingProxyType({}),
    seen: Sequence[Any] = (),
    without: Mapping[type, Container[str]] = MappingProxyType({}),
) -> Description:
    """Describe an object by the graph of all it holds.

    Parameters
    ----------
    root : object
        One of Keras's, or a tensor of the backend.
    for_token : bool
        Make the bytes the same in every process; see :class:`shells.ShellPickler`.
    links : dict of int to (parcel, Key)
        What other parcels of the same pickle hold: which, and the key there, by ``id()``.
    seen : sequence of object
        The parts of an earlier description, in order: they keep their numbers.
    without : dict of type to container of str
        Attributes that are left out, of instances of the class.

    Returns
    -------
    Description
        Its extras are the pickle, then the out-of-band buffers of the arrays in it.

    Raises
    ------
    EncodeError
        If something the object holds cannot be pickled; names the attribute.

    Notes
    -----
    Copies: none of variables' or arrays' bytes.
    """
    if MISSING:
        raise EncodeError(
            f"{private.describe(root)} must go by value, which this keras {keras.version()} is too "
            f"new for ({', '.join(MISSING)} is gone): use an older one, or update this package"
        )
    sending = _Dump(root, for_token, links, seen, without)
    try:
        return sending.run()
    finally:
        del sending.pickler  # they hold each other, and what others may then link to


def load(
    body: dict[str, Any], values: Values, extras: list[Array], links: Sequence[Rebuilt] = ()
) -> Rebuilt:
    """Rebuild an object from what :func:`dump` described. It runs pickle.

    Parameters
    ----------
    body : dict
    values : Values
    extras : list of ndarray of uint8
    links : sequence of Rebuilt
        The other parcels it refers to.

    Returns
    -------
    Rebuilt

    Raises
    ------
    DecodeError
        If a class or module is missing here, or the bytes are not whole.

    Notes
    -----
    Copies: one of each variable's bytes, into memory the backend owns, and one of
    each array that was writeable.
    """
    owner = values.header.owner
    import_named(values.header.code)
    with rebuilding():
        try:
            return _Load(body, values, extras, links).run()
        except DecodeError as error:
            reason = str(error).removeprefix(f"{owner}: ")
            raise DecodeError(f"{owner}: {reason}") from error
        except ModuleNotFoundError as error:
            raise missing(error, values.header) from error
        except Exception as error:  # unpickling runs anybody's code
            raise DecodeError(
                f"{owner}: it cannot be rebuilt by value here: {error!r}; "
                f"{skew.named(values.header)}"
            ) from error


class _Dump:
    """One object on its way out."""

    def __init__(
        self,
        root: Any,
        for_token: bool,
        links: Mapping[int, tuple[Any, Key | None]],
        seen: Sequence[Any],
        without: Mapping[type, Container[str]],
    ) -> None:
        self.root = root
        self.without = without
        self.owner = private.describe(root)
        self.for_token = for_token
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
        name, self.backend = backends.current()
        self.bound = Bindings(name)
        self.pickler = self.new_pickler(self.stream, self.buffers)

    def run(self) -> Description:
        try:
            self.pickler.dump(self.root)
        except Exception as error:
            found = culprit([type(self.root)], self.error_of)
            path = f" ({found[0].removeprefix('[0]')} of its class)" if found else ""
            raise EncodeError(f"{self.owner} cannot travel: {error}{path}") from error
        done = 0
        while done < len(self.objects):  # pickling a state finds more objects
            self.current = obj = self.objects[self.next()]
            try:
                state = self.state(obj)
            except EncodeError as error:
                raise EncodeError(f"{self.owner}: {error}") from error
            if self.for_token and isinstance(state, dict):
                state = dict(sorted(state.items()))  # what was mended comes last
            try:
                # with the object: one seen in an earlier pickle may not be named before
                self.pickler.dump((obj, state))
            except Exception as error:
                raise EncodeError(self.blame(obj, state, error)) from error
            self.bound.note(obj, self.pickler.named, self.holder(obj))
            done += 1
        raw = [buffer.raw() for buffer in self.buffers]
        body = {
            "objects": done,
            "writeable": [not view.readonly for view in raw],
            "code": sorted(map(list, self.pickler.code.items())),
            "bound": self.bound.first(),
        }
        stream: Array = np.frombuffer(self.stream.getbuffer(), np.uint8)
        extras = [stream, *(np.frombuffer(view, np.uint8) for view in raw)]
        parts: dict[Key, Any] = dict(enumerate(self.objects))
        return Description(body, self.variables, extras, lambda: parts, self.linked)

    def next(self) -> int:
        """Choose the object whose state comes next."""
        self.waiting += range(self.numbered, len(self.objects))
        self.numbered = len(self.objects)
        return self.waiting.pop(next_place(self.objects[number] for number in self.waiting))

    def new_pickler(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> ShellPickler:
        return ShellPickler(file, buffers, self.backend, self.refer, self.root, self.for_token)

    def refer(self, obj: Any) -> Reference:
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

    def state(self, obj: Any) -> Any:
        """Return what fills an object's shell, as it is pickled."""
        state = state_of(obj, self.backend, self.variables)
        for cls, names in self.without.items():
            if isinstance(obj, cls) and isinstance(state, dict):
                state = {name: value for name, value in state.items() if name not in names}
        if isinstance(obj, keras.Variable) and has_value(obj):
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

    def blame(self, obj: Any, state: Any, error: Exception) -> str:
        """Say which attribute of an object cannot travel."""
        holder = self.holder(obj)
        if holder is not obj:
            obj, state = holder, attributes_of(holder)
        where = "" if obj is self.root else f" of {private.describe(obj)}"
        found = culprit(state, self.error_of)
        if found is None:
            return f"{self.owner}{where and ': part'}{where} cannot travel: {error}"
        return sentence(self.owner, found, where, "travel")

    def holder(self, obj: Any) -> Any:
        """Return what has a container of Keras's as its attribute; any other object itself."""
        while isinstance(obj, private.TRACKED) and obj is not self.root:
            obj = self.holders.get(id(obj), self.root)  # of what was seen earlier, unknown
        return obj

    def error_of(self, value: Any) -> Exception | None:
        try:
            self.new_pickler(io.BytesIO(), []).dump(value)
        except Exception as error:
            return error
        return next(filter(None, map(self.error_of, private.watched_items(value))), None)


class _Load:
    """One object on its way in."""

    def __init__(
        self,
        body: dict[str, Any],
        values: Values,
        extras: list[Array],
        links: Sequence[Rebuilt],
    ) -> None:
        self.values = values
        self.count = int(body["objects"])
        stream, *arrays = extras
        buffers = [
            _with_writeable(array, bool(flag))
            for array, flag in zip(arrays, body["writeable"], strict=True)
        ]
        self.shells: dict[int, Any] = {}
        self.rows: list[int] = []
        self.translation = translation_from(values.header.backend)
        found_at = self.translation.name if self.translation else None
        self.unpickler = ShellUnpickler(
            self.shells, io.BytesIO(stream.data), buffers, values.backend, links, found_at
        )

    def run(self) -> Rebuilt:
        root = self.unpickler.load()
        filled = []
        for _ in range(self.count):
            shell, state = self.unpickler.load()
            if self.translation:
                self.translation.state(shell, state)
            filled.append((shell, state))
            if not isinstance(state, Custom):
                self.fill(*filled[-1])
        complete(filled, self.values.backend)
        if self.translation:
            self.translation.complete([shell for shell, _ in filled])
        header = self.values.header
        renamed = self.translation and self.translation.renames(header.class_name)
        # by its name alone: a class by value arrives without its __qualname__
        if not header.is_of(type(root)) and not renamed:
            raise DecodeError(f"{header.owner}: the pickle holds a {type(root).__qualname__}")
        if sorted(map(id, self.shells.values())) != sorted(id(shell) for shell, _ in filled):
            raise DecodeError(
                f"{header.owner}: the pickle is not whole: objects are missing or extra"
            )
        if sorted(self.rows) != list(range(len(header.variables))):
            raise DecodeError(f"{header.owner}: the table of variables is not the pickle's")
        return Rebuilt(root, lambda: self.shells)

    def fill(self, shell: Any, state: Any) -> None:
        row = state.pop("value", None) if isinstance(shell, keras.Variable) else None
        fill(shell, state)
        if row is not None:
            self.rows.append(row)
            check_fits(shell, row, self.values.header)
            self.values.place(row, functools.partial(self.values.backend.initialize, shell))


def _with_writeable(array: Array, flag: bool) -> Array:
    """Return an array as writeable as it was; a copy if it must be and is not ours."""
    if flag and not array.flags.writeable:
        return array.copy()
    array.flags.writeable = flag
    return array
