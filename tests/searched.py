"""What the searches of test_dask_ml.py train: importable, as estimators of users are."""

from __future__ import annotations

import numpy as np
from scikeras.wrappers import KerasClassifier
from sklearn.preprocessing import FunctionTransformer

from dask_keras_serialize.workflows.estimators import Warm, WarmClassifier

KINDS = {"scikeras": KerasClassifier, "warm": WarmClassifier}


def mlp(hidden=16):
    """Build an MLP for the digits, whose first weights do not hang on who else draws a seed."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(hidden, "relu", kernel_initializer=_seeded(1)),
            keras.layers.Dense(10, "softmax", kernel_initializer=_seeded(2)),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def halves(hidden=16):
    """Build a model whose two inputs are the upper and the lower half of a digit."""
    import keras

    inputs = [keras.Input((32,), name="upper"), keras.Input((32,), name="lower")]
    dense = [keras.layers.Dense(hidden, "relu", kernel_initializer=_seeded(3))(i) for i in inputs]
    joined = keras.layers.concatenate(dense)
    outputs = keras.layers.Dense(10, "softmax", kernel_initializer=_seeded(4))(joined)
    model = keras.Model(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def _seeded(seed):
    import keras

    return keras.initializers.GlorotUniform(seed=seed)


def split(x):
    """Give each of the two inputs its columns."""
    x = np.asarray(x)
    return {"upper": x[:, :32], "lower": x[:, 32:]}


class TwoInputs(Warm, KerasClassifier):
    """A wrapper for several inputs, as scikeras's documentation makes it."""

    @property
    def feature_encoder(self):
        return FunctionTransformer(split)


def estimator(kind, **settings):
    """Make an estimator whose training is the same wherever it runs."""
    settings = {"model": mlp, "hidden": 16, "batch_size": 32, "verbose": 0} | settings
    return KINDS[kind](**settings, random_state=0, fit__shuffle=False)


#: Calls that a process made, by name, since :func:`count`.
calls: dict[str, int] = {}


def count():
    """Count, in this process, whose code moves models: Keras's, scikeras's or ours."""
    import keras.src.saving.saving_lib as keras_saving
    import scikeras._saving_utils as scikeras_saving

    from dask_keras_serialize import copying, protocol

    watched = {
        # all that Keras saves and loads, by any of its functions, scikeras's among them
        "keras": (keras_saving, ("_save_model_to_fileobj", "_load_model_from_fileobj")),
        "scikeras": (scikeras_saving, ("pack_keras_model", "unpack_keras_model")),
        "ours": (protocol, ("encode", "encode_parts", "decode", "decode_parts")),
        "our copies": (copying, ("_reconstruct",)),
    }
    for name, (module, functions) in watched.items():
        calls[name] = 0
        for function in functions:
            setattr(module, function, _counted(name, getattr(module, function)))


def _counted(name, function):
    function = getattr(function, "counted", function)

    def counting(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    counting.counted = function
    return counting


def counted():
    """Return the calls."""
    return dict(calls)


def models_alive():
    """Count the models of this process; none if Keras is not even loaded."""
    import gc
    import sys

    keras = sys.modules.get("keras")
    if keras is None:
        return 0
    return sum(isinstance(each, keras.Model) for each in gc.get_objects())
