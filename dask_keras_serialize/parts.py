"""What an encoding makes of an object, and what it makes of that: with names for its parts.

Objects that are pickled together may share parts: two models a layer, an optimizer and
a model their variables. Each part has a *key* that means the same to sender and
receiver, so that one parcel can refer to the parts of another; see ``pickling``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dask_keras_serialize.backends import Array

#: Names a part of an object: its number by value, its place by config.
Key = int | tuple[Any, ...]

#: Names a part from outside: the number of another parcel and the key there.
#: None is the key of a whole object.
Reference = int | tuple[int, Key | None]


class Description(NamedTuple):
    """An object on its way out.

    Attributes
    ----------
    body : dict
        For the header.
    variables : list of keras.Variable
        For the table, in an order that a rebuild repeats.
    extras : list of ndarray of uint8
        What else travels as bytes.
    parts : callable
        Returns the parts of the object by their keys.
    links : list
        By value: the other parcels it refers to, in the order of the references.
    """

    body: dict[str, Any]
    variables: list[Any]
    extras: list[Array]
    parts: Callable[[], Mapping[Any, Any]]
    links: list[Any]


class Rebuilt(NamedTuple):
    """An object that has arrived.

    Attributes
    ----------
    root : object
    parts : callable
        Returns its parts by the keys they had on the way out.
    """

    root: Any
    parts: Callable[[], Mapping[Any, Any]]

    def part(self, key: Key | None) -> Any:
        """Return the part of a key, the object itself for None; None if there is no such."""
        return self.root if key is None else self.parts().get(key)
