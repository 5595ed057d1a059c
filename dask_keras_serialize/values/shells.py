"""Pickle that takes Keras's objects for shells: empty at first sight, filled later.

A *shell* is an instance made by ``cls.__new__`` alone. In a pickle it is a persistent
id, ``(reference, class)``: its number, or, if it lies in another parcel of the same
pickle, the number of that parcel and its key there. What fills it is somebody else's
business (``states``).
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import cloudpickle
import keras

from dask_keras_serialize import private
from dask_keras_serialize.backends import KERAS_AND_BELOW, PACKAGES, Backend
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.parts import Rebuilt, Reference
from dask_keras_serialize.private import SHELLS

_PLAIN = (str, int, float, bool, bytes, type(None))

#: Modules whose code everybody has who has Keras.
_EVERYWHERE = frozenset(
    {*sys.stdlib_module_names, "keras", "tensorflow", "jax", "jaxlib", "torch", "numpy"}
    | {"ml_dtypes", "cloudpickle", "dask_keras_serialize"}
)


class ShellPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickle by cloudpickle's rules, Keras's objects left out.

    Parameters
    ----------
    file : file
    buffers : list of pickle.PickleBuffer
        Collects what goes out of band.
    backend : Backend
    refer : callable
        Takes one of Keras's objects and returns what names it.
    root : object
        The one that travels; never asked how it is pickled, for that led here.
    for_token : bool
        Make the bytes the same in every process, at the price that nobody can load
        them: strings and tuples that are equal but not the same object, the order of sets
        and cloudpickle's random ids of classes would differ.
    """

    def __init__(
        self,
        file: io.BytesIO,
        buffers: list[pickle.PickleBuffer],
        backend: Backend,
        refer: Callable[[Any], Reference],
        root: Any,
        for_token: bool,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)
        #: Names of code that is neither Python's nor Keras's, and whether it travels
        #: by "reference" or by "value".
        self.code: dict[str, str] = {}
        #: That code and the backends'.
        self.named: list[Any] = []
        self._backend = backend
        self._refer = refer
        self._root = root
        self._for_token = for_token
        self._shells = SHELLS + backend.SHELLS
        self._known: dict[type, bool] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | bytes | None:
        """Name a shell; for tokens, strings, tuples and sets by what is in them."""
        cls = type(obj)
        known = self._known.get(cls)
        if known is None:  # asked for every object there is
            known = self._known[cls] = issubclass(cls, self._shells)
        if known and (obj is self._root or not reduces_itself(cls)):
            pid = self._refer(obj), cls
            return (*pid, "functional") if isinstance(obj, private.Function) else pid
        if self._for_token:
            if type(obj) is str:
                return obj.encode(errors="surrogatepass")
            if type(obj) is tuple and all(type(each) in _PLAIN for each in obj):
                return b"tuple", repr(obj)
            if isinstance(obj, (set, frozenset)) and all(isinstance(each, _PLAIN) for each in obj):
                return repr(sorted(map(repr, obj))).encode(errors="surrogatepass")
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what pickle cannot take, and by cloudpickle's rules what it should not."""
        if type(obj) is private.DynamicBackend:
            return private.reduce_backend(obj)
        reduced = self._backend.reduce(obj)
        if reduced is not None:
            return reduced
        if isinstance(obj, io.IOBase) and not isinstance(obj, (io.BytesIO, io.StringIO)):
            if not obj.closed:  # cloudpickle would send a copy of what it can read of it
                raise pickle.PicklingError("an open file stays where it is")
            return closed_file, ()
        reduced = super().reducer_override(obj)
        if isinstance(obj, (type, types.FunctionType)):
            self._note(obj, "reference" if reduced is NotImplemented else "value")
        if self._for_token and isinstance(obj, type) and isinstance(reduced, tuple):
            function, arguments, *rest = reduced
            name = f"{obj.__module__}.{obj.__qualname__}"
            tracker = getattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", {})
            known = tracker.get(obj)
            arguments = tuple(name if known and a == known else a for a in arguments)
            return (function, arguments, *rest)
        return reduced

    def _note(self, code: Any, how: str) -> None:
        module = str(code.__module__).partition(".")[0]
        # a namedtuple's __new__ is of a module of that name
        if module not in _EVERYWHERE and not module.startswith("namedtuple_"):
            self.code[private.full_name(code)] = how
            self.named.append(code)
        elif any(module in packages for packages in PACKAGES.values()):
            self.named.append(code)


def import_named(code: Iterable[tuple[str, str]]) -> None:
    """Import the modules of code that an object refers to, while no lock is held.

    A module that opens a model as it is imported, in another thread, holds Python's lock for that
    module and waits for the one of rebuilds. What cannot be imported is said where it is missed.

    Parameters
    ----------
    code : iterable of (str, str)
        As :attr:`header.Header.code` has it.
    """
    for name, how in code:
        module = name
        while how == "reference" and module and module not in sys.modules:
            module = module.rpartition(".")[0]
            with suppress(Exception):
                importlib.import_module(module)


