"""Models that arrive by config again: clones of the first are as like it as Keras's rebuilds."""

import gc
import importlib.util
import logging
import weakref

import dask
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.backend.common import global_state

from dask_keras_serialize.configs import templates
from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.protocol import decode, encode
from dask_keras_serialize.values import by_value, shells
from tests import zoo

#: Their vocabularies are values that no variable holds.
WITH_ASSETS = {"vocabulary", "words", "word counts", "document frequencies", "strings"}


@pytest.fixture(autouse=True)
def nothing_known():
    templates.forget()
    templates.counts.clear()
    yield
    templates.forget()


def arrive(model, keep=False):
    header, frames = encode(model)
    return decode(header, [bytearray(frame) for frame in frames], keep=keep)


@pytest.mark.parametrize("name", zoo.some(zoo.BY_CONFIG))
def test_a_clone_is_the_same_model(name):
    model = zoo.build(name)
    for _ in range(2):
        arrive(model)
    assert not templates.counts["cloned"]
    clone = arrive(model, keep=True)
    assert templates.counts["cloned"] == (name not in WITH_ASSETS)
    assert encode(clone)[0].encoding == "config"
    zoo.assert_same(model, clone)
    zoo.assert_same(clone, arrive(clone))


def test_clones_can_be_turned_off():
    model = stack()
    for _ in range(3):
        arrive(model)
    assert templates.counts == {"config": 2, "cloned": 1}
    with dask.config.set({"dask-keras-serialize.clone": False}):
        zoo.assert_same(model, arrive(model))
    assert templates.counts == {"config": 2, "cloned": 1}
    arrive(model)
    assert templates.counts["cloned"] == 2


@pytest.mark.parametrize("name", zoo.some(name for name in zoo.BY_CONFIG if "trained" in name))
def test_clones_train_to_the_bit_and_apart(name):
    model = zoo.build(name)
    rebuilt = [arrive(model) for _ in range(4)]
    assert templates.counts["cloned"] == 2
    before = encode(model)[0].fingerprints
    for replica in rebuilt[1:]:
        replica.make_train_function(force=True)
        target = zoo.TARGET.get(name, "sparse")
        replica.test_on_batch(zoo.X, zoo.TARGETS[target])
        keras.utils.set_random_seed(0)
        replica.fit(zoo.X, zoo.TARGETS[target], epochs=2, shuffle=False, verbose=0)
    by_keras, *clones = rebuilt[1:]
    for clone in clones:
        assert clone.history.history == by_keras.history.history
        zoo.assert_same(by_keras, clone)
    zoo.assert_same(model, rebuilt[0])  # nobody's training reached it
    assert encode(model)[0].fingerprints == before


def test_what_was_trained_since_is_the_same_architecture():
    model = zoo.build("trained")
    for _ in range(3):
        arrive(model)
    model.fit(zoo.X, zoo.TARGETS["sparse"], epochs=1, verbose=0)
    clone = arrive(model)
    assert templates.counts["cloned"] == 2
    assert clone.history.history == model.history.history
    zoo.assert_same(model, clone)


def stack(rate=0.5, width=3):
    steps = [layers.Dense(4, name="a"), layers.Dropout(rate, name="b"), layers.Dense(2, name="c")]
    return keras.Sequential([keras.Input((width,), name="input"), *steps], name="stack")


@pytest.mark.parametrize("change", ["rate", "frozen", "shape", "policy"])
def test_another_architecture_is_not_taken_for_it(change):
    for _ in range(3):
        arrive(stack())
    other = stack(0.25 if change == "rate" else 0.5, 4 if change == "shape" else 3)
    if change == "frozen":
        other.layers[0].trainable = False
    if change == "policy":
        with_policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
        other.layers[0].dtype_policy = with_policy
    zoo.assert_same(other, arrive(other))
    assert templates.counts["cloned"] == 1


def two_losses(order):
    inputs = keras.Input((3,), name="input")
    heads = {name: layers.Dense(2, name=name)(inputs) for name in order}
    model = keras.Model(inputs, heads, name="heads")
    model.compile("sgd", dict.fromkeys(order, "mse"))
    model.fit(np.ones((4, 3)), {"a": np.ones((4, 2)), "b": np.zeros((4, 2))}, verbose=0)
    return model


