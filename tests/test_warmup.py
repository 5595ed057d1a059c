"""A model is traced on every worker before the first task, and is the same after."""

import gc
import weakref

import keras
import numpy as np
import pytest

from dask_keras_serialize import PlacementError, WarmKeras
from dask_keras_serialize.cluster import warmup
from tests import zoo
from tests.conftest import local_client, until


@pytest.fixture(scope="module")
def client():
    with local_client() as client:
        yield client


class Traced(keras.layers.Layer):
    """Counts in Python how often it is traced; on torch, which does not trace, how often run."""

    count = 0

    def call(self, x):
        Traced.count += 1
        return x


def predict(chunk, model):
    """Return whether the model was warm, and how often it was traced meanwhile."""
    warm = model.predict_function is not None
    before = Traced.count
    model.predict(chunk, verbose=0)
    return warm, Traced.count - before


#: What a task finds of a warm model.
WARM = (True, 1 if keras.backend.backend() == "torch" else 0)


class Counts(keras.layers.Layer):
    """Counts its calls in a variable, as some layers keep averages."""

    def __init__(self, counts_in_a_weight):
        super().__init__()
        self.counts_in_a_weight = counts_in_a_weight

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=self.counts_in_a_weight, name="calls"
        )

    def call(self, x):
        self.calls.assign(self.calls + 1)
        return x


def fresh():
    parts = [Traced(), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((zoo.WIDTH,)), *parts])


@pytest.mark.cluster
def test_the_first_task_traces_nothing(client):
    model = fresh()
    future = client.scatter(model, broadcast=True, hash=False)
    client.register_plugin(WarmKeras(future, (16, zoo.WIDTH)))
    x = np.ones((16, zoo.WIDTH), "float32")
    for worker in client.nthreads():
        first = client.submit(predict, x, future, workers=[worker], pure=False).result()
        assert first == WARM
        far = client.submit(lambda m: m, future, workers=[worker], pure=False).result()
        zoo.assert_same(model, far)


@pytest.mark.cluster
def test_a_worker_that_has_no_replica_yet_fetches_one(client):
    here, there = client.nthreads()
    future = client.scatter(fresh(), workers=[here], hash=False)
    client.register_plugin(WarmKeras(future, (4, zoo.WIDTH)))
    assert has(client, future, {here, there})
    x = np.ones((4, zoo.WIDTH), "float32")
    assert client.submit(predict, x, future, workers=[there], pure=False).result() == WARM


def has(client, future, workers):
    """Wait until just these workers have a model; a worker's word takes a moment."""
    until(lambda: set(client.who_has(future)[future.key]) == set(workers), "others have it", 30)
    return True


def kept(dask_worker, key):
    return id(dask_worker.data[key]) if key in dask_worker.data else None


@pytest.mark.cluster
def test_workers_keep_what_is_warm_until_the_future_is_gone(client):
    here, there = client.nthreads()
    warm, cold = (client.scatter(fresh(), broadcast=True, hash=False) for _ in range(2))
    plugin = WarmKeras(warm, (4, zoo.WIDTH))
    client.register_plugin(plugin)
    before = client.run(kept, key=warm.key)
    assert None not in before.values()
    for _ in range(3):
        client.amm.run_once()
        assert has(client, warm, {here, there})
    assert len(client.who_has(cold)[cold.key]) == 1  # so the memory manager has been at work
    assert client.run(kept, key=warm.key) == before
    client.unregister_worker_plugin(plugin.name)
    client.register_plugin(plugin)  # as warm as before: it was not dropped meanwhile
    key = warm.key
    del warm
    until(lambda: set(client.run(kept, key=key).values()) == {None}, "it is kept", 30)


