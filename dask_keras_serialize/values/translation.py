"""Objects by value from another backend: what was the sender's there becomes ours here.

An object's graph is Keras's own and the user's, but for what a backend's base classes add
to it (``backends.ADDED``): that is left out, what this backend adds is put in its place as on a
new object, and Keras's modules for the one backend are looked up as those for the other. How a
model is executed is left to this backend. What else names the sender's packages cannot be
translated.
"""

from __future__ import annotations

import traceback
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends
from dask_keras_serialize.backends import ADDED, COMMON, OWN_OPTIMIZERS, PACKAGES, Array
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.private import State
from dask_keras_serialize.values.states import ITEMS, Custom
from dask_keras_serialize.wire.header import Header

#: Makes an object that shows what this backend adds to those of a class.
_NEW = {
    keras.Model: keras.Model,
    keras.Layer: keras.Layer,
    keras.Optimizer: keras.optimizers.SGD,
    keras.Variable: SimpleNamespace,  # nothing but what TensorFlow makes when it needs it
}

#: Where the like of ``backends.COMMON`` is, by name.
_HERE = {
    "convert_to_tensor": (__name__, "tensor"),
    "ListWrapper": ("builtins", "list"),
    "_reconstruct_array": (__name__, "tensor_of_jax"),
    "TensorShape": (__name__, "shape"),
    "Dimension": (__name__, "dimension"),
    "Size": ("builtins", "tuple"),
    "as_dtype": ("builtins", "str"),
    "dtype_of": ("builtins", "str"),
}


class Translation:
    """From one backend to the one that runs here.

    Parameters
    ----------
    sender : str
        The backend that the object comes from.
    """

    def __init__(self, sender: str) -> None:
        self.sender = sender
        self.here, self.backend = backends.current()

    def name(self, module: str, name: str) -> tuple[str, str]:
        """Return where a class or function that the sender names is to be found here.

        Raises
        ------
        DecodeError
            If it is of the sender's backend.
        """
        if (module, name) in COMMON:
            return _HERE[name]
        if module.startswith(OWN_OPTIMIZERS):
            return "keras.optimizers", name
        theirs = f"keras.src.backend.{self.sender}"
        if module == theirs or module.startswith(f"{theirs}."):
            return f"keras.src.backend.{self.here}{module.removeprefix(theirs)}", name
        adapter = f"{backends.__name__}.{self.sender}"
        if module.partition(".")[0] in PACKAGES[self.sender] or module == adapter:
            raise DecodeError(
                f"{module}.{name} is of the backend {self.sender!r}, but Keras runs on "
                f"{self.here!r} in this process"
            )
        return module, name

    def renames(self, name: str) -> bool:
        """Say whether a class of the sender's, by its full name, is called otherwise here."""
        return name.partition(".")[0] in PACKAGES[self.sender]

    def state(self, shell: Any, state: State | Custom) -> None:
        """Put a state in terms of this backend; changed in place."""
        if isinstance(state, Custom):
            state = state.state
        if not isinstance(state, dict):
            return
        if type(shell) is list:  # a ListWrapper there
            for name in [name for name in state if name != ITEMS]:
                del state[name]
        kind = next((cls for cls in _NEW if isinstance(shell, cls)), None)
        if kind is None:
            return
        added = [name for name in state if ADDED[self.sender].fullmatch(name)]
        for name in added:
            if name != "training":  # torch's, but what a user's layer may well have too
                content = state.pop(name)
                if name == "_modules":  # where torch's keep what elsewhere are attributes
                    state |= content
        for name, value in vars(_NEW[kind]()).items():
            # TensorFlow makes these when it first needs them
            if ADDED[self.here].fullmatch(name) and not name.startswith("_self_"):
                state.setdefault(name, value)
        if kind is keras.Model:
            state["_jit_compile"] = None  # Trainer.jit_compile finds out when asked
            if self.backend.ONE_STEP:
                state["steps_per_execution"] = 1

    def complete(self, shells: list[Any]) -> None:
        """Do what has to wait until all shells are filled."""
        for shell in shells:
            self.backend.adopt(shell)
            if isinstance(shell, keras.random.SeedGenerator):
                self._cast(shell.state)

    def _cast(self, seed: keras.Variable) -> None:
        dtype = keras.random.SeedGenerator(0).state.dtype
        if seed.dtype != dtype:
            value = np.asarray(self.backend.view(seed)).astype(dtype)
            seed._dtype = dtype
            self.backend.initialize(seed, self.backend.tensor(value))


def translation_from(sender: str) -> Translation | None:
    """Return what an object of another backend needs; None if it is of this one."""
    return Translation(sender) if sender != backends.current()[0] else None


def missing(error: ModuleNotFoundError, header: Header) -> DecodeError:
    """Say what to do about a module that is missing here: nobody has to install another backend.

    Parameters
    ----------
    error : ModuleNotFoundError
        Raised by code that was imported.
    header : Header
    """
    here = backends.current()[0]
    if header.backend == here or str(error.name).partition(".")[0] not in PACKAGES[header.backend]:
        return DecodeError(
            f"{header.owner}: it holds code of module {error.name!r}, which is not installed here: "
            "install it on every worker, or call "
            f"cloudpickle.register_pickle_by_value({error.name}) before sending"
        )
    frames = [
        frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    who = next(
        (f"its module {name!r}" for name in reversed(frames) if not _is_machinery(str(name))), "it"
    )
    return DecodeError(
        f"{header.owner}: {who} imports {error.name!r}, and so is bound to the backend "
        f"{header.backend!r}, but Keras runs on {here!r} in this process: import it where it is "
        f"used, or set KERAS_BACKEND to {header.backend!r} here"
    )


def _is_machinery(module: str) -> bool:
    return module.partition(".")[0] in {"importlib", "cloudpickle", __package__}


def tensor(array: Array) -> Any:
    """Turn an array into a tensor of this backend, which owns its memory."""
    return backends.current()[1].tensor(np.array(array))


def shape(dims: list[int | None] | None) -> tuple[int | None, ...] | None:
    """Turn a ``tf.TensorShape`` into what Keras makes of it; None if the rank is unknown."""
    return None if dims is None else tuple(dims)


def dimension(size: int | None) -> int | None:
    """Do so for one dimension; None if it is unknown."""
    return size


def tensor_of_jax(function: Any, arguments: Any, state: Any, _: Any) -> Any:
    """Do so for what ``jax.Array.__reduce__`` says (``jax/_src/array.py``)."""
    array = function(*arguments)
    array.__setstate__(state)
    return tensor(array)
