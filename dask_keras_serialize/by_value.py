"""Models by value: the graph of their objects through pickle, variables as frames.

For what a config cannot carry: subclasses of Model, custom layers, losses, metrics
and training steps, Python attributes. Every Keras object becomes a *shell*, made
empty by ``cls.__new__`` and filled from its own ``__dict__``; inside a state, other
Keras objects are persistent ids that name their shells. So no chain of layers nests
deeper than pickle can recurse, cycles close by themselves, and Keras's constructors
and ``__reduce__`` never run. Variables are left out of the pickle: they are the
table's. Code that the other side cannot import travels by cloudpickle's rules.

It needs the same minor versions of Python and Keras and the same backend on both
sides, and it runs pickle: load only what you trust.

Caches are dropped (traced functions, losses of the last call) and what Keras keys by
``id()`` is mended; see ``mending``.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends
from dask_keras_serialize.backends import Array
from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.mending import menders
from dask_keras_serialize.private import MISSING, State, Tracker
from dask_keras_serialize.rebuild import Values, check_fits, rebuilding
from dask_keras_serialize.shells import ShellPickler, ShellUnpickler, own_method


def dump(
    model: keras.Model, *, for_token: bool = False
) -> tuple[dict[str, Any], list[keras.Variable], list[Array]]:
    """Describe a model by the graph of its objects.

    Parameters
    ----------
    model : keras.Model
    for_token : bool
        Make the bytes the same in every process; see :class:`shells.ShellPickler`.

    Returns
    -------
    body : dict
        For the header.
    variables : list of keras.Variable
        For the table.
    extras : list of ndarray of uint8
        The pickle, then the out-of-band buffers of the arrays in it.

    Raises
    ------
    EncodeError
        If something the model holds cannot be pickled; names the attribute.

    Notes
    -----
    Copies: none of variables' or arrays' bytes.
    """
    if MISSING:
        raise EncodeError(
            f"model {model.name!r} ({type(model).__qualname__}) must go by value, which this "
            f"keras {keras.version()} is too new for ({', '.join(MISSING)} is gone): use an "
            "older one, or update this package"
        )
    return _Dump(model, for_token).run()


def load(body: dict[str, Any], values: Values, extras: list[Array]) -> keras.Model:
    """Rebuild a model from what :func:`dump` described. It runs pickle.

    Parameters
    ----------
    body : dict
    values : Values
    extras : list of ndarray of uint8

    Returns
    -------
    keras.Model

    Raises
    ------
    DecodeError
        If a class or module is missing here, or the bytes are not whole.

    Notes
    -----
    Copies: one of each variable's bytes, into memory the backend owns, and one of
    each array that was writeable.
    """
    owner = values.header.owner
    with rebuilding():
        try:
            return _Load(body, values, extras).run()
        except DecodeError:
            raise
        except ModuleNotFoundError as error:
            raise DecodeError(
                f"{owner}: it holds code of module {error.name!r}, which is not installed "
                f"here: install it on every worker, or call cloudpickle."
                f"register_pickle_by_value({error.name}) before sending"
            ) from error
        except Exception as error:  # unpickling runs anybody's code
            raise DecodeError(f"{owner}: it cannot be rebuilt by value here: {error!r}") from error


class _Dump:
    """One model on its way out."""

    def __init__(self, model: keras.Model, for_token: bool) -> None:
        self.model = model
        self.owner = f"model {model.name!r} ({type(model).__qualname__})"
        self.for_token = for_token
        self.stream = io.BytesIO()
        self.buffers: list[pickle.PickleBuffer] = []
        self.objects: list[Any] = []
        self.variables: list[keras.Variable] = []
        self.index: dict[int, int] = {}
        self.predicates: dict[types.CodeType, Any] = {}
        self.backend = backends.current()[1]
        self.pickler = self.new_pickler(self.stream, self.buffers)

    def run(self) -> tuple[dict[str, Any], list[keras.Variable], list[Array]]:
        self.pickler.dump(self.model)
        done = 0
        while done < len(self.objects):  # pickling a state finds more objects
            obj = self.objects[done]
            try:
                state = self.state(obj)
            except EncodeError as error:
                raise EncodeError(f"{self.owner}: {error}") from error
            if self.for_token and isinstance(state, dict):
                state = dict(sorted(state.items()))  # what was mended comes last
            try:
                self.pickler.dump(state)
            except Exception as error:
                raise EncodeError(self.blame(obj, state, error)) from error
            done += 1
        raw = [buffer.raw() for buffer in self.buffers]
        body = {"objects": done, "writeable": [not view.readonly for view in raw]}
        stream = np.frombuffer(self.stream.getbuffer(), np.uint8)
        return body, self.variables, [stream, *(np.frombuffer(view, np.uint8) for view in raw)]

    def new_pickler(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> ShellPickler:
        return ShellPickler(file, buffers, self.backend, self.number, self.for_token)

    def number(self, obj: Any) -> int:
        """Return the number of an object's shell, a new one at first sight."""
        number = self.index.get(id(obj))
        if number is None:
            # caches __slotnames__ on the class, which changes the class's own pickle:
            # now, or tokens would differ from the first to the second (as in dask/tokenize.py)
            copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
            number = self.index[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return number

    def state(self, obj: Any) -> Any:
        """Return what fills an object's shell: its ``__dict__``, caches dropped."""
        if isinstance(obj, keras.Variable):
            return self.variable_state(obj)
        if isinstance(obj, Tracker):
            return self.tracker_state(obj)
        if own_method(type(obj), "__getstate__"):
            state = obj.__getstate__()
        else:
            plain = object.__getstate__(obj)
            state, slots = plain if isinstance(plain, tuple) else (plain, None)
            state = (state or {}) | (slots or {})
        if isinstance(state, dict):
            state = dict(state)
            for mender in menders(obj):
                mender.drop(obj, state)
            self.backend.drop(obj, state)
        if own_method(type(obj), "__setstate__"):
            return _Custom(state)
        if not isinstance(state, dict):
            raise EncodeError(
                f"{type(obj).__qualname__} {getattr(obj, 'name', '')!r} has a __getstate__ that "
                f"returns a {type(state).__name__}: give it a __setstate__ that takes it"
            )
        return state

    def variable_state(self, variable: keras.Variable) -> State:
        state = dict(vars(variable))
        if state.pop("_value") is not None:
            state["value"] = len(self.variables)
            self.variables.append(variable)
        return state

    def tracker_state(self, tracker: Tracker) -> State:
        state = dict(vars(tracker))
        del state["stored_ids"]
        # its predicates are lambdas without closures, made anew for every layer:
        # send one for each place in Keras's source
        state["config"] = {
            name: (self.predicates.setdefault(test.__code__, test), store)
            for name, (test, store) in tracker.config.items()
        }
        return state

    def blame(self, obj: Any, state: Any, error: Exception) -> str:
        """Say which attribute of an object cannot travel."""
        owner = self.owner
        where = f"{type(obj).__qualname__} {getattr(obj, 'name', '')!r}"
        for path, value in _parts(state):
            try:
                self.new_pickler(io.BytesIO(), []).dump(value)
            except Exception as cause:
                return (
                    f"{owner}: attribute {path} of {where}, a {type(value).__name__}, cannot "
                    f"travel ({cause}): make it in a method, or leave it out by __getstate__"
                )
        return f"{owner}: {where} cannot travel: {error}"


class _Load:
    """One model on its way in."""

    def __init__(self, body: dict[str, Any], values: Values, extras: list[Array]) -> None:
        self.values = values
        self.count = int(body["objects"])
        writeable = body["writeable"]
        stream, *arrays = extras
        buffers = [
            _with_writeable(array, bool(flag))
            for array, flag in zip(arrays, writeable, strict=True)
        ]
        self.shells: dict[int, Any] = {}
        self.rows: list[int] = []
        self.unpickler = ShellUnpickler(
            self.shells, io.BytesIO(stream.data), buffers, values.backend
        )

    def run(self) -> keras.Model:
        model = self.unpickler.load()
        states = []
        for number in range(self.count):
            state = self.unpickler.load()
            self.fill(self.shells[number], state)
            states.append(state)
        # what is derived from other objects comes last, when all are filled
        for number, state in enumerate(states):
            shell = self.shells[number]
            for mender in menders(shell):
                mender.mend(shell, state)
            self.values.backend.mend(shell, state)
        owner = self.values.header.owner
        if not isinstance(model, keras.Model):
            raise DecodeError(f"{owner}: the pickle holds no model")
        if self.shells.keys() != set(range(self.count)):
            raise DecodeError(f"{owner}: the pickle is not whole: objects are missing or extra")
        if sorted(self.rows) != list(range(len(self.values.header.variables))):
            raise DecodeError(f"{owner}: the table of variables is not the one of the pickle")
        return model

    def fill(self, shell: Any, state: Any) -> None:
        if isinstance(state, _Custom):
            shell.__setstate__(state.state)
            return
        value = state.pop("value", None) if isinstance(shell, keras.Variable) else None
        for name, content in state.items():
            slot = getattr(type(shell), name, None)
            if isinstance(slot, types.MemberDescriptorType):
                slot.__set__(shell, content)
            else:  # past __setattr__, where Keras would track what its lists already hold
                shell.__dict__[name] = content
        if isinstance(shell, keras.Variable):
            shell._value = None
            if value is not None:
                self.rows.append(value)
                check_fits(shell, value, self.values.header)
                shell._initialize(self.values.tensor(value))


def _with_writeable(array: Array, flag: bool) -> Array:
    """Return an array as writeable as it was; a copy if it must be and is not ours."""
    if flag and not array.flags.writeable:
        return array.copy()
    array.flags.writeable = flag
    return array


class _Custom:
    """A state that the class takes in itself, by ``__setstate__``."""

    def __init__(self, state: Any) -> None:
        self.state = state


def _parts(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the smallest parts of a state first, with their paths."""
    items: Iterator[tuple[str, Any]]
    if isinstance(state, dict):
        items = ((f"{path}.{k}" if not path else f"{path}[{k!r}]", v) for k, v in state.items())
    elif isinstance(state, (list, tuple, set)):
        items = ((f"{path}[{i}]", v) for i, v in enumerate(state))
    else:
        return
    for name, value in items:
        yield from _parts(value, name)
        yield name, value
