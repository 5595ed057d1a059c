import copy
import dataclasses
import gc
import pickle

import cloudpickle
import joblib
import keras
import pytest

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
    view = memoryview(model.layers[0].kernel.value.value())
    assert buffers[1].raw().obj is not None
    assert address(buffers[1].raw()) == address(view)


def address(view):
    import numpy as np

    return np.asarray(view).ctypes.data


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
