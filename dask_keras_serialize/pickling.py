"""Pickle and copy for Keras's objects, over the same encoder as everything else.

The reducer sits on Keras's base classes as ``__reduce_ex__``, which pickle, cloudpickle,
copy and joblib ask before ``__reduce__``: so ours is asked first whatever else, such
as scikeras, puts on ``__reduce__``, and in whatever order things are imported.

Objects that one pickle holds may share parts: two models a layer, an optimizer and a
model their variables. Nothing tells a reducer what else its pickler has seen. But a
pickler keeps alive all it has pickled, so the parcels of this thread that are alive are
those of the same pickle (or of another one that somebody keeps, which costs bytes and
loses nothing): parts of an object that lie in one of them are referred to, not sent
again. A parcel is encoded each time a pickler reaches it, so none shows an old state,
and what others may have referred to keeps its key.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ReferenceType, WeakSet, finalize, ref

import keras

from dask_keras_serialize import backends, private
from dask_keras_serialize.backends import Backend
from dask_keras_serialize.copying import deep, deep_inside, shallow
from dask_keras_serialize.errors import EncodeError, KerasSerializeError
from dask_keras_serialize.packed import Parcel, take
from dask_keras_serialize.parts import Key
from dask_keras_serialize.values.shells import own_method


class _Sending:
    """A parcel on its way into a pickle, closed when the pickler gets to it."""

    def __init__(self, root: Any) -> None:
        self.root = root
        #: Its parts by key, once others have asked; held, so that their ids stay theirs.
        self.parts: dict[Key, Any] = {}
        self._encoding = ""
        self._new_parts: Callable[[], Mapping[Key, Any]] = dict
        self._alive = _alive()
        self._alive.add(self)

    def close(self) -> tuple[bytes, list[_Sending], list[Any]]:
        """Encode the object."""
        # here, not above: this module is loaded as keras is, which protocol may be importing
        from dask_keras_serialize.protocol import encode_parts

        seen = list(self.parts.values()) if self._encoding == "value" else []
        links = {} if self._encoding == "config" else _Others(self)
        encoded = encode_parts(self.root, links, seen=seen)
        if self.parts:
            found = encoded.description.parts()
            if any(found.get(key) is not part for key, part in self.parts.items()):
                raise EncodeError(
                    f"{encoded.header.owner}: it was changed while something that shares parts "
                    "with it was pickled: pickle them again"
                )
        self._encoding, self._new_parts = encoded.header.encoding, encoded.description.parts
        self._alive.unnamed.add(self)
        return encoded.header.to_bytes(), encoded.description.links, encoded.frames

    def name_parts(self) -> dict[Key, Any]:
        """Name its parts, for others to refer to from now on."""
        self.parts |= self._new_parts()
        return self.parts

    def __reduce_ex__(self, protocol: Any) -> Any:
        header, links, frames = self.close()
        receive, (packed, _, *arrays) = Parcel(header, frames).__reduce_ex__(protocol)
        return receive, (packed, tuple(links), *arrays)


class _Alive:
    """The parcels that picklers of one thread keep alive, and what they hold."""

    def __init__(self) -> None:
        self.count = 0
        self.unnamed: WeakSet[_Sending] = WeakSet()
        self._index: dict[int, tuple[ReferenceType[_Sending], Key | None]] = {}

    def add(self, sending: _Sending) -> None:
        """Count a parcel for as long as it lives."""
        self.count += 1
        self._name(sending, {None: sending.root})

    def find(self, obj_id: int) -> tuple[_Sending, Key | None] | None:
        """Return the parcel that holds an object, and its key there."""
        while self.unnamed:
            sending = self.unnamed.pop()
            self._name(sending, sending.name_parts())
        reference, key = self._index.get(obj_id, (None, None))
        holder = reference() if reference is not None else None
        return None if holder is None else (holder, key)

    def _name(self, sending: _Sending, parts: Mapping[Any, Any]) -> None:
        numbers = []
        for key, part in parts.items():
            # policies: all objects share the same ones, and nobody changes them
            named = part is None or isinstance(part, keras.DTypePolicy) or id(part) in self._index
            if not named:
                self._index[id(part)] = ref(sending), key
                numbers.append(id(part))
        finalize(sending, self._forget, numbers, None in parts).atexit = False

    def _forget(self, numbers: list[int], root: bool) -> None:
        self.count -= root
        for number in numbers:
            self._index.pop(number, None)


class _Others(Mapping[int, tuple[_Sending, Key | None]]):
    """What a parcel may refer to in the others that are alive, by ``id()``."""

    def __init__(self, sending: _Sending) -> None:
        self._sending = sending
        self._alive = _alive()

    def __getitem__(self, number: int) -> tuple[_Sending, Key | None]:
        found = self._alive.find(number)
        # one that is not closed may be closing around this one
        if found is None or found[0] is self._sending or not found[0]._encoding:
            raise KeyError(number)
        return found

    def __len__(self) -> int:
        return self._alive.count - 1

    def __iter__(self) -> Iterator[int]:
        raise TypeError("look objects up by their id()")


_threads = threading.local()


def _alive() -> _Alive:
    alive: _Alive = vars(_threads).setdefault("alive", _Alive())
    return alive


def pack(obj: Any) -> Parcel:
    """Close one of Keras's objects into a parcel, to be looked at, kept or opened.

    Raises
    ------
    EncodeError
        If it cannot travel without losing something.

    Notes
    -----
    Copies: as :func:`dask_keras_serialize.protocol.encode`.
    """
    from dask_keras_serialize.protocol import encode

    header, frames = encode(obj)
    return Parcel(header.to_bytes(), frames)


def reduce_object(obj: Any, protocol: Any) -> Any:
    """Reduce one of Keras's objects; stands on their base classes as ``__reduce_ex__``.

    A class of the user's that defines ``__reduce__`` keeps it.

    Notes
    -----
    Copies: under protocol 5 with a buffer callback, as ``encode``; else pickle copies
    every byte once more into its stream.
    """
    # a class with a __reduce_ex__ of its own that comes here asks for what it overrides
    if own_method(obj.__class__, "__reduce__") and not own_method(obj.__class__, "__reduce_ex__"):
        return obj.__reduce__()
    return reduce_by_default(obj)


def reduce_by_default(obj: Any) -> Any:
    """Reduce an object whatever its class says; stands on ``KerasSaveable`` as ``__reduce__``."""
    return take, _alive().find(id(obj)) or (_Sending(obj), None)


def _backend() -> Backend | None:
    try:
        return backends.current()[1]
    except KerasSerializeError:  # one that we do not know
        return None


def _classes_of_backend(*kinds: str) -> list[Any]:
    backend = _backend()
    return [cls for kind in kinds for cls in getattr(backend, kind)] if backend else []


def _bases() -> list[Any]:
    """Return the classes that every one of Keras's objects descends from."""
    classes = list(private.CITIZENS)
    return [cls for cls in classes if not any(base in classes for base in cls.__mro__[1:])]


