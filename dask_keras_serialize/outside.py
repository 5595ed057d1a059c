"""What an object holds that is not Keras's: kept out of its parcel, for all who share it.

A parcel is closed: a list, an array or a user's own object that lies both in it and beside
it, in the same pickle, would arrive twice. So the pickler that carries the parcel carries
such things too, as the parcel's state, and its memo knows them. That pickler is not asked
to do what it cannot: what would not get through it, as an instance of a class of
``__main__`` does not through plain pickle, stays in the parcel, which goes by
cloudpickle's rules.
"""

from __future__ import annotations

import array
import collections
import io
import pickle
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np

from dask_keras_serialize import private
from dask_keras_serialize.backends import Backend
from dask_keras_serialize.shells import is_everywhere

#: What of Python and NumPy can be changed: left out as far as a user has put it into an
#: attribute. Keras has its own in every object.
_MUTABLE = frozenset(
    {list, dict, set, bytearray, array.array, types.SimpleNamespace, random.Random}
    | {collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter}
    | {np.ndarray, np.random.Generator, np.random.RandomState}
)


class Outside:
    """What one parcel leaves to the pickler that carries it.

    Parameters
    ----------
    backend : Backend
    code_by_value : bool
        Whether that pickler is cloudpickle's.
    arrays : bool
        Whether it knows an array again. joblib's does not, and may map it read-only.

    Attributes
    ----------
    objects : list of object
        In the order of their numbers.
    """

    def __init__(self, backend: Backend, *, code_by_value: bool, arrays: bool) -> None:
        self.objects: list[Any] = []
        self._trial = _TrialByValue if code_by_value else _Trial
        self._mutable = _MUTABLE if arrays else _MUTABLE - {np.ndarray}
        self._keras = (*private.CITIZENS, *private.TRACKED, *backend.TENSORS)
        self._numbers: dict[int, int] = {}
        #: By ``id()``, and held so that it stays theirs: what that pickler will meet,
        #: and what stays in the parcel.
        self._carried: dict[int, Any] = {}
        self._kept: dict[int, Any] = {}
        #: What is known of classes.
        self._own: dict[type, bool] = {}
        self._names: dict[type, frozenset[str]] = {}
        self._open = True
        self._keeping = False

    def offer_attributes(self, obj: Any, state: Any) -> None:
        """Leave out the containers that a user has put into an object's attributes."""
        if not isinstance(obj, tuple(private.CITIZENS)) or not isinstance(state, dict):
            return
        for name, value in vars(obj).items():
            if state.get(name) is value and not (
                name.startswith("_") and name in self._used_by_keras(type(obj))
            ):
                for each in _outermost(value):
                    if type(each) in self._mutable:
                        self._offer(each)

    def number(self, obj: Any) -> int | None:
        """Return the number of what is left out, a new one at first sight; else None."""
        if self._keeping:
            self._kept[id(obj)] = obj
            self._carried.pop(id(obj), None)
            return None
        number = self._numbers.get(id(obj))
        if number is None and (id(obj) in self._carried or self._offer_own(obj)):
            number = self._numbers[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return number

    def settle(self) -> None:
        """Leave out what has been found, and only that, whichever of them comes first now."""
        self.objects = []
        self._numbers = {}
        self._open = False

    @contextmanager
    def kept_in(self) -> Iterator[None]:
        """Keep in the parcel all that is met now: what classes hold that go by value."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def _offer_own(self, obj: Any) -> bool:
        cls = type(obj)
        own = self._own.get(cls)
        if own is None:
            own = self._own[cls] = _is_own(cls) and not issubclass(cls, self._keras)
        return own and self._offer(obj)

    def _used_by_keras(self, cls: type) -> frozenset[str]:
        if cls not in self._names:
            self._names[cls] = frozenset(_names_in_code(cls))
        return self._names[cls]

    def _offer(self, obj: Any) -> bool:
        if self._open and id(obj) not in self._carried and id(obj) not in self._kept:
            trial = self._trial(self._keras)
            try:
                trial.dump(obj)
                self._carried |= trial.met
            except Exception:  # whatever it is, the pickler would raise it too
                self._kept[id(obj)] = obj
        return id(obj) in self._carried


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


class _Trial(pickle.Pickler):
    """Pickle into nothing, by reference only, to see whether that can be done."""

    def __init__(self, keras: tuple[type, ...]) -> None:
        super().__init__(_Nowhere(), 5, buffer_callback=lambda buffer: None)
        self.met: dict[int, Any] = {}
        self._keras = keras
        self._rules = cloudpickle.Pickler(_Nowhere())

    def persistent_id(self, obj: Any) -> str | None:
        """Note what can be changed; go no deeper at Keras's objects, which travel."""
        if isinstance(obj, self._keras):
            return "Keras's"
        if type(obj) in _MUTABLE or _is_own(type(obj)):
            self.met[id(obj)] = obj
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Refuse code that the other side might not be able to import."""
        code = isinstance(obj, (type, types.FunctionType)) and not is_everywhere(obj)
        if code and self._rules.reducer_override(obj) is not NotImplemented:
            raise pickle.PicklingError(f"{obj!r} would go by value")
        return NotImplemented


class _TrialByValue(cloudpickle.Pickler):  # type: ignore[misc]
    """As above, by cloudpickle's rules."""

    def __init__(self, keras: tuple[type, ...]) -> None:
        super().__init__(_Nowhere(), 5, buffer_callback=lambda buffer: None)
        self.met: dict[int, Any] = {}
        self._keras = keras

    persistent_id = _Trial.persistent_id


def _is_own(cls: type) -> bool:
    """Say whether instances of a class are a user's own, or a library's, and can be changed."""
    fixed = (type, tuple, str, bytes, int, float, frozenset)
    return not issubclass(cls, fixed) and not is_everywhere(cls)


def _outermost(value: Any) -> Iterator[Any]:
    """Yield a value, or the items of a tuple."""
    if isinstance(value, tuple):
        for item in value:
            yield from _outermost(item)
    else:
        yield value


def _names_in_code(cls: type) -> Iterator[str]:
    """Yield the names that the code of Keras and the backend uses in a class."""
    for base in cls.__mro__:
        for member in vars(base).values() if is_everywhere(base) else ():
            code = getattr(getattr(member, "fget", None) or member, "__code__", None)
            if code is not None:
                yield from code.co_names
                yield from (name for name in code.co_consts if isinstance(name, str))