def test_the_order_of_a_config_counts():
    """Keras builds losses' totals, and what predict returns, in it."""
    # which Keras on JAX puts in the order of the names instead, and a newer one on torch
    torchtree = importlib.util.find_spec("keras.src.tree.torchtree_impl") is not None
    by_name = {"tensorflow": False, "jax": True, "torch": torchtree}[keras.backend.backend()]
    predicted = ["a", "b"] if by_name else ["b", "a"]
    for _ in range(3):
        arrive(two_losses("ab"))
    model = two_losses("ba")
    for _ in range(3):
        clone = arrive(model)
        zoo.assert_same(model, clone)
        outputs = [list(each.predict(np.ones((1, 3)), verbose=0)) for each in (model, clone)]
        assert outputs[0] == outputs[1] == predicted


def test_learning_rates_are_values():
    model = stack()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    zoo.assert_same(model, arrive(model))
    model.predict(np.ones((1, 3)), verbose=0)  # which the model remembers
    for rate in (0.1, 0.01, 0.001):
        model.optimizer.learning_rate = rate
        clone = arrive(model)
        zoo.assert_same(model, clone)
        assert clone.optimizer.get_config() == model.optimizer.get_config()
    assert templates.counts["cloned"] == 1


def test_scopes_of_rematerialization_are_those_of_the_receiver():
    model = stack()
    for _ in range(3):
        arrive(model)
    with keras.RematScope("full"):
        assert arrive(model).layers[0]._remat_mode is not None
    assert arrive(model).layers[0]._remat_mode is None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_what_a_template_fails_of_has_arrived(monkeypatch, error):
    def fails(*_, **__):
        raise error("gone")

    model = stack()
    monkeypatch.setattr(by_value, "dump", fails)
    for _ in range(3):
        zoo.assert_same(model, arrive(model))


def test_a_message_that_is_not_whole_ends_no_cloning():
    model = stack()
    for _ in range(3):
        arrive(model)
    header, frames = encode(model)
    with pytest.raises(DecodeError):
        decode(header, frames[:-1])
    arrive(model)
    assert templates.counts["cloned"] == 2


class Both(layers.Dense, dict):
    """A layer that is a container too."""


def test_a_layer_that_is_a_dict_too_arrives():
    layer = Both(2)
    layer["key"] = 1
    replica = decode(*encode(layer))
    assert (dict(replica), replica.units) == ({"key": 1}, 2)


def test_normalization_follows_its_variables():
    def adapted(mean):
        layer = layers.Normalization(name="norm")
        layer.adapt(np.full((8, 3), mean) + np.arange(8)[:, None])
        return keras.Sequential([keras.Input((3,), name="input"), layer], name="adapted")

    for _ in range(3):
        arrive(adapted(1.0))
    model = adapted(7.0)
    clone = arrive(model)
    assert templates.counts["cloned"] == 2
    batch = np.ones((2, 3), "float32")
    assert np.array_equal(model.predict(batch, verbose=0), clone.predict(batch, verbose=0))


def test_templates_hold_no_model_and_no_values():
    model = stack()
    held = [weakref.ref(arrive(model)) for _ in range(4)]
    gc.collect()
    assert not any(each() for each in held)
    (known,) = templates._known.values()
    assert known.template
    assert not known.template.likeness  # it has been compared
    secret = np.full((3, 4), 1.2345678, "float32")
    model.layers[0].kernel.assign(secret)
    templates.forget()
    for _ in range(3):
        arrive(model)
    (known,) = templates._known.values()
    assert not any(secret.tobytes() in extra.tobytes() for extra in known.template.extras)


def test_what_a_template_does_not_know_is_rebuilt_by_config(monkeypatch, caplog):
    def unknown(*_, **__):
        raise EncodeError("it holds something else")

    monkeypatch.setattr(by_value, "dump", unknown)
    model = stack()
    with caplog.at_level(logging.DEBUG, "dask_keras_serialize.configs.templates"):
        for _ in range(4):
            zoo.assert_same(model, arrive(model))
    assert caplog.text.count("is not cloned: it holds something else") == 1
    assert templates.counts == {"config": 4}


