"""One small adapter for each Keras backend, with the same few verbs.

``view(variable)``
    ndarray of a variable's value: read-only, in C order, uncopied where the backend
    can; it never shows what is assigned to the variable later.
``views(variables)``
    The same of several: what is copied from other devices is on its way together.
``tensor(array)``
    Tensor of the backend that owns its memory: one copy of ``array`` at most. A
    writeable array is given away, and may be used in place where that is safe. Where Keras puts
    new variables on another device, the copy is the one to there, out of ``array`` itself.
``lost(array)``
    Why that tensor would not hold all of the array's numbers.
``on_gpu(variable)``, ``device_frames(variables)``, ``device_tensor(frame, dtype, shape)``
    For Dask's "cuda" family: whether a value lies on a GPU, snapshots that stay there, and a tensor
    made of a frame that arrived there.
``creating()``, ``initialize(variable, tensor)``
    The scope in which variables are made here, and to give one its first value.
``placement(variable)``, ``place(tensor, placement)``
    How a value lies on several devices, or otherwise than in C order, as plain data; and to put
    another so.
``no_config_holds(layer)``
    Says what was done to a layer past Keras, so that it has to go by value.
``slots()``
    What has to be wrapped of Keras's, so that a view is of one instant: class, name, wrapper.
``version()``, ``STRINGS``, ``ONE_STEP``
    The backend's version; whether its variables may hold strings; and whether its trainer takes
    no more than one step per execution.
``TENSORS``
    Classes of the backend's own tensors that travel as parcels.
``SHELLS``, ``REDUCED``, ``shell(cls)``, ``reduce(obj)``, ``drop(obj, state)``, ``mend(obj, state)``
    What the backend adds to Keras objects that pickle cannot take; used when a model
    goes by value.
``adopt(obj)``
    Does for an object that came by value from another backend what this one does as
    attributes are set.

Nothing else in the package knows a backend, but for ``translation``, which says what :data:`COMMON`
is here; :mod:`dask_keras_serialize.devices` has the same of processes. :data:`PACKAGES` and
:data:`ADDED` name what is each one's, for those who do not have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from dask_keras_serialize.errors import KerasSerializeError
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.header import minor, numpy_dtype

Array = npt.NDArray[np.generic]

#: The oldest Keras that works. Configs of older ones do not tell a list of one tensor from the
#: tensor (3.10: keras/src/models/functional.py, functional_from_config).
OLDEST_KERAS = (3, 11)

NAMES = ("tensorflow", "jax", "torch")

#: Packages whose code belongs to a backend.
PACKAGES = {
    "tensorflow": frozenset({"tensorflow"}),
    "jax": frozenset({"jax", "jaxlib", "flax"}),
    "torch": frozenset({"torch"}),
}

#: Packages that Keras's own classes, and their bases, are of.
KERAS_AND_BELOW = frozenset({"keras", "builtins", "collections"}).union(*PACKAGES.values())

#: Attributes that a backend's base classes give Keras's layers, models, optimizers and variables
#: (``keras/src/backend/*/layer.py``, ``trainer.py``, ``optimizer.py``), and what its adapter's
#: ``drop`` writes in their place.
ADDED = {
    "tensorflow": re.compile(
        r"_self_(setattr_tracking|update_uid|name_based_restores|saveable_object_factories"
        r"|unconditional_(checkpoint_dependencies|dependency_names|deferred_dependencies))"
        r"|_tracked|_saved_model_(inputs|arg)_spec|_distribut(e|ion)_strategy"
        r"|unrolled_steps_per_execution|wrapped by tensorflow"
    ),
    "jax": re.compile(r"_jax_state(_synced)?"),
    "torch": re.compile(
        r"_(parameters|buffers|modules|non_persistent_buffers_set|is_full_backward_hook)"
        r"|_(forward|backward|state_dict|load_state_dict)_(pre_|post_)?hooks(_\w+)?"
        r"|training|variables listed by torch|requires_grad"
    ),
}

#: Those of them that each run sets anew (``torch.nn.Module.train``).
SET_BY_RUNS = {
    "tensorflow": frozenset[str](),
    "jax": frozenset[str](),
    "torch": frozenset({"training"}),
}

#: What of a backend's has its like on every other, by module and name: what makes its tensors,
#: a list that it watches, shapes and dtypes.
COMMON = {
    ("tensorflow.python.framework.ops", "convert_to_tensor"),
    ("tensorflow.python.trackable.data_structures", "ListWrapper"),
    ("tensorflow.python.framework.tensor_shape", "TensorShape"),
    ("tensorflow.python.framework.tensor_shape", "Dimension"),
    ("tensorflow.python.framework.dtypes", "as_dtype"),
    ("jax._src.array", "_reconstruct_array"),
    ("torch", "Size"),
    (f"{__name__}.torch", "dtype_of"),
}


#: Where Keras keeps a backend's own kinds of the classes in ``keras.optimizers``, which it makes
#: instead of those.
OWN_OPTIMIZERS = "keras.src.backend.torch.optimizers."


class _Borrowed:
    """An array's bytes, as if they could be written to; keeps the array."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "data": (array.ctypes.data, False),
        }


