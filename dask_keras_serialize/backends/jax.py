"""JAX: arrays are immutable, so a view is a snapshot by nature.

But for as long as it fits, evaluates or predicts, Keras's trainer takes the values out of their
variables, so that they are in memory once, and gives them away to each step, which returns new
ones (``keras/src/backend/jax/trainer.py``). Meanwhile another thread finds variables without a
value: a task that predicts with the same model fails. So we remember who took them; the variable
then gives the trainer's, and threads that evaluate or predict with one model take turns.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax._src.array import ArrayImpl
from keras.src.backend.common.stateless_scope import in_stateless_scope

from dask_keras_serialize.backends import Array

logger = logging.getLogger(__name__)


def view(variable: Any) -> Array | None:
    """View a variable's value.

    Parameters
    ----------
    variable : keras.Variable
        On any device; a sharded array is gathered.

    Returns
    -------
    ndarray
        Read-only, of the variable's shape and dtype. JAX gives no memory away, when an
        array is donated, that is viewed. None if it was given away just now.

    Notes
    -----
    Copies: none for an array in host memory, else one.
    """
    value = variable._value
    return _view_of(_held(variable) if value is None else value)


def _view_of(value: jax.Array | None) -> Array | None:
    if value is None:
        return None
    try:
        array: Array = np.asarray(value).view(_View)
    except RuntimeError:  # given away to a step of training in another thread
        return None
    array.flags.writeable = False
    return array


class _View(np.ndarray[Any, np.dtype[Any]]):
    """An array's memory, which JAX never writes to."""


def tensor(array: Array) -> jax.Array:
    """Turn an array into one of JAX's.

    Parameters
    ----------
    array : ndarray
        A writeable one is the caller's to give away: nobody may write to it any more.

    Returns
    -------
    jax.Array
        On the default device. JAX never writes to memory it adopted, nor gives it away
        when it is donated.

    Notes
    -----
    Copies: none of a writeable array, nor of a view of an array of this process, that starts
    at a multiple of 64 bytes; else one, by JAX where it is not aligned.
    """
    if array.flags.writeable or isinstance(array, _View):
        return jax.device_put(np.asarray(array), may_alias=True)
    return jnp.array(array, copy=True)  # device_put may alias what others write to


def tensor_in(array: Array, memory: Array) -> jax.Array:
    """Turn an array into a tensor: nobody can write to one, so none has to share memory."""
    return tensor(array)


def initialize(variable: Any, tensor: Any) -> None:
    """Give a new variable its value."""
    variable._initialize(tensor)


def placement(variable: Any) -> list[Any] | None:
    """Say how a variable's value is sharded over a mesh of devices.

    Returns
    -------
    list or None
        The mesh's shape and the names of its axes, and for each axis of the value the names of
        those it is split over, or None.
    """
    value = variable._value
    sharding = getattr(_held(variable) if value is None else value, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size < 2:
        return None
    spec = [list(axis) if isinstance(axis, tuple) else axis for axis in sharding.spec]
    return [list(sharding.mesh.devices.shape), list(sharding.mesh.axis_names), spec]


def place(tensor: jax.Array, placement: list[Any]) -> jax.Array:
    """Shard a tensor as another process had it, over this one's first devices.

    Where there are fewer, and where a ``keras.distribution`` is set, which Keras then follows,
    it stays on one.

    Notes
    -----
    Copies: one, where it is sharded.
    """
    shape, names, spec = placement
    devices = jax.devices()[: math.prod(shape)]
    if keras.distribution.distribution() is not None or len(devices) < math.prod(shape):
        return tensor
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), tuple(names))
    axes = (tuple(axis) if isinstance(axis, (list, tuple)) else axis for axis in spec)
    return jax.device_put(
        tensor, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    )


def no_config_holds(layer: Any) -> str | None:
    """Return None: nothing is done to a layer past Keras."""
    return None


def slots() -> Iterator[tuple[Any, str, Any]]:
    """Yield what of Keras's takes values out of variables, reads them, or must take turns."""
    wrapped = [(keras.Model, name, _in_turn) for name in _RUNS]
    wrapped += [(keras.Model, name, _forgetting) for name in _TRAINING]
    wrapped += [(keras.Model, _PURGE, _remembering), (keras.Variable, "value", _reading)]
    for base, name, wrap in wrapped:
        cls = next((cls for cls in base.__mro__ if name in vars(cls)), None)
        if cls is not None:
            yield cls, name, wrap(vars(cls)[name])


