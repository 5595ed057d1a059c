"""Replicas that are dropped are freed before memory fills, however few objects they are."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.rebuilding import garbage


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    gc.collect()
    monkeypatch.setattr(garbage, "GROWTH", 8 << 20)
    monkeypatch.setattr(garbage, "_alive", {})
    monkeypatch.setattr(garbage, "_left", [0])


def message(width=512, by_value=False):
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(width, use_bias=False)])
    if by_value:
        model.note = 1
    header, frames = serialize_keras(model)
    return header, [np.frombuffer(bytes(frame), np.uint8) for frame in frames]


@pytest.mark.parametrize("by_value", [False, True])
def test_dropped_replicas_do_not_pile_up(by_value):
    header, frames = message(by_value=by_value)  # 1 MiB
    before = garbage.alive()
    for _ in range(100):
        deserialize_keras(header, frames)
        assert garbage.alive() - before <= (8 + 1) << 20


def test_what_is_held_is_counted_until_it_is_dropped():
    header, frames = message()
    before = garbage.alive()
    held = [deserialize_keras(header, frames) for _ in range(20)]
    assert garbage.alive() - before == 20 * sum(frame.nbytes for frame in frames)
    held.clear()
    gc.collect()
    assert garbage.alive() == before


def test_the_collector_runs_seldom_where_much_is_held(monkeypatch):
    header, frames = message()
    runs = []
    monkeypatch.setattr(garbage.gc, "collect", lambda *args: runs.append(args))
    held = [deserialize_keras(header, frames) for _ in range(64)]
    assert garbage.alive() >= len(held) << 20
    # at 8, 16, 24, 32 of them, and then at each quarter more: 40, 50, 62
    assert [generation for (generation,) in runs].count(2) == 7


def test_a_collector_that_the_user_turned_off_stays_off(monkeypatch):
    header, frames = message()
    monkeypatch.setattr(garbage.gc, "collect", lambda *args: pytest.fail("it ran"))
    gc.disable()
    try:
        for _ in range(20):
            deserialize_keras(header, frames)
    finally:
        gc.enable()


def test_it_runs_while_another_thread_packs():
    """Which pauses the collector, as a user may who wants it off."""
    header, frames = message()
    before = garbage.alive()
    with ThreadPoolExecutor(1) as other, garbage.paused():
        for _ in range(20):
            other.submit(deserialize_keras, header, frames).result()
            assert garbage.alive() - before <= (8 + 1) << 20
        assert not gc.isenabled()
    assert gc.isenabled()


def test_pauses_of_several_threads_end_with_the_last():
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def pauses():
        for _ in range(2000):
            with garbage.paused(), garbage.paused():
                assert not gc.isenabled()

    try:
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(pauses) for _ in range(8)]:
                done.result()
    finally:
        sys.setswitchinterval(switch)
    assert gc.isenabled()


def test_what_takes_no_weak_reference_is_not_counted():
    before = garbage.alive()
    garbage.watch((1, 2), 1 << 20)
    assert garbage.alive() == before
