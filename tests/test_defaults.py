"""While a thread rebuilds a model under its sender's defaults, all others keep their own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import keras
from keras.src.backend.common import global_state

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import defaults
from dask_keras_serialize.configs.defaults import floatx_in_this_thread, policy_in_this_thread
from tests import zoo


def sent_of_float64():
    """A model that was made and trained where everything is float64, and its message."""
    model = zoo.made_under("float64", "float64")
    keras.config.set_floatx("float64")
    try:
        message = serialize_keras(model)
    finally:
        keras.config.set_floatx("float32")
    assert message[0]["encoding"] == "config"
    return model, message


def in_another_thread(function):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result(timeout=60)


def test_others_make_theirs_under_the_process_s(monkeypatch):
    model, message = sent_of_float64()
    met, build = threading.Barrier(2), keras.layers.Dense.build

    def build_slowly(layer, shape):
        if threading.get_ident() != here:
            met.wait(30)
            met.wait(30)
        build(layer, shape)

    here = threading.get_ident()
    monkeypatch.setattr(keras.layers.Dense, "build", build_slowly)
    with ThreadPoolExecutor(1) as threads:
        rebuilt = threads.submit(deserialize_keras, *message)
        met.wait(30)
        monkeypatch.undo()
        variable = keras.Variable(keras.initializers.Ones(), shape=())
        layer, found = keras.layers.Dense(2), keras.config.floatx()
        keras.config.set_floatx("float16")  # a user's: it stays
        try:
            met.wait(30)
            there = rebuilt.result(timeout=60)
            assert keras.config.floatx() == "float16"
        finally:
            keras.config.set_floatx("float32")
    assert (variable.dtype, layer.variable_dtype, found) == ("float32",) * 3
    assert {each.dtype for each in there.trainable_variables} == {"float64"}
    assert there.optimizer.learning_rate.dtype == model.optimizer.learning_rate.dtype
    assert list(map(zoo.to_bytes, there.variables)) == list(map(zoo.to_bytes, model.variables))
    assert keras.config.floatx.__code__ is not defaults._hooked.__code__


def test_others_change_the_process_s_meanwhile(monkeypatch):
    """As a model is rebuilt whose floatx is the same as theirs was."""
    model = zoo.build("trained")
    message, build = serialize_keras(model), keras.layers.Dense.build

    def build_as_another_sets_floatx(layer, shape):
        in_another_thread(lambda: keras.config.set_floatx("float64"))
        build(layer, shape)

    monkeypatch.setattr(keras.layers.Dense, "build", build_as_another_sets_floatx)
    try:
        there = deserialize_keras(*message)
        assert keras.config.floatx() == "float64"
    finally:
        keras.config.set_floatx("float32")
    assert zoo.bits(there) == zoo.bits(model)
    assert there.optimizer.learning_rate.dtype == "float32"


def test_one_rebuild_inside_another():
    def others():
        return in_another_thread(keras.config.floatx)

    with floatx_in_this_thread("float64"):
        with floatx_in_this_thread("float16"):
            assert (keras.config.floatx(), others()) == ("float16", "float32")
            with floatx_in_this_thread("float32"):
                assert (keras.config.floatx(), others()) == ("float32", "float32")
        assert (keras.config.floatx(), others()) == ("float64", "float32")
        made = keras.Variable(keras.initializers.Ones(), shape=())
        assert keras.backend.floatx() == made.dtype == "float64"
    assert (keras.config.floatx(), others()) == ("float32", "float32")


def test_a_keras_whose_function_cannot_be_hooked(monkeypatch):
    """Then floatx is another for all, and is put back."""
    model, message = sent_of_float64()
    monkeypatch.setattr(defaults, "can_hook", lambda _: False)
    there = deserialize_keras(*message)
    assert list(map(zoo.to_bytes, there.variables)) == list(map(zoo.to_bytes, model.variables))
    with floatx_in_this_thread("float64"):
        assert in_another_thread(keras.config.floatx) == "float64"
    assert keras.config.floatx() == "float32"


def test_a_policy_that_nobody_has_set_stays_unset():
    """Or a later ``set_floatx`` would change nothing for what the thread makes then."""

    def receive():
        assert global_state.get_global_attribute("dtype_policy") is None
        deserialize_keras(*message)
        return global_state.get_global_attribute("dtype_policy")

    message = serialize_keras(zoo.functional())
    assert in_another_thread(receive) is None


def test_a_policy_is_put_back():
    before = keras.config.dtype_policy()
    with policy_in_this_thread(keras.DTypePolicy("float16")):
        assert keras.config.dtype_policy().name == "float16"
    assert keras.config.dtype_policy() is before


def test_a_keras_that_keeps_policies_elsewhere(monkeypatch):
    before = keras.config.dtype_policy()
    monkeypatch.setattr(defaults, "import_module", lambda _: object())
    with policy_in_this_thread(keras.DTypePolicy("float16")):
        assert keras.config.dtype_policy().name == "float16"
    assert keras.config.dtype_policy() is before
