"""What arguments may ask for: refused of a config, and sent by value of an honest model."""

import contextlib
import inspect
import json
import tracemalloc

import dask
import keras
import numpy as np
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.rebuilding import assets
from tests import zoo
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

RAN = []


@keras.saving.register_keras_serializable(package="registered")
class Registered(keras.losses.Loss):
    def __init__(self, **settings):
        RAN.append("made")
        super().__init__()

    def call(self, y, predicted):
        return keras.ops.mean(keras.ops.abs(y - predicted), axis=-1)


@keras.saving.register_keras_serializable(package="registered")
def registered(x):
    RAN.append("called")
    return x


def compiled(**settings):
    built = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    built.compile("sgd", **settings)
    return built


@pytest.mark.parametrize("by_value", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_initializer": "registered>Registered"},
        {"activation": "registered>registered"},
        {"activation": layer("function", "builtins") | {"config": "registered>registered"}},
        {"activation": layer("function", "builtins") | {"config": "registered"}},
    ],
    ids=repr,
)
def test_what_was_registered_here_is_not_asked_for_by_name(settings, by_value):
    RAN.clear()
    with dask.config.set({"dask-keras-serialize.by-value": by_value}):
        node = layer("Dense", units=2, **settings)
        refused(*with_layer(node), "registered.*not Keras's own")
    assert RAN == []


@pytest.mark.parametrize("name", ["registered>Registered", "registered>registered"])
def test_nor_from_any_other_place_in_a_config(name):
    header, frames = serialize_keras(zoo.build("sequential"))
    RAN.clear()
    for change in (
        {"policy": name},
        {"model": {"build_config": {"input_shape": name}}},
        {"model": {"config": {"layers": [name]}}},
        {"model": {"compile_config": {"optimizer": "sgd", "loss": name}}},
        {"model": {"config": {"name": [name]}}},
    ):
        config = json.loads(header["body"]["config"])
        merge(config, change)
        refused(changed(header, config), frames, "not Keras's own|compiled inside a model")
    assert RAN == []


def merge(config, change):
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


@pytest.mark.parametrize("output", ["name", "layers", "vocabulary", "input_layers"])
@pytest.mark.parametrize("place", ["loss", "metrics"])
def test_nor_for_an_output_of_any_name(output, place):
    inputs = keras.Input((3,))
    source = keras.Model(inputs, {output: keras.layers.Dense(2, name=output)(inputs)})
    source.compile("sgd", loss={output: "mse"}, metrics={output: ["mae"]})
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    zoo.assert_same(source, deserialize_keras(header, frames))
    config = json.loads(header["body"]["config"])
    config["compile"][place] = {output: ["registered>Registered"]}
    RAN.clear()
    refused(changed(header, config), frames, "'registered>Registered'.*this process registered")
    assert RAN == []


@pytest.mark.parametrize("place", ["loss", "metrics", "weighted_metrics"])
def test_nor_by_what_compiles(place):
    header, frames = serialize_keras(compiled(loss="mse", metrics=["mae"]))
    assert header["encoding"] == "config"
    config = json.loads(header["body"]["config"])
    config["compile"][place] = ["registered>Registered"]
    RAN.clear()
    refused(changed(header, config), frames, "'registered>Registered'.*this process registered")
    assert RAN == []


def test_who_asked_for_it_by_name_sends_by_value():
    source = compiled(loss="registered>Registered")
    source.build()
    header, frames = serialize_keras(source)
    assert header["encoding"] == "value"
    zoo.assert_same(source, deserialize_keras(header, frames))


@pytest.mark.parametrize("name", ["IoU", "MeanIoU", "OneHotIoU", "OneHotMeanIoU"])
def test_metrics_that_list_all_classes(name):
    header, frames = serialize_keras(compiled(loss="mse", metrics=["mae"]))
    config = json.loads(header["body"]["config"])
    node = layer(name, "keras.metrics", num_classes=10**8, target_class_ids=[0], name="m")
    config["compile"]["metrics"] = [node]
    refused(changed(header, config), frames, f"num_classes of {name} asks for 100000000 at once")


