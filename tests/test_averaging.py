"""Rounds of averaging, against the same rounds done by hand in this process."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.array as da
import keras
import numpy as np
import pytest
from distributed import Client, wait
from keras import layers

from dask_keras_serialize.configs.by_config import variables_of
from dask_keras_serialize.workflows import averaging, means, replicas
from dask_keras_serialize.workflows.averaging import fit_rounds
from dask_keras_serialize.workflows.means import mean_weights
from tests import zoo
from tests.conftest import local_client, travelling_by_value

#: Of unequal sizes.
PARTS = [(zoo.X[a:b], zoo.LABELS[a:b]) for a, b in ((0, 8), (8, 20), (20, 32))]
SIZES = [len(x) for x, _ in PARTS]


@pytest.fixture(autouse=True)
def code_travels_by_value():
    """The workers cannot import this suite."""
    with travelling_by_value(sys.modules[__name__], zoo):
        yield


@pytest.fixture(scope="module")
def mortals():
    """Two workers of two threads that nannies start again when they are killed.

    A cluster closes the nanny of a worker that is not there so many seconds after it went, and asks
    no more whether that was the second time (``SpecCluster._update_worker_status``).
    """
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"}),
        local_client(threads=2) as client,
    ):
        yield client


def fit(model, part):
    """Keras is a global of it: a scheduler that opened it would import that."""
    x, y = part
    keras.utils.set_random_seed(1)  # PyTorch's dropout may draw from its own
    if isinstance(y, dict):
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        return None
    return model.fit(x, y, batch_size=4, shuffle=False, verbose=0).history["loss"]


def descend(model, part):
    """Train a layer that is not compiled, by a gradient written out."""
    x, y = part
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    for _ in range(3):
        wrong = np.asarray(model.predict_on_batch(x)) - np.eye(3, dtype="float32")[y]
        gradients = [x.T @ wrong / len(x), wrong.mean(0)]
        optimizer.apply([keras.ops.convert_to_tensor(each) for each in gradients])
    return len(x)


class Counts(layers.Layer):
    """An integer among the weights."""

    def build(self, shape):
        self.batches = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="batches"
        )

    def call(self, x, training=False):
        if training:
            self.batches.assign(self.batches + 1)
        return x


def compiled(model, loss="sparse_categorical_crossentropy", optimizer="adam"):
    model.compile(optimizer, loss)
    return model


def with_averages():
    return keras.Sequential(
        [
            keras.Input((zoo.WIDTH,)),
            layers.Dense(16, activation="relu"),
            layers.Dropout(0.3, seed=3),
            layers.BatchNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def subclassed():
    model = zoo.Subclassed((16, zoo.WIDTH))
    model.drop = layers.Dropout(0.2, seed=1)  # without, PyTorch draws from the process
    model(zoo.X)
    return compiled(model)


def of_dtype(dtype):
    model = zoo.stack(layers.Softmax(dtype="float32"), dtype=dtype)
    return compiled(model, optimizer=keras.optimizers.SGD(0.1))


MODELS = {
    "batch norm, unbuilt optimizer": lambda: compiled(with_averages()),
    "trained before": lambda: zoo.trained(with_averages()),
    "subclassed": subclassed,
    "two outputs": lambda: compiled(
        zoo.two_outputs(), {"p": "sparse_categorical_crossentropy", "q": "mse"}
    ),
    "integers": lambda: compiled(
        keras.Sequential([keras.Input((zoo.WIDTH,)), Counts(), layers.Dense(3)]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
    "float16": lambda: of_dtype("float16"),
    "bfloat16": lambda: of_dtype("bfloat16"),
    "not compiled": zoo.stack,
}
TYPICAL = ("batch norm, unbuilt optimizer", "two outputs", "not compiled")


@functools.cache
def made(name):
    keras.utils.set_random_seed(0)
    return MODELS[name]()


def make(name="batch norm, unbuilt optimizer"):
    """Build it once: a client's thread may draw from the seed that was just set."""
    return copy.deepcopy(made(name))


def parts_for(name):
    if name != "two outputs":
        return PARTS
    q = zoo.TARGETS["two"]["q"]
    bounds = np.cumsum([0, *SIZES])
    return [
        (x, {"p": y, "q": q[a:b]}) for (x, y), a, b in zip(PARTS, bounds, bounds[1:], strict=False)
    ]


