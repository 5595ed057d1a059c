"""The encoder: the same model, uncopied out, copied once in, no random numbers drawn."""

import copy
import gc
import json
import logging
import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import msgpack
import numpy as np
import pytest
from keras import layers
from keras.src.random import seed_generator

from dask_keras_serialize import backends
from dask_keras_serialize.configs import fidelity
from dask_keras_serialize.configs.by_config import variables_of
from dask_keras_serialize.errors import DecodeError, EncodeError
from dask_keras_serialize.protocol import GRAPH_BYTES, decode, encode, graph_nbytes, nbytes
from dask_keras_serialize.rebuilding import rebuild
from dask_keras_serialize.rebuilding.aside import aside
from dask_keras_serialize.wire import frames
from dask_keras_serialize.wire.header import Header
from tests import zoo


def round_trip(model):
    """Encode, cross a real msgpack and fresh buffers, decode."""
    header, parts = encode(model)
    wire = msgpack.unpackb(msgpack.packb(header.to_wire()), use_list=False)
    return decode(Header.from_wire(wire), [bytearray(part) for part in parts])


@pytest.mark.parametrize("name", zoo.some(zoo.ALL, others=pytest.mark.more))
def test_what_arrives_is_the_same_model(name):
    model = zoo.build(name)
    assert encode(model)[0].encoding == ("config" if name in zoo.BY_CONFIG else "value")
    replica = round_trip(model)
    zoo.assert_same(model, replica)
    if model.built:
        zoo.assert_predict_the_same(model, replica, zoo.inputs_for(model))
    # and what arrives can be sent on
    zoo.assert_same(model, round_trip(replica))


def test_whose_classes_a_config_names_is_read_off_its_text():
    """Keras's own at once; what only looks so is looked at one by one."""
    config = keras.saving.serialize_keras_object(zoo.build("sequential"))
    text = json.dumps({key: value for key, value in config.items() if key != "compile_config"})
    assert fidelity._only_keras(text)
    assert fidelity._only_keras(text.replace('"name": "', '"name": "\\"class_name\\": \\"X'))
    for theirs in (
        text.replace('"module": "keras.layers"', '"module": "keras_of_mine.layers"', 1),
        text.replace('"module": "keras.layers"', '"module": null', 1),
        text.replace('"registered_name": null', '"registered_name": "Mine>Dense"', 1),
        text.replace('"class_name": "Dense"', '"class_name": "__lambda__"', 1),
        text.replace('"module": "keras.layers", ', "", 1),
        "",
    ):
        assert theirs != text
        assert not fidelity._only_keras(theirs)


@pytest.mark.more
@pytest.mark.parametrize("name", zoo.some(name for name in zoo.ALL if "trained" in name))
def test_training_goes_on_to_the_bit(name):
    model = zoo.build(name)
    assert round_trip(model).history.history == model.history.history
    replica = round_trip(model)
    assert (replica.run_eagerly, replica.jit_compile) == (model.run_eagerly, model.jit_compile)
    assert replica.steps_per_execution == model.steps_per_execution
    # traced anew, as the replica will be: TensorFlow's first trace, which builds the
    # optimizer, sums some gradients in another order
    model.make_train_function(force=True)
    target = zoo.TARGET.get(name, "sparse")
    for trained in (model, replica):
        # torch's dropout draws from the process, not from the layer, and so does what
        # builds a loss before the first step
        trained.test_on_batch(zoo.X, zoo.TARGETS[target])
        keras.utils.set_random_seed(0)
        trained.fit(zoo.X, zoo.TARGETS[target], epochs=2, shuffle=False, verbose=0)
    assert model.history.history == replica.history.history
    zoo.assert_same(model, replica)


def test_a_lossy_loss_keeps_its_argument():
    loss = round_trip(zoo.build("lossy loss")).loss
    assert loss._fn_kwargs == {"delta": 3.0}


def test_excluded_variables_stay_excluded():
    replica = round_trip(zoo.build("excluded from decay"))
    decays = [replica.optimizer._use_weight_decay(v) for v in replica.trainable_variables]
    assert decays.count(False) == 1
    assert not replica.optimizer._use_weight_decay(replica.layers[0].bias)


def test_layers_tied_across_nesting_stay_tied():
    replica = round_trip(zoo.build("tied across nesting"))
    assert len(replica.trainable_variables) == 2
    assert replica.layers[1].layers[0] is replica.layers[2]


def test_python_state_arrives():
    model = zoo.build("trained subclassed")
    model.notes["steps"] = 7
    model.notes["array"] = np.arange(3.0)
    replica = round_trip(model)
    assert replica.notes["steps"] == 7
    replica.notes["array"][0] = 9  # as writeable as it was, and not the sender's
    assert model.notes["array"][0] == 0
    assert replica.hidden[0] in replica.layers


