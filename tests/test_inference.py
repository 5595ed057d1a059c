"""``predict`` over Dask's collections: what ``model.predict`` gives, chunk by chunk."""

import copy
import random
import threading

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers
from sklearn.datasets import load_digits, load_sample_images

from dask_keras_serialize import protocol, register, unregister
from dask_keras_serialize.workflows import batches, outputs
from dask_keras_serialize.workflows.inference import predict
from tests import zoo
from tests.conftest import local_client

DIGITS = load_digits()
X = DIGITS.data.astype("float32")[:100] / 16
SIZES = (40, 33, 27)
BACKEND = keras.backend.backend()


def classifier(policy=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,), name="pixels"),
            layers.Dense(16, activation="relu", dtype=policy),
            layers.Dense(10, activation="softmax", dtype=policy),
        ],
        name="digits",
    )


def two_sided():
    """Inputs by name, outputs in a structure."""
    keras.utils.set_random_seed(0)
    image, scale = keras.Input((64,), name="image"), keras.Input((1,), name="scale")
    hidden = layers.Dense(8)(layers.Concatenate()([image, scale]))
    label = layers.Dense(10, name="label")(hidden)
    parts = [layers.Dense(1)(hidden), keras.ops.reshape(hidden, (-1, 2, 4))]
    return keras.Model({"image": image, "scale": scale}, {"label": label, "parts": parts})


def by_chunks(model, x, sizes=SIZES, batch_size=None):
    """What model.predict gives for each chunk."""
    ends = np.cumsum(sizes)[:-1]
    parts = zip(*(np.split(each, ends) for each in outputs.leaves(x)), strict=True)
    keys = sorted(x) if isinstance(x, dict) else None
    found = []
    for part in parts:
        chunk = dict(zip(keys, part, strict=True)) if keys else part[0]
        found.append(model.predict(chunk, batch_size=batch_size, verbose=0))
    return [np.concatenate(each) for each in zip(*map(outputs.leaves, found), strict=True)]


def assert_is(lazy, expected):
    """Both in value and in what was promised of it."""
    for array, value in zip(outputs.leaves(lazy), expected, strict=True):
        assert array.dtype == value.dtype
        assert all(a == b or np.isnan(a) for a, b in zip(array.shape, value.shape, strict=True))
    for value, right in zip(outputs.leaves(dask.compute(lazy)[0]), expected, strict=True):
        assert value.dtype == right.dtype
        np.testing.assert_array_equal(value, right)


def state_bytes(model):
    return [zoo.to_bytes(variable) for variable in model.variables]


def assert_close(found, expected):
    """Workers' sums may run in another order: Dask gives them one thread of OpenMP's."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def here():
    """In this thread, but where a test asks for others."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.mark.parametrize("batch_size", [None, 16, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
def test_arrays(dtype, batch_size):
    model, x = classifier(), (X * 16).astype(dtype)
    lazy = predict(model, da.from_array(x, chunks=(SIZES, 20)), batch_size=batch_size)
    assert lazy.chunks == (SIZES, (10,))
    assert_is(lazy, by_chunks(model, x, batch_size=batch_size))


@pytest.mark.parametrize(
    "policy", ["float16", "mixed_float16", "bfloat16", "mixed_bfloat16", "float64"]
)
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_dtypes_are_those_that_predict_returns(policy):
    model = classifier(policy)
    assert_is(predict(model, da.from_array(X, chunks=(SIZES, 64))), by_chunks(model, X))


@pytest.mark.parametrize("name", ["trained subclassed", "lambda and custom layer", "two outputs"])
def test_models_of_the_zoo(name):
    model = zoo.build(name)
    x = da.from_array(zoo.X, chunks=(8, 8))
    assert_is(predict(model, x), by_chunks(model, zoo.X, (8,) * 4))


def test_nothing_is_computed_and_nothing_changes_until_it_is_asked_for():
    def refuse(block):
        raise AssertionError("data was computed")

    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    noisy = layers.GaussianNoise(0.1)(layers.Dropout(0.5)(inputs), training=True)
    model = keras.Model(inputs, layers.BatchNormalization()(noisy))
    model.compile("adam", "mse", metrics=["mae"])
    names = layers.Dense(1).name
    before, drawn = state_bytes(model), random.getstate()
    x = da.from_array(X, chunks=(SIZES, 64)).map_blocks(refuse, dtype="float32", meta=X[:0])
    assert predict(model, x).shape == (100, 64)
    assert state_bytes(model) == before
    assert random.getstate() == drawn
    assert layers.Dense(1).name == f"dense_{int(names.partition('_')[2] or 0) + 1}"
    with pytest.raises(AssertionError, match="data was computed"):
        predict(model, x).compute()


