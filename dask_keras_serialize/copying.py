"""``copy.copy`` and ``copy.deepcopy`` of Keras's objects, by Python's own rules.

A copy shares what the object holds: layers, variables, an optimizer. So training the
copy of a model trains the model. What Keras itself keeps in lists on the object is listed
anew, so that adding a layer to one adds none to the other.

A deepcopy shares nothing but what Python never copies (functions, classes, modules) and
what the memo of the copy under way already has. Every Keras object becomes a shell at
first sight, filled from a deepcopy of its state when its turn comes: so no graph of layers
nests deeper than Python can recurse, and cycles close by themselves.
"""

from __future__ import annotations

import copy
import io
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import keras

from dask_keras_serialize import backends, private
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.rebuilding.rebuild import rebuilding
from dask_keras_serialize.values import mending
from dask_keras_serialize.values.blame import culprit, sentence
from dask_keras_serialize.values.shells import closed_file, new_shell, reduces_itself
from dask_keras_serialize.values.states import (
    Custom,
    attributes_of,
    complete,
    fill,
    has_value,
    items_of,
    next_place,
    state_of,
    view,
)


def shallow(obj: Any) -> Any:
    """Return another object with the same parts; stands on base classes as ``__copy__``.

    Parameters
    ----------
    obj : object
        One of Keras's; a class of the user's that defines ``__reduce__`` is copied by that.

    Returns
    -------
    object
        Of the same class. Traced functions are its own, as they hold the model.
    """
    if reduces_itself(obj.__class__):
        return _reconstruct(obj, None)
    state = attributes_of(obj)
    mending.forget(obj, state)
    own: dict[int, Any] = {}
    tracker = state.get("_tracker")
    if isinstance(tracker, private.Tracker):
        twin = own[id(tracker)] = new_shell(type(tracker))
        twin.__dict__ |= vars(tracker)
        twin.stored_ids = {name: set(ids) for name, ids in tracker.stored_ids.items()}
        own |= {id(store): list(store) for _, store in tracker.config.values()}
        twin.config = {name: (test, own[id(s)]) for name, (test, s) in tracker.config.items()}
    for name, value in state.items():
        if name.startswith("_") and id(value) not in own:
            if isinstance(value, private.TRACKED):
                own[id(value)] = type(value)(value, own.get(id(value.tracker), value.tracker))
            elif type(value) in (list, dict, set, OrderedDict):  # which torch up to 2.4 has more of
                own[id(value)] = copy.copy(value)
    shell = new_shell(type(obj))
    fill(shell, items_of(obj) | {name: own.get(id(v), v) for name, v in state.items()})
    if isinstance(obj, keras.Variable):
        shell._value = obj._value
    return shell


def deep(obj: Any, memo: dict[Any, Any]) -> Any:
    """Return an independent replica; stands on base classes as ``__deepcopy__``.

    Parameters
    ----------
    obj : object
        One of Keras's; a class of the user's that defines ``__reduce__`` is copied by that.
    memo : dict
        Of the copy under way.

    Returns
    -------
    object
        Of the same class; if another one of Keras's is being copied, not yet filled.

    Raises
    ------
    EncodeError
        If it holds what only lives here, such as a TensorFlow strategy.

    Notes
    -----
    Copies: none of the bytes of variables that the backend can show where they lie, until one of
    the two is written to; else each once. Values lie in memory, or over devices, as they lay.
    """
    if reduces_itself(obj.__class__):
        return _reconstruct(obj, memo)
    copying = memo.get(_COPYING)
    if copying is not None:
        shell: Any = copying.shell_of(obj)
        return shell
    copying = memo[_COPYING] = _Copying(obj, memo)
    try:
        with rebuilding():
            twin = copying.shell_of(obj)
            copying.run()
    finally:
        del memo[_COPYING]
    return twin


def deep_inside(original: Any) -> Callable[[Any, dict[Any, Any]], Any]:
    """Deepcopy what a backend puts into Keras's objects; as it does itself anywhere else."""

    def deepcopy(obj: Any, memo: dict[Any, Any]) -> Any:
        copying = memo.get(_COPYING)
        if copying is None:
            return original(obj, memo)
        if isinstance(obj, copying.backend.SHELLS):
            return copying.shell_of(obj)
        reduced = copying.backend.reduce(obj)
        if reduced is None and original is not None:
            return original(obj, memo)
        return _reconstruct(obj, memo, reduced)

    return deepcopy


#: Where a memo keeps the copy of Keras's objects under way.
_COPYING = "dask_keras_serialize.copying"


class _Copying:
    """One deepcopy under way: shells that wait to be filled."""

    def __init__(self, root: Any, memo: dict[Any, Any]) -> None:
        self.root = root
        self.memo = memo
        self.backend = backends.current()[1]
        self.waiting: list[tuple[Any, Any]] = []
        self.filled: list[tuple[Any, Any]] = []
        self.variables: list[keras.Variable] = []

    def shell_of(self, obj: Any) -> Any:
        cls = type(obj)
        shell = self.backend.shell(cls) if cls in self.backend.SHELLS else new_shell(cls)
        self.memo[id(obj)] = shell
        self.waiting.append((obj, shell))
        return shell

    def run(self) -> None:
        while self.waiting:  # copying a state finds more
            obj, shell = self.waiting.pop(next_place(obj for obj, _ in self.waiting))
            state = state_of(obj, self.backend, self.variables)
            for value in state.values() if isinstance(state, dict) else ():
                if isinstance(value, types.ModuleType):
                    self.memo[id(value)] = value
                elif isinstance(value, io.IOBase) and value.closed:
                    self.memo[id(value)] = closed_file()
            state = self._copy(obj, state)
            self.filled.append((shell, state))
            if not isinstance(state, Custom):
                fill(shell, state)
            if isinstance(obj, keras.Variable) and has_value(obj):
                self.variables.append(obj)
                array = view(obj, self.backend, private.describe(obj))
                tensor, placement = self.backend.tensor(array), self.backend.placement(obj)
                if placement is not None:
                    tensor = self.backend.place(tensor, placement)
                self.backend.initialize(shell, tensor)
        complete(self.filled, self.backend)

    def _copy(self, obj: Any, state: Any) -> Any:
        try:
            return copy.deepcopy(state, self.memo)
        except EncodeError:
            raise
        except Exception as error:  # what an object does to be copied is anybody's code
            if isinstance(obj, private.TRACKED):  # a container, which goes for who holds it
                obj, state = self.root, attributes_of(self.root)
            found = culprit(state, self._error_of)
            if found is None:
                raise
            raise EncodeError(sentence(private.describe(obj), found, "", "be copied")) from error

    def _error_of(self, value: Any) -> Exception | None:
        """Return what copying a part of a state raises; Keras's objects in it have their turn."""
        if isinstance(value, types.ModuleType):
            return None
        apart: dict[Any, Any] = {}
        apart[_COPYING] = _Copying(self.root, apart)
        try:
            copy.deepcopy(value, apart)
        except Exception as error:  # as above
            return error
        return next(filter(None, map(self._error_of, private.watched_items(value))), None)


def _reconstruct(obj: Any, memo: dict[Any, Any] | None, reduced: Any = None) -> Any:
    reconstruct = copy._reconstruct  # type: ignore[attr-defined]
    return reconstruct(obj, memo, *(reduced or obj.__reduce_ex__(4)))
