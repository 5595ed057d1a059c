"""What TensorFlow adds to Keras's objects, and pickle cannot take.

Its wrappers of lists and dicts, its tracking of attributes, its functions and SavedModels. The
verbs here are the adapter's, ``tensorflow.py``.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.trackable import KerasAutoTrackable
from keras.src.utils.tracking import DotNotTrackScope
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function as _Function
from tensorflow.python.trackable.data_structures import ListWrapper, _DictWrapper

from dask_keras_serialize.backends import ADDED
from dask_keras_serialize.cluster.whereabouts import temporary_folder
from dask_keras_serialize.errors import DecodeError, EncodeError

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
    folder = tempfile.mkdtemp(prefix="dask-keras-serialize-", dir=temporary_folder())
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
