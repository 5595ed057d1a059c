"""On a GPU: what the rest of the suite has on machines without one. Run by ``make test-gpu``."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from distributed import protocol

from dask_keras_serialize import devices
from dask_keras_serialize.cluster.handlers import (
    deserialize_keras,
    serialize_keras,
    serialize_on_gpu,
)
from dask_keras_serialize.configs.by_config import variables_of
from dask_keras_serialize.wire.cuda import DeviceFrame
from tests import gpu, zoo
from tests.conftest import ROOT, run_module, start_cluster
from tests.pretending import BACKEND, NAME, counting_host_bytes
from tests.test_backends import DTYPES, at

pytestmark = pytest.mark.gpu

FAMILIES = ("cuda", "dask", "pickle")
COUNT = 1_000_000


@pytest.fixture(autouse=True)
def _gpu():
    """Nothing is skipped: who asks for these tests has a GPU."""
    if not devices.current().gpus():
        pytest.fail(f"these tests need a GPU that Keras's backend {NAME!r} can use: {found()}")


def found():
    try:
        cards = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
        return f"nvidia-smi -L says {(cards.stdout or cards.stderr).strip()!r}"
    except OSError:
        return "there is no nvidia-smi here"


@pytest.fixture
def model():
    model = gpu.build()
    assert gpu.on_gpu(model)
    return model


def test_a_model_comes_back_to_where_it_was(model):
    replica = pickle.loads(pickle.dumps(model, 5))
    assert gpu.on_gpu(replica)
    zoo.assert_same(model, replica)
    twin = copy.deepcopy(model)
    assert gpu.on_gpu(twin)
    zoo.assert_same(model, twin)
    twin.fit(gpu.X, np.ones((64, 10)), verbose=0)
    zoo.assert_same(model, replica)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("offset", [0, 16, 1])
def test_every_bit_of_every_dtype_by_the_host(dtype, writeable, offset):
    array = at(offset, dtype, COUNT)
    array.flags.writeable = writeable
    before = array.tobytes()
    with counting_host_bytes() as counted:
        tensor = BACKEND.tensor(array)
    # tf.constant's own copies; and int32, which TensorFlow keeps on the host
    if NAME != "tensorflow" or not ("float8" in dtype.name or dtype == np.int32):
        assert counted[0] < array.nbytes / 2, "a copy on the host"
    if np.issubdtype(dtype, np.floating):
        assert gpu.is_gpu(tensor.device)
    variable = keras.Variable(np.zeros(COUNT), dtype=dtype.name, trainable=False)
    variable._value = None
    BACKEND.initialize(variable, tensor)
    if not writeable:
        array.flags.writeable = True
        array.view(np.uint8)[:] = 0  # it has arrived
    with counting_host_bytes() as counted:
        (view,) = BACKEND.views([variable])
    assert counted[0] < 1.5 * len(before), "a second copy on the host"
    assert view.tobytes() == before
    assert getattr(variable.value, "_npy_value", None) is None, "JAX keeps a copy on the host"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_on_the_gpu(dtype):
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, 2**20, "u1")
    variable = keras.Variable(np.zeros(2**20 // dtype.itemsize), dtype=dtype.name, trainable=False)
    variable._value = None
    variable._initialize(BACKEND.tensor(raw.view(dtype)))
    if not BACKEND.on_gpu(variable):
        assert not np.issubdtype(dtype, np.floating)
        return
    header, frames = serialize_on_gpu(variable)
    # float8 has no DLPack, int32 stays on the host
    lies = NAME != "tensorflow" or not ("float8" in dtype.name or dtype == np.int32)
    assert isinstance(frames[1], DeviceFrame) is lies
    replica = deserialize_keras(header, frames)
    assert zoo.to_bytes(replica) == raw.tobytes()


def test_what_lies_on_the_gpu_stays_there(model):
    frames = protocol.dumps({"x": protocol.to_serialize(model)}, serializers=FAMILIES)
    sizes = [frame.nbytes for frame in frames if isinstance(frame, DeviceFrame)]
    assert sizes == [256 * 1024 * 4] * 3  # a kernel, and Adam's two slots for it
    before = [zoo.to_bytes(variable) for variable in variables_of(model)]
    model.fit(gpu.X, np.ones((64, 10)), verbose=0)  # shows to nobody
    with counting_host_bytes() as counted:
        replica = protocol.loads(frames, deserializers=FAMILIES)["x"]
    assert gpu.on_gpu(replica)
    assert [zoo.to_bytes(variable) for variable in variables_of(replica)] == before
    assert counted[0] < sum(map(len, before)), "over the host"


@pytest.mark.skipif(NAME != "torch", reason="others copy on the GPU, and let go of the frame")
def test_a_frame_that_is_the_receivers_own_is_used_in_place(model):
    header, frames = serialize_on_gpu(model)
    own = [frame.own() if isinstance(frame, DeviceFrame) else frame for frame in frames]
    replica = deserialize_keras(header, own)
    addresses = {variable.value.data_ptr() for variable in variables_of(replica)}
    assert {frame.address for frame in own[1:]} <= addresses
    zoo.assert_same(model, replica)


def test_frames_of_a_gpu_are_fetched_where_keras_uses_none(model):
    header, frames = serialize_on_gpu(model)
    with keras.device("cpu:0" if NAME != "jax" else "cpu"):
        replica = deserialize_keras(header, frames)
    for ours, theirs in zip(variables_of(model), variables_of(replica), strict=True):
        assert zoo.to_bytes(ours) == zoo.to_bytes(theirs)


def test_dasks_own_family_goes_by_the_host(model):
    header, frames = serialize_keras(model)
    assert all(type(frame) is memoryview for frame in frames)
    zoo.assert_same(model, deserialize_keras(header, frames))


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_of_one_gpu_and_a_client_without(workers, processes, tmp_path):
    """Each within its limit, and what they return is bit-equal on the client."""
    bin_ = Path(sys.executable).parent
    path = {"PYTHONPATH": str(ROOT)}
    address = start_cluster(processes, bin_, bin_, tmp_path, [path] * workers)
    run_module("tests.gpu", address, workers, 2 << 30, CUDA_VISIBLE_DEVICES="-1")


@pytest.mark.cluster
def test_from_worker_to_worker_by_ucx():
    pytest.importorskip("distributed_ucxx", reason="no comm that sends a GPU's memory is installed")
    run_module("tests.gpu", "ucxx")
