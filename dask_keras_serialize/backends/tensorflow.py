"""TensorFlow: views of variables without a copy, tensors with one at most.

Copies between devices are TensorFlow's own, by ``tf.identity``. It waits for each, and holds its
source until then (``TensorHandle::CopyToDevice``,
``tensorflow/core/common_runtime/eager/tensor_handle.cc``), but where a user has turned synchronous
execution off.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

from dask_keras_serialize.backends import Array, behind, borrowed
from dask_keras_serialize.backends.tensorflow_objects import REDUCED as REDUCED
from dask_keras_serialize.backends.tensorflow_objects import SHELLS as SHELLS
from dask_keras_serialize.backends.tensorflow_objects import TENSORS as TENSORS
from dask_keras_serialize.backends.tensorflow_objects import adopt as adopt
from dask_keras_serialize.backends.tensorflow_objects import drop as drop
from dask_keras_serialize.backends.tensorflow_objects import mend as mend
from dask_keras_serialize.backends.tensorflow_objects import reduce as reduce
from dask_keras_serialize.backends.tensorflow_objects import shell as shell
from dask_keras_serialize.wire.cuda import DeviceFrame, Loan, address_in
from dask_keras_serialize.wire.frames import ALIGNMENT, allocate

#: dtypes that have no buffer, nor a bitcast to one that has.
_NO_BUFFER = frozenset(map(tf.as_dtype, ("float8_e4m3fn", "float8_e5m2", "string")))

#: dtypes whose values stay on the host even if a GPU is named (``VarHandleOp`` and ``Identity``).
_ON_HOST = frozenset({tf.int32, tf.string})

_BFLOAT16 = np.dtype(tf.bfloat16.as_numpy_dtype)


def view(variable: Any) -> Array:
    """View a variable's value.

    Parameters
    ----------
    variable : keras.Variable
        On any device.

    Returns
    -------
    ndarray
        Read-only, of the variable's shape and dtype. Later assignments to the
        variable do not show: TensorFlow copies on write while a view lives.

    Notes
    -----
    Copies: none for a variable in host memory, one for a variable on a GPU, and one
    for float8 (its dtype has no buffer and no bitcast).
    """
    return _view_of(_value_of(variable))


def views(variables: Sequence[Any]) -> list[Array]:
    """View several; TensorFlow waits for each copy from another device."""
    return [view(variable) for variable in variables]


def _value_of(variable: Any) -> tf.Tensor:
    value = variable.value
    if isinstance(value, tf.distribute.DistributedValues):  # as get_weights() has it
        return tf.convert_to_tensor(value)
    if isinstance(value, tf.Variable):  # as value.value() does, in half the time
        return tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
    return tf.convert_to_tensor(value)


def _view_of(tensor: tf.Tensor) -> Array:
    dtype = tensor.dtype
    if not tensor.device.endswith("CPU:0"):
        tensor = _to("CPU:0", tensor)
    if dtype in _NO_BUFFER:
        array: Array = np.asarray(tensor.numpy())  # of a scalar it makes no array
    else:
        # the buffer protocol has no letter for bfloat16; a bitcast shares the memory
        source = tf.bitcast(tensor, tf.uint16) if dtype == tf.bfloat16 else tensor
        known = np.asarray(memoryview(source)).view(dtype.as_numpy_dtype).view(_View)
        known.tensor = tensor
        array = known
    array.flags.writeable = False
    return array


def _to(device: str, tensor: tf.Tensor) -> tf.Tensor:
    with tf.device(device):
        return tf.identity(tensor)


class _View(np.ndarray[Any, np.dtype[Any]]):
    """A tensor's memory, and, through reshapes, the tensor."""

    tensor: tf.Tensor | None

    def __array_finalize__(self, obj: Any) -> None:
        self.tensor = getattr(obj, "tensor", None)


def tensor(array: Array) -> tf.Tensor:
    """Turn an array into a tensor; ``tf.Variable(tensor)`` then takes its memory over.

    Parameters
    ----------
    array : ndarray
        Any shape and dtype that ``header.ITEMSIZE`` names. A writeable one is the
        caller's to give away: nobody may write to it any more.

    Returns
    -------
    tf.Tensor
        Where new variables go: in host memory, or on a GPU. It never writes to memory it
        adopted, so that several may adopt the same: the first update of such a variable goes to
        memory of its own (``Tensor::RefCountIsOne``, ``tensorflow/core/framework/tensor.cc``).

    Notes
    -----
    Copies: none of a view of a tensor of this process, which is that tensor: nobody writes
    to its memory while it lives. None of a writeable array that is aligned as TensorFlow
    wants it, which it adopts by DLPack; else one, into memory that is. What is not aligned
    would abort the process on first use; what is read-only numpy does not export.
    ``tf.constant`` copies twice (``tensorflow/python/framework/constant_op.py``,
    ``convert_to_eager_tensor``), as it still does here for float8, which has no bitcast. Where
    variables go to a GPU, one to there, out of the array itself.
    """
    shared = _tensor_behind(array)
    if shared is not None:
        return shared
    if "float8" in array.dtype.name or array.dtype == object:  # strings
        return tf.constant(array)
    moved = _moved(array)
    if moved is not None:
        return moved
    if not array.flags.writeable or array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous:
        own = allocate(array.nbytes)
        own[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        array = own.view(array.dtype).reshape(array.shape)
    bits: Any = array.view(_bits(array.dtype))
    return _typed(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), array.dtype)


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype that DLPack has, of the same size."""
    return np.dtype(np.uint16) if dtype == _BFLOAT16 else dtype


def _typed(tensor: tf.Tensor, dtype: np.dtype[Any]) -> tf.Tensor:
    return tensor if _bits(dtype) is dtype else tf.bitcast(tensor, dtype)


def _device() -> str | None:
    """Return where new variables go; None for the host's memory."""
    if len(tf.config.list_logical_devices()) < 2:
        return None
    device: str = tf.zeros(()).device  # of whatever scope this is in
    return device if _is_gpu(device) else None


