"""What fills an object's shell: taken from the object, and put into the shell.

A state is an object's attributes, without caches and native resources (``mending``) and
without what a class leaves out by ``__getstate__``. The value of a variable is not part
of it.
"""

from __future__ import annotations

import math
import time
import types
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import keras

from dask_keras_serialize import private
from dask_keras_serialize.backends import Array, Backend
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.private import State, Tracker
from dask_keras_serialize.values import mending
from dask_keras_serialize.values.shells import own_method
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.frames import LARGE
from dask_keras_serialize.wire.header import ITEMSIZE, STRING, numpy_dtype

#: The state of a class that is Keras's and a container too.
ITEMS = "items of the container"


class Custom:
    """A state that the class takes in itself, by ``__setstate__``."""

    def __init__(self, state: Any) -> None:
        self.state = state


def state_of(obj: Any, backend: Backend, variables: Sequence[Any] = ()) -> Any:
    """Return what fills an object's shell.

    Parameters
    ----------
    obj : object
        One of Keras's, or of ``backend.SHELLS``.
    backend : Backend
    variables : sequence of keras.Variable
        Those that travel with it, as far as they are known.

    Returns
    -------
    dict of str to object
        A new one; or Custom.

    Raises
    ------
    EncodeError
        If it cannot travel; names the object.
    """
    if isinstance(obj, keras.Variable):
        state = {name: value for name, value in vars(obj).items() if name != "_value"}
        backend.drop(obj, state)
        return state
    if isinstance(obj, Tracker):
        return {name: value for name, value in vars(obj).items() if name != "stored_ids"}
    state = obj.__getstate__() if own_method(type(obj), "__getstate__") else attributes_of(obj)
    if isinstance(state, dict):
        state = dict(state) | items_of(obj)
        mending.drop(obj, state, variables)
        backend.drop(obj, state)
    if own_method(type(obj), "__setstate__"):
        return Custom(state)
    if not isinstance(state, dict):
        raise EncodeError(
            f"{private.describe(obj)} has a __getstate__ that "
            f"returns a {type(state).__name__}: give it a __setstate__ that takes it"
        )
    return state


def attributes_of(obj: Any) -> State:
    """Return an object's attributes, those in slots among them; a new dict."""
    plain = object.__getstate__(obj)
    attributes, slots = plain if isinstance(plain, tuple) else (plain, None)
    return (attributes or {}) | (slots or {})


def items_of(obj: Any) -> State:
    """Return the items of an object that is a container too, as part of its state.

    Raises
    ------
    EncodeError
        If it is a number, a string or a tuple too, which nothing can fill later.
    """
    if isinstance(obj, (int, float, complex, str, bytes, tuple, frozenset)):
        raise EncodeError(
            f"{private.describe(obj)} is a {type(obj).__mro__[-2].__name__} too, which cannot "
            "travel: give its class a __reduce__"
        )
    if isinstance(obj, dict):
        return {ITEMS: list(obj.items())}
    if isinstance(obj, set):  # in one order in every process, where that can be: for tokens
        return {ITEMS: sorted(obj, key=lambda item: item if type(item) is str else "")}
    return {ITEMS: list(obj)} if isinstance(obj, list) else {}


def fill(shell: Any, state: State | Custom) -> None:
    """Fill an object's shell from its state."""
    if isinstance(state, Custom):
        shell.__setstate__(state.state)
        return
    if ITEMS in state:
        _put(shell, state.pop(ITEMS))
    slots = _slots_of(type(shell)) & state.keys()
    if slots:
        state = dict(state)
        for name in slots:
            getattr(type(shell), name).__set__(shell, state.pop(name))
    if state:  # past __setattr__, where Keras would track what its lists already hold
        vars(shell).update(state)
    if isinstance(shell, keras.Variable):
        shell.__dict__.setdefault("_value")  # None; torch may have put one there


def _slots_of(cls: type) -> frozenset[str]:
    """Return the names of a class's slots."""
    slots = _SLOTS.get(cls)
    if slots is None:
        names = {name for base in cls.__mro__ for name in vars(base)}
        member = types.MemberDescriptorType
        slots = frozenset(name for name in names if isinstance(getattr(cls, name, None), member))
        _SLOTS[cls] = slots
    return slots


