"""Nothing is left behind: not by tests, which ``leaks.py`` sees, nor in buffers that were lent."""

import copy
import gc
import pickle
import threading

import keras
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_keras_serialize import aside
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.handlers import deserialize_keras, serialize_keras
from tests import leaks, zoo


def test_threads_files_and_locks_are_seen(tmp_path):
    before = leaks.standing()
    assert leaks.left(before) == []
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left behind")
    thread.start()
    with (tmp_path / "file").open("w") as file, aside.LOCK.held(0):
        found = leaks.left(before, seconds=0)
        assert "thread 'left behind'" in found
        assert any(str(tmp_path / "file") in each for each in found) or not leaks.open_files()
        assert "the lock of rebuilds" in found
        del file
    end.set()
    thread.join()
    assert leaks.left(before) == []


def test_clusters_and_clients_are_seen():
    before = leaks.standing()
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        with Client(cluster):
            found = leaks.left(before, seconds=0)
            assert "a client" in found
            assert any("thread 'IO loop'" in each for each in found)
        assert "a client" not in leaks.left(before, seconds=0)
        assert leaks.left(before, seconds=0)
    assert leaks.left(before) == []


def lent(frames):
    """Return the frames in buffers that cannot be resized while anybody has a view of them."""
    return [bytearray(frame) for frame in frames]


def assert_given_back(buffers):
    gc.collect()
    for buffer in buffers:
        buffer.clear()  # BufferError where a view is still exported


def large(by_value):
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 256)), np.ones((8, 2)), verbose=0)
    if by_value:
        model.note = 1
    return model


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("times", [1, 4])  # by Keras's rebuild, and as a clone
def test_buffers_of_a_model_are_given_back_with_it(by_value, times):
    model = large(by_value)
    header, frames = serialize_keras(model)
    for _ in range(times):
        buffers = lent(frames)
        replica = deserialize_keras(header, [memoryview(b) for b in buffers])
        assert zoo.bits(replica) == zoo.bits(model)
        replica.predict(np.ones((4, 256)), verbose=0)
        del replica
        assert_given_back(buffers)


def test_buffers_of_pickle_are_given_back():
    model = large(by_value=False)
    out: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(model, protocol=5, buffer_callback=out.append)
    buffers = lent(each.raw() for each in out)
    replica = pickle.loads(packed, buffers=buffers)
    assert zoo.bits(replica) == zoo.bits(model)
    twin = copy.deepcopy(replica)
    del replica, twin
    assert_given_back(buffers)


@pytest.mark.parametrize("by_value", [False, True])
def test_buffers_of_what_is_refused_are_given_back(by_value):
    header, frames = serialize_keras(large(by_value))
    wrong = header | {"variables": header["variables"][:-1]}
    buffers = lent(frames)
    with pytest.raises(DecodeError):
        deserialize_keras(wrong, [memoryview(b) for b in buffers])
    assert_given_back(buffers)
    buffers = lent(frames)
    buffers[-1].pop()
    with pytest.raises(DecodeError):
        deserialize_keras(header, [memoryview(b) for b in buffers])
    assert_given_back(buffers)


@pytest.mark.parametrize("by_value", [False, True])
def test_views_of_a_sent_model_are_given_back(by_value):
    """What the frames show of a model's memory ends with them: updates are in place again."""
    header, frames = serialize_keras(model := large(by_value))
    assert header["variables"]
    views = [memoryview(frame) for frame in frames]
    weights = [each.tobytes() for each in views]
    model.fit(np.ones((8, 256)), np.ones((8, 2)), verbose=0)
    assert [each.tobytes() for each in views] == weights  # a snapshot
    for each in views:
        each.release()  # BufferError where a view of it is still exported
