"""Nothing is left behind: not by tests, which ``leaks.py`` sees, nor in buffers that were lent."""

import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
from multiprocessing import shared_memory

import keras
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_keras_serialize.cluster import offload
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import templates
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.rebuilding import aside
from dask_keras_serialize.rebuilding.turns import Turn
from dask_keras_serialize.workflows import batches, holding, replicas
from tests import hostile, leaks, zoo


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
        assert "dask_keras_serialize.rebuilding.aside.LOCK" in found
        del file
    end.set()
    thread.join()
    assert leaks.left(before) == []


def pipe():
    ends = os.pipe()
    return lambda: list(map(os.close, ends))


def event():
    number = os.eventfd(0)
    return lambda: os.close(number)


def poll():
    import select

    return select.epoll().close


def memory():
    shared = shared_memory.SharedMemory(create=True, size=64)
    return lambda: (shared.close(), shared.unlink())


def of_a_package():
    return open(pytest.__file__).close  # under sys.prefix


def pair():
    ends = socket.socketpair()
    return lambda: [end.close() for end in ends]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("made", [pipe, event, poll, memory, of_a_package, pair])
def test_descriptors_of_every_kind_are_seen(made):
    before = leaks.standing()
    close = made()
    found = leaks.left(before, seconds=0)
    close()
    assert [each for each in found if each.startswith("open ")]
    assert leaks.left(before, seconds=0) == []


def test_other_threads_by_the_name_of_our_pool_are_seen():
    before = leaks.standing()
    for each in [offload._threads.submit(threading.get_ident) for _ in range(8)]:
        each.result()
    assert leaks.left(before, seconds=0) == []
    end = threading.Event()
    other = threading.Thread(target=end.wait, name="Dask-Keras_0")
    other.start()
    assert leaks.left(before, seconds=0) == ["thread 'Dask-Keras_0'"]
    end.set()
    other.join()


def test_a_lock_that_nobody_knows_of_is_seen(monkeypatch):
    """As an interrupt between ``acquire`` and the line after it leaves it."""
    lost = Turn()
    monkeypatch.setattr(aside, "LOCK", lost)
    got, end = threading.Event(), threading.Event()

    def lose():
        lost._lock.acquire()
        got.set()
        end.wait()
        lost._lock.release()

    thread = threading.Thread(target=lose)
    thread.start()
    got.wait()
    assert not lost.taken
    assert leaks.locks_held() == ["dask_keras_serialize.rebuilding.aside.LOCK"]
    end.set()
    thread.join()
    assert leaks.locks_held() == []


def test_a_lock_of_a_thread_that_has_ended_is_seen():
    """Whose number the next one gets."""
    locks = [threading.RLock(), threading.Lock()]
    for lock in locks:
        thread = threading.Thread(target=lock.acquire)
        thread.start()
        thread.join()
    assert set(leaks.refused([("again", locks[0]), ("once", locks[1])])) == {"again", "once"}


class Key:
    """What a weak reference may be to."""


def test_locks_of_objects_are_seen():
    key, held = Key(), holding.Held()
    batches._SHARED[key] = batches._Shared()
    for lock, name in [
        (replicas.POOL._lock, f"{leaks.PACKAGE}.workflows.replicas.POOL._lock"),
        (batches._SHARED[key].turn, "what threads share.turn"),
        (held._turn, "what holds a model._turn"),
    ]:
        lock.acquire()
        assert leaks.locks_held() == [name]
        lock.release()
        assert leaks.locks_held() == []


def test_a_process_that_is_left_is_seen():
    before = leaks.standing()
    process = subprocess.Popen(["sleep", "60"])
    assert leaks.left(before, seconds=0) == [f"process {process.pid}"]
    process.kill()
    process.wait()


def test_with_a_shared_client_only_its_connections_are_left_out():
    options = {"processes": False, "protocol": "tcp://", "dashboard_address": ":0"}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        before = leaks.standing()
        other = Client(client.scheduler.address)
        assert "a Client" in leaks.left(before, seconds=0)
        other.close()
        assert client.submit(sum, [1, 2]).result() == 3
        client.run(int, nanny=False)  # by a connection of its own
        assert leaks.left(before) == []
        with socket.create_server(("127.0.0.1", 0)):
            found = leaks.left(before, seconds=0)
            assert found or not leaks.open_files()
            assert all(each.startswith("open socket:") for each in found)
        assert leaks.left(before) == []


def test_clusters_and_clients_are_seen():
    before = leaks.standing()
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        with Client(cluster):
            found = leaks.left(before, seconds=0)
            assert "a Client" in found
            assert any("thread 'IO loop'" in each for each in found)
        found = leaks.left(before, seconds=0)
        assert "a Client" not in found
        assert {"a Worker", "a Scheduler"} < set(found)
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


class Fragile(keras.layers.Dense):
    """A layer that cannot be put together."""

    def __getstate__(self):
        return vars(self)

    def __setstate__(self, state):
        vars(self).update(state)
        raise RuntimeError("it fails in the middle")


def fragile_by_value(monkeypatch):
    layers = [keras.layers.Dense(256), Fragile(256), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((256,)), *layers])


def fragile_by_config(monkeypatch):
    inputs, *layers = keras.Input((256,)), keras.layers.Dense(256), keras.layers.Dense(2)
    model = keras.Sequential([inputs, *layers])
    build = keras.layers.Dense.build

    def fails(self, input_shape):
        build(self, input_shape)
        if self.units == 2:
            raise RuntimeError("it fails in the middle")

    monkeypatch.setattr(keras.layers.Dense, "build", fails)
    return model


def by_dask(model):
    header, frames = serialize_keras(model)
    buffers = lent(frames)
    return (
        header["encoding"],
        buffers,
        lambda: deserialize_keras(header, [*map(memoryview, buffers)]),
    )


def by_pickle(model):
    out: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(model, protocol=5, buffer_callback=out.append)
    buffers = lent(each.raw() for each in out)
    encoding = serialize_keras(model)[0]["encoding"]
    return encoding, buffers, lambda: pickle.loads(packed, buffers=buffers)


@pytest.mark.parametrize("way", [by_dask, by_pickle])
@pytest.mark.parametrize("fragile", [fragile_by_value, fragile_by_config])
def test_nothing_is_left_of_a_rebuild_that_fails_in_the_middle(fragile, way, monkeypatch):
    for by_value in (False, True):  # what is kept of a first rebuild is no leak
        deserialize_keras(*serialize_keras(large(by_value)))
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")  # which is the sender's, so also the rebuild's
    keras.config.set_floatx("float16")
    try:
        model = fragile(monkeypatch)
        encoding, buffers, rebuild = way(model)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
    assert encoding in fragile.__name__
    settings, alive = hostile.settings(), leaks.layers_alive()
    with templates.forgotten():  # a clone is not built
        for _ in range(3):
            with pytest.raises(DecodeError, match="it fails in the middle") as failed:
                rebuild()
            assert hostile.settings() == settings
            assert leaks.locks_held() == []
            del failed  # its traceback has the frames of the rebuild
    assert leaks.layers_alive() == alive
    assert_given_back(buffers)
