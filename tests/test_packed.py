import pickle

import numpy as np
import pytest
from dask.base import tokenize
from dask.sizeof import sizeof

from dask_keras_serialize import packed
from dask_keras_serialize.broken import BrokenObject
from dask_keras_serialize.errors import DecodeError, MissingPackageError
from dask_keras_serialize.packed import PackedObject
from dask_keras_serialize.pickling import pack
from tests import zoo


def test_a_parcel_opens_to_new_models():
    model = zoo.build("trained")
    parcel = pack(model)
    zoo.assert_same(model, parcel.open())
    assert parcel.open() is not parcel.open()
    assert "96 bytes" not in repr(parcel)
    assert model.name in repr(parcel)


def test_it_pickles_again_to_the_same_bytes_without_touching_them():
    parcel = pack(zoo.build("trained subclassed"))
    buffers = []
    stream = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(stream, buffers=buffers)
    assert [addresses(f) for f in again.frames] == [addresses(f) for f in parcel.frames]
    assert again.header == parcel.header
    assert tokenize(again) == tokenize(parcel)
    assert sizeof(PackedObject(again)) >= again.nbytes == parcel.nbytes


def keep(parcel, key):
    return PackedObject(parcel, key)


def addresses(frame):
    return np.frombuffer(frame, np.uint8).ctypes.data


def test_a_closed_model_hands_its_methods_on_closed(monkeypatch):
    """As a scheduler does with ``client.submit(model.predict, x)``."""
    model = zoo.build("trained")
    stream = pickle.dumps(model.predict)
    monkeypatch.setattr(packed, "take", keep)
    closed = pickle.loads(stream)
    assert "predict of <PackedObject" in repr(closed)
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(closed))
    np.testing.assert_array_equal(again(zoo.X, verbose=0), model.predict(zoo.X, verbose=0))
    np.testing.assert_array_equal(closed(zoo.X, verbose=0), model.predict(zoo.X, verbose=0))


def test_a_broken_model_raises_its_error_on_any_use():
    broken = BrokenObject(DecodeError("model 'm': why"))
    assert "model 'm': why" in repr(broken)
    for use in (
        lambda: broken.predict(1),
        lambda: broken(1),
        lambda: broken.weights,
        lambda: pickle.loads(pickle.dumps(broken)).predict(1),
        lambda: str(broken),
        lambda: bool(broken),
        lambda: list(broken),
    ):
        with pytest.raises(DecodeError, match="model 'm': why"):
            use()
    assert not hasattr(broken, "__dask_graph__")


def test_errors_travel():
    for error in (DecodeError("a"), MissingPackageError.on_workers(["tcp://x"], 2)):
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), twin.args) == (type(error), error.args)