def test_a_class_may_say_what_its_state_is():
    assert not hasattr(round_trip(zoo.build("trained with getstate")), "log")
    assert round_trip(zoo.build("trained with setstate")).log == "opened"


def test_metrics_arrive_with_their_totals():
    model = zoo.build("trained")
    expected = model.get_metrics_result()
    assert expected == round_trip(model).get_metrics_result()


def test_large_variables_leave_without_a_copy():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((256,)), layers.Dense(512), layers.Dense(64)])
    large = [v for v in model.variables if math.prod(v.shape) * 4 >= frames.LARGE]
    _, parts = encode(model)
    assert len(large) == 2
    assert len(parts) == 1 + len(large)
    where = [np.frombuffer(part, np.uint8).ctypes.data for part in parts[1:]]
    assert where == [zoo.address(v) for v in large]


def test_frames_do_not_show_later_training():
    model = zoo.build("sequential")
    before = [zoo.to_bytes(v) for v in model.variables]
    header, parts = encode(model)
    for variable in model.variables:
        variable.assign(variable + 1)
    replica = decode(header, parts)
    assert [zoo.to_bytes(v) for v in replica.variables] == before


def test_a_model_keeps_none_of_the_frames_it_came_from():
    model = zoo.build("sequential")
    header, parts = encode(model)
    buffers = [bytearray(part) for part in parts]
    replica = decode(header, buffers)
    keras.ops.zeros(1)  # at its next call JAX lets go of what it copied last
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))
        buffer.clear()  # BufferError while anything views it
    zoo.assert_same(model, replica)


def test_each_byte_is_copied_once_on_the_way_in(monkeypatch):
    model = zoo.build("trained")
    header, parts = encode(model)
    copied = []
    backend = backends.current()[1]
    original = backend.tensor
    monkeypatch.setattr(
        backend, "tensor", lambda array: copied.append(array.nbytes) or original(array)
    )
    monkeypatch.setattr(keras.Variable, "assign", refuse_but_counters(keras.Variable.assign))
    decode(header, parts)
    assert sum(copied) == sum(v.location.nbytes for v in header.variables)


def refuse_but_counters(original):
    def assign(variable, value):
        assert math.prod(variable.shape) <= 2, f"{variable.path} was assigned, not created"
        return original(variable, value)

    return assign


def test_no_initializer_runs(monkeypatch):
    header, parts = encode(zoo.build("trained"))

    def refuse(self, shape, dtype=None):
        raise AssertionError(f"initialised {shape} at random")

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", refuse)
    decode(header, parts)


@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
def test_random_state_is_left_alone(name):
    header, parts = encode(zoo.build(name))
    random.seed(5)
    np.random.seed(5)
    state, numpy_state = random.getstate(), np.random.get_state()[1].tobytes()
    assert gc.isenabled()
    decode(header, parts)
    assert gc.isenabled()
    assert random.getstate() == state
    assert np.random.get_state()[1].tobytes() == numpy_state


def test_other_threads_keep_their_random_numbers():
    model = keras.Sequential([keras.Input((4,)), *[layers.Dense(4) for _ in range(40)]])
    header, parts = encode(model)
    done = threading.Event()

    def decode_on():
        while not done.is_set():
            decode(header, parts)

    thread = threading.Thread(target=decode_on)
    thread.start()
    drawn = [random.getrandbits(64) for _ in range(2000) if not time.sleep(0.0005)]
    done.set()
    thread.join()
    assert len(set(drawn)) == len(drawn)


def test_sending_and_receiving_at_once_leave_random_numbers_alone():
    """Each puts numbers of its own in place of Python's, and puts back what it found."""
    receiving, sent = threading.Event(), threading.Event()

    def receive():
        with rebuild.rebuilding():
            receiving.set()
            sent.wait(0.5)  # as long as it would take the other to come in between

    def send():
        receiving.wait()
        with aside():
            sent.set()
            thread.join(0.5)

    thread, other = threading.Thread(target=receive), threading.Thread(target=send)
    thread.start()
    other.start()
    thread.join()
    other.join()
    assert seed_generator.python_random is random


@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
def test_a_model_in_training_is_sent_whole(name):
    model = zoo.build(name)
    done = threading.Event()
    data = zoo.X, zoo.LABELS

    def train():
        while not done.is_set():
            model.fit(*data, batch_size=2, validation_data=data, verbose=0)

    thread = threading.Thread(target=train)
    thread.start()
    steps = []
    try:
        # tracing may take longer than sixty sends
        while len(steps) < 60 or steps[0] == steps[-1]:
            header, parts = encode(model)
            replica = decode(Header.from_wire(header.to_wire()), parts)
            steps.append(int(replica.optimizer.iterations))
            assert all(np.isfinite(each).all() for each in replica.get_weights())
    finally:
        done.set()
        thread.join()
    assert steps == sorted(steps)