def by_hand(model, train, parts, rounds, shares=None):
    """Do the same here; return the weights' bytes, and what ``train`` returned."""
    if model.compiled:
        model.optimizer.build(model.trainable_variables)
    mean, history = None, []
    replica = copy.deepcopy(model)  # one, or each would be traced
    start = [(v, np.array(keras.ops.convert_to_numpy(v))) for v in variables_of(replica)]
    for number in range(rounds):
        trained, logs = [], []
        for place, part in enumerate(parts):
            for variable, value in start:
                variable.assign(value)
            if mean is not None:
                replica.set_weights(mean)
            averaging._draw_apart(replica, (number, place))
            logs.append(train(replica, part))
            trained.append(replica.get_weights())
        mean = []
        for arrays in zip(*trained, strict=True):
            if arrays[0].dtype.kind in "iu":
                mean.append(arrays[0])
            else:
                stacked = np.stack([array.astype("float64") for array in arrays])
                exact = np.average(stacked, axis=0, weights=shares)
                mean.append(exact.astype(arrays[0].dtype))
        history.append(logs)
    model.set_weights(mean)
    return weights_of(model), history


def weights_of(model):
    return [zoo.to_bytes(variable) for variable in model.weights]


@pytest.mark.cluster
@pytest.mark.parametrize("name", zoo.some(MODELS, TYPICAL))
def test_rounds_are_those_done_by_hand(client, name):
    train = descend if name == "not compiled" else fit
    parts, model, seen = parts_for(name), make(name), []
    history = fit_rounds(
        model, train, parts, rounds=3, weights=SIZES,
        on_round=lambda number, logs: seen.append((number, logs, weights_of(model))),
    )  # fmt: skip
    expected, logs = by_hand(make(name), train, parts, 3, SIZES)
    assert weights_of(model) == expected
    assert history == logs
    assert [each[:2] for each in seen] == list(enumerate(logs))
    assert len({tuple(each) for *_, each in seen}) == 3
    assert seen[-1][2] == expected
    if name == "integers":
        assert int(model.layers[0].batches) == 3 * SIZES[0] // 4
    assert not client.run_on_scheduler(lambda: "keras" in __import__("sys").modules)


@pytest.mark.cluster
def test_it_is_the_same_each_time_and_all_count_alike(client):
    results = []
    for parts in (PARTS, client.scatter(PARTS)):
        model = make()
        history = fit_rounds(model, fit, parts, rounds=2, client=client)
        results.append((weights_of(model), history))
    assert results[0] == results[1] == by_hand(make(), fit, PARTS, 2)


@pytest.mark.cluster
def test_parts_may_be_whatever_dask_has(client):
    xs = da.from_array(zoo.X, chunks=(tuple(SIZES), zoo.WIDTH))
    ys = da.from_array(zoo.LABELS, chunks=(tuple(SIZES),))
    columns = zip(xs.to_delayed().ravel(), ys.to_delayed().ravel(), strict=True)
    given = {
        "delayed": [dask.delayed(part) for part in PARTS],
        "pairs of chunks": list(columns),
        "pairs of futures": [tuple(client.scatter(list(part))) for part in PARTS],
        "arrays": [(xs.blocks[i], ys.blocks[i]) for i in range(3)],
        "some of each": [PARTS[0], client.submit(lambda: PARTS[1]), dask.delayed(PARTS[2])],
    }
    expected = by_hand(make(), fit, PARTS, 1)
    for what, parts in given.items():
        model = make()
        assert fit_rounds(model, fit, parts) == expected[1], what
        assert weights_of(model) == expected[0], what