def test_training_and_its_predictions_before_are_told_apart():
    model = zoo.build("trained")
    x = da.from_array(zoo.X, chunks=(8, 8))
    before = copy.deepcopy(model)
    earlier, first = predict(model, x), by_chunks(model, zoo.X, (8,) * 4)
    model.fit(zoo.X, zoo.LABELS, verbose=0)
    later, second = predict(model, x), by_chunks(model, zoo.X, (8,) * 4)
    assert not np.array_equal(first[0], second[0])
    for lazy, expected in zip(dask.compute(earlier, predict(before, x), later),
                              (first[0], first[0], second[0]), strict=True):  # fmt: skip
        np.testing.assert_array_equal(lazy, expected)


def test_chunks_of_unknown_and_of_no_rows():
    model = classifier()
    x = da.from_array(X, chunks=(SIZES, 64))
    few = x[(x[:, 2] > 0.5) & (da.arange(100, chunks=(SIZES,)) >= 40)]
    lazy = predict(model, few)
    assert np.isnan(lazy.shape[0])
    right = [part[part[:, 2] > 0.5] for part in np.split(X, np.cumsum(SIZES)[:-1])[1:]]
    expected = np.concatenate([model.predict(part, verbose=0) for part in right])
    assert 0 < len(expected) < 60
    assert_is(lazy, [expected])
    nothing = predict(model, x[:0])
    assert_is(nothing, [np.empty((0, 10), "float32")])
    unknown = predict(model, x[:0], meta=np.empty((0, 0), "float32"))
    with pytest.raises(ValueError, match=r"a chunk has no rows, .* or leave out chunks without"):
        unknown.compute()


def test_outputs_and_inputs_in_structures():
    model = two_sided()
    inputs = {"image": X, "scale": X[:, 2:3]}
    arrays = {
        "image": da.from_array(X, chunks=(SIZES, 30)),
        "scale": da.from_array(X[:, 2:3], chunks=(SIZES, 1)),
    }
    lazy = predict(model, arrays)
    assert list(lazy) == ["label", "parts"]
    assert isinstance(lazy["parts"], list)
    assert lazy["parts"][1].shape == (100, 2, 4)
    assert_is(lazy, by_chunks(model, inputs))
    apart = predict(model, arrays | {"scale": da.from_array(X[:, 2:3], chunks=(50, 1))})
    assert apart["label"].chunks[0] == (40, 10, 23, 27)
    sizes = (40, 10, 23, 27)
    assert_is(apart, by_chunks(model, inputs, sizes))


def test_outputs_of_a_chunk_are_predicted_at_once(monkeypatch):
    chunks = []
    original = batches.of_blocks

    def counted(*blocks, **settings):
        chunks.append(1)
        return original(*blocks, **settings)

    monkeypatch.setattr(batches, "of_blocks", counted)
    arrays = {
        "image": da.from_array(X, chunks=(25, 64)),
        "scale": da.ones((100, 1), chunks=(25, 1)),
    }
    lazy = predict(two_sided(), arrays)
    dask.compute(lazy)
    assert len(chunks) == 4
    # and where Dask could fuse what comes after
    (lazy["label"].sum(axis=1) + lazy["parts"][0][:, 0]).compute()
    assert len(chunks) == 8


FRAME = pd.DataFrame(X.astype("float64"), columns=[f"p{i}" for i in range(64)])


def test_dataframes_and_series():
    model = classifier()
    frame = dd.from_pandas(FRAME, npartitions=3)
    sizes = tuple(map(len, frame.partitions))
    lazy = predict(model, frame)
    assert isinstance(lazy, da.Array)
    assert lazy.dtype == "float32"
    assert lazy.shape[1:] == (10,)
    assert all(map(np.isnan, lazy.chunks[0]))
    assert_is(lazy, by_chunks(model, X, sizes))
    assert_is(predict(model, frame[frame.p2 > 9]), [np.empty((0, 10), "float32")])
    one = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    assert_is(predict(one, frame.p2), by_chunks(one, X[:, 2:3], sizes))


