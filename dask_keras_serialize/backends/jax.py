"""JAX: arrays are immutable, so a view is a snapshot by nature.

But for as long as it fits, evaluates or predicts, Keras's trainer takes the values out of their
variables, so that they are in memory once, and gives them away to each step, which returns new
ones (``keras/src/backend/jax/trainer.py``). Meanwhile another thread finds variables without a
value: a task that predicts with the same model fails. So we remember who took them
(``jax_trainer``); the variable then gives the trainer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax._src.array import ArrayImpl
from keras.src.backend.common.stateless_scope import in_stateless_scope

from dask_keras_serialize.backends import Array
from dask_keras_serialize.backends.jax_trainer import HELD, held_value, slots_of_trainers
from dask_keras_serialize.wire.cuda import DeviceFrame, Loan, address_in
from dask_keras_serialize.wire.header import fits_in_an_array


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
    Copies: none for an array in host memory, else one, which the variable's own array does not
    keep.
    """
    return _view_of(_on_its_way(_value_of(variable)))


def views(variables: Sequence[Any]) -> list[Array | None]:
    """View several; copies from other devices are under way together."""
    return [_view_of(value) for value in [_on_its_way(_value_of(v)) for v in variables]]


def _value_of(variable: Any) -> Any:
    value = variable._value
    return held_value(variable) if value is None else value


def _on_its_way(value: Any) -> Any:
    """Return an array in the host's memory, or one like it that is being copied there.

    NumPy's copy of an array that lies elsewhere stays with it for as long as it lives
    (``ArrayImpl._value``, ``jax/_src/array.py``): this one's is let go of.
    """
    if not isinstance(value, ArrayImpl) or _on_host(value):
        return value
    try:
        parts = [shard.data for shard in value.addressable_shards]
        twin = jax.make_array_from_single_device_arrays(value.shape, value.sharding, parts)
        twin.copy_to_host_async()
    except RuntimeError:  # given away to a step of training in another thread
        return None
    return twin


def _on_host(value: jax.Array) -> bool:
    """Say whether NumPy can view an array where it lies."""
    devices = value.sharding.device_set  # even of one that was given away
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


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
    at a multiple of 64 bytes; else one, by JAX where it is not aligned. To a GPU one, out of the
    array itself.
    """
    if array.flags.writeable or isinstance(array, _View):
        return jax.device_put(np.asarray(array), may_alias=True)
    if _is_gpu(_device()):  # nobody may write to the array until it is there
        return jax.block_until_ready(jax.device_put(array))
    return jnp.array(array, copy=True)  # device_put may alias what others write to


def lost(array: Array) -> str | None:
    """Say why a tensor made of an array would not hold its numbers.

    Without ``jax_enable_x64`` JAX keeps 64 bits in 32, and says nothing
    (``jax/_src/dtypes.py``, ``canonicalize_dtype``).
    """
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if kept == array.dtype:
        return None
    with np.errstate(over="ignore"):
        same = np.array_equal(array.astype(kept).astype(array.dtype), array, equal_nan=True)
    return None if same else f"JAX keeps them in {kept}; set JAX_ENABLE_X64=1 there"


def tensor_in(array: Array, memory: Array) -> jax.Array:
    """Turn an array into a tensor: nobody can write to one, so none has to share memory."""
    return tensor(array)


def _device() -> jax.Device:
    """Return where new arrays go."""
    device = jax.config.jax_default_device  # None, a device, or a platform's name
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def _is_gpu(device: jax.Device) -> bool:
    return device.platform in ("gpu", "cuda")


def on_gpu(variable: Any) -> bool:
    """Say whether a variable lies on one GPU."""
    value = _value_of(variable)
    if not isinstance(value, ArrayImpl):
        return False
    devices = value.sharding.device_set
    return len(devices) == 1 and _is_gpu(next(iter(devices)))


def device_frames(variables: Sequence[Any]) -> list[DeviceFrame | None]:
    """Take snapshots of values where they are.

    Notes
    -----
    Copies: one on the GPU, which no step of training can give away.
    """
    return [_frame(_twin(_value_of(variable))) for variable in variables]


def _twin(value: Any) -> jax.Array | None:
    """Copy an array where it lies; None if that cannot be."""
    try:
        # not device_put(may_alias=False), which before jax 0.6 shared the memory all the same
        return None if value is None else jax.block_until_ready(jnp.array(value, copy=True))
    except RuntimeError:  # given away to a step of training in another thread; or no memory left
        return None


def _frame(twin: Any) -> DeviceFrame | None:
    try:
        address = None if twin is None else address_in(twin.__dlpack__())
    except RuntimeError:  # an older jax has no DLPack of float8: it goes by the host
        return None
    if address is None:
        return None
    return DeviceFrame(address, twin.nbytes, twin, partial(np.asarray, twin))


def device_tensor(
    frame: DeviceFrame, dtype: np.dtype[Any], shape: Sequence[int]
) -> jax.Array | None:
    """Turn a device frame into an array.

    Notes
    -----
    Copies: one, on the GPU; the frame is free when it is done.
    """
    device = _device()
    if not _is_gpu(device):
        return None
    try:
        lent = jax.dlpack.from_dlpack(Loan(frame, dtype, shape, device.local_hardware_id))
    except RuntimeError:  # as in _frame
        return None
    return _twin(lent)


def creating() -> AbstractContextManager[None]:
    """Do nothing: variables leave nothing behind."""
    return nullcontext()


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
    sharding = getattr(_value_of(variable), "sharding", None)
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
    if not all(isinstance(n, int) and n > 0 for n in shape) or not fits_in_an_array(shape):
        raise ValueError("no mesh has such a shape")
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
    for base, name, wrap in (*slots_of_trainers(), (keras.Variable, "value", _reading)):
        cls = next((cls for cls in base.__mro__ if name in vars(cls)), None)
        if cls is not None:
            yield cls, name, wrap(vars(cls)[name])


#: Of a millisecond each: for as long as a step may have given a value away.
_TRIES = 1000


def _reading(original: property) -> property:
    """Wrap ``Variable.value``."""

    def value(self: Any) -> Any:
        if self._value is None and id(self) in HELD and not in_stateless_scope():
            for _ in range(_TRIES):
                own = _own(held_value(self))
                if own is not None:  # the trainer's is given away
                    return self._maybe_autocast(own)
                if id(self) not in HELD:  # it is back
                    break
                time.sleep(0.001)
        return original.__get__(self)

    return property(value, doc=original.__doc__)


def _own(value: Any) -> jax.Array | None:
    """Return an array of the same content that nobody gives away; None if it is gone."""
    if value is None or not _on_host(value):
        return _twin(value)
    view = _view_of(value)
    return None if view is None else tensor(view)


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