def wide():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((512,)), layers.Dense(512), layers.Dense(3)])
    return compiled(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def wait_and_fit(model, part):
    x, y, seconds = part
    model.fit(x, y, verbose=0)
    time.sleep(seconds)
    return os.getpid()


def start_counting():
    replicas.POOL.clear()
    replicas.counts.clear()


def counted(dask_worker):
    """Return how replicas were got there, and the bytes that came from other workers, by key."""
    log = [message["keys"] for message in dask_worker.transfer_incoming_log]
    return dict(replicas.counts), [item for keys in log for item in keys.items()]


@pytest.mark.cluster
def test_parts_stay_and_weights_alone_move(client):
    """Longer than Dask takes to take back what a worker that waits has: two seconds."""
    client.run(start_counting)
    model, rounds = wide(), 8
    nbytes = sum(weight.nbytes for weight in model.get_weights())
    x = np.zeros((4, 512), "float32")
    first, second = client.nthreads()
    # three on one worker, that a thief could take
    placed = [
        client.scatter((x, np.zeros(4, "int32"), seconds), workers=[worker], hash=False)
        for worker, seconds in [(first, 0.1), (first, 0.1), (first, 0.1), (second, 0)]
    ]
    # scatter takes a tuple for a collection of values
    parts = [client.submit(lambda *part: part, *each) for each in placed]
    wait(parts)
    before, before_all = client.who_has(parts), client.run(counted)
    history = fit_rounds(model, wait_and_fit, parts, rounds=rounds)
    assert client.who_has(parts) == before
    pids = client.run(os.getpid)
    assert history == [[pids[first]] * 3 + [pids[second]]] * rounds
    moved = []
    for worker, (counts, log) in client.run(counted).items():
        assert counts == {"rebuilt": 1, "filled": rounds * (3 if worker == first else 1) - 1}
        moved += log[len(before_all[worker][1]) :]
    assert {str(key).split("-")[0].strip("_") for key, _ in moved} <= {"train", "mean", "logs_of"}
    # what was trained on one worker goes to the other, and the mean back; or once the other way
    assert nbytes < sum(size for _, size in moved) < 2 * rounds * 2 * nbytes


@pytest.mark.once
@pytest.mark.cluster
def test_more_parts_than_one_task_averages(client, monkeypatch):
    monkeypatch.setattr(means, "FAN_IN", 2)
    parts = PARTS + PARTS[:2]
    for shares in (None, [1, 2, 3, 4, 5], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]):
        model = make()
        fit_rounds(model, fit, parts, weights=shares)
        expected, _ = by_hand(make(), fit, parts, 1, shares)
        assert weights_of(model) == expected


def fail(model, part):
    x, _ = part
    loss = fit(model, part)
    if len(x) == SIZES[1]:
        raise LookupError("this part is bad")
    return loss


@pytest.mark.cluster
def test_what_train_raises_is_raised_and_the_model_is_as_it_was(client):
    model = make()
    before = weights_of(model)
    for shares in (None, [1, 0, 1]):
        with pytest.raises(LookupError, match="this part is bad"):
            fit_rounds(model, fail, PARTS, rounds=2, weights=shares)
    with pytest.raises(ZeroDivisionError):
        fit_rounds(model, fit, [client.submit(lambda: 1 / 0), *PARTS])
    assert weights_of(model) == before
    model = make()
    with pytest.raises(KeyError):  # stops the rest
        fit_rounds(model, fit, PARTS, rounds=50, on_round=lambda number, logs: {}[number])
    assert weights_of(model) == by_hand(make(), fit, PARTS, 1)[0]


def lock(model, part):
    return threading.Lock()


def grow(model, part):
    model.add(layers.Dense(2))


@pytest.mark.cluster
def test_what_train_may_not_do_is_said(client):
    model = make()
    before = weights_of(model)
    with pytest.raises(TypeError, match="what train returned, a lock, cannot travel: return numb"):
        fit_rounds(model, lock, PARTS, rounds=2)
    with pytest.raises(ValueError, match="train made other weights of model 'sequential"):
        fit_rounds(model, grow, PARTS, rounds=2)
    assert weights_of(model) == before


@pytest.mark.cluster
def test_a_function_that_workers_cannot_open_fails(client):
    def breaks():
        raise ImportError("no module of that name")

    class Bad:
        def __reduce__(self):
            return breaks, ()

        def __call__(self, model, part):
            raise AssertionError

    with pytest.raises(ImportError, match="no module of that name"):
        fit_rounds(make(), Bad(), PARTS)


@pytest.mark.cluster
def test_wrong_arguments_are_named(client, address):
    unbuilt = keras.Sequential([layers.Dense(3)], name="mine")
    x = da.zeros((4, 2), chunks=2)
    for model, parts, more, error in (
        (unbuilt, PARTS, {}, "model 'mine' has no weights yet"),
        (make(), [], {}, "there are no parts"),
        (make(), PARTS, {"weights": [1, 2]}, "no weights of 3 parts"),
        (make(), PARTS, {"weights": [1, 2, -1]}, "none negative"),
        (make(), PARTS, {"weights": [0, 0, 0]}, "not all zero"),
        (make(), PARTS, {"weights": [1, 1, float("nan")]}, "no weights of 3 parts"),
        (make(), x, {}, "parts is one Array: give a list"),
        (make(), PARTS, {"rounds": -1}, "rounds=-1"),
    ):
        with pytest.raises(ValueError, match=error) as info:
            fit_rounds(model, fit, parts, **more)
        assert "\n" not in str(info.value)
    model = make()
    before = weights_of(model)
    assert fit_rounds(model, fit, PARTS, rounds=0) == []
    assert weights_of(model) == before

    async def ask():
        async with Client(address, asynchronous=True) as other:
            with pytest.raises(TypeError, match="an asynchronous client cannot"):
                fit_rounds(make(), fit, PARTS, client=other)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(__import__("asyncio").run, ask()).result(60)