def test_columns_go_to_inputs_of_their_names():
    a, b = keras.Input((1,), name="p2"), keras.Input((1,), name="p3")
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([b, a])))
    frame = dd.from_pandas(FRAME.assign(name="x"), npartitions=2)
    expected = model.predict([X[:, 2:3], X[:, 3:4]], verbose=0)
    np.testing.assert_allclose(predict(model, frame).compute(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no column 'p3' among"):
        predict(model, frame[["p2", "name"]])
    with pytest.raises(TypeError, match=r"these columns are none: 'name' \("):
        predict(classifier(), frame)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="models take strings on TensorFlow alone")
def test_a_column_of_strings_goes_to_a_model_that_takes_them():
    lookup = layers.StringLookup(vocabulary=["a", "b"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup])
    frame = dd.from_pandas(pd.DataFrame({"s": ["b", "a", "c", "b"]}), npartitions=2)
    for columns in (frame, frame.s):
        assert predict(model, columns).compute().ravel().tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("batch_size", [None, 16])
def test_bags(batch_size):
    model = classifier()
    bag = db.from_sequence(list(X), npartitions=3)
    sizes = bag.map_partitions(lambda part: [len(part)]).compute()
    found = predict(model, bag, batch_size=batch_size).compute()
    assert {(each.shape, each.dtype.name) for each in found} == {((10,), "float32")}
    (expected,) = by_chunks(model, X, sizes, batch_size)
    np.testing.assert_array_equal(found, expected)
    assert predict(model, bag.filter(lambda x: False)).compute() == []


def test_bags_of_samples_in_parts():
    model = two_sided()
    samples = [{"image": row, "scale": row[2:3]} for row in X[:20]]
    found = predict(model, db.from_sequence(samples, npartitions=1)).compute()
    expected = model.predict({"image": X[:20], "scale": X[:20, 2:3]}, verbose=0)
    np.testing.assert_array_equal([each["label"] for each in found], expected["label"])
    np.testing.assert_array_equal([each["parts"][1] for each in found], expected["parts"][1])
    assert isinstance(found[0]["parts"], list)


def test_a_partition_of_a_bag_is_never_held_whole():
    read = []

    def samples():
        for row in X:
            read.append(1)
            yield row

    first = next(batches.of_samples(samples(), classifier(), 8))
    assert first.shape == (10,)
    assert len(read) == 8


def test_images_of_any_rank():
    tiles = np.stack(load_sample_images().images)[:, :64, :64].reshape(-1, 16, 16, 3)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Rescaling(1 / 255), layers.Conv2D(4, 3, strides=2)]
    )
    lazy = predict(model, da.from_array(tiles, chunks=(100, 8, -1, -1)), batch_size=64)
    assert lazy.shape[1:] == (7, 7, 4)
    assert_is(lazy, by_chunks(model, tiles, lazy.chunks[0], 64))


class Stubborn(keras.Model):
    """Cannot be called on symbols; is numpy's."""

    def call(self, x):
        return keras.ops.convert_to_tensor(np.asarray(keras.ops.convert_to_numpy(x))[:, :2] * 2)

    def predict(self, x, batch_size=None, verbose=0):
        return np.asarray(x, "float64")[:, :2] * 2


def test_a_predict_of_the_user_s_own():
    model = Stubborn(name="mine")
    model.built = True
    lazy = predict(model, da.from_array(X, chunks=(SIZES, 64)))
    assert (lazy.dtype, lazy.shape) == (np.float64, (100, 2))
    np.testing.assert_array_equal(lazy, X[:, :2].astype("float64") * 2)


def test_meta_is_believed_and_checked():
    model = classifier()
    x = da.from_array(X, chunks=(SIZES, 64))
    assert_is(predict(model, x, meta=np.empty((0, 10), "float32")), by_chunks(model, X))
    unknown = predict(model, x, meta=np.empty((0, 0), "float32"))
    assert np.isnan(unknown.shape[1])
    assert unknown.compute().shape == (100, 10)
    with pytest.raises(ValueError, match=r"returned float32 .* not float64 of shape .rows, 10"):
        predict(model, x, meta=np.empty((0, 10))).compute()
    with pytest.raises(TypeError, match="is no array of no rows"):
        predict(model, x, meta=["f4"])


def wrong_uses():
    model, x = classifier(), da.from_array(X, chunks=(SIZES, 64))
    unbuilt = keras.Sequential([layers.Dense(3)], name="raw")
    side = da.ones((100, 1), chunks=(50, 1))
    unknown = side[side[:, 0] > 0]
    return {
        "numpy": (model, X, TypeError, "not a ndarray: give .* model.predict, or .*from_array"),
        "nothing": (model, [], TypeError, "takes a dask Array"),
        "a name": ("model.keras", x, TypeError, "takes a keras.Model, .* not a str"),
        "unbuilt": (unbuilt, x, ValueError, "'raw' .* is not built"),
        "features": (model, x[:, :63], ValueError, r"'digits' .* \(rows, 63\), it takes .*64"),
        "no axes": (model, x.sum(), ValueError, "input 0 .* no axes"),
        "rows": (two_sided(), [x, side[:7]], ValueError, r"input\[0\] 100, input\[1\] 7"),
        "chunks": (two_sided(), [x, unknown], ValueError, "compute_chunk_sizes"),
    }