def borrowed(array: Array) -> Array:
    """View an array as if it could be written to; whoever asks for that never does.

    Backends take no other, even where they only copy it to a device.

    Notes
    -----
    Copies: none of an array in C order, else one.
    """
    if not array.flags.c_contiguous:
        array = array.copy()
    return np.asarray(_Borrowed(array)).view(array.dtype).reshape(array.shape)


def behind(array: Array, cls: type) -> Any:
    """Return the object of a class whose memory an array is a view of, or None."""
    base: Any = array
    while not isinstance(base, cls):
        if isinstance(base, np.ndarray):
            base = base.base
        elif isinstance(base, memoryview):
            base = base.obj
        else:
            return None
    return base


def tensor_of(
    memory: Array, dtype: str, shape: Sequence[int], strides: Sequence[int], offset: int
) -> Any:
    """Make a tensor like one of another process, out of a copy of the memory it lay in.

    Parameters
    ----------
    memory : ndarray of uint8
        Given away, if it is writeable. Tensors made of one that shared memory share it again,
        where the backend's can.
    dtype : str
    shape : sequence of int
    strides : sequence of int
        In bytes, as ``offset``.
    offset : int

    Returns
    -------
    tensor
    """
    array: Array = np.ndarray(shape, numpy_dtype(dtype), memory.data, offset, strides)
    return current()[1].tensor_in(array, memory)


class Backend(Protocol):
    """What an adapter offers; its modules are the instances."""

    def view(self, variable: Any) -> Array | None:
        """View a ``keras.Variable``'s value; None where it has none just now."""

    def views(self, variables: Sequence[Any]) -> Sequence[Array | None]:
        """View several; copies from other devices overlap where the backend can."""

    def on_gpu(self, variable: Any) -> bool:
        """Say whether all of a variable's value lies on one CUDA GPU."""

    def device_frames(self, variables: Sequence[Any]) -> Sequence[DeviceFrame | None]:
        """Take snapshots of values on a GPU, there; None of those that cannot be had so."""

    def device_tensor(
        self, frame: DeviceFrame, dtype: np.dtype[Any], shape: Sequence[int]
    ) -> Any | None:
        """Turn a device frame into a tensor; None where new variables are not on a GPU."""

    def tensor(self, array: Array) -> Any:
        """Turn an array into a tensor."""

    def lost(self, array: Array) -> str | None:
        """Say why a tensor would not hold an array's numbers."""

    def tensor_in(self, array: Array, memory: Array) -> Any:
        """Turn an array into a tensor that shares ``memory``, which it lies in, if it can."""

    def creating(self) -> AbstractContextManager[None]:
        """Return the scope within which variables are made."""

    def initialize(self, variable: Any, tensor: Any) -> None:
        """Give a variable that has no value yet one of ``tensor``'s."""

    def placement(self, variable: Any) -> list[Any] | None:
        """Say how a variable's value lies, if not on one device and in C order."""

    def place(self, tensor: Any, placement: list[Any]) -> Any:
        """Lay a tensor so, if this process has the devices and no other plan."""

    def no_config_holds(self, layer: Any) -> str | None:
        """Say what the backend's own ways have added to a layer that no config holds."""

    def slots(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield classes of Keras's, the name of a method, and what to put there."""

    def version(self) -> str:
        """Return the backend's version."""

    #: Whether variables may hold strings.
    STRINGS: bool

    #: Whether the trainer refuses other ``steps_per_execution`` than 1.
    ONE_STEP: bool

    #: Classes of tensors that pickle as parcels.
    TENSORS: tuple[type, ...]

    #: Classes that ``reduce`` knows, and that copy themselves in a way of their own.
    REDUCED: tuple[type, ...]

    #: Classes of the backend whose instances become shells when a model goes by value.
    SHELLS: tuple[type, ...]

    def shell(self, cls: type) -> Any:
        """Make an empty instance of one of SHELLS."""

    def reduce(self, obj: Any) -> tuple[Any, ...] | None:
        """Reduce what pickle cannot, or return None."""

    def drop(self, obj: Any, state: dict[str, Any]) -> None:
        """Leave out of an object's state what the backend can make again."""

    def mend(self, obj: Any, state: dict[str, Any]) -> None:
        """Make it again."""

    def adopt(self, obj: Any) -> None:
        """Do for an object of another backend what is done as attributes are set."""


def current() -> tuple[str, Backend]:
    """Choose the adapter of the backend that Keras runs on in this process.

    Returns
    -------
    name : str
    backend : module

    Raises
    ------
    KerasSerializeError
        If there is no adapter for it, or Keras is older than :data:`OLDEST_KERAS`.
    """
    import keras

    if tuple(map(int, minor(keras.version()))) < OLDEST_KERAS:
        oldest = ".".join(map(str, OLDEST_KERAS))
        raise KerasSerializeError(
            f"keras {keras.version()} is older than {oldest}, the oldest that works with "
            "dask_keras_serialize: upgrade it"
        )
    name = keras.backend.backend()
    if name not in NAMES:
        raise KerasSerializeError(
            f"Keras runs on the backend {name!r} in this process, which is not supported; "
            f"set KERAS_BACKEND to one of {', '.join(NAMES)}"
        )
    return name, cast(Backend, import_module(f"{__name__}.{name}"))