WORDS = ["a" * 10_000, *map(str, range(2000))]


def test_a_vocabulary_that_one_word_makes_large():
    node = layer("StringLookup", vocabulary=WORDS)
    refused(*with_layer(node), "one word in the vocabulary of StringLookup is too long")


def looks_up(words):
    lookup = keras.layers.StringLookup(output_mode="count")
    lookup.set_vocabulary(words)
    inputs = keras.Input((2,), dtype="string")
    return keras.Model(inputs, lookup(inputs))


@zoo.tensorflow_only
@pytest.mark.parametrize("words", [WORDS, ["an uncommonly long word", *WORDS[1:]]], ids=len)
def test_honest_vocabularies_arrive(words):
    source = looks_up(words)
    header, frames = serialize_keras(source)
    assert header["encoding"] == ("value" if words is WORDS else "config")
    assert deserialize_keras(header, frames).layers[-1].get_vocabulary()[1:] == words


@zoo.tensorflow_only
def test_a_file_of_one_word_that_makes_it_large():
    text = np.frombuffer("\n".join(WORDS).encode(), np.uint8)
    with pytest.raises(DecodeError, match="one word of its vocabulary is too long"):
        assets.write(looks_up(["a"]), [(1, "vocabulary.txt")], [text])


#: Arguments that are names.
PLAIN = {
    "self",
    "name",
    "dtype",
    "reduction",
    "kwargs",
    "loss_scale_factor",
    "use_ema",
    "jit_compile",
}


def what_compiles():
    """Yield each of Keras's metrics, losses and optimizers with each argument it takes."""
    for module, place, base in (
        ("metrics", "metrics", keras.Metric),
        ("losses", "loss", keras.Loss),
        ("optimizers", "optimizer", keras.Optimizer),
    ):
        for name, cls in sorted(vars(getattr(keras, module)).items()):
            if isinstance(cls, type) and issubclass(cls, base):
                for argument in inspect.signature(cls.__init__).parameters.keys() - PLAIN:
                    yield module, place, name, argument


@pytest.mark.more
@pytest.mark.once
def test_nothing_that_compiles_takes_memory_for_a_number():
    header, frames = serialize_keras(compiled(loss="mse", metrics=["mae"]))
    seen = 0
    tracemalloc.start()
    try:
        for module, place, name, argument in what_compiles():
            config = json.loads(header["body"]["config"])
            node = layer(name, f"keras.{module}", **{argument: 10**7})
            config["compile"][place] = [node] if place == "metrics" else node
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(DecodeError):
                deserialize_keras(changed(header, config), frames)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 30e6, f"{argument} of {name} took {peak / 1e6:.0f} MB"
            seen += 1
    finally:
        tracemalloc.stop()
    assert seen > 100


def test_a_history_is_as_deep_as_it_may_be_sent_on():
    source = zoo.build("trained")
    source.history.history["odd"] = [[1.5]]
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    assert deserialize_keras(header, frames).history.history["odd"] == [[1.5]]
    deep = []
    for _ in range(100):
        deep = [deep]
    config = json.loads(header["body"]["config"])
    config["history"]["history"]["odd"] = deep
    refused(changed(header, config), frames, "malformed at 'history'")
    source.history.history["odd"] = deep
    header, frames = serialize_keras(source)
    assert header["encoding"] == "value"
    assert deserialize_keras(header, frames).history.history["odd"] == deep


@keras.saving.register_keras_serializable(package="registered")
class Instead(keras.layers.Dense):
    def __init__(self, *arguments, **settings):
        RAN.append("made")
        super().__init__(*arguments, **settings)


