"""What kind of value an argument takes: anything else is refused before Keras multiplies it."""

import collections
import json
import tracemalloc

import keras
import numpy as np
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.limits import names, symbols, vetting
from tests import catalogue, zoo
from tests.test_vetting import (
    at,
    call,
    changed,
    layer,
    refused,
    tensor,
    with_layer,
    with_more_layers,
)

#: Of a gigabyte, once it is formatted, or repeated.
FORMAT, WORD = "%1000000000d", "x" * 20_000


def array(values, dtype="float32"):
    return {"class_name": "__numpy__", "config": {"value": values, "dtype": dtype}}


def refused_in_little_memory(header, frames, match):
    tracemalloc.start()
    refused(header, frames, match)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"units": FORMAT}, "units.* no str"),
        ({"units": [3] * 1000}, "units.* no list"),
        ({"units": {"a": 1}}, "units.* no dict"),
        ({"units": {"class_name": "__bytes__", "config": {"value": WORD}}}, "units.* no dict"),
        ({"units": {"class_name": "__slice__", "config": {"stop": 1}}}, "units.* no dict"),
        ({"units": array([1], "int32")}, "units.* no dict"),
        ({"axis": ["a", 1]}, "axis.* no list"),
        ({"whatever": "text"}, "whatever.* no str"),
        ({"cells": [{"class_name": "__bytes__", "config": {"value": WORD}}]}, "cells.* no list"),
    ],
    ids=repr,
)
def test_arguments_of_another_kind(settings, kind):
    node = layer("Dense", **{"units": 2} | settings)
    refused_in_little_memory(*with_layer(node), f"argument '{kind}")


@pytest.mark.parametrize(
    "shape",
    [FORMAT, [None, None, FORMAT], {"a": [None, WORD]}, [[1, [2, FORMAT]]], [1.5, None]],
    ids=repr,
)
@pytest.mark.parametrize("key", ["input_shape", "shapes_dict"])
def test_what_is_no_shape(shape, key):
    node = layer("DepthwiseConv1D", kernel_size=1, depth_multiplier=10**7)
    node["build_config"] = {key: shape}
    refused_in_little_memory(*with_layer(node), "DepthwiseConv1D is built with what is no shape")


@pytest.mark.parametrize("stateful", [1, 1.0, "yes", [1]])
@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "Dense"])
def test_states_by_any_word_for_yes(stateful, name):
    node = layer(name, units=2, stateful=stateful)
    refused(*with_layer(node), f"{name} has states as large as its batch")


@pytest.mark.parametrize("name", ["StringLookup", "IntegerLookup", "TextVectorization"])
def test_weights_of_documents(name):
    """They are padded to as many as ``max_tokens`` says, for each lookup in a model."""
    node = layer(name, output_mode="tf_idf", max_tokens=10**7, vocabulary=["a"])
    refused(*with_layer(node), f"{name} has weights of documents")


@pytest.mark.parametrize("token", ["oov_token", "mask_token"])
def test_words_that_are_repeated(token):
    settings = {"vocabulary": ["a", "b"], "num_oov_indices": 10_000, token: WORD}
    node = layer("StringLookup", **settings)
    refused_in_little_memory(*with_layer(node), f"the {token} of StringLookup is too long")


@pytest.mark.parametrize(
    "indices",
    [
        [WORD, *range(10_000)],
        [[0, 1], [WORD, *range(10_000)]],
        [{"class_name": "__bytes__", "config": {"value": WORD}}, *map(str, range(10_000))],
    ],
    ids=["flat", "nested", "bytes"],
)
def test_one_word_among_what_a_layer_is_called_on(indices):
    node = layer("Take", "keras.src.ops.numpy", axis=None, name="take")
    calls = [call(tensor("input_layer", shape=(None, 3)), indices)]
    node = at(node, *calls)
    header, frames = with_more_layers(node)
    refused_in_little_memory(header, frames, "'Take' is called on a text of more than 200")


@pytest.mark.parametrize("mean", [[[0]] * 1000, array([0.0] * 1000)], ids=["list", "array"])
@pytest.mark.parametrize("name", ["RandomNormal", "TruncatedNormal"])
def test_initializers_that_would_multiply_a_variable(name, mean):
    initializer = layer(name, "keras.initializers", mean=mean)
    node = layer("Dense", units=100, kernel_initializer=initializer)
    refused_in_little_memory(*with_layer(node), f"argument 'mean' of {name} is no")


def nested(depth, inner=0):
    value = [inner]
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    "argument",
    [
        {"kernel_initializer": layer("Constant", "keras.initializers", value=nested(255))},
        {"kernel_initializer": layer("RandomNormal", "keras.initializers", mean=nested(255))},
        {"units": nested(255)},
    ],
    ids=["Constant", "RandomNormal", "units"],
)
def test_lists_in_lists_without_end(argument):
    """TensorFlow ends the process where it makes a tensor of them."""
    node = layer("Dense", **{"units": 2} | argument)
    refused(*with_layer(node), "lists in lists, 255 in all")


