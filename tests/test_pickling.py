import bz2
import copy
import dataclasses
import gc
import gzip
import hashlib
import lzma
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import joblib
import keras
import numpy as np
import pytest

from dask_keras_serialize import pack
from tests import zoo


@pytest.mark.parametrize("name", ["trained", "trained subclassed", "lambda and custom layer"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(name, protocol):
    model = zoo.build(name)
    zoo.assert_same(model, pickle.loads(pickle.dumps(model, protocol)))


@pytest.mark.parametrize("name", ["functional", "trained subclassed"])
def test_out_of_band(name):
    model = zoo.build(name)
    buffers = []
    stream = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    assert zoo.to_bytes(model.variables[0])[:64] not in stream
    assert all(buffer.raw().readonly for buffer in buffers)
    zoo.assert_same(model, pickle.loads(stream, buffers=buffers))


def test_a_pickle_leaves_nothing_alive_for_the_next_to_refer_to():
    first, second = zoo.build("trained"), zoo.build("trained subclassed")
    gc.collect()
    gc.disable()
    try:
        alone = len(pickle.dumps(first))
        pickle.dumps([first, second])
        assert len(pickle.dumps(first)) == alone
    finally:
        gc.enable()


def test_large_variables_go_out_of_band_uncopied():
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(512)])
    buffers = []
    pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    where = np.asarray(buffers[1].raw()).ctypes.data
    assert where == zoo.address(model.layers[0].kernel)


@dataclasses.dataclass
class Holder:
    model: keras.Model
    again: keras.Model


def test_inside_containers_one_model_stays_one():
    model = zoo.build("sequential")
    value = pickle.loads(pickle.dumps({"a": [Holder(model, model)], "b": (model,)}))
    assert value["a"][0].model is value["a"][0].again is value["b"][0]
    zoo.assert_same(model, value["b"][0])


def test_in_a_closure_by_cloudpickle():
    model = zoo.build("trained")
    function = cloudpickle.loads(cloudpickle.dumps(lambda: model))
    zoo.assert_same(model, function())


@pytest.mark.parametrize("compress", [0, 3])
def test_joblib(compress, tmp_path):
    model = zoo.build("trained subclassed")
    joblib.dump(model, tmp_path / "model", compress=compress)
    zoo.assert_same(model, joblib.load(tmp_path / "model"))


@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
def test_deepcopy_is_independent(name):
    model = zoo.build(name)
    before = [zoo.to_bytes(v) for v in model.variables]
    twin = copy.deepcopy(model)
    zoo.assert_same(model, twin)
    twin.fit(zoo.X, zoo.LABELS, verbose=0)
    assert [zoo.to_bytes(v) for v in model.variables] == before


class WithReduce(keras.Model):
    def __reduce__(self):
        return WithReduce, ()


def test_a_subclass_keeps_its_own_reduce():
    assert type(pickle.loads(pickle.dumps(WithReduce()))) is WithReduce


def test_a_later_patch_of_reduce_does_not_take_our_place(monkeypatch):
    """scikeras puts its own __reduce__ on keras.Model when it is imported."""
    monkeypatch.setattr(keras.Model, "__reduce__", None, raising=False)
    model = zoo.build("sequential")
    zoo.assert_same(model, pickle.loads(pickle.dumps(model)))


def test_a_mapped_file_is_not_read_nor_written(tmp_path):
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(4096), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    joblib.dump({"model": model}, tmp_path / "file")
    digest = hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    for mode in ("r", "r+", "c"):
        replica = joblib.load(tmp_path / "file", mmap_mode=mode)["model"]
        assert lies_in_file(zoo.address(replica.layers[0].kernel), tmp_path / "file")
        zoo.assert_same(model, replica)
        x = np.ones((8, 256), "float32")
        replica.fit(x, np.ones(8), verbose=0)
        assert zoo.to_bytes(replica.layers[0].kernel) != zoo.to_bytes(model.layers[0].kernel)
        assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == digest
    replica = joblib.load(tmp_path / "file")["model"]
    assert not lies_in_file(zoo.address(replica.layers[0].kernel), tmp_path / "file")


def test_a_mapped_model_opened_twice_is_two(tmp_path):
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(4096)])
    joblib.dump(pack(model), tmp_path / "file")
    parcel = joblib.load(tmp_path / "file", mmap_mode="r")
    first, second = parcel.open(), parcel.open()
    first.layers[0].kernel.assign_add(keras.ops.ones((256, 4096)))
    zoo.assert_same(model, second)
    zoo.assert_same(model, parcel.open())


