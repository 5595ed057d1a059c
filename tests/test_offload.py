"""Threads: on which a model is packed and rebuilt, and that it is the same on each."""

import asyncio
import pickle
import threading

import keras
import numpy as np
import pytest
from distributed import Client, Worker

from dask_keras_serialize import BusyError, register, unregister
from dask_keras_serialize.rebuilding import aside
from tests import zoo
from tests.conftest import local_client

#: Seconds; what is asked for takes no time where the event loop is free to answer.
SOON = 20


def ask_the_loops():
    """Ask every event loop of a worker or client in this process for something, and wait."""
    for each in (*Worker._instances, *Client._instances):
        if each.status in ("running", getattr(each.status, "running", None)):
            answer = asyncio.run_coroutine_threadsafe(
                asyncio.sleep(0, "here"), each.loop.asyncio_loop
            )
            assert answer.result(SOON) == "here"


class Asking(keras.layers.Layer):
    """A layer that needs the event loop as it is taken apart and put together."""

    def __getstate__(self):
        ask_the_loops()
        return dict(vars(self), asked_by=threading.current_thread().name)

    def __setstate__(self, state):
        vars(self).update(state)
        ask_the_loops()
        self.__dict__["answered"] = threading.current_thread().name

    def call(self, x):
        return x


def names(model):
    """Return who took the model's first layer apart, and who put it together."""
    return model.layers[0].asked_by, model.layers[0].answered


def same(model):
    return model


def asking(nbytes):
    """Make a model whose variables are about so large."""
    return keras.Sequential([keras.Input((nbytes // 64,)), Asking(), keras.layers.Dense(16)])


@pytest.fixture(scope="module")
def client():
    with local_client() as client:
        yield client


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:Sending large graph:UserWarning")
@pytest.mark.parametrize("nbytes", [1 << 10, 16 << 20])
@pytest.mark.parametrize("way", ["scatter", "direct", "graph"])
def test_the_event_loop_goes_on_while_a_model_is_packed_or_rebuilt(client, nbytes, way):
    model = asking(nbytes)
    here, there = client.nthreads()
    value = model
    if way != "graph":
        value = client.scatter(model, workers=[here], direct=way == "direct", hash=False)
    first = client.submit(same, value, workers=[here], pure=False)
    second = client.submit(names, first, workers=[there], pure=False)  # from worker to worker
    for name in second.result(4 * SOON):
        assert name.startswith("Dask-Keras")
    back = first.result(4 * SOON)
    assert back.layers[0].answered.startswith("Dask-Keras")
    for ours, theirs in zip(model.get_weights(), back.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_thread_that_never_finishes_is_an_error_not_a_deadlock(monkeypatch):
    model = zoo.build("trained")
    sent = pickle.dumps(model)
    monkeypatch.setattr(aside, "PATIENCE_OF_A_LOOP", 0.05)

    async def receive():
        return pickle.loads(sent)

    held, finish = threading.Event(), threading.Event()

    def rebuild():
        with aside.own_random():
            held.set()
            finish.wait(SOON)

    thread = threading.Thread(target=rebuild)
    thread.start()
    try:
        assert held.wait(SOON)
        with pytest.raises(BusyError, match="another thread of this process") as info:
            asyncio.run(receive())
        assert "\n" not in str(info.value)
    finally:
        finish.set()
        thread.join()
    zoo.assert_same(model, asyncio.run(receive()))


@pytest.mark.parametrize("name", ["trained", "subclassed"])
def test_what_arrives_does_not_follow_the_scopes_of_the_thread(name):
    model = zoo.build(name)
    paths = [variable.path for variable in model.variables]
    sent = pickle.dumps(model, 5)
    cpu = "cpu" if keras.backend.backend() == "torch" else "cpu:0"  # as Keras itself takes it
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with keras.device(cpu), keras.name_scope("outer"):
            far = pickle.loads(sent)
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy(before)
    assert [variable.path for variable in far.variables] == paths
    assert far.dtype_policy.name == "float32"
    zoo.assert_same(model, far)


def test_comms_are_given_back():
    from distributed.comm import tcp, ws

    ours = [getattr(comm, name) for comm in (tcp, ws) for name in ("from_frames", "to_frames")]
    unregister()
    try:
        theirs = [
            getattr(comm, name) for comm in (tcp, ws) for name in ("from_frames", "to_frames")
        ]
    finally:
        register()
    assert all(wrapper.__wrapped__ is plain for wrapper, plain in zip(ours, theirs, strict=True))
