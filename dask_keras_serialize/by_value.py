"""Objects by value: the graph of all they hold through pickle, variables as frames.

For what a config cannot carry: subclasses of Model, custom layers, losses, metrics
and training steps, Python attributes; and for every object that is no model. Every
Keras object becomes a *shell*, made empty by ``cls.__new__`` and filled from its own
``__dict__``; inside a state, other Keras objects are persistent ids that name their
shells. So no chain of layers nests deeper than pickle can recurse, cycles close by
themselves, and Keras's constructors and ``__reduce__`` never run. Variables are left
out of the pickle: they are the table's. Code that the other side cannot import travels
by cloudpickle's rules.

It needs the same minor versions of Python and Keras and the same backend on both
sides, and it runs pickle: load only what you trust.

Caches are dropped (traced functions, losses of the last call) and what Keras keys by
``id()`` is mended; see ``mending``. Objects that lie in another parcel of the same
pickle are named there, not sent again; see ``parts``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras

from dask_keras_serialize import private
from dask_keras_serialize.arrival import Arrival, explained
from dask_keras_serialize.backends import Array
from dask_keras_serialize.departure import Departure
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.outside import Outside
from dask_keras_serialize.parts import Description, Key, Rebuilt
from dask_keras_serialize.private import MISSING
from dask_keras_serialize.rebuild import Values


def dump(
    root: Any,
    *,
    for_token: bool = False,
    links: Mapping[int, tuple[Any, Key | None]] = MappingProxyType({}),
    seen: Sequence[Any] = (),
    outside: Outside | None = None,
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
    outside : Outside, optional
        What of the things that are not Keras's another pickler carries.

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
            f"{private.describe(root)} must go by value, which this "
            f"keras {keras.version()} is too new for ({', '.join(MISSING)} is gone): use an "
            "older one, or update this package"
        )

    def attempt(seen: Sequence[Any], all_shells_first: bool) -> Description:
        sending = Departure(root, for_token, links, seen, outside)
        try:
            return sending.run(all_shells_first)
        finally:
            del sending.pickler  # they hold each other, and what others may then link to

    described = attempt(seen, False)
    if outside is not None and (described.outside or described.links):
        # these may hold this object, or wait for such: shells must be there before states
        outside.settle()
        described = attempt(list(described.parts().values()), True)
    return described


def load(
    body: dict[str, Any],
    values: Values,
    extras: list[Array],
    links: Sequence[Rebuilt] = (),
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
    with explained(values.header.owner):
        loading = Arrival(body, values, extras, links)
        root = loading.begin()
    if loading.shells_first:
        return Rebuilt(root, lambda: loading.shells, loading.finish)
    loading.finish(())
    return Rebuilt(root, lambda: loading.shells)