def part_of(place):
    return PARTS[place]


def kill(client, worker):
    """Kill a worker, and wait until it is gone."""
    pid = client.run(os.getpid, workers=[worker])[worker]
    os.kill(pid, signal.SIGKILL)
    while worker in client.nthreads():
        time.sleep(0.05)


@pytest.mark.programs
@pytest.mark.cluster
def test_each_thread_rebuilds_once(mortals):
    mortals.wait_for_workers(2)
    mortals.run(start_counting)
    model = make()
    # PyTorch's seed is the process's, on which threads would draw in turns
    fit_rounds(model, fit, PARTS * 4, rounds=4, client=mortals)
    seen = [counts for counts, _ in mortals.run(counted).values()]
    assert all(counts["rebuilt"] <= 2 for counts in seen)
    assert sum(sum(counts.values()) for counts in seen) == 48


@pytest.mark.programs
@pytest.mark.cluster
def test_a_worker_may_die_between_rounds(mortals):
    mortals.wait_for_workers(2)
    parts = mortals.map(part_of, range(3), pure=False)
    model, killed = make(), []

    def on_round(number, logs):
        if number == 1:
            (worker,) = mortals.who_has([parts[0]])[parts[0].key]
            killed.append(worker)
            kill(mortals, worker)

    history = fit_rounds(model, fit, parts, rounds=4, on_round=on_round, client=mortals)
    assert killed
    assert (weights_of(model), history) == by_hand(make(), fit, PARTS, 4)


def die_once(flag):
    def train(model, part):
        if len(part[0]) == SIZES[1] and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return fit(model, part)

    return train


@pytest.mark.programs
@pytest.mark.cluster
def test_a_worker_may_die_while_it_trains(mortals, tmp_path):
    mortals.wait_for_workers(2)
    parts = mortals.map(part_of, range(3), pure=False)
    model = make()
    fit_rounds(model, die_once(tmp_path / "died"), parts, rounds=2, client=mortals)
    assert weights_of(model) == by_hand(make(), fit, PARTS, 2)[0]
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(RuntimeError, match="round 0 was begun 1 times"),
    ):
        fit_rounds(model, die_once(tmp_path / "again"), parts, client=mortals)


@pytest.mark.programs
@pytest.mark.cluster
def test_a_part_that_is_gone_is_an_error(mortals):
    mortals.wait_for_workers(2)
    worker = next(iter(mortals.nthreads()))
    part = mortals.scatter([PARTS[0]], workers=[worker], hash=False)[0]
    model = make()
    with pytest.raises(RuntimeError, match="a part is gone with the worker"):
        fit_rounds(
            model, fit, [part], rounds=3, client=mortals,
            on_round=lambda number, logs: number or kill(mortals, worker),
        )  # fmt: skip
    assert weights_of(model) == by_hand(make(), fit, PARTS[:1], 1)[0]


def test_means_of_weights():
    rng = np.random.default_rng(0)
    sets = [[rng.normal(size=(3, 2)).astype("float32"), np.array(i), np.array("a")] for i in (7, 8)]
    given = copy.deepcopy(sets)
    mean, count, text = mean_weights(sets, [1, 3])
    np.testing.assert_array_equal(mean, np.average([s[0] for s in sets], 0, [1, 3]).astype("f4"))
    assert mean.dtype == "float32"
    assert (count, text) == (7, "a")
    for arrays, before in zip(sets, given, strict=True):
        assert all(map(np.array_equal, arrays, before))
    sets[0][0][:] = np.nan
    np.testing.assert_array_equal(mean_weights(sets, [0, 5])[0], sets[1][0])
    (same,) = mean_weights([[np.float32(0.1)]] * 7, [1] * 7)
    assert same == np.float32(0.1)
    (halves,) = mean_weights([[np.float16([60000])]] * 3, [1] * 3)
    assert halves == np.float16(60000)


def test_parts_and_rounds_draw_from_seeds_of_their_own():
    seen = set()
    for place in [(0, 0), (0, 1), (1, 0)]:
        model = make()
        averaging._draw_apart(model, place)
        seen.add(tuple(map(zoo.to_bytes, model.variables)))
        assert weights_of(model) == weights_of(make())
    assert len(seen) == 3