@pytest.mark.programs
@pytest.mark.cluster
def test_later_workers_are_warm_and_start_even_if_the_model_is_gone(client):
    future = client.scatter(fresh(), broadcast=True, hash=False)
    client.register_plugin(WarmKeras(future, (4, zoo.WIDTH)))
    old = set(client.nthreads())
    client.cluster.scale(3)
    client.wait_for_workers(3, timeout=60)
    (new,) = set(client.nthreads()) - old
    x = np.ones((4, zoo.WIDTH), "float32")
    assert client.submit(predict, x, future, workers=[new], pure=False).result() == WARM
    client.cluster.scale(2)
    del future
    client.cluster.scale(4)
    client.wait_for_workers(4, timeout=60)
    client.cluster.scale(2)
    until(lambda: len(client.nthreads()) == 2, "more workers are there", 30)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_what_a_prediction_changes_is_put_back(built, trainable):
    parts = [Counts(trainable), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((4,))] * built + parts)
    assert model.built is built
    assert _plugin((3, 4))._run(model) is None
    assert len(model.variables) == 5
    assert float(model.layers[0].calls.numpy()) == 0
    model.predict(np.ones((3, 4)), verbose=0)
    # of what a prediction changes, Keras keeps on JAX what is not trained
    kept = not (trainable and keras.backend.backend() == "jax")
    assert float(model.layers[0].calls.numpy()) == kept


@pytest.mark.parametrize("as_", [list, dict])
def test_several_inputs_of_their_own_dtypes(as_):
    seen = []

    class Looks(keras.layers.Layer):
        def call(self, words, numbers):
            seen.append((words.dtype, numbers.dtype))
            return keras.ops.cast(words, "float32") + numbers

    inputs = [keras.Input((2,), name="words", dtype="int32"), keras.Input((2,), name="numbers")]
    given = inputs if as_ is list else {each.name: each for each in inputs}
    model = keras.Model(given, Looks()(*inputs))
    del seen[:]
    shape = [(3, 2), (3, 2)] if as_ is list else {"words": (3, 2), "numbers": (3, 2)}
    assert _plugin(shape)._run(model) is None
    names = {tuple(keras.backend.standardize_dtype(each) for each in pair) for pair in seen}
    assert names == {("int32", "float32")}


class Stops(keras.layers.Layer):
    def call(self, x):
        raise StopIteration("no more")


def test_an_error_of_the_model_s_own_is_returned():
    model = keras.Sequential([Stops()])
    assert "no more" in str(_plugin((3, 4))._run(model))


def test_what_answers_for_a_worker_goes_with_it():
    class Worker:
        def __init__(self):
            self.extensions = {}
            self.stream_handlers = {"remove-replicas": self.remove}

        def remove(self, **event):
            pass

    worker = Worker()
    assert warmup._keeper(worker) is warmup._keeper(worker)
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None


def _plugin(shape):
    plugin = WarmKeras.__new__(WarmKeras)
    plugin.key, plugin.batch_shape, plugin.dtype = "model", shape, None
    return plugin


@pytest.mark.programs
@pytest.mark.cluster
def test_what_cannot_be_warmed_is_an_error_that_names_it(client):
    future = client.scatter(fresh(), broadcast=True, hash=False)
    with pytest.raises(TypeError, match="takes the future of a model, not a Sequential"):
        WarmKeras(fresh(), (3, 4))
    for shape in ((), (0, 4), [(3, 4), ()], {}, {"a": ()}, "ab", 8, None, (None, 8), [[]]):
        with pytest.raises(ValueError, match="is no shape of a batch"):
            WarmKeras(future, shape)
    with pytest.raises(ValueError, match="dtype='nope' is none of"):
        WarmKeras(future, (3, 4), dtype="nope")
    WarmKeras(future, (np.int64(3), 4), dtype="uint8")
    with pytest.raises(PlacementError, match=r"worker tcp://.* cannot predict on zeros") as info:
        client.register_plugin(WarmKeras(future, (3, zoo.WIDTH + 1)))
    assert "\n" not in str(info.value)
    assert "\x1b" not in str(info.value)
    assert "sequential" in str(info.value)
    assert future.status == "finished"