class ShellUnpickler(pickle.Unpickler):
    """Unpickle, making a shell for each persistent id.

    Parameters
    ----------
    shells : dict of int to object
        Gains every shell by its number.
    file : file
    buffers : sequence of buffers
    backend : Backend
    links : sequence of Rebuilt
        Other parcels of the same pickle.
    found_at : callable, optional
        Takes the module and name of code as the sender has it, and returns those it has here.
    """

    def __init__(
        self,
        shells: dict[int, Any],
        file: io.BytesIO,
        buffers: Sequence[Any],
        backend: Backend,
        links: Sequence[Rebuilt],
        found_at: Callable[[str, str], tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(file, buffers=buffers)
        self._shells = shells
        self._backend = backend
        self._links = links
        self._found_at = found_at

    def find_class(self, module: str, name: str) -> Any:
        """Find code by its name there."""
        if self._found_at is not None:
            module, name = self._found_at(module, name)
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        """Return the shell of a reference, made at first sight; DecodeError if no such class."""
        reference, cls, *functional = pid
        if functional:
            private.make_functional(cls)
        if isinstance(reference, tuple):
            parcel, key = reference
            obj = self._links[parcel].part(key)
            if type(obj) is not cls:
                raise DecodeError(f"the {cls.__qualname__} it shares with another is not there")
            return obj
        shell = self._shells.get(reference)
        if shell is None:
            if cls in self._backend.SHELLS:
                shell = self._backend.shell(cls)
            elif issubclass(cls, SHELLS):
                shell = new_shell(cls)
            elif cls is list:  # one that another backend watches
                shell = []
            else:
                raise DecodeError(f"{cls.__qualname__} is not a Keras class")
            self._shells[reference] = shell
        return shell


def closed_file() -> io.StringIO:
    """Return what stands for a closed file: a closed one."""
    file = io.StringIO()
    file.close()
    return file


def new_shell(cls: type) -> Any:
    """Make an empty instance."""
    new = _NEW.get(cls)
    if new is None:
        # Keras's own __new__, which wraps build(), takes no arguments; a user's might
        new = _NEW[cls] = next(
            vars(base)["__new__"]
            for base in cls.__mro__
            if "__new__" in vars(base) and not _foreign(base)
        )
    wrappers = _wrappers() if new is _LAYERS_NEW and _made_by_keras(cls) else None
    return new(cls) if wrappers is None else _new_layer(cls, wrappers)


def _made_by_keras(cls: type) -> bool:
    # a layer that is a dict too is made by dict.__new__
    return all(issubclass(keras.Layer, base) for base in cls.__mro__ if "__new__" in vars(base))


#: By class; weak, as classes may be made by the thousand.
_NEW: WeakKeyDictionary[type, Any] = WeakKeyDictionary()
_LAYERS_NEW = vars(keras.Layer).get("__new__")


class _Wrapper(NamedTuple):
    """What ``Layer.__new__`` makes of a method: a function, and which of its cells is the layer."""

    name: str
    function: types.FunctionType
    of_layer: list[bool]


def _new_layer(cls: type, wrappers: list[_Wrapper]) -> Any:
    """Make an empty layer as ``Layer.__new__`` does, but for what its state brings anyhow.

    That is a tracker and the arguments of its constructor, for which Keras takes the constructor's
    signature apart: nine tenths of the time (``keras/src/ops/operation.py``).
    """
    layer: Any = object.__new__(cls)
    for name, function, of_layer in wrappers:
        original = getattr(layer, name)
        cells = tuple(types.CellType(layer if own else original) for own in of_layer)
        wrapper = types.FunctionType(
            function.__code__, function.__globals__, name, function.__defaults__, cells
        )
        wrapper.__kwdefaults__ = function.__kwdefaults__
        layer.__dict__[name] = functools.wraps(original)(wrapper)
    return layer


@functools.cache
def _wrappers() -> list[_Wrapper] | None:
    """Take Keras's wrappers from a layer; None if they are not what they are known to be."""
    make: Any = _LAYERS_NEW
    layer = make(keras.Layer)
    wrappers = []
    for name, value in vars(layer).items():
        if isinstance(value, types.FunctionType):
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            original: Any = types.MethodType(vars(keras.Layer)[name], layer)
            if any(each is not layer and each != original for each in held):
                return None
            wrappers.append(_Wrapper(name, value, [each is layer for each in held]))
    found = {wrapper.name for wrapper in wrappers}
    return wrappers if found == private.WRAPPED and vars(layer).keys() <= private.MADE else None


def reduces_itself(cls: Any) -> bool:
    """Say whether a class outside Keras says itself how it is pickled."""
    known = _REDUCES_ITSELF.get(cls)
    if known is None:
        known = _REDUCES_ITSELF[cls] = _reduces_itself(cls)
    return known


#: Weak: classes may be made by the thousand.
_REDUCES_ITSELF: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def _reduces_itself(cls: type) -> bool:
    return own_method(cls, "__reduce_ex__") or own_method(cls, "__reduce__")


def own_method(cls: type, name: str) -> bool:
    """Say whether a class outside Keras and the backends defines a method."""
    return next((_foreign(base) for base in cls.__mro__ if name in vars(base)), False)


def _foreign(cls: type) -> bool:
    # whose classes leave it to us how their instances are pickled; of collections, OrderedDict,
    # which Keras has a subclass of
    return cls.__module__.partition(".")[0] not in KERAS_AND_BELOW
