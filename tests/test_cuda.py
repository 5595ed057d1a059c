"""Dask's "cuda" family: frames that stay in a GPU's memory, and what becomes of them elsewhere.

An adapter is made to take the host's memory for a GPU's (tests/pretending.py); tests/test_gpu.py
has the same on a true one.
"""

import asyncio
import ctypes
import gc
import weakref
from types import SimpleNamespace

import keras
import msgpack
import numpy as np
import pytest
from distributed import protocol
from distributed.comm.core import Comm
from distributed.diagnostics import nvml
from distributed.protocol.serialize import families

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_on_gpu
from dask_keras_serialize.cluster.tasks import only_to_gpus
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire import cuda
from dask_keras_serialize.wire.cuda import DeviceFrame
from tests import pretending, zoo
from tests.pretending import ADAPTER, NAME, Received
from tests.test_backends import DTYPES, WRITES

FAMILIES = ("cuda", "dask", "pickle")


@pytest.fixture
def sender(monkeypatch):
    """A process whose variables lie on a GPU."""
    pretending.variables_lie_on_a_gpu(monkeypatch)


@pytest.fixture
def receiver(monkeypatch):
    """A process where new variables go to a GPU."""
    pretending.variables_go_to_a_gpu(monkeypatch)


def build():
    """One variable is small; its optimizer's are as large."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1024)])
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse")
    model.fit(np.ones((8, 64)), np.ones((8, 1024)), verbose=0)
    return model


def over_the_wire(header):
    return msgpack.unpackb(msgpack.packb(header), use_list=False, strict_map_key=False)


def received(frames, **options):
    return [Received(f, **options) if isinstance(f, DeviceFrame) else f for f in frames]


@pytest.mark.usefixtures("sender", "receiver")
def test_large_variables_stay_on_the_gpu_the_rest_is_the_arena():
    model = build()
    header, frames = protocol.serialize(model, serializers=FAMILIES, on_error="raise")
    assert header["serializer"] == "cuda"
    assert [type(frame) for frame in frames] == [memoryview, DeviceFrame, DeviceFrame]
    assert all(frame.nbytes == 64 * 1024 * 4 for frame in frames[1:])
    replica = protocol.deserialize(over_the_wire(header), received(frames))
    zoo.assert_same(model, replica)
    model.fit(np.ones((8, 64)), np.ones((8, 1024)), verbose=0)
    replica.fit(np.ones((8, 64)), np.ones((8, 1024)), verbose=0)
    zoo.assert_same(model, replica)


@pytest.mark.usefixtures("sender", "receiver")
def test_a_message_is_cut_and_merged_around_them():
    model = build()
    message = {"op": "gather", "data": protocol.to_serialize(model)}
    frames = protocol.dumps(message, serializers=FAMILIES)
    assert sum(isinstance(frame, DeviceFrame) for frame in frames) == 2
    assert all(hasattr(frame, "__cuda_array_interface__") for frame in frames[-2:])
    replica = protocol.loads(received(frames), deserializers=FAMILIES)["data"]
    zoo.assert_same(model, replica)


def takes_float8():
    """Say whether the backend has a DLPack of it; what has none goes by the host."""
    if NAME != "jax":
        return NAME == "torch"  # without DLPack
    import jax

    try:
        jax.numpy.zeros(1, "float8_e5m2").__dlpack__()
    except RuntimeError:
        assert jax.__version_info__ < (0, 10)
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("sender", "receiver")
def test_every_bit_of_every_dtype(dtype):
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, 2**17, "u1")
    variable = keras.Variable(np.zeros(2**17 // dtype.itemsize), dtype=dtype.name, trainable=False)
    variable._value = None
    variable._initialize(ADAPTER.tensor(raw.view(dtype)))
    header, frames = serialize_on_gpu(variable)
    lies = "float8" not in dtype.name or takes_float8()
    assert isinstance(frames[1], DeviceFrame) is lies
    assert header.get("unread", []) == [1] * lies
    replica = deserialize_keras(header, received(frames))
    assert zoo.to_bytes(replica) == raw.tobytes()
    assert (replica.dtype, tuple(replica.shape)) == (dtype.name, tuple(variable.shape))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.usefixtures("sender")
def test_frames_do_not_show_later_training(write):
    model = build()
    before = [zoo.to_bytes(variable) for variable in model.variables]
    header, frames = serialize_on_gpu(model)
    for _ in range(2):
        WRITES[write](model)
    assert [zoo.to_bytes(variable) for variable in model.variables] != before
    replica = deserialize_keras(header, received(frames))
    assert [zoo.to_bytes(variable) for variable in replica.variables] == before


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.usefixtures("sender", "receiver")
def test_a_frame_is_used_in_place_or_let_go_of(readonly):
    model = build()
    header, frames = serialize_on_gpu(model)
    arrived = received(frames, readonly=readonly)
    memory = arrived[1].memory
    before = memory.tobytes()
    kept = weakref.ref(arrived[1])
    replica = deserialize_keras(header, arrived)
    in_place = zoo.address(replica.layers[0].kernel) == memory.ctypes.data
    assert in_place is (NAME == "torch" and not readonly)
    assert not any(each.fetched for each in arrived[1:])
    del arrived
    gc.collect()
    assert (kept() is not None) is in_place
    assert not cuda._LENT
    WRITES["assign"](replica)
    assert (memory.tobytes() == before) is not in_place
    zoo.assert_same(model, deserialize_keras(header, received(frames)))


class Fetched(Received):
    """As cupy's arrays."""

    copy_to_host = None

    def get(self):
        self.fetched += 1
        return self.memory.copy()