def _slots() -> Iterator[tuple[Any, str, Any]]:
    """Yield classes of Keras's, and what we put on them under which name."""
    for cls in (*_bases(), *private.TRACKED):
        yield cls, "__reduce_ex__", reduce_object
        yield cls, "__copy__", shallow
        yield cls, "__deepcopy__", deep
    for cls in (private.Node, private.Tracker):
        yield cls, "__deepcopy__", deep
    for cls in _classes_of_backend("SHELLS", "REDUCED"):
        yield cls, "__deepcopy__", deep_inside(getattr(cls, "__deepcopy__", None))
    backend = _backend()
    if backend is not None:
        yield from backend.slots()
    yield private.DynamicBackend, "__deepcopy__", lambda self, memo: type(self)(self._backend)
    # not asked by pickle, but by classes that override it and call what they override
    yield private.KerasSaveable, "__reduce__", reduce_by_default


#: What stood in each slot; None where nothing did.
_before: list[tuple[Any, str, Any]] = []
_reducers: dict[type, Any] = {}


def install() -> None:
    """Put reducers, and what ``copy`` asks for, on Keras's base classes."""
    for cls, name, ours in _slots():
        _before.append((cls, name, vars(cls).get(name)))
        setattr(cls, name, ours)
    for cls in _classes_of_backend("TENSORS"):
        _reducers[cls] = copyreg.dispatch_table.get(cls)
        copyreg.pickle(cls, lambda tensor: reduce_object(tensor, 4))


def uninstall() -> None:
    """Take them off again."""
    while _before:
        cls, name, original = _before.pop()
        if original is not None:
            setattr(cls, name, original)
        else:
            delattr(cls, name)
    while _reducers:
        cls, reducer = _reducers.popitem()
        if reducer is not None:
            copyreg.pickle(cls, reducer)
        else:
            copyreg.dispatch_table.pop(cls, None)


def take_off_scikeras() -> Callable[[], None] | None:
    """Take off Keras's classes what scikeras puts there, and return what puts it back.

    It goes through a file, and loses what Keras's own way loses (``scikeras/__init__.py``);
    ``copy.deepcopy`` would ask it first, and so would a class of the user's whose ``__reduce__``
    calls the one that it overrides.
    """
    taken = [
        (cls, name, method)
        for cls in (keras.Model, keras.Loss, keras.Metric, keras.Optimizer)
        for name in ("__deepcopy__", "__reduce__")
        if str(getattr(method := vars(cls).get(name), "__module__", "")).startswith("scikeras")
    ]
    for cls, name, _ in taken:
        delattr(cls, name)

    def put_back() -> None:
        for each in taken:
            setattr(*each)

    return put_back if taken else None