#: What tasks of one worker call of one model. Not ``fit``: its callbacks and its data may wait for
#: threads that run the model.
_RUNS = ("evaluate", "predict", "test_on_batch", "predict_on_batch")
_TRAINING = ("fit", "train_on_batch")
_PURGE = "_purge_model_variables"

#: Locks by the model they are of: one thread at a time runs it.
_TURNS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

#: Seconds that a thread waits for its turn. Longer ones wait for each other: one goes on, as it
#: would by Keras alone.
_PATIENCE = 60.0


def _in_turn(original: Any) -> Any:
    run = _forgetting(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        turn = _TURNS.setdefault(self, threading.RLock())
        mine = turn.acquire(timeout=_PATIENCE)
        if not mine:
            logger.warning("%s runs in two threads, each for over %.0f s", self.name, _PATIENCE)
        try:
            return run(self, *args, **kwargs)
        finally:
            if mine:
                turn.release()

    return method


def _forgetting(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            _forget(self)

    return method


class _Held(NamedTuple):
    """A value that a trainer has taken out of a variable."""

    variable: ref[Any]
    trainer: ref[Any]
    kind: str
    place: int
    #: Given away at the first step; else it goes then.
    first: ref[Any]


#: By the variable's ``id()``.
_HELD: dict[int, _Held] = {}


def _remembering(original: Any) -> Any:
    """Wrap ``_purge_model_variables``."""

    @functools.wraps(original)
    def purge(self: Any, **kinds: bool) -> None:
        for kind in (kind for kind, purged in kinds.items() if purged):
            owner = self.optimizer if kind.startswith("optimizer") else self
            name = "variables" if owner is not self else kind
            for place, variable in enumerate(getattr(owner, name)):
                if variable._value is not None:
                    held = _Held(ref(variable), ref(self), kind, place, ref(variable._value))
                    _HELD[id(variable)] = held
        original(self, **kinds)

    return purge


def _forget(trainer: Any) -> None:
    """Forget what is back in its variable; what is not, after an interrupt, can still be read."""
    for key, held in list(_HELD.items()):
        variable = held.variable()
        back = variable is not None and variable._value is not None
        if variable is None or (back and held.trainer() is trainer):
            _HELD.pop(key, None)


def _held(variable: Any) -> Any:
    """Return the array that a trainer has taken out of a variable, or None."""
    held = _HELD.get(id(variable))
    if held is None or held.variable() is not variable:
        return None
    state = getattr(held.trainer(), "_jax_state", None) or {}
    return state[held.kind][held.place] if held.kind in state else held.first()


#: Of a millisecond each: for as long as a step may have given a value away.
_TRIES = 1000


def _reading(original: property) -> property:
    """Wrap ``Variable.value``."""

    def value(self: Any) -> Any:
        if self._value is None and id(self) in _HELD and not in_stateless_scope():
            for _ in range(_TRIES):
                view = _view_of(_held(self))
                if view is not None:  # as an array of its own: the trainer's is given away
                    return self._maybe_autocast(tensor(view))
                if id(self) not in _HELD:  # it is back
                    break
                time.sleep(0.001)
        return original.__get__(self)

    return property(value, doc=original.__doc__)


def version() -> str:
    """Return JAX's version."""
    return str(jax.__version__)


STRINGS = False

ONE_STEP = False

#: Not the class of an array made here: that would start JAX's devices, which a user may yet set up.
TENSORS: tuple[type, ...] = (ArrayImpl,)

REDUCED: tuple[type, ...] = ()

SHELLS: tuple[type, ...] = ()


def shell(cls: type) -> Any:
    """Never called: there are no classes in SHELLS."""
    raise TypeError(cls)


def reduce(obj: Any) -> tuple[Any, ...] | None:
    """Reduce an array past copyreg's table, where it is a parcel of its own."""
    if not isinstance(obj, TENSORS):
        return None
    array: Any = obj
    reduced: tuple[Any, ...] = array.__reduce__()
    return reduced


def drop(obj: Any, state: dict[str, Any]) -> None:
    """Leave out what a trainer holds for an epoch, and the devices that a value lies on."""
    if state.get("_layout") is not None:  # ``placement`` has it
        state["_layout"] = None
    if state.pop("_jax_state", None) is not None:
        state["_jax_state_synced"] = True


def mend(obj: Any, state: dict[str, Any]) -> None:
    """Mend nothing."""


def adopt(obj: Any) -> None:
    """Do nothing: no attribute is watched."""
