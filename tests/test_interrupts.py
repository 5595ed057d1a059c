"""Interrupts at the worst moments leave no lock held, no hook set and no collector off."""

import ctypes
import gc
import threading
import time

import keras
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.rebuilding import aside, garbage
from dask_keras_serialize.rebuilding.hooks import in_this_thread
from dask_keras_serialize.rebuilding.turns import Turn
from tests import leaks, zoo


class Interrupt(BaseException):
    """What a user may interrupt a thread with, as Ctrl-C does the main one."""


def waiting(run):
    """Start a thread that waits for what this one holds; return it, and what it raised."""
    raised = []

    def target():
        try:
            run()
        except BaseException as error:
            raised.append(type(error))

    thread = threading.Thread(target=target)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    return thread, raised


def interrupt(thread):
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt)
    )
    assert raised == 1


def interrupted_as_it_gets(lock, run):
    """Interrupt a thread that waits for a lock, and give it the lock."""
    with lock.held(0):
        thread, raised = waiting(run)
        interrupt(thread)
    thread.join(60)
    assert not thread.is_alive()
    assert raised == [Interrupt]


def test_who_waits_for_a_rebuild_does_not_keep_its_lock():
    model = zoo.build("trained")
    sent = serialize_keras(model)
    interrupted_as_it_gets(aside.LOCK, lambda: deserialize_keras(*sent))
    assert not leaks.locks_held()
    arrived = []
    thread = threading.Thread(target=lambda: arrived.append(deserialize_keras(*sent)), daemon=True)
    thread.start()
    thread.join(60)
    zoo.assert_same(model, *arrived)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="models take turns on JAX alone")
def test_who_waits_to_predict_does_not_keep_the_turn():
    from dask_keras_serialize.backends.jax_trainer import TURNS

    model = zoo.build("trained")
    inputs = zoo.inputs_for(model)
    model.predict(inputs, verbose=0)
    interrupted_as_it_gets(TURNS[model], lambda: model.predict(inputs, verbose=0))
    assert not leaks.locks_held()


def test_a_turn_is_one_threads_and_may_be_taken_again():
    turn, seen = Turn(), []

    def other():
        with turn.held(0) as mine:
            seen.append(mine)

    with turn.held(0) as mine, turn.held(0) as again:
        assert mine
        assert again
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert turn.taken  # who was refused has not given back ours
    other()
    assert seen == [False, True]
    assert not turn.taken


class Meta(type):
    """Of classes that interrupt whoever has just set a method."""

    interrupts = False

    def __setattr__(cls, name, value):
        super().__setattr__(name, value)
        if Meta.interrupts:
            Meta.interrupts = False
            raise Interrupt


@pytest.mark.parametrize("inherits", [True, False])
def test_a_hook_does_not_stay(inherits, monkeypatch):
    class Base(metaclass=Meta):
        def method(self):
            return "theirs"

    cls = type("Derived", (Base,), {}) if inherits else Base
    before = dict(vars(cls))
    monkeypatch.setattr(Meta, "interrupts", True)
    with pytest.raises(Interrupt), in_this_thread(cls, "method", lambda *_: "ours"):
        pytest.fail("it was interrupted before")
    assert dict(vars(cls)) == before
    with in_this_thread(cls, "method", lambda *_: "ours"):
        assert cls().method() == "ours"
    assert cls().method() == "theirs"


def test_the_senders_policy_does_not_stay(monkeypatch):
    keras.config.set_dtype_policy("mixed_bfloat16")
    header, frames = serialize_keras(zoo.build("sequential"))
    keras.config.set_dtype_policy("float32")
    setter = keras.config.set_dtype_policy

    def once(policy):
        setter(policy)
        monkeypatch.setattr(keras.config, "set_dtype_policy", setter)
        raise Interrupt

    monkeypatch.setattr(keras.config, "set_dtype_policy", once)
    with pytest.raises(Interrupt):
        deserialize_keras(header, frames)
    assert keras.config.dtype_policy().name == "float32"


def test_the_collector_does_not_stay_off(monkeypatch):
    def disable():
        off()
        raise Interrupt

    off = gc.disable
    monkeypatch.setattr(gc, "disable", disable)
    with pytest.raises(Interrupt), garbage.paused():
        pytest.fail("it was interrupted before")
    assert gc.isenabled()
