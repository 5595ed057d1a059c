"""JAX: arrays are immutable, so a view is a snapshot by nature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dask_keras_serialize.backends import Array


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
    try:
        array: Array = np.asarray(variable.value).view(_View)
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


def initialize(variable: Any, tensor: Any) -> None:
    """Give a new variable its value."""
    variable._initialize(tensor)


def slots() -> Iterator[tuple[Any, str, Any]]:
    """Yield nothing: a view is of one instant whatever other threads do."""
    yield from ()


def version() -> str:
    """Return JAX's version."""
    return str(jax.__version__)


TENSORS: tuple[type, ...] = (type(jnp.zeros(())),)

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
    """Leave out what a trainer holds for an epoch (``keras/src/backend/jax/trainer.py``)."""
    if state.pop("_jax_state", None) is not None:
        state["_jax_state_synced"] = True


def mend(obj: Any, state: dict[str, Any]) -> None:
    """Mend nothing."""


def adopt(obj: Any) -> None:
    """Do nothing: no attribute is watched."""