@pytest.mark.parametrize("kind", [Received, Fetched])
@pytest.mark.usefixtures("sender")
def test_without_a_gpu_what_holds_them_copies_them_to_the_host(kind):
    model = build()
    header, frames = serialize_on_gpu(model)
    arrived = [frames[0], *map(kind, frames[1:])]
    replica = deserialize_keras(header, arrived)
    assert [each.fetched for each in arrived[1:]] == [1, 1]
    zoo.assert_same(model, replica)
    zoo.assert_same(model, deserialize_keras(header, frames))  # by the sender's own backend


class Nothing:
    def __init__(self, frame):
        self.nbytes = frame.nbytes
        self.__cuda_array_interface__ = frame.__cuda_array_interface__


@pytest.mark.usefixtures("sender")
def test_without_a_gpu_and_without_a_way_to_the_host():
    header, frames = serialize_on_gpu(build())
    with pytest.raises(DecodeError, match=r"model 'seq.*in a Nothing, which cannot copy.*tcp://"):
        deserialize_keras(header, [frames[0], *map(Nothing, frames[1:])])


@pytest.mark.usefixtures("sender", "receiver")
def test_a_frame_may_have_come_to_the_host_on_the_way():
    model = build()
    header, frames = serialize_on_gpu(model)
    host = [bytes(cuda.to_host(f, "")) if isinstance(f, DeviceFrame) else f for f in frames]
    zoo.assert_same(model, deserialize_keras(header, host))
    zoo.assert_same(model, deserialize_keras(header, [host[0], Received(frames[1]), host[2]]))


def cut(frame):
    return DeviceFrame(frame.address, frame.nbytes - 4, frame, frame.copy_to_host)


def strided(frame):
    other = Received(frame)
    other.__cuda_array_interface__ |= {"strides": (2,)}
    return other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: [f[0], cut(f[1]), f[2]], r"frame 1 has 262140 bytes where 262144 were sent"),
        (lambda f: f[:2], r"2 frames arrived where 3 were sent"),
        (lambda f: [f[0], f[2], bytes(3)], r"frame 2 has 3 bytes where"),
        (lambda f: [bytes(f[0].nbytes), *f[1:]], r"frame 0 does not hold the bytes"),
        (lambda f: [f[0], strided(f[1]), f[2]], r"no contiguous run of bytes.*strides \(2,\)"),
    ],
)
@pytest.mark.usefixtures("sender", "receiver")
def test_frames_are_checked_by_length(change, said):
    header, frames = serialize_on_gpu(build())
    with pytest.raises(DecodeError, match=rf"model 'sequential.*{said}"):
        deserialize_keras(header, change(frames))


def test_what_does_not_lie_on_a_gpu_goes_by_dasks_family():
    model = build()
    with pytest.raises(NotImplementedError, match="Sequential has nothing large on a GPU"):
        serialize_on_gpu(model)
    header, frames = protocol.serialize(model, serializers=FAMILIES)
    assert header["serializer"] == "dask"
    assert all(type(frame) is memoryview for frame in frames)