def _is_gpu(device: str) -> bool:
    return "device:GPU:" in device


def _moved(array: Array) -> tf.Tensor | None:
    """Copy an array to the GPU where new variables go, out of its own memory; None if to none."""
    device = _device()
    if device is None or not tf.config.experimental.get_synchronous_execution():
        return None
    bits: Any = borrowed(array).view(_bits(array.dtype))
    source = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
    moved = _to(device, source)
    if not _is_gpu(moved.backing_device):  # as of int32: what it has is this array's memory
        return None
    with tf.device(device):
        return _typed(moved, array.dtype)


def on_gpu(variable: Any) -> bool:
    """Say whether a variable lies on one GPU."""
    value = variable._value
    mirrored = isinstance(value, tf.distribute.DistributedValues)
    if mirrored or not isinstance(value, tf.Variable) or value.dtype in _ON_HOST:
        return False
    return _is_gpu(value.device)


def device_frames(variables: Sequence[Any]) -> list[DeviceFrame | None]:
    """Lend values where they are.

    Notes
    -----
    Copies: none. TensorFlow copies on write while a capsule lives, and has waited for the GPU when
    it makes one (``TFE_TensorHandleDevicePointer``, ``tensorflow/c/eager/c_api.cc``).
    """
    return [_frame(_value_of(variable)) for variable in variables]


def _frame(tensor: tf.Tensor) -> DeviceFrame | None:
    if tensor.dtype in _NO_BUFFER:
        return None
    capsule = tf.experimental.dlpack.to_dlpack(tensor)
    address = address_in(capsule)
    if address is None:
        return None
    nbytes = tensor.dtype.size * tensor.shape.num_elements()
    return DeviceFrame(address, nbytes, capsule, functools.partial(_view_of, tensor))


def device_tensor(
    frame: DeviceFrame, dtype: np.dtype[Any], shape: Sequence[int]
) -> tf.Tensor | None:
    """Turn a device frame into a tensor.

    Notes
    -----
    Copies: one, on the GPU; the frame is free when it is done.
    """
    device = _device()
    if device is None or tf.as_dtype(dtype) in _NO_BUFFER:
        return None
    loan = Loan(frame, _bits(dtype), shape, int(device.rpartition(":")[2]))
    lent = tf.experimental.dlpack.from_dlpack(loan.__dlpack__())
    try:
        with tf.device(device):
            # never in place, for it does not own this memory
            tensor = _typed(tf.raw_ops.Snapshot(input=lent), dtype)
    except tf.errors.OpError:  # not on the GPU for this dtype
        return None
    tf.test.experimental.sync_devices()
    return tensor


def _tensor_behind(array: Array) -> tf.Tensor | None:
    """Return the tensor whose memory, all of it, :func:`view` gave as this array."""
    base = behind(array, _View)
    tensor = getattr(base, "tensor", None)
    if tensor is None or base.nbytes != array.nbytes or tensor.dtype != array.dtype:
        return None
    return tf.reshape(tensor, array.shape)


def lost(array: Array) -> str | None:
    """Return None: a tensor holds an array's numbers."""
    return None


def tensor_in(array: Array, memory: Array) -> tf.Tensor:
    """Turn an array into a tensor: nobody can write to one, so none has to share memory."""
    return tensor(array)


def creating() -> AbstractContextManager[None]:
    """Return the scope within which variables leave nothing behind.

    Notes
    -----
    TensorFlow builds a kernel for each name that a variable is made with, in half a millisecond,
    and keeps it for good, 36 KB (``debug_name`` of ``VarHandleOp``; ``kernel_cache_`` in
    ``tensorflow/core/common_runtime/eager/context.h``). So all are made with one name here, and
    told their own.
    """
    scope: AbstractContextManager[None] = tf.variable_creator_scope(_create)
    return scope


def _create(next_creator: Any, name: str | None = None, **kwargs: Any) -> Any:
    name = name or "Variable"
    outer = tf.get_current_name_scope()
    with tf.name_scope("variable/"):  # not within the one there is
        made = next_creator(name="value", **kwargs)
    whole = f"{outer}/{name}" if outer else name
    # one for each device of a tf.distribute strategy (tensorflow/python/distribute/values.py)
    for i, each in enumerate(getattr(made, "values", [made])):
        if hasattr(each, "_handle_name"):  # tensorflow/python/ops/resource_variable_ops.py
            each._handle_name = f"{whole}/replica_{i}:0" if i else f"{whole}:0"
    return made


def initialize(variable: Any, tensor: Any) -> None:
    """Give a new variable its value."""
    with tf.name_scope(f"{variable.path.rpartition('/')[0]}/"):
        variable._initialize(tensor)


def placement(variable: Any) -> list[Any] | None:
    """Return None: replicas of a tf.distribute strategy are the receiver's own to make."""
    return None


def place(tensor: Any, placement: list[Any]) -> Any:
    """Return the tensor as it is."""
    return tensor


def no_config_holds(layer: Any) -> str | None:
    """Return None: nothing is done to a layer past Keras."""
    return None


def slots() -> Iterator[tuple[Any, str, Any]]:
    """Yield nothing: a view is of one instant whatever other threads do."""
    yield from ()


def version() -> str:
    """Return TensorFlow's version."""
    return str(tf.__version__)


STRINGS = True

ONE_STEP = False
