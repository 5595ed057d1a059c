"""Snapshots, and the replicas that are lent for them."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import threading

import cloudpickle
import keras
import numpy as np
import pytest

from dask_keras_serialize import DecodeError
from dask_keras_serialize.configs.by_config import variables_of
from dask_keras_serialize.workflows import replicas
from dask_keras_serialize.workflows.replicas import POOL, Snapshot, counts
from tests import zoo
from tests.conftest import local_client

#: Rebuilt each time, for nothing says what an array in a history is.
NOT_COMPARED = {"history of arrays"}


@pytest.fixture(autouse=True)
def empty_pool():
    POOL.clear()
    counts.clear()


def spoil(model):
    for variable in variables_of(model):
        if variable.dtype != "string" and "normalization" not in variable.path:
            variable.assign(keras.ops.cast(keras.ops.ones(variable.shape), variable.dtype))


@pytest.mark.more
@pytest.mark.parametrize("name", zoo.some(zoo.ALL))
def test_a_replica_that_is_filled_again_is_the_same_model(name):
    model = zoo.build(name)
    snapshot = Snapshot(model)
    with snapshot.replica() as first:
        assert first is not model
        spoil(first)
    with snapshot.replica() as second:
        expected = {"rebuilt": 2} if name in NOT_COMPARED else {"rebuilt": 1, "filled": 1}
        assert counts == expected
        assert (second is first) == ("filled" in counts)
        zoo.assert_same(model, second)
        ours, theirs = (vars(each).get("history") for each in (model, second))
        if isinstance(ours, keras.callbacks.History):
            assert ours.history == theirs.history
        else:
            assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", ["slots", "trained", "trained subclassed", "trained two outputs"])
def test_a_replica_survives_what_runs_leave_behind(name):
    model = zoo.build("trained" if name == "slots" else name)
    if name == "slots":
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    target = zoo.TARGETS[zoo.TARGET.get(name, "sparse")]
    snapshot = pickle.loads(pickle.dumps(Snapshot(model)))  # as on a worker

    def train():
        with snapshot.replica() as replica:
            keras.utils.set_random_seed(1)  # PyTorch's dropout draws from its own
            logs = replica.fit(zoo.X, target, shuffle=False, verbose=0).history
            replica.predict(zoo.X, verbose=0)
            return logs, [zoo.to_bytes(v) for v in variables_of(replica)]

    first = train()
    if keras.backend.backend() == "torch" and name != "slots":
        first = train()  # a rebuilt model's first fit draws once more, to build its loss
        counts.subtract(filled=1)
    for _ in range(2):
        assert train() == first
    # the first batch made the optimizer's slots, which have no value to go back to
    expected = {"rebuilt": 3} if name == "slots" else {"rebuilt": 1, "filled": 2}
    assert counts == expected


def test_metrics_that_a_first_batch_builds_do_not_make_another_architecture():
    for model in (zoo.mlp(), zoo.Subclassed((4,))):
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        model(zoo.X)
        model.optimizer.build(model.trainable_variables)
        snapshot = Snapshot(model)
        losses = []
        for _ in range(4):
            with snapshot.replica(keep_metrics=True) as replica:
                assert getattr(replica, "history", None) is None
                keras.utils.set_random_seed(1)
                fitted = replica.fit(zoo.X, zoo.LABELS, shuffle=False, verbose=0)
                losses.append(fitted.history)
        assert losses[1] == losses[2] == losses[3]
        # there a rebuilt model's first fit draws once more, to build what it is compiled with
        assert losses[0] == losses[1] or keras.backend.backend() == "torch"
    assert counts == {"rebuilt": 2, "filled": 6}


def test_a_snapshot_does_not_show_later_training():
    model = zoo.build("trained")
    snapshot, before = Snapshot(model), [zoo.to_bytes(v) for v in variables_of(model)]
    model.fit(zoo.X, zoo.LABELS, verbose=0)
    with snapshot.replica() as replica:
        replica.fit(zoo.X, zoo.LABELS, verbose=0)
        assert len(replica.history.history["loss"]) == 1
    assert [zoo.to_bytes(v) for v in variables_of(snapshot.open())] == before
    with snapshot.replica() as replica:
        assert [zoo.to_bytes(v) for v in variables_of(replica)] == before


def test_a_snapshot_copies_no_large_variable():
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(256)])
    snapshot = Snapshot(model)
    frame = max(snapshot.parcel.frames, key=len)
    assert np.frombuffer(frame, np.uint8).ctypes.data == zoo.address(model.layers[0].kernel)
    assert snapshot.nbytes > 512 * 256 * 4
    assert snapshot.__sizeof__() == snapshot.nbytes


def test_weights_take_the_place_of_the_snapshots_own():
    model = zoo.build("trained")
    snapshot = Snapshot(model)
    ones = [np.ones_like(w) for w in model.get_weights()]
    for _ in range(2):
        with snapshot.replica(ones) as replica:
            assert all((w == 1).all() for w in replica.get_weights())
            slots = zip(replica.optimizer.variables, model.optimizer.variables, strict=True)
            assert all(zoo.to_bytes(a) == zoo.to_bytes(b) for a, b in slots)
    with snapshot.replica() as replica:
        zoo.assert_same(model, replica)
    assert counts == {"rebuilt": 1, "filled": 2}
    with pytest.raises(ValueError, match="weights"), snapshot.replica(ones[:-1]):
        pass


def test_whoever_borrows_a_replica_has_it_alone():
    snapshot = Snapshot(zoo.build("sequential"))
    with snapshot.replica() as one, snapshot.replica() as other:
        assert one is not other
    everyone, seen, wrong = threading.Barrier(4), set(), []

    def borrow():
        everyone.wait(60)
        for _ in range(10):
            with snapshot.replica() as replica:
                if id(replica) in seen:
                    wrong.append(replica)
                seen.add(id(replica))
                spoil(replica)
                seen.discard(id(replica))

    threads = [threading.Thread(target=borrow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert counts["rebuilt"] <= 4
    assert sum(counts.values()) == 42


def test_another_architecture_gets_a_replica_of_its_own():
    keras.utils.set_random_seed(0)
    model, wider = zoo.mlp(3), zoo.mlp(4)
    with Snapshot(model).replica(), Snapshot(wider).replica() as replica:
        assert replica.output_shape[-1] == 4
    frozen = keras.models.clone_model(model)
    frozen.layers[0].trainable = False
    with Snapshot(frozen).replica() as replica:
        assert not replica.layers[0].trainable_variables
    assert counts["rebuilt"] == 3


def test_what_a_borrower_does_to_the_architecture_goes_no_further():
    model = zoo.build("trained")
    snapshot = Snapshot(model)
    with snapshot.replica() as replica:
        replica.layers[0].trainable = False
    with snapshot.replica() as replica:
        zoo.assert_same(model, replica)
    assert counts == {"rebuilt": 2}


def spoil_dropout(model):
    model.layers[1].rate = 0.9


def spoil_optimizer(model):
    model.optimizer.clipnorm = 1e-6


@pytest.mark.parametrize("change", [spoil_dropout, spoil_optimizer])
def test_what_was_traced_before_a_change_is_not_used_after_it(change):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(64), keras.layers.Dropout(0.01, seed=1)]
    model = keras.Sequential([*layers, keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    changed = Snapshot(model).open()
    change(changed)
    with Snapshot(model).replica() as replica:
        replica.train_on_batch(zoo.X, zoo.LABELS)
        change(replica)
    snapshot, moved = Snapshot(changed), []
    for borrowed in (True, False):
        keras.utils.set_random_seed(0)
        if borrowed:
            with snapshot.replica() as replica:
                replica.train_on_batch(zoo.X, zoo.LABELS)
                moved.append([zoo.to_bytes(v) for v in replica.weights])
        else:
            opened = snapshot.open()
            opened.train_on_batch(zoo.X, zoo.LABELS)
            moved.append([zoo.to_bytes(v) for v in opened.weights])
    assert counts == {"rebuilt": 1, "filled": 1}
    assert moved[0] == moved[1]


def test_flags_of_a_run_are_the_snapshots():
    model = zoo.build("trained")
    stopped = copy.deepcopy(model)
    stopped.stop_training = True
    snapshots = Snapshot(model), Snapshot(stopped)
    for _ in range(2):
        for snapshot, expected in zip(snapshots, (False, True), strict=True):
            with snapshot.replica() as replica:
                assert replica.stop_training is snapshot.open().stop_training is expected
                replica.stop_training = not expected
    assert counts == {"rebuilt": 1, "filled": 3}


def test_metrics_chosen_for_other_targets_are_not_used():
    snapshots = {}
    for target in ("sparse_categorical_crossentropy", "categorical_crossentropy"):
        keras.utils.set_random_seed(0)
        model = zoo.trained(
            keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, "softmax")], name="same"),
            lambda y, p: keras.ops.mean(p) + keras.ops.sum(keras.ops.cast(y, p.dtype)) * 0,
            "sparse" if target.startswith("sparse") else "one-hot",
        )
        snapshots[target] = (
            Snapshot(model),
            zoo.TARGETS["sparse" if target.startswith("sparse") else "one-hot"],
        )
    for snapshot, y in snapshots.values():
        with snapshot.replica() as replica:
            chosen = [type(m).__name__ for m in replica._compile_metrics.metrics]
            assert chosen == [type(m).__name__ for m in snapshot.open()._compile_metrics.metrics]
            replica.evaluate(zoo.X, y, verbose=0)


def test_metrics_are_chosen_anew_for_other_targets():
    model = zoo.mlp()
    model.compile("adam", lambda y, p: keras.ops.mean(p, axis=-1), metrics=["accuracy"])
    snapshot = Snapshot(model)
    for target in ("sparse", "one-hot", "sparse"):
        y = zoo.TARGETS[target]
        with snapshot.replica() as replica:
            expected = snapshot.open().evaluate(zoo.X, y, verbose=0)
            assert replica.evaluate(zoo.X, y, verbose=0) == pytest.approx(expected)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_first_call_does_not_make_another_architecture(compiled):
    layers = [keras.Input((8,)), zoo.Scale(lambda x: x * 2), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential(layers)  # by value
    if compiled:
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
    snapshot = Snapshot(model)
    for _ in range(3):
        with snapshot.replica() as replica:
            replica.predict(zoo.X, verbose=0)
            if compiled:
                replica.fit(zoo.X, zoo.LABELS, verbose=0)
    assert counts == {"rebuilt": 1, "filled": 2}
    assert len(POOL) == 1


def test_code_that_was_loaded_anew_is_not_taken_for_the_old(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = "def factor(x):\n    return x * {}\n"
    (tmp_path / "mended_later.py").write_text(source.format(1))
    mended_later = importlib.import_module("mended_later")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Activation(mended_later.factor)])
    snapshot = Snapshot(model)
    ones = np.ones((1, 8), "float32")
    for factor in (1, 1, 1000):
        (tmp_path / "mended_later.py").write_text(source.format(factor))
        importlib.invalidate_caches()
        if factor > 1:
            importlib.reload(mended_later)
        with pickle.loads(pickle.dumps(snapshot)).replica() as replica:
            assert replica.predict(ones, verbose=0)[0, 0] == factor


def test_there_are_never_many_idle_replicas():
    for width in range(1, replicas.SPARE + 5):
        with Snapshot(keras.Sequential([keras.Input((2,)), keras.layers.Dense(width)])).replica():
            pass
    assert len(POOL) == replicas.SPARE


def test_idle_replicas_are_let_go(monkeypatch):
    monkeypatch.setattr(replicas, "BESIDE", 0)
    snapshots = []
    for width in (64, 65, 66):
        model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(width)])
        snapshots.append(Snapshot(model))
    monkeypatch.setattr(replicas, "SPARE_BYTES", 300_000)
    for snapshot in snapshots:
        with snapshot.replica():
            pass
    assert len(POOL) == 2
    monkeypatch.setattr(replicas, "SPARE_BYTES", 0)
    with snapshots[0].replica():
        pass
    assert len(POOL) == 1  # the one used last stays, whatever its size


def test_bytes_that_are_not_whole_are_refused():
    model = zoo.build("trained")
    snapshot = Snapshot(model)
    with snapshot.replica():
        pass
    broken = bytearray(cloudpickle.dumps(snapshot))
    at = broken.index(zoo.to_bytes(model.layers[0].kernel)[:64])
    broken[at] ^= 1
    received = pickle.loads(broken)
    for _ in range(2):
        with pytest.raises(DecodeError, match="bytes"), received.replica():
            pass
    with snapshot.replica() as replica:
        zoo.assert_same(model, replica)


def use(snapshot, rows):
    with snapshot.replica() as replica:
        return replica.predict(rows, verbose=0), replica.name


def counted():
    return dict(counts)


@pytest.mark.cluster
def test_workers_rebuild_once_and_fill_again():
    model = zoo.build("trained")
    with local_client() as client:
        expected = model.predict(zoo.X, verbose=0)
        for _ in range(2):
            for direct in (False, True):
                future = client.scatter(Snapshot(model), broadcast=True, direct=direct, hash=False)
                results = client.gather(
                    [client.submit(use, future, zoo.X, pure=False) for _ in range(6)]
                )
                for predicted, _ in results:
                    np.testing.assert_array_equal(predicted, expected)
            model.fit(zoo.X, zoo.LABELS, verbose=0)
            expected = model.predict(zoo.X, verbose=0)
        counted_there = client.run(counted).values()
        assert all(each["rebuilt"] == 1 for each in counted_there)
        assert sum(sum(each.values()) for each in counted_there) == 24
