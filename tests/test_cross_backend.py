"""A model sent from any backend arrives on any other: golden files of each are read here."""

import pickle

import keras
import numpy as np
import pytest

from dask_keras_serialize import backends
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.handlers import deserialize_keras, serialize_keras
from tests import golden, zoo

#: The largest difference between predictions, which backends compute in other orders.
TOLERANCE = 1e-5


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("name", golden.NAMES)
def test_a_model_of_every_backend(name, backend):
    sent, inputs, arrays, predictions = golden.read(backend)[name]
    model = pickle.loads(sent)
    for ours, theirs in zip(golden.arrays(model), arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(zoo.predictions(model, inputs), predictions, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert model.compiled is ("trained" in name)
    if model.compiled:  # and it trains on, with the optimizer it came with
        assert int(model.optimizer.iterations) > 0
        target = zoo.TARGETS[zoo.TARGET.get(name, "sparse")]
        model.fit(zoo.X, target, batch_size=16, verbose=0)
        assert np.isfinite(model.history.history["loss"]).all()


def test_what_goes_by_value_says_why_it_is_bound():
    header, frames = serialize_keras(zoo.build("lambda and custom layer"))
    header["backend"] = next(name for name in backends.NAMES if name != keras.backend.backend())
    with pytest.raises(DecodeError, match=r"by value \(.*Scale.*\) from the backend") as info:
        deserialize_keras(header, frames)
    assert "\n" not in str(info.value)