def test_a_clone_that_is_not_like_it_is_never_handed_out(monkeypatch):
    model = stack()
    for _ in range(2):
        arrive(model)
    original = by_value.load

    def wrong(*arguments):
        rebuilt = original(*arguments)
        rebuilt.root.layers[1].rate = 0.75
        return rebuilt

    monkeypatch.setattr(by_value, "load", wrong)
    for _ in range(2):
        zoo.assert_same(model, arrive(model))
    assert templates.counts == {"config": 4}


def test_a_clone_that_fails_falls_back(monkeypatch):
    model = stack()
    for _ in range(2):
        arrive(model)

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(by_value._Load, "run", broken)
    (known,) = templates._known.values()
    for _ in range(templates.FAILURES):
        assert not known.refused  # it may be the message's fault
        zoo.assert_same(model, arrive(model))
    assert "RuntimeError" in known.refused
    assert templates.counts == {"config": 2 + templates.FAILURES}


def test_one_odd_message_ends_no_cloning():
    model = stack()
    for _ in range(3):
        arrive(model)
    header, frames = encode(model)
    header.body["placements"] = [[99, {}]]
    with pytest.raises(DecodeError, match="placements"):
        decode(header, frames)
    (known,) = templates._known.values()
    assert (known.failures, known.refused) == (0, "")
    arrive(model)
    assert known.failures == 0
    assert templates.counts["cloned"] == 2


@pytest.mark.parametrize("config", ["[" * 200_000, '{"a":' * 100_000, "[]", "7"])
def test_a_config_that_is_none_is_an_error(config):
    header, frames = encode(stack())
    header.body["config"] = config
    with pytest.raises(DecodeError, match="config"):
        decode(header, frames)


def test_who_has_flash_attention_off_gets_no_clone_of_one_that_has_it_on():
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs))
    before = keras.config.is_flash_attention_enabled()
    for _ in range(3):
        arrive(model)
    try:
        keras.config.disable_flash_attention()
        assert arrive(model).layers[1]._flash_attention == keras.config.is_flash_attention_enabled()
    finally:
        global_state.set_global_attribute("flash_attention", before)  # None is neither


def test_a_process_remembers_so_many(monkeypatch):
    monkeypatch.setattr(templates, "REMEMBERED", 2)
    for rate in (0.1, 0.2, 0.3):
        for _ in range(2):
            arrive(stack(rate))
    assert len(templates._known) == 2
    monkeypatch.setattr(templates, "TEMPLATE_BYTES", 1)
    for _ in range(2):
        arrive(stack(0.4))
    assert len(templates._known) == 1


def test_layers_by_value_are_made_as_keras_makes_them():
    """By what of ``Layer.__new__`` a state does not bring; and they build and quantize."""
    made, by_keras = shells.new_shell(layers.Dense), layers.Dense.__new__(layers.Dense)
    assert vars(made).keys() == {"build", "quantize"} <= vars(by_keras).keys()
    for name in vars(made):
        ours, theirs = vars(made)[name], vars(by_keras)[name]
        assert ours.__code__ is theirs.__code__
        assert ours.__wrapped__.__self__ is made
        assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
        assert (ours.__defaults__, ours.__kwdefaults__) == (
            theirs.__defaults__,
            theirs.__kwdefaults__,
        )
    layer = decode(*encode(layers.Dense(3)))
    layer.build((None, 4))
    assert layer.built
    assert layer._build_shapes_dict == {"input_shape": (None, 4)}
    layer.quantize("int8")
    assert layer.kernel.dtype == "int8"


def test_layers_by_value_without_what_we_know_of_keras(monkeypatch):
    monkeypatch.setattr(shells, "_wrappers", lambda: None)
    model = zoo.build("subclassed")
    zoo.assert_same(model, arrive(model))


def test_by_config_says_what_is_malformed():
    header, frames = encode(stack())
    header.body["config"] = "{"
    with pytest.raises(Exception, match="its config cannot be rebuilt"):
        decode(header, frames)
    assert not templates._known