def test_lists_in_lists_that_a_layer_is_called_on():
    take = layer("Take", "keras.src.ops.numpy", axis=None, name="take")
    node = at(take, call(tensor("input_layer"), nested(255)))
    refused(*with_more_layers(node), "lists in lists, 25. in all")


def test_lists_in_lists_of_a_user_go_by_value():
    inputs = keras.Input((2,))
    deep = keras.Model(nested(70, inputs), keras.layers.Dense(1)(inputs))
    assert serialize_keras(deep)[0]["encoding"] == "value"
    flat = keras.Model(nested(3, inputs), keras.layers.Dense(1)(inputs))
    assert serialize_keras(flat)[0]["encoding"] == "config"


def stacked(depth):
    cell = keras.layers.LSTMCell(2)
    for _ in range(depth):
        cell = keras.layers.StackedRNNCells([cell])
    return keras.layers.RNN(cell)


def test_cells_in_cells_whose_sizes_are_asked_for_twice_at_each_depth():
    node = keras.saving.serialize_keras_object(stacked(25))
    refused(*with_layer(node), "StackedRNNCells are in StackedRNNCells")
    for depth, encoding in [(1, "config"), (2, "value")]:
        source = keras.Sequential([keras.Input((3, 2)), stacked(depth)])
        assert serialize_keras(source)[0]["encoding"] == encoding


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="a newer Keras's")
def test_optimizers_that_call_what_they_are_given():
    """On each variable of the model's: a regularizer takes the square of its memory."""
    source = keras.Sequential([keras.Input((15_000,)), keras.layers.Dense(1, use_bias=False)])
    source.compile("sgd", "mse")
    header, frames = serialize_keras(source)
    config = json.loads(header["body"]["config"])
    rows = layer("OrthogonalRegularizer", "keras.regularizers", mode="rows")
    map_of_rows = layer("MultiOptimizer", "keras.optimizers", optimizer_map=rows)
    config["compile"]["optimizer"] = map_of_rows
    config["trainer"]["optimizer-built"] = True
    refused_in_little_memory(changed(header, config), frames, "MultiOptimizer would call")


def heads(make):
    inputs = keras.Input((8,))
    names = iter("qab")
    outputs = make(lambda: keras.layers.Dense(2, name=next(names))(inputs))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("make", "encoding"),
    [
        (lambda head: {9: head(), 10: head()}, "value"),
        (lambda head: collections.OrderedDict(q=head(), a=head()), "value"),
        (lambda head: collections.defaultdict(list, q=head(), a=head()), "value"),
        (lambda head: [{"a": head()}, {1: head()}], "value"),
        (lambda head: {"q": head(), "a": head()}, "config"),
    ],
    ids=["numbers", "ordered", "default", "nested", "text"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_heads_keep_their_weights(make, encoding, nested):
    """A config has no such dicts, and Keras finds outputs by their order: heads would change."""
    source = heads(make)
    if nested:
        inputs = keras.Input((8,))
        source = keras.Model(inputs, keras.tree.flatten(source(inputs)))
    header, frames = serialize_keras(source)
    assert header["encoding"] == encoding
    again = deserialize_keras(header, frames)
    x = np.arange(16, dtype="float32").reshape(2, 8)
    zoo.assert_same(source, again)
    for ours, theirs in zip(*map(keras.tree.flatten, (source(x), again(x))), strict=True):
        assert np.array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))
    if not nested:
        outputs = source.output
        assert type(again.output) is type(outputs)
        if isinstance(outputs, dict):
            assert list(again.output) == list(outputs)


class Chooses(keras.layers.Layer):
    def call(self, x):
        return x[9] - x[10]


def test_numbers_as_keys_of_what_a_layer_is_called_on():
    inputs = keras.Input((2,)), keras.Input((2,))
    source = keras.Model(inputs, Chooses()(dict(zip((9, 10), inputs, strict=True))))
    again = deserialize_keras(*serialize_keras(source))
    x = [np.ones((1, 2), "float32"), np.zeros((1, 2), "float32")]
    assert np.array_equal(*(keras.ops.convert_to_numpy(each(x)) for each in (source, again)))


#: Of which configs are not asked for, or hold what goes by value in any case.
OTHERS = ("callbacks", "wrappers", "distribution", "utils", "distillation", "random")
#: Code, files, other models.
BY_VALUE = {
    "Lambda",
    "TFSMLayer",
    "FeatureSpace",
    "JaxLayer",
    "TorchModuleWrapper",
    "MultiOptimizer",
}


@pytest.mark.once
def test_arguments_of_all_that_keras_has():
    seen = 0
    for name, citizen in catalogue.CITIZENS.items():
        if name.startswith(OTHERS) or name.split(".")[-1] in BY_VALUE:
            continue
        try:
            text = json.dumps(keras.saving.serialize_keras_object(citizen.make()))
        except (TypeError, ValueError, NotImplementedError):  # classes that are bases of others
            continue
        _, named = names.objects(text)
        for node in named:
            if symbols.of_keras(node.get("module")) and node["class_name"] != "function":
                seen += 1
                assert not vetting.unlike_keras(node), name
    assert seen > 300