@pytest.mark.more
@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
@pytest.mark.parametrize("send", [round_trip, copy.deepcopy], ids=["encode", "deepcopy"])
def test_a_callback_may_send_the_model_between_epochs(name, send):
    model = zoo.build(name)
    sent = []

    def on_epoch_end(epoch, logs):
        sent.append((send(model), model.get_weights()))

    callback = keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)
    data = zoo.X, zoo.LABELS
    model.fit(*data, epochs=2, validation_data=data, verbose=0, callbacks=[callback])
    for replica, weights in sent:
        for ours, theirs in zip(replica.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert len(sent) == 2
    replica.fit(*data, validation_data=data, verbose=0)


def test_threads_may_run_one_model():
    """On JAX, whose trainer takes the values out of a model while it predicts, too."""
    model = zoo.build("trained")
    expected = model.predict(zoo.X, batch_size=4, verbose=0)

    def predict(_):
        return model.predict(zoo.X, batch_size=4, verbose=0)

    with ThreadPoolExecutor(4) as threads:
        for predicted in threads.map(predict, range(20)):
            np.testing.assert_array_equal(predicted, expected)


def test_the_hook_on_variables_is_taken_off_even_after_an_error():
    before = keras.Variable._initialize_with_initializer
    header, parts = encode(zoo.build("sequential"))
    decode(header, parts)
    assert keras.Variable._initialize_with_initializer is before
    header.body["config"] = header.body["config"].replace('"Dense"', '"Dance"')
    with pytest.raises(DecodeError):
        decode(header, parts)
    assert keras.Variable._initialize_with_initializer is before


def test_without_the_hook_values_are_assigned(monkeypatch):
    monkeypatch.setattr(rebuild.private, "feeds_at_creation", lambda: False)
    for name in ("trained", "nested", "adapted"):
        model = zoo.build(name)
        zoo.assert_same(model, round_trip(model))


def test_it_logs_why_a_model_goes_by_value(caplog):
    caplog.set_level(logging.DEBUG, "dask_keras_serialize")
    encode(zoo.build("attribute"))
    assert "goes by value: attribute 'note' was set on" in caplog.text


@pytest.mark.parametrize("thing", [open, lambda: (yield)], ids=["file", "generator"])
def test_what_cannot_travel_is_named(thing, tmp_path):
    model = zoo.build("subclassed")
    model.notes["log"] = thing(tmp_path / "log", "w") if thing is open else thing()
    with pytest.raises(EncodeError, match=r"model 'subclassed\w*'.*notes\['log'\]") as info:
        encode(model)
    assert "\n" not in str(info.value)
    model.notes["log"].close()


def test_dtypes_that_cannot_travel_are_named(monkeypatch):
    model = zoo.build("sequential")
    monkeypatch.setattr("dask_keras_serialize.protocol.ITEMSIZE", {})
    with pytest.raises(EncodeError, match=r"variable 'sequential.*kernel' has dtype float32"):
        encode(model)


def test_every_dtype_survives():
    model = zoo.Subclassed((4,))
    dtypes = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
    dtypes += ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
    dtypes += ["complex64", "complex128"]
    # Keras has no such on torch, and JAX only if told so
    lacking = {"torch": {"uint64"}, "jax": {"int64", "uint64", "float64", "complex128"}}
    dtypes = [each for each in dtypes if each not in lacking.get(keras.backend.backend(), ())]
    model.kept = [
        keras.Variable(np.arange(6.0).reshape(2, 3), dtype=dtype, trainable=False)
        for dtype in dtypes
    ]
    replica = round_trip(model)
    assert [v.dtype for v in replica.kept] == dtypes
    for ours, theirs in zip(model.kept, replica.kept, strict=True):
        assert zoo.to_bytes(ours) == zoo.to_bytes(theirs), ours.dtype


def test_sizes():
    model = zoo.build("trained")
    assert nbytes(model) == sum(len(zoo.to_bytes(v)) for v in variables_of(model))
    assert graph_nbytes(model) > GRAPH_BYTES[0]


def test_an_attribute_named_like_one_of_a_trainer_s_is_sent():
    model = zoo.build("trained")
    model.my_variable_shardings = [1, 2, 3]
    assert list(decode(*encode(model)).my_variable_shardings) == [1, 2, 3]
    assert list(copy.deepcopy(model).my_variable_shardings) == [1, 2, 3]
