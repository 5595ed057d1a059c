"""Sequential models built once are those that Keras's own ``from_config`` builds."""

import copy
import threading

import keras
import numpy as np
import pytest
from keras import layers

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs.sequentials import built_once
from tests import zoo


@keras.saving.register_keras_serializable("tests")
class Shapeless(layers.Layer):
    """A layer of whose outputs nothing is known before there are some."""

    def compute_output_spec(self, *args, **kwargs):
        raise NotImplementedError

    def call(self, x):
        return x


def unbuilt():
    return keras.Sequential([layers.Dense(3), layers.Dense(2)])


def built_late():
    model = unbuilt()
    model.build((None, 4))
    return model


def after_a_model():
    return keras.Sequential([zoo.functional(), layers.Dense(2)])


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.ReLU()], name="inner")
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])


def of_unknown_shapes():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), Shapeless(), layers.Dense(2)])


def empty():
    return keras.Sequential(name="empty")


def of_an_input():
    return keras.Sequential([keras.Input((4,))])


MODELS = [unbuilt, built_late, after_a_model, nested, of_unknown_shapes, empty, of_an_input]


@pytest.mark.parametrize("make", MODELS)
def test_what_is_built_once_is_what_keras_builds(make):
    config = make().get_config()
    keras.utils.set_random_seed(0)
    theirs = keras.Sequential.from_config(copy.deepcopy(config))  # which it empties
    keras.utils.set_random_seed(0)
    with built_once():
        ours = keras.Sequential.from_config(copy.deepcopy(config))
    assert ours.get_config() == theirs.get_config()
    assert ours.built == theirs.built
    assert [each.built for each in ours.layers] == [each.built for each in theirs.layers]
    assert [v.path for v in ours.variables] == [v.path for v in theirs.variables]
    if ours.built and ours.layers:
        x = np.ones((2, zoo.X.shape[1] if make is after_a_model else 4), np.float32)
        ours.set_weights(theirs.get_weights())
        found, right = map(keras.ops.convert_to_numpy, (ours(x), theirs(x)))
        np.testing.assert_array_equal(found, right)


def test_a_model_that_was_sent_has_called_each_layer_once():
    """As it had; Keras's own ``from_config`` calls the first of 50 layers 50 times."""
    model = keras.Sequential([keras.Input((4,)), *(layers.Flatten() for _ in range(50))])
    twin = deserialize_keras(*serialize_keras(model))
    assert [len(each._inbound_nodes) for each in twin.layers] == [1] * 50
    by_keras = keras.Sequential.from_config(model.get_config())
    if len(by_keras.layers[0]._inbound_nodes) == 1:
        pytest.fail("Keras builds them once by itself: sequentials.py can go")


def test_others_are_keras_s_own():
    """Subclasses, what other threads build; not configs with what is unknown here."""
    original = vars(keras.Sequential)["from_config"]
    config = keras.Sequential([keras.Input((4,)), layers.ReLU(), layers.ReLU()]).get_config()
    built = []
    with built_once():

        class Own(keras.Sequential):
            pass

        assert type(Own.from_config(config)) is Own
        built.append(Own.from_config(config))
        thread = threading.Thread(target=lambda: built.append(keras.Sequential.from_config(config)))
        thread.start()
        thread.join()
        once = [keras.Sequential.from_config(each) for each in (config, config | {"new": 1})]
    assert [len(each.layers[0]._inbound_nodes) for each in built] == [2] * 2
    assert [len(each.layers[0]._inbound_nodes) for each in once] == [1] * 2
    assert vars(keras.Sequential)["from_config"] is original


def test_layers_that_were_never_built_stay_so():
    """``build`` of one that was added to without builds none of its layers' variables."""
    source = keras.Sequential([keras.Input((4, 1))])
    for i in range(2):
        cell = layers.LSTM(1, return_sequences=True, name=f"lstm_{i}")
        source.add(layers.Bidirectional(cell, name=f"both_{i}"), rebuild=False)
    source.build()
    header, frames = serialize_keras(source)
    arrived = deserialize_keras(header, frames)
    assert [layer.built for layer in arrived.layers] == [layer.built for layer in source.layers]
    assert len(arrived.variables) == len(source.variables)