#: Weak: classes may be made by the thousand.
_SLOTS: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _put(container: Any, items: list[Any]) -> None:
    """Put items into a container by what Python has for it: Keras's own would track them."""
    if isinstance(container, list):
        list.extend(container, items)
    elif isinstance(container, set):
        set.update(container, items)
    else:
        cls: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        for key, value in items:
            cls.__setitem__(container, key, value)


def next_place(waiting: Iterable[Any]) -> int:
    """Say which of the objects that wait for their state is next."""
    # optimizers name variables by id: when those are known
    ready = (i for i, obj in enumerate(waiting) if not isinstance(obj, keras.Optimizer))
    return next(ready, 0)


def complete(filled: Sequence[tuple[Any, Any]], backend: Backend) -> None:
    """Do what has to wait until all shells are filled.

    Parameters
    ----------
    filled : sequence of (object, state)
        All shells with their states; those that are Custom are filled now, when a class's
        own code finds its parts there.
    backend : Backend
    """
    mending.mend_trackers(filled)
    for shell, state in reversed(filled):
        if isinstance(state, Custom):
            fill(shell, state)
    mending.mend(filled)
    for shell, state in filled:
        backend.mend(shell, state)


#: Of a millisecond each.
_TRIES = 1000


def view(variable: keras.Variable, backend: Backend, owner: str) -> Array:
    """View a variable's value, which another thread may be training.

    Raises
    ------
    EncodeError
        If it is never whole.
    """
    return _whole(variable, backend.view(variable), backend, owner)


def views(variables: Sequence[keras.Variable], backend: Backend, owner: str) -> list[Array]:
    """View variables' values, as :func:`view`; their copies from other devices overlap."""
    return [
        _whole(variable, array, backend, owner)
        for variable, array in zip(variables, backend.views(variables), strict=True)
    ]


def views_or_frames(
    variables: Sequence[keras.Variable], backend: Backend, owner: str
) -> list[Array | DeviceFrame]:
    """View variables' values, but take those that are large and on a GPU as device frames."""
    large = [v for v in variables if stays_on_device(v, backend)]
    frames = {
        id(variable): frame
        for variable, frame in zip(large, backend.device_frames(large), strict=True)
        # None, or another size, if a trainer has it just now; or kept in another dtype
        if frame is not None and frame.nbytes == nbytes(variable)
    }
    rest = [variable for variable in variables if id(variable) not in frames]
    arrays = iter(views(rest, backend, owner))
    return [frames[id(v)] if id(v) in frames else next(arrays) for v in variables]


def stays_on_device(variable: keras.Variable, backend: Backend) -> bool:
    """Say whether a variable is sent from the GPU it lies on, if frames may lie there."""
    return nbytes(variable) >= LARGE and has_value(variable) and backend.on_gpu(variable)


def shape_of(variable: keras.Variable) -> tuple[int, ...]:
    """Return a variable's shape, of which TensorFlow would make a TensorShape first."""
    shape = vars(variable).get("_shape")
    return tuple(map(int, variable.shape if shape is None else shape))


def nbytes(variable: keras.Variable) -> int:
    """Count the bytes of a variable, without reading it."""
    return math.prod(shape_of(variable)) * ITEMSIZE.get(variable.dtype, 1)


def _whole(variable: keras.Variable, array: Array | None, backend: Backend, owner: str) -> Array:
    """Return a variable's view as it travels; look again for as long as it is not whole."""
    shape = shape_of(variable)
    for _ in range(_TRIES):
        if array is not None and array.shape == shape:
            # JAX keeps 64 bits in 32, torch unsigned numbers in wider ones that have a sign
            name = variable.dtype
            unlike = name != STRING and array.dtype != numpy_dtype(name)
            return array.astype(numpy_dtype(name)) if unlike else array
        # TensorFlow takes a tensor apart for as long as it updates it in place; JAX's trainer
        # takes the values out of their variables for an epoch
        time.sleep(0.001)
        array = backend.view(variable)
    raise EncodeError(
        f"{owner}: variable {variable.path!r} has no value of its shape {shape}: if another thread "
        "trains the model, send it from a callback, by its self.model, or between epochs; if a run "
        "of it failed, set its weights again"
    )


def has_value(variable: keras.Variable) -> bool:
    """Say whether a variable is initialised, even if a trainer holds its value just now."""
    return variable._value is not None or variable._initializer is None