@pytest.mark.usefixtures("sender")
def test_nor_does_what_is_small():
    with pytest.raises(NotImplementedError):
        serialize_on_gpu(zoo.build("sequential"))


@pytest.mark.usefixtures("sender", "receiver")
def test_it_is_loaded_without_the_class_that_dask_would_unpickle_first():
    model = build()
    header, frames = protocol.serialize(model, serializers=FAMILIES)
    header["type-serialized"] = b"no class"
    zoo.assert_same(model, families["cuda"][1](header, received(frames)))


def test_the_interface_is_the_third_version_s():
    memory = np.arange(9, dtype=np.uint8)
    frame = DeviceFrame(memory.ctypes.data, 9, memory, memory.copy)
    assert frame.__cuda_array_interface__ == {
        "version": 3,
        "shape": (9,),
        "typestr": "|u1",
        "strides": None,
        "data": (memory.ctypes.data, True),
        "stream": None,
    }
    assert frame.own().__cuda_array_interface__["data"] == (memory.ctypes.data, False)
    again = cuda.received(frame, "")
    assert (again.address, again.nbytes, again.writeable) == (frame.address, 9, False)
    assert bytes(cuda.to_host(again, "")) == memory.tobytes()


def test_a_loan_is_what_dlpack_says(monkeypatch):
    """Read by NumPy, which takes the same structs."""
    monkeypatch.setattr(cuda, "DEVICE_TYPE", 1)
    for dtype in ("int8", "uint16", "int32", "uint64", "float16", "float64", "complex64", "bool"):
        memory = np.zeros((3, 5), dtype)
        memory[1, 2] = 1
        frame = DeviceFrame(memory.ctypes.data, memory.nbytes, memory, memory.copy)
        array = np.from_dlpack(cuda.Loan(frame, memory.dtype, (3, 5), 0))
        assert array.dtype == memory.dtype
        assert array.tobytes() == memory.tobytes()
        assert array.ctypes.data == memory.ctypes.data
        assert len(cuda._LENT) == 1
        del array
        assert not cuda._LENT


def test_a_loan_that_nobody_takes_is_forgotten():
    memory = np.zeros(4, np.float32)
    frame = DeviceFrame(memory.ctypes.data, 16, memory, memory.copy)
    capsule = cuda.Loan(frame, memory.dtype, (4,), 0).__dlpack__()
    assert cuda.address_in(capsule) == memory.ctypes.data
    assert len(cuda._LENT) == 1
    del capsule
    assert not cuda._LENT


def test_an_address_on_the_host_is_none_on_a_gpu():
    memory = np.zeros(4, np.float32)
    assert cuda.address_in(memory.__dlpack__()) is None
    assert ctypes.sizeof(cuda._Managed) == 64  # of the C struct, on 64 bits


def test_a_peer_without_a_gpu_gets_models_by_the_host(monkeypatch):
    asked = []

    class Ucxx:
        """As distributed-ucxx's."""

        def __init__(self, **remote_info):
            self.remote_info = remote_info

        async def write(self, msg, serializers=None):
            asked.append(serializers)

    monkeypatch.setattr(Ucxx, "write", only_to_gpus(Ucxx.write))
    model = {"data": {"x": protocol.to_serialize(build())}}
    array = {"data": {"x": protocol.to_serialize(np.ones(3))}}
    said = Comm.handshake_info(SimpleNamespace(same_host=True))
    ((name, has),) = ((name, value) for name, value in said.items() if "gpu" in name)
    assert has is False
    for comm, msg, serializers in [
        (Ucxx(), model, FAMILIES),
        (Ucxx(**{name: False}), model, None),
        (Ucxx(**{name: True}), model, FAMILIES),
        (Ucxx(), array, FAMILIES),
    ]:
        asyncio.run(comm.write(msg, serializers))
    assert asked == [FAMILIES[1:], ("dask", "pickle", "error"), FAMILIES, FAMILIES]
    monkeypatch.setattr(nvml, "device_get_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Comm.handshake_info(SimpleNamespace(same_host=True))[name] is True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert Comm.handshake_info(SimpleNamespace(same_host=True))[name] is False