def lies_in_file(where, path):
    """Say whether an address of this process is of a page of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= where < end:
            return line.endswith(str(path))
    return False


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_in_compressed_files(opener, tmp_path):
    model = zoo.build("trained")
    with opener(tmp_path / "file", "wb") as file:
        pickle.dump(model, file)
    with opener(tmp_path / "file", "rb") as file:
        zoo.assert_same(model, pickle.load(file))


@pytest.mark.parametrize("compress", [("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3), True])
def test_joblib_compresses_the_weights(compress, tmp_path):
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(512, "relu", False, "zeros")])
    joblib.dump(model, tmp_path / "file", compress=compress)
    assert (tmp_path / "file").stat().st_size < 20_000
    zoo.assert_same(model, joblib.load(tmp_path / "file"))


@pytest.mark.parametrize("name", ["trained", "trained subclassed", "nested", "adapted"])
def test_a_shallow_copy_shares_the_parts(name):
    model = zoo.build(name)
    twin = copy.copy(model)
    assert type(twin) is type(model)
    assert twin is not model
    assert all(a is b for a, b in zip(twin.variables, model.variables, strict=True))
    twin.note = 1
    assert not hasattr(model, "note")
    if model.compiled:
        twin.fit(zoo.X, zoo.LABELS, verbose=0)  # through its own traced function
        assert twin.train_function is not model.train_function
    zoo.assert_predict_the_same(model, twin, zoo.X)


def test_what_is_added_to_a_shallow_copy_is_its_own():
    model = zoo.Subclassed((4,))
    twin = copy.copy(model)
    twin.extra = keras.layers.Dense(2)
    assert not hasattr(model, "extra")
    assert len(twin.layers) == len(model.layers) + 1


def test_shallow_copies_of_other_objects():
    for obj in (
        zoo.build("trained").optimizer,
        keras.metrics.Mean(),
        keras.losses.Huber(delta=2.0),
        keras.initializers.Constant(3.0),
        keras.Variable([1.0]),
        keras.callbacks.History(),
    ):
        twin = copy.copy(obj)
        assert twin is not obj
        assert type(twin) is type(obj)
        ours, theirs = (getattr(each, "variables", ()) for each in (obj, twin))
        assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_tensors_are_values_too():
    for dtype in ("float32", "bfloat16", "bool", "int64"):
        value = keras.ops.cast([[1.0, 2.0]], dtype)
        for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy([value])[0]):
            assert twin.dtype == value.dtype
            assert bool(keras.ops.all(twin == value))
    if keras.backend.backend() != "torch":  # whose tensors pickle by themselves
        assert b"dask_keras_serialize" in pickle.dumps(value)  # a scheduler need not open it


SCIKERAS = """
import dask_keras_serialize
{first}
import keras, pickle, copy
{last}
import numpy as np
from scikeras.wrappers import KerasClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

def build():
    layers = keras.layers
    return keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(2, "softmax")])

x, y = np.random.default_rng(0).normal(size=(32, 4)), np.arange(32) % 2
loss = "sparse_categorical_crossentropy"
pipeline = make_pipeline(StandardScaler(), KerasClassifier(build, loss=loss, verbose=0))
pipeline.fit(x, y)
stream = pickle.dumps(pipeline)
assert b"dask_keras_serialize" in stream and b"scikeras._saving_utils" not in stream
for twin in (pickle.loads(stream), copy.deepcopy(pipeline)):
    np.testing.assert_array_equal(twin.predict_proba(x), pipeline.predict_proba(x))
    ours, theirs = pipeline[-1].model_, twin[-1].model_
    assert ours is not theirs
    for a, b in zip(ours.variables, theirs.variables, strict=True):  # seeds, which it loses
        assert a.numpy().tobytes() == b.numpy().tobytes(), a.path
    assert theirs.optimizer.iterations == ours.optimizer.iterations > 0
    assert twin[-1].history_ == pipeline[-1].history_
assert pickle.dumps(keras.losses.Huber(delta=3.0)).count(b"dask_keras_serialize")
class Overrides(keras.Model):
    def __reduce__(self):
        return super().__reduce__()
assert b"scikeras._saving_utils" not in pickle.dumps(Overrides())
dask_keras_serialize.unregister()
assert "scikeras" in pickle.dumps(pipeline[-1].model_).decode("latin1")
"""


@pytest.mark.more
@pytest.mark.once
@pytest.mark.parametrize("order", ["first", "last"])
def test_scikeras_in_either_order(order, tmp_path):
    """It replaces __reduce__ and __deepcopy__ of keras.Model when it is imported."""
    lines = {"first": "", "last": ""} | {order: "import scikeras.wrappers"}
    (tmp_path / "script.py").write_text(SCIKERAS.format(**lines))
    run_script(tmp_path / "script.py")


def run_script(path, *arguments):
    command = [sys.executable, str(path), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