def test_what_stands_here_for_one_of_keras_is_not_taken_for_it():
    """Keras looks for classes and functions among those registered before its own."""
    source = zoo.build("sequential")
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    for name, instead in (("Dense", Instead), ("relu", registered), ("Sequential", Instead)):
        with keras.saving.custom_object_scope({}):
            keras.saving.get_custom_objects()[name] = instead
            RAN.clear()
            try:
                refused(header, frames, f"'{name}' is what this process registered")
                assert serialize_keras(source)[0]["encoding"] == "value"
            finally:
                del keras.saving.get_custom_objects()[name]
            assert RAN == []
    zoo.assert_same(source, deserialize_keras(header, frames))


def state_of(units, batch):
    inputs = layer("InputLayer", batch_shape=[batch, 1, 1], dtype="float32", name="big")
    rnn = layer("SimpleRNN", units=units, stateful=True, name="rnn")
    return at(inputs), at(rnn, call(tensor("big", shape=(batch, 1, 1))))


def test_states_as_large_as_a_batch_are_not_made():
    refused(*with_more_layers(*state_of(1, 10**6)), "SimpleRNN has states as large as its batch")


@pytest.mark.parametrize("built", [True, False])
def test_an_honest_layer_with_states_goes_by_value(built):
    source = keras.Sequential([keras.layers.GRU(3, stateful=True)])
    if built:
        source.build((2, 4, 3))
        source(np.ones((2, 4, 3), np.float32))
    header, frames = serialize_keras(source)
    assert header["encoding"] == "value"
    again = deserialize_keras(header, frames)
    assert again.get_config() == source.get_config()
    if built:
        for mine, theirs in zip(source.layers[0].states, again.layers[0].states, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (mine, theirs)))


@pytest.mark.parametrize(
    "node",
    [
        layer("Dense", units=10**7 + 1),
        layer("Dropout", rate=0.5, noise_shape=[None, 2**40]),
        layer("StringLookup", vocabulary=["a"], max_tokens=10**8, pad_to_max_tokens=True),
        layer("Identity") | {"build_config": {"input_shape": [10**9, 2]}},
    ],
    ids=lambda node: node["class_name"],
)
def test_numbers_larger_than_what_was_sent(node):
    refused(*with_layer(node), "larger than any axis of its variables")


def test_seeds_and_axes_that_were_sent_may_be_large():
    inputs = keras.Input((2,))
    x = keras.layers.Dropout(0.1, seed=2**31 - 1)(inputs)
    x = keras.layers.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed=10**9))(x)
    source = keras.Model(inputs, keras.layers.Reshape((1, 2))(x))
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    zoo.assert_same(source, deserialize_keras(header, frames))
    large = keras.Sequential([keras.Input((1,)), keras.layers.Dense(10**7 + 1, dtype="float16")])
    header, frames = serialize_keras(large)
    assert header["encoding"] == "config"
    assert deserialize_keras(header, frames).layers[0].units == 10**7 + 1


@pytest.mark.parametrize("seed", [None, 10**9])
def test_large_numbers_go_by_value(seed):
    inputs = keras.Input((2,))
    x = keras.layers.Dropout(0.1, seed=seed, noise_shape=(10**8, 2))(inputs)
    header, frames = serialize_keras(keras.Model(inputs, x))
    assert header["encoding"] == "value"
    assert deserialize_keras(header, frames).layers[1].noise_shape[0] == 10**8


LOPSIDED = ["x" * 20_000, *range(10_000)]


