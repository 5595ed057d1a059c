"""JAX: arrays are immutable, so a view is a snapshot by nature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dask_keras_serialize.backends import Array


def view(variable: Any) -> Array:
    """View a variable's value.

    Parameters
    ----------
    variable : keras.Variable
        On any device; a sharded array is gathered.

    Returns
    -------
    ndarray
        Read-only, of the variable's shape and dtype. JAX does not donate a buffer
        that is viewed.

    Notes
    -----
    Copies: none for an array in host memory, else one.
    """
    array: Array = np.asarray(variable.value)
    array.flags.writeable = False
    return array


def tensor(array: Array) -> jax.Array:
    """Copy an array; ``copy=True`` because JAX would alias an aligned one."""
    return jnp.array(array, copy=True)


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
    """Leave nothing out."""


def mend(obj: Any, state: dict[str, Any]) -> None:
    """Mend nothing."""
