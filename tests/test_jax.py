"""JAX's own: a trainer that takes the values out of a model for as long as it runs."""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import keras
import numpy as np
import pytest

from dask_keras_serialize.backends.jax_trainer import HELD
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import compiled
from dask_keras_serialize.errors import DecodeError, EncodeError
from tests import zoo

X, Y = zoo.X, zoo.LABELS


def callback(on_batch):
    return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: on_batch(batch))


def test_a_model_is_sent_from_another_thread_in_the_middle_of_an_epoch():
    model = zoo.build("trained")
    sent = []

    def send(batch):
        assert model.trainable_variables[0]._value is None
        with ThreadPoolExecutor(1) as thread:
            sent.append(thread.submit(pickle.dumps, model).result(60))

    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[callback(send)])
    steps = [int(pickle.loads(each).optimizer.iterations) for each in sent]
    assert steps == sorted(set(steps))
    assert len(steps) == 4
    assert not HELD


def test_what_a_config_says_may_be_given_away_while_it_is_read(monkeypatch):
    model = zoo.build("trained")
    given_away = jnp.array(0.1)
    given_away.delete()
    monkeypatch.setattr(compiled, "describe", lambda m: float(given_away))
    arrived = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(arrived.predict(X, verbose=0), model.predict(X, verbose=0))
    assert int(arrived.optimizer.iterations) == int(model.optimizer.iterations)


def test_training_may_wait_for_a_thread_that_predicts():
    model = zoo.build("trained")
    predicted = []

    def predict(epoch, logs):
        with ThreadPoolExecutor(1) as thread:
            predicted.append(thread.submit(model.predict, X, verbose=0).result(60))

    wait = keras.callbacks.LambdaCallback(on_epoch_end=predict)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[wait])
    assert len(predicted) == 2


def test_values_that_a_failed_run_lost_are_named_at_once():
    model = zoo.build("trained")

    def batches():
        yield X, Y
        yield X, Y
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        model.evaluate(batches(), verbose=0)
    model.predict(X, verbose=0)
    with pytest.raises(EncodeError, match=r"variable .* has no value .* if a run of it failed"):
        pickle.dumps(model)


def test_another_model_s_run_forgets_nothing():
    model, other = zoo.build("trained"), zoo.build("sequential")
    done = threading.Event()

    def run():
        while not done.is_set():
            other.predict_on_batch(X)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            model.fit(
                X, Y, batch_size=4, verbose=0, callbacks=[callback(lambda _: pickle.dumps(model))]
            )
    finally:
        done.set()
        thread.join()


def test_what_training_began_with_is_not_kept():
    model = zoo.build("trained eagerly")
    first = []

    def look(batch):
        first.append([held.first() for held in HELD.values()])

    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[callback(look)])
    trainable = len(model.trainable_variables)
    assert sum(value is None for value in first[-1]) >= trainable
    assert np.isfinite(model.predict(X, verbose=0)).all()


def test_a_limit_is_told_by_the_name_that_is_set_already(monkeypatch):
    from dask_keras_serialize.devices import Limits
    from dask_keras_serialize.devices import jax as devices

    monkeypatch.setattr(devices, "started", lambda: False)
    old, new = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
    for name in (old, new):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(old, "")  # so that it is taken back after the test
    devices.settle(Limits(fraction=1e-5))
    assert os.environ[old] == "1e-05"
    monkeypatch.delenv(old)
    monkeypatch.setenv(new, "0.5")
    devices.settle(Limits(fraction=0.25))
    assert os.environ[new] == "0.25"
    assert old not in os.environ


@pytest.mark.parametrize(
    "placement",
    [[["a", 10**9], ["x"], [None]], [[10**9, -1], ["x"], [None]], [[2.5], ["x"], [None]], [[], 1]],
    ids=repr,
)
def test_a_placement_that_is_none(placement):
    header, frames = serialize_keras(zoo.build("sequential"))
    body = header["body"] | {"placements": [[0, placement]]}
    with pytest.raises(DecodeError, match="cannot be placed as"):
        deserialize_keras(header | {"body": body}, frames)


@pytest.mark.parametrize("by_value", [True, False])
def test_numbers_of_64_bits_are_not_cut(tmp_path, by_value):
    """A process with jax_enable_x64 sends them to this one, without it."""
    path = tmp_path / "model.pkl"
    program = f"""
import pickle, keras, dask_keras_serialize
keras.config.set_floatx("float64")
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer=VALUE)])
with open({str(path)!r}, "wb") as file:
    pickle.dump(model.layers[0] if {by_value} else model, file)
"""
    for value, held in (("keras.initializers.Constant(1 / 3)", False), ("'ones'", True)):
        subprocess.run(
            [sys.executable, "-c", program.replace("VALUE", value)],
            env=os.environ | {"JAX_ENABLE_X64": "1"},
            check=True,
            timeout=120,
        )
        if held:
            again = pickle.loads(path.read_bytes())
            assert np.array_equal(again.variables[0].value, np.ones((2, 1)))
        else:
            with pytest.raises(DecodeError, match=r"kernel.*numbers of float64.*JAX_ENABLE_X64=1"):
                pickle.loads(path.read_bytes())