@pytest.mark.parametrize(
    "values",
    [
        LOPSIDED,
        [LOPSIDED],
        [{"class_name": "__bytes__", "config": {"value": "x" * 20_000}}, *WORDS[1:]],
        [*LOPSIDED, {"class_name": "__numpy__", "config": {"value": 1, "dtype": "int32"}}],
    ],
    ids=["numbers", "nested", "bytes", "arrays"],
)
@pytest.mark.parametrize("where", ["value", "vocabulary", "whatever"])
def test_one_word_among_many_values(values, where):
    constant = layer("Constant", "keras.initializers", **{where: values})
    node = layer("Dense", units=2, bias_initializer=constant)
    tracemalloc.start()
    refused(*with_layer(node), f"one word in the {where} of Constant is too long")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_vocabularies_in_files_are_split_as_keras_does():
    text = np.frombuffer("\x0b".join(WORDS).encode(), np.uint8)
    assert assets.is_lopsided("vocabulary.txt", text)
    assert not assets.is_lopsided("vocabulary.txt", text[10_000:])


@pytest.mark.parametrize("name", ["Orthogonal", "Identity", "GlorotUniform", "STFT"])
def test_variables_without_elements_are_not_initialized(name):
    """LAPACK ends a process for it, on TensorFlow."""
    initializer = layer(name, "keras.initializers")
    empty = at(layer("InputLayer", batch_shape=[None, 0], dtype="float32", name="empty"))
    node = layer("Dense", units=9_999_999, use_bias=False, kernel_initializer=initializer, name="d")
    refused(
        *with_more_layers(empty, at(node, call(tensor("empty", shape=(None, 0))))), "rebuil|larger"
    )
    node["config"]["units"] = 5
    refused(*with_more_layers(empty, at(node, call(tensor("empty", shape=(None, 0))))), "rebuil")


def test_variables_without_elements_arrive():
    source = keras.Sequential([keras.Input((0,)), keras.layers.Dense(3)])
    again = deserialize_keras(*serialize_keras(source))
    zoo.assert_same(source, again)
    assert again.layers[0].kernel.shape == (0, 3)


def repeated(times, *, metrics=0):
    inputs = x = keras.Input((2,))
    x = keras.layers.Concatenate(axis=1)([keras.layers.RepeatVector(5000)(x) for _ in range(times)])
    made = keras.Model(inputs, keras.layers.Flatten()(x))
    if metrics:
        size = {2: 10_000}.get(times, 900)
        found = [keras.metrics.AUC(size, name=f"m{i}") for i in range(metrics)]
        made.compile("sgd", "mse", metrics=found)
    return made


@pytest.mark.parametrize(
    ("times", "metrics", "encoding"),
    [(45, 0, "value"), (38, 12, "value"), (2, 21, "value"), (38, 0, "config"), (30, 4, "config")],
)
def test_what_asks_for_too_much_together_goes_by_value(times, metrics, encoding):
    header, frames = serialize_keras(repeated(times, metrics=metrics))
    assert header["encoding"] == encoding
    assert len(deserialize_keras(header, frames).layers) == times + 3


@pytest.mark.parametrize(
    "metrics",
    [
        lambda: [keras.metrics.AUC(9000)],
        lambda: [keras.metrics.MeanAbsoluteError(name=f"m{i}") for i in range(60)],
    ],
    ids=["large", "many"],
)
@pytest.mark.parametrize("trained", [False, True])
def test_metrics_that_are_not_built(metrics, trained):
    """They have variables, which are not the model's yet."""
    made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    made.compile("sgd", "mse", metrics=metrics())
    if trained:
        made.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    header, frames = serialize_keras(made)
    assert header["encoding"] == ("config" if trained else "value")
    again = deserialize_keras(header, frames)
    zoo.assert_same(made, again)
    for each in (made, again):
        each.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    zoo.assert_same(made, again)


def test_means_as_wide_as_large_images_go_by_value():
    def normalizes(width):
        layer = keras.layers.Normalization(axis=(1, 2, 3), mean=0.5, variance=1.0)
        return keras.Sequential([keras.Input((width, 2048, 3)), layer])

    for width, encoding in ((1024, "config"), (2048, "value")):
        header, frames = serialize_keras(normalizes(width))
        assert header["encoding"] == encoding
        assert deserialize_keras(header, frames).layers[-1].mean.shape[1:] == (width, 2048, 3)
