"""TensorFlow: views of variables without a copy, tensors with one at most."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.trackable import KerasAutoTrackable
from keras.src.utils.tracking import DotNotTrackScope
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function as _Function
from tensorflow.python.trackable.data_structures import ListWrapper, _DictWrapper

from dask_keras_serialize.backends import ADDED, Array, behind
from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.frames import ALIGNMENT, allocate

#: dtypes that have no buffer, nor a bitcast to one that has.
_NO_BUFFER = frozenset(map(tf.as_dtype, ("float8_e4m3fn", "float8_e5m2", "string")))


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
    Copies: none for a variable in host memory, one for float8 (its dtype has no
    buffer and no bitcast) or a variable on another device.
    """
    value = variable.value
    if isinstance(value, tf.distribute.DistributedValues):  # as get_weights() has it
        tensor = tf.convert_to_tensor(value)
    elif isinstance(value, tf.Variable):  # as value.value() does, in half the time
        tensor = tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
    else:
        tensor = tf.convert_to_tensor(value)
    dtype = tensor.dtype
    if dtype in _NO_BUFFER or not tensor.device.endswith("CPU:0"):
        array: Array = np.asarray(tensor.numpy())  # of a scalar it makes no array
    else:
        # the buffer protocol has no letter for bfloat16; a bitcast shares the memory
        source = tf.bitcast(tensor, tf.uint16) if dtype == tf.bfloat16 else tensor
        known = np.asarray(memoryview(source)).view(dtype.as_numpy_dtype).view(_View)
        known.tensor = tensor
        array = known
    array.flags.writeable = False
    return array


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
        In host memory. It never writes to memory it adopted, so that several may adopt
        the same: the first update of such a variable goes to memory of its own
        (``Tensor::RefCountIsOne``, ``tensorflow/core/framework/tensor.cc``).

    Notes
    -----
    Copies: none of a view of a tensor of this process, which is that tensor: nobody writes
    to its memory while it lives. None of a writeable array that is aligned as TensorFlow
    wants it, which it adopts by DLPack; else one, into memory that is. What is not aligned
    would abort the process on first use; what is read-only numpy does not export.
    ``tf.constant`` copies twice (``tensorflow/python/framework/constant_op.py``,
    ``convert_to_eager_tensor``), as it still does here for float8, which has no bitcast.
    """
    shared = _tensor_behind(array)
    if shared is not None:
        return shared
    if "float8" in array.dtype.name or array.dtype == object:  # strings
        return tf.constant(array)
    if not array.flags.writeable or array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous:
        own = allocate(array.nbytes)
        own[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        array = own.view(array.dtype).reshape(array.shape)
    if array.dtype == tf.bfloat16.as_numpy_dtype:
        bits: Any = array.view(np.uint16)
        return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), tf.bfloat16)
    typed: Any = array
    return tf.experimental.dlpack.from_dlpack(typed.__dlpack__())


def _tensor_behind(array: Array) -> tf.Tensor | None:
    """Return the tensor whose memory, all of it, :func:`view` gave as this array."""
    base = behind(array, _View)
    tensor = getattr(base, "tensor", None)
    if tensor is None or base.nbytes != array.nbytes or tensor.dtype != array.dtype:
        return None
    return tf.reshape(tensor, array.shape)


def tensor_in(array: Array, memory: Array) -> tf.Tensor:
    """Turn an array into a tensor: nobody can write to one, so none has to share memory."""
    return tensor(array)


def initialize(variable: Any, tensor: Any) -> None:
    """Give a new variable its value."""
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

#: Tensors as users hold them.
TENSORS = (tf.__internal__.EagerTensor,)

#: Classes that :func:`reduce` knows, and that copy themselves in a way of their own.
REDUCED = (_DictWrapper, _Function)

#: Classes of TensorFlow's own that become shells beside Keras's, when by value.
SHELLS = (ListWrapper,)

_State = dict[str, Any]


def shell(cls: type) -> Any:
    """Make an empty ListWrapper; its sentinel, which holds weak references, is new."""
    return cls([])


def reduce(obj: Any) -> tuple[Any, ...] | None:
    """Reduce a _DictWrapper, a proxy pickle cannot take, to the dict it wraps; a tensor."""
    if isinstance(obj, TENSORS):  # past copyreg's table, where it is a parcel of its own
        reduced: tuple[Any, ...] = obj.__reduce__()
        return reduced
    if isinstance(obj, _Function):
        # what it has traced holds graphs; a clone has traced nothing
        clone = obj._clone(None)
        return _function, (clone.python_function, clone.__getstate__())
    if isinstance(obj, _DictWrapper):
        return dict, (), None, None, iter(obj.items())
    return None


def _function(python_function: Any, state: _State) -> Any:
    function = tf.function(python_function)
    function.__setstate__(state | {"_python_function": python_function})
    return function


def drop(obj: Any, state: _State) -> None:
    """Leave out of a state what TensorFlow can make again and pickle cannot take."""
    if isinstance(obj, ListWrapper):
        del state["_self_attribute_sentinel"]
    if isinstance(obj, keras.layers.TFSMLayer):
        _drop_saved_model(obj, state)
    wrapped = [name for name, value in state.items() if isinstance(value, _DictWrapper)]
    if wrapped:
        state[_WRAPPED] = wrapped
    if _DEPENDENCIES in state:
        # what was dropped from the attributes, functions above all, is tracked here too
        gone = {name for name, value in vars(obj).items() if state.get(name) is not value}
        gone.update(wrapped)
        # a class of TensorFlow's, which another backend could not load
        state[_DEPENDENCIES] = [tuple(ref) for ref in state[_DEPENDENCIES] if ref.name not in gone]
        state[_NAMES] = {k: v for k, v in state[_NAMES].items() if k not in gone}
    for name in _STRATEGIES & state.keys():
        state[name] = None


def mend(obj: Any, state: _State) -> None:
    """Make again what :func:`drop` left out."""
    if isinstance(obj, keras.layers.TFSMLayer):
        _mend_saved_model(obj)
    for name in _STRATEGIES & vars(obj).keys():
        # as TFOptimizer and TensorFlowTrainer do (keras/src/backend/tensorflow): that of the scope
        # it is rebuilt in
        needed = name == "_distribution_strategy" or tf.distribute.has_strategy()
        obj.__dict__[name] = tf.distribute.get_strategy() if needed else None
    if _DEPENDENCIES in vars(obj):
        reference = tf.__internal__.tracking.TrackableReference
        obj.__dict__[_DEPENDENCIES] = [reference(*pair) for pair in vars(obj)[_DEPENDENCIES]]
    for name in vars(obj).pop(_WRAPPED, ()):
        if name in vars(obj):
            tf.__internal__.tracking.AutoTrackable.__setattr__(obj, name, vars(obj).pop(name))


def adopt(obj: Any) -> None:
    """Track what the attributes hold, for checkpoints and SavedModels."""
    if isinstance(obj, KerasAutoTrackable):
        if "_tracked" in vars(obj):
            obj.__dict__["_tracked"] = []
        with DotNotTrackScope():  # Keras tracks already, and forbids more in what is built
            for name, value in list(vars(obj).items()):
                if not ADDED["tensorflow"].fullmatch(name):
                    del obj.__dict__[name]  # or it is taken to be set already
                    KerasAutoTrackable.__setattr__(obj, name, value)


def _drop_saved_model(layer: Any, state: _State) -> None:
    """Send the files a TFSMLayer was loaded from (``keras/src/export/tfsm_layer.py``)."""
    folder = Path(layer.filepath)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    if not files:
        raise EncodeError(
            f"layer {layer.name!r} is a TFSMLayer whose SavedModel is no longer in {folder}: keep "
            "the folder for as long as the layer is sent"
        )
    state[_SAVED_MODEL] = {
        name: np.frombuffer(path.read_bytes(), np.uint8)
        for name, path in files.items()
        if path.is_file()
    }
    for name in _LOADED:
        state.pop(name, None)


def _mend_saved_model(layer: Any) -> None:
    """Load the files from a folder that goes when the layer goes; give it its variables."""
    folder = tempfile.mkdtemp(prefix="dask-keras-serialize-")
    weakref.finalize(layer, shutil.rmtree, folder, ignore_errors=True)
    for name, content in vars(layer).pop(_SAVED_MODEL).items():
        path = Path(folder, *PurePosixPath(name).parts)
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            raise DecodeError(f"layer {layer.name!r}: {name!r} lies outside its SavedModel")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.tobytes())
    layer.__dict__["filepath"] = folder
    loaded = keras.layers.TFSMLayer(folder, layer.call_endpoint, layer.call_training_endpoint)
    for ours, theirs in zip(layer.variables, loaded.variables, strict=True):
        theirs.assign(ours.value)
        ours._value = theirs.value
    for name in _LOADED:
        if name in vars(loaded):
            layer.__dict__[name] = vars(loaded)[name]


#: What of a TFSMLayer holds functions of TensorFlow's.
_LOADED = ("_reloaded_obj", "call_endpoint_fn", "call_training_endpoint_fn")
_SAVED_MODEL = "files of the SavedModel"
_DEPENDENCIES = "_self_unconditional_checkpoint_dependencies"
_NAMES = "_self_unconditional_dependency_names"
_WRAPPED = "wrapped by tensorflow"
#: Where an optimizer and a model keep the tf.distribute strategy that they were made under.
_STRATEGIES = frozenset({"_distribution_strategy", "_distribute_strategy"})
