"""What every backend's adapter promises: views, adoption, memory shared until written to."""

import asyncio
import copy
import pickle
import threading
import time

import keras
import ml_dtypes
import numpy as np
import pytest
from distributed.comm import connect, listen, tcp
from distributed.protocol import to_serialize, utils

from dask_keras_serialize import backends
from dask_keras_serialize.wire import frames
from dask_keras_serialize.wire.frames import ALIGNMENT
from dask_keras_serialize.wire.header import ITEMSIZE
from tests import zoo

NAME, BACKEND = backends.current()

#: Kept by the backend in other dtypes, with a warning, or not at all.
OTHERS = {
    "jax": {"int64", "uint64", "float64", "complex128"},
    "torch": {"uint16", "uint32", "uint64"},
}
NAMES = [name for name in ITEMSIZE if name not in {"string", *OTHERS.get(NAME, ())}]
DTYPES = [np.dtype(getattr(ml_dtypes, name, name)) for name in NAMES]


def at(offset, dtype="float32", count=1000):
    """Make a writeable array that starts so many bytes after an aligned address."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT + offset
    array = raw[start : start + count * np.dtype(dtype).itemsize]
    array[:] = np.arange(len(array)) % 2
    return array.view(dtype)


def adopts(dtype, offset, writeable):
    """Say what docs/protocol.md says."""
    if NAME == "torch":
        return writeable
    return writeable and offset == 0 and not (NAME == "tensorflow" and "float8" in dtype.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 16, 48])
@pytest.mark.parametrize("writeable", [True, False])
def test_adopted_where_safe_else_copied(dtype, offset, writeable):
    array = at(offset, dtype).reshape(10, 100)
    array.flags.writeable = writeable
    variable = keras.Variable(np.ones((10, 100)), dtype=dtype.name, trainable=False)
    variable._value = None
    variable._initialize(BACKEND.tensor(array))
    view = BACKEND.view(variable)
    # torch copies what it did not allocate
    where = zoo.address(variable) if NAME == "torch" else view.ctypes.data
    assert (where == array.ctypes.data) is adopts(dtype, offset, writeable)
    assert NAME == "torch" or "float8" in dtype.name or where % ALIGNMENT == 0
    assert view.dtype == array.dtype
    assert view.tobytes() == array.tobytes()
    assert not view.flags.writeable


WRITES = {
    "assign": lambda model: model.layers[0].kernel.assign(model.layers[0].kernel * 2 + 1),
    "assign_add": lambda model: model.layers[0].kernel.assign_add(keras.ops.ones((64, 1024))),
    "fit": lambda model: model.fit(np.ones((8, 64)), np.ones((8, 1024)), verbose=0),
}


def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1024)])
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse")
    return model


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("first", [True, False], ids=["the model", "its copy"])
def test_a_deepcopy_shares_memory_until_one_of_the_two_is_written_to(write, first):
    model = build()
    before = zoo.to_bytes(model.layers[0].kernel)
    twin = copy.deepcopy(model)
    assert zoo.address(model.layers[0].kernel) == zoo.address(twin.layers[0].kernel)
    written, other = (model, twin) if first else (twin, model)
    for _ in range(2):
        WRITES[write](written)
        assert zoo.to_bytes(written.layers[0].kernel) != before
        assert zoo.to_bytes(other.layers[0].kernel) == before
    WRITES[write](other)
    assert zoo.to_bytes(other.layers[0].kernel) != before


@pytest.mark.parametrize("write", WRITES)
def test_a_view_does_not_show_what_is_written_later(write):
    model = build()
    view = BACKEND.view(model.layers[0].kernel)
    assert view.ctypes.data == zoo.address(model.layers[0].kernel)
    before = view.tobytes()
    for _ in range(2):
        WRITES[write](model)
    assert view.tobytes() == before != zoo.to_bytes(model.layers[0].kernel)


@pytest.mark.parametrize("write", WRITES)
def test_training_shows_to_nobody_else(write):
    """Neither to the sender, nor in its frames, nor in another replica of the same bytes."""
    model = build()
    buffers = []
    stream = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    first, second = (pickle.loads(stream, buffers=buffers) for _ in range(2))
    before = [bytes(buffer.raw()) for buffer in buffers]
    for _ in range(2):
        WRITES[write](first)
    zoo.assert_same(model, second)
    assert [bytes(buffer.raw()) for buffer in buffers] == before


def test_variables_received_over_tcp_are_used_where_they_arrived(monkeypatch):
    """By address, through a real comm; one is over 64 MiB, which it cuts and merges."""
    arrived = []
    original = frames.as_frames

    def spy(buffers, owner, **keywords):
        arrived.extend(np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers)
        return original(buffers, owner, **keywords)

    monkeypatch.setattr(frames, "as_frames", spy)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4096,)), *map(keras.layers.Dense, (5120, 129, 131))])
    replica = asyncio.run(over_tcp(model))
    _, *large = arrived
    kernels = replica.variables[::2]
    assert [zoo.address(kernel) for kernel in kernels] == large
    zoo.assert_same(model, replica)
    kernels[0].assign(kernels[0] + 1)
    # torch's update is in place; elsewhere the first one makes room
    assert (zoo.address(kernels[0]) == large[0]) is (NAME == "torch")


@pytest.mark.parametrize("passed_on", [False, True], ids=["sent", "passed on"])
@pytest.mark.parametrize("shape", [(4096, 5120), (8192, 4096), (4097, 4097)])
def test_the_first_large_variable_is_received_with_the_headers(monkeypatch, shape, passed_on):
    """Over 64 MiB it would be cut, and joined by a copy: by address, and by what is allocated.

    Also where a scheduler passes it on, as it was received.
    """
    buffers = []
    original = frames.host_array

    def spy(n):
        buffers.append(original(n))
        return buffers[-1]

    monkeypatch.setattr(tcp, "host_array", spy)
    monkeypatch.setattr(utils, "host_array", spy)
    keras.utils.set_random_seed(0)
    inputs, units = shape
    model = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units, use_bias=False)])
    replica = asyncio.run(over_tcp(model, passed_on))
    nbytes = 4 * inputs * units
    where = zoo.address(replica.variables[0])
    whole = [b for b in buffers if begins(b) <= where and where + nbytes <= begins(b) + b.nbytes]
    zoo.assert_same(model, replica)
    if nbytes % ALIGNMENT:  # it cannot begin and end as the backends want it: joined
        assert [b.nbytes for b in whole] == [nbytes]
    else:
        (buffer,) = whole
        assert begins(buffer) + buffer.nbytes == where + nbytes
        assert sum(b.nbytes for b in buffers) < (1 + passed_on) * 1.01 * nbytes


def begins(buffer):
    return np.frombuffer(buffer, np.uint8).ctypes.data


async def over_tcp(value, passed_on=False):
    """Send a value over TCP, if asked to by way of one that does not deserialize."""
    loop = asyncio.get_running_loop()
    received = [loop.create_future() for _ in range(1 + passed_on)]

    def server(future, **keywords):
        async def handle(comm):
            future.set_result(await comm.read())
            await comm.close()

        return listen("tcp://127.0.0.1:0", handle, **keywords)

    message = {"value": to_serialize(value)}
    for i, future in enumerate(received):
        last = i == len(received) - 1
        async with server(future, deserialize=last) as listener:
            comm = await connect(listener.contact_address)
            await comm.write(message)
            message = await future
            await comm.close()
    return message["value"]


def test_a_view_is_of_one_instant():
    """While another thread trains: every element of this kernel is moved alike."""
    kernel = keras.layers.Dense(2000, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((2000,)), kernel])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    batch = np.ones((2, 2000), "float32"), np.full((2, 2000), 1e6, "float32")
    model.train_on_batch(*batch)
    done = threading.Event()

    def train():
        while not done.is_set():
            model.train_on_batch(*batch)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        seen = []
        while len(seen) < 200:
            view = BACKEND.view(kernel.kernel) if kernel.kernel._value is not None else None
            if view is None or view.shape != (2000, 2000):
                continue  # not now; states.view asks again
            low, high = view.min(), view.max()
            assert high - low < 1e-3 * high, "half of an update"  # they round as they like
            time.sleep(0.003)
            assert (view.min(), view.max()) == (low, high), "it shows what was written later"
            seen.append(high)
    finally:
        done.set()
        thread.join()
    assert seen == sorted(seen)
    assert seen[0] < seen[-1], "nothing was trained meanwhile"