@pytest.mark.parametrize("name", wrong_uses())
def test_what_is_wrong_is_said_at_once_in_a_line(name):
    model, collection, kind, said = wrong_uses()[name]
    with pytest.raises(kind, match=said) as info:
        predict(model, collection)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_batch_sizes(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        predict(classifier(), da.from_array(X), batch_size=batch_size)


def test_what_is_wrong_with_data_is_said_by_its_task():
    model = classifier()
    bag = db.from_sequence([X[0], X[1][:5]], npartitions=1)
    with pytest.raises(ValueError, match=r"'digits' .* not all alike"):
        predict(model, bag).compute()
    flat = keras.Sequential([keras.Input((64,)), layers.Lambda(lambda x: x[:1])])
    with pytest.raises(ValueError, match=r"row for each|no dense tensor of rows"):
        predict(flat, da.from_array(X, chunks=(SIZES, 64))).compute()


@pytest.mark.more
@pytest.mark.parametrize("registered", [True, False])
def test_threads_share_a_replica(registered):
    """From its first batch on, of shapes that none has traced."""
    model = zoo.build("trained")
    rows = np.tile(zoo.X, (40, 1))
    sizes = (37, 50, 3, 70, 160) * 4
    alike = copy.deepcopy(model)
    if not registered:
        unregister()
    try:
        lazy = predict(model, da.from_array(rows, chunks=(sizes, 8)), batch_size=16)
        found = lazy.compute(scheduler="threads", num_workers=4)
    finally:
        register()
    np.testing.assert_array_equal(found, by_chunks(alike, rows, sizes, 16)[0])


@pytest.mark.more
@pytest.mark.once
def test_processes_of_dask_s_own():
    model = classifier()
    lazy = predict(model, da.from_array(X[:40], chunks=(20, 64)))
    found = lazy.compute(scheduler="processes", num_workers=1)
    np.testing.assert_array_equal(found, by_chunks(model, X[:40], (20, 20))[0])


@pytest.fixture(scope="module")
def client():
    with local_client(threads=2) as client:
        yield client


def count_rebuilds():
    """In a worker: from now on."""
    protocol.rebuilt = []
    if not hasattr(protocol, "decode_itself"):
        protocol.decode_itself = protocol.decode

        def decode(*args, **kwargs):
            protocol.rebuilt.append(threading.get_ident())
            return protocol.decode_itself(*args, **kwargs)

        protocol.decode = decode


def rebuilds():
    return len(protocol.rebuilt)


def collections():
    x = da.from_array(X, chunks=(5, 64))
    return {
        "array": x,
        "frame": dd.from_pandas(FRAME, npartitions=20),
        "bag": db.from_sequence(list(X), npartitions=20),
    }


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["array", "frame", "bag"])
def test_a_model_is_rebuilt_once_in_each_worker(client, kind):
    client.run(count_rebuilds)
    keras.utils.set_random_seed(len(kind))
    model = classifier()
    model.layers[0].kernel.assign(model.layers[0].kernel * len(kind))  # not the last one's key
    lazy = predict(model, collections()[kind])
    found = lazy.compute(scheduler=client)
    assert_close(found, by_chunks(model, X, (5,) * 20)[0])
    assert set(client.run(rebuilds).values()) <= {0, 1}
    assert sum(client.run(rebuilds).values()) >= 1


@pytest.mark.cluster
def test_models_that_are_elsewhere(client):
    model = classifier()
    x = da.from_array(X, chunks=(SIZES, 64))
    (expected,) = by_chunks(model, X)
    future = client.scatter(model)
    made = dask.delayed(copy.copy)(model)
    for each in (future, made):
        lazy = predict(each, x)
        assert (lazy.dtype, lazy.shape) == (np.float32, (100, 10))
        assert_close(lazy.compute(scheduler=client), expected)
    by_columns = predict(future, dd.from_pandas(FRAME, npartitions=3))
    assert by_columns.compute(scheduler=client).shape == (100, 10)
    with pytest.raises(ValueError, match=r"'digits' .* \(rows, 63\)"):
        predict(future, x[:, :63])
    with pytest.raises(TypeError, match="not what this gave: a str"):
        predict(dask.delayed(str)(3), x)

    def refuse():
        raise AssertionError("made too early")

    assert predict(dask.delayed(refuse)(), x, meta=np.empty((0, 10), "f4")).shape == (100, 10)
