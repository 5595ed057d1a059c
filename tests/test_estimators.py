"""Estimators whose copies go on with the model that is there already."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from sys import getsizeof

import cloudpickle
import keras
import numpy as np
import pytest
from distributed import Client, LocalCluster
from scikeras.wrappers import KerasClassifier, KerasRegressor
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from dask_keras_serialize.workflows.estimators import Warm, WarmClassifier, WarmRegressor
from dask_keras_serialize.workflows.replicas import POOL, counts
from tests import zoo

DIGITS = load_digits()
X, Y = (DIGITS.data / 16).astype("float32")[:200], DIGITS.target[:200]


@pytest.fixture(autouse=True)
def empty_pool():
    POOL.clear()
    counts.clear()


def build(meta, units=16, dropout=0.0):
    layers = [keras.layers.Dense(units, activation="relu"), keras.layers.Dropout(dropout, seed=1)]
    out = keras.layers.Dense(meta["n_classes_"], activation="softmax")
    return keras.Sequential([keras.Input((meta["n_features_in_"],)), *layers, out])


def line(meta):
    return keras.Sequential([keras.Input((meta["n_features_in_"],)), keras.layers.Dense(1)])


def classifier(cls=WarmClassifier, **arguments):
    settings = {
        "loss": "sparse_categorical_crossentropy", "optimizer": "adam", "metrics": ["accuracy"],
        "verbose": 0, "random_state": 0, "fit__shuffle": False,
    }  # fmt: skip
    return cls(build, **(settings | arguments))


def weights(estimator):
    return [
        zoo.to_bytes(v) for v in estimator.model_.variables + estimator.model_.optimizer.variables
    ]


def rounds(estimator, number=3):
    """Do as dask-ml's searches: copy, train the copy, score it."""
    scores = []
    for _ in range(number):
        estimator = copy.deepcopy(estimator)
        estimator.partial_fit(X, Y)
        scores.append(estimator.score(X, Y))
    return estimator, scores


def test_copies_train_as_scikeras_does_and_rebuild_nothing():
    ours, scores = rounds(classifier().partial_fit(X, Y))
    assert counts == {"kept": 3}
    theirs, expected = rounds(classifier(KerasClassifier).partial_fit(X, Y))
    assert scores == expected
    assert dict(ours.history_) == dict(theirs.history_)
    assert ours.current_epoch == theirs.current_epoch == 4
    np.testing.assert_array_equal(ours.predict_proba(X), theirs.predict_proba(X))
    assert weights(ours) == weights(theirs)


def test_what_was_copied_is_what_it_was():
    first = classifier().partial_fit(X, Y)
    expected = first.predict_proba(X)
    second = copy.deepcopy(first)
    second.partial_fit(X, Y)
    third = copy.deepcopy(second).partial_fit(X, Y)
    assert not np.array_equal(second.predict_proba(X), expected)
    np.testing.assert_array_equal(first.predict_proba(X), expected)
    # the first is trained further, apart from the others
    again = copy.deepcopy(first).partial_fit(X, Y)
    np.testing.assert_array_equal(again.predict_proba(X), second.predict_proba(X))
    assert len(third.model_.history.history["loss"]) == 1
    assert len(third.history_["loss"]) == 3


def test_the_optimizers_state_and_seeds_go_on():
    ours, _ = rounds(classifier(model__dropout=0.5).partial_fit(X, Y))
    theirs, _ = rounds(classifier(KerasClassifier, model__dropout=0.5).partial_fit(X, Y))
    if keras.backend.backend() == "torch":  # whose dropout draws from PyTorch's own numbers
        assert int(ours.model_.optimizer.iterations.numpy()) == 28
        return
    assert weights(ours) == weights(theirs)


def test_who_takes_the_model_keeps_it():
    estimator = classifier().partial_fit(X, Y)
    mine = estimator.model_
    before = mine.get_weights()
    twin = copy.deepcopy(estimator)
    twin.partial_fit(X, Y)
    assert twin.model_ is not mine
    assert estimator.model_ is mine
    for a, b in zip(before, mine.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    mine.set_weights([np.zeros_like(w) for w in before])  # by hand: the copy has it too
    assert all((w == 0).all() for w in copy.deepcopy(estimator).model_.get_weights())


def test_a_model_that_is_given_is_trained_as_scikeras_does():
    model = build({"n_features_in_": 64, "n_classes_": 10})
    model.compile("adam", "sparse_categorical_crossentropy")
    estimator = WarmClassifier(model, random_state=0, verbose=0).fit(X, Y)
    assert estimator.model_ is model
    twin = copy.deepcopy(estimator)
    before = model.get_weights()
    twin.partial_fit(X, Y)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


KEPT = {}


def given_back(meta):
    return KEPT["model"]


@pytest.mark.parametrize("how", ["global", "closure", "optimizer"])
def test_what_the_user_keeps_is_not_trained_by_copies(how):
    model = KEPT["model"] = build({"n_features_in_": 64, "n_classes_": 10})
    settings = {"loss": "sparse_categorical_crossentropy", "verbose": 0, "random_state": 0}
    optimizer = keras.optimizers.Adam()
    if how != "optimizer":
        model.compile("adam", settings["loss"])
    builder = {"global": given_back, "closure": lambda: model, "optimizer": build}[how]
    extra = {"optimizer": optimizer} if how == "optimizer" else {}
    estimator = WarmClassifier(builder, **settings, **extra).partial_fit(X, Y)
    kept = optimizer if how == "optimizer" else model.optimizer
    before = [zoo.to_bytes(v) for v in [*kept.variables, *model.variables]]
    twin = copy.deepcopy(estimator)
    copy.deepcopy(twin.partial_fit(X, Y)).partial_fit(X, Y)
    assert [zoo.to_bytes(v) for v in [*kept.variables, *model.variables]] == before


def test_a_copy_made_while_it_trains_has_what_was_trained():
    class Keep(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            kept.append(copy.deepcopy(KEPT["estimator"]))

    kept = []
    first = classifier().partial_fit(X, Y)
    KEPT["estimator"] = second = copy.deepcopy(first)
    second._fit_callbacks = [Keep()]
    second.partial_fit(X, Y)
    expected = second.predict_proba(X)
    assert not np.array_equal(first.predict_proba(X), expected)
    np.testing.assert_array_equal(kept[0].predict_proba(X), expected)


def test_a_shallow_copy_that_is_fitted_leaves_the_original():
    first = classifier().fit(X, Y)
    expected = first.predict_proba(X)
    copy.copy(first).fit(X, 9 - Y)
    np.testing.assert_array_equal(first.predict_proba(X), expected)
    del first.model_
    assert not first.initialized_


def test_predictions_that_change_the_model_are_seen():
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            return x

    def counting(meta):
        return keras.Sequential([keras.Input((64,)), Noisy(), keras.layers.Dense(10, "softmax")])

    def calls(estimator):
        return float(keras.ops.convert_to_numpy(estimator.model_.layers[0].calls))

    settings = {"loss": "sparse_categorical_crossentropy", "verbose": 0, "random_state": 0}
    estimator = WarmClassifier(counting, **settings).fit(X, Y)
    twin = copy.deepcopy(estimator)
    twin.predict(X)
    later = copy.deepcopy(twin)
    plain = KerasClassifier(counting, **settings).fit(X, Y)
    assert calls(estimator) == calls(plain)
    plain.predict(X)
    assert calls(later) == calls(plain) > calls(estimator)


def test_copies_while_others_predict_and_train():
    estimator = classifier().partial_fit(X, Y)
    # it sets variables of the environment, and fails in threads (scikeras/utils/random_state.py)
    estimator._random_state = None
    expected = estimator.predict_proba(X)
    trained = copy.deepcopy(estimator).partial_fit(X, Y).predict_proba(X)
    # sums differ in their last bits with how TensorFlow's threads share them
    assert not np.allclose(trained, expected, 1e-4, 1e-5)
    wrong = []

    def predict():
        for _ in range(5):
            if not np.allclose(estimator.predict_proba(X), expected, 1e-4, 1e-5):
                wrong.append("predict")

    def train():
        for _ in range(3):
            twin = copy.deepcopy(estimator)
            twin.partial_fit(X, Y)
            if not np.allclose(twin.predict_proba(X), trained, 1e-4, 1e-5):
                wrong.append("train")

    threads = [threading.Thread(target=each) for each in (predict, train, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not wrong


def test_every_way_of_copying():
    estimator = classifier().partial_fit(X, Y)
    expected = estimator.predict_proba(X)
    for duplicate in (
        copy.deepcopy,
        lambda e: pickle.loads(pickle.dumps(e)),
        lambda e: cloudpickle.loads(cloudpickle.dumps(e)),
        copy.copy,
    ):
        twin = duplicate(estimator)
        np.testing.assert_array_equal(twin.predict_proba(X), expected)
        assert twin.initialized_
        assert twin.get_params()["model"] is not None
    fresh = clone(estimator)
    assert not fresh.initialized_
    assert not hasattr(fresh, "model_")
    copy.deepcopy(fresh).fit(X, Y)
    with pytest.raises(Exception, match="fit before"):
        pickle.loads(pickle.dumps(clone(estimator))).predict(X)


def test_fit_begins_anew():
    estimator = classifier()
    for _ in range(2):
        estimator = copy.deepcopy(estimator).fit(X, Y, epochs=2)
        assert len(estimator.history_["loss"]) == 2
    np.testing.assert_array_equal(
        estimator.predict_proba(X), classifier().fit(X, Y, epochs=2).predict_proba(X)
    )


def test_callbacks_do_not_carry_the_model():
    stop = keras.callbacks.EarlyStopping("loss", patience=1)
    estimator = classifier(callbacks=[stop]).fit(X, Y, epochs=3)
    assert stop.model is None
    twin = copy.deepcopy(estimator)
    twin.partial_fit(X, Y)
    assert counts == {"kept": 1}


KEPT_MODELS = []


class Keeps(keras.callbacks.Callback):
    """Keeps the model, somewhere."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_train_end(self, logs=None):
        if self.where == "attribute":
            self.best = self.model
        elif self.where == "list":
            self.all = [self.model]
        else:
            KEPT_MODELS.append(self.model)


def kept_by(where):
    KEPT_MODELS.clear()
    if where == "lambda":
        return keras.callbacks.LambdaCallback(
            on_train_end=lambda logs: KEPT_MODELS.append(KEPT["estimator"]._holder.model())
        )
    return Keeps(where)


@pytest.mark.parametrize("where", ["attribute", "list", "global", "lambda"])
def test_a_model_that_a_callback_keeps_is_not_trained_by_copies(where):
    callback = kept_by(where)
    # not a parameter: those are copied, and what was kept with them
    KEPT["estimator"] = estimator = classifier().fit(X, Y)
    estimator._fit_callbacks = [callback]
    estimator.partial_fit(X, Y)
    (model,) = [*KEPT_MODELS, *getattr(callback, "all", [getattr(callback, "best", None)])][:1]
    before = model.get_weights()
    copy.deepcopy(estimator).partial_fit(X, Y)
    for ours, kept in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, kept)


class Drops(keras.callbacks.Callback):
    """Changes what was traced already."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.layers[1].rate = 0.9


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="PyTorch traces nothing, and draws from numbers of its own",
)
def test_what_a_callback_changes_is_traced_anew():
    losses = []
    for cls in (WarmClassifier, KerasClassifier):
        estimator = classifier(cls, callbacks=Drops, model__dropout=0.01).partial_fit(X, Y)
        losses.append([dict(rounds(estimator, n)[0].history_)["loss"] for n in (1, 2)])
    assert losses[0] == losses[1]


def test_nothing_is_traced_anew_without_need():
    estimator, traced = classifier().partial_fit(X, Y), []
    for _ in range(3):
        with estimator._holder.using("trains"):
            traced.append(estimator.model_.train_function)
        estimator = copy.deepcopy(estimator).partial_fit(X, Y)
    assert traced[0] is traced[1] is traced[2] is not None


def test_data_that_are_refused_leave_the_model():
    estimator = classifier().fit(X, Y)
    expected = estimator.predict_proba(X)
    bad = X.copy()
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        estimator.fit(bad, Y)
    np.testing.assert_array_equal(estimator.predict_proba(X), expected)


def test_what_cannot_travel_is_copied_all_the_same():
    def locked(meta):
        model = build(meta)
        model.lock = Uncopied()
        return model

    estimator = WarmClassifier(
        locked, loss="sparse_categorical_crossentropy", verbose=0, random_state=0
    ).fit(X, Y)
    twin = copy.deepcopy(estimator)
    np.testing.assert_array_equal(twin.predict_proba(X), estimator.predict_proba(X))
    assert twin.model_ is not estimator.model_


class Uncopied:
    """Copies, but does not pickle."""

    def __deepcopy__(self, memo):
        return Uncopied()

    def __reduce__(self):
        raise TypeError("it stays here")


@pytest.mark.once
def test_a_regressor_and_a_pipeline():
    x, y = load_diabetes(return_X_y=True)
    x, y = x.astype("float32"), y.astype("float32")
    settings = {"loss": "mse", "optimizer": "adam", "verbose": 0, "random_state": 0}
    ours = WarmRegressor(line, fit__shuffle=False, **settings).fit(x, y)
    theirs = KerasRegressor(line, fit__shuffle=False, **settings).fit(x, y)
    assert copy.deepcopy(ours).score(x, y) == theirs.score(x, y)
    pipeline = make_pipeline(StandardScaler(), classifier()).fit(X, Y)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(pipeline)))
    np.testing.assert_array_equal(twin.predict_proba(X), pipeline.predict_proba(X))
    search = GridSearchCV(classifier(), {"model__units": [4, 32]}, cv=2).fit(X, Y)
    expected = GridSearchCV(classifier(KerasClassifier), {"model__units": [4, 32]}, cv=2).fit(X, Y)
    assert search.best_params_ == expected.best_params_
    assert search.best_score_ == expected.best_score_


class TwoInputs(Warm, KerasClassifier):
    """A wrapper of one's own: two inputs out of the columns of one table."""

    @property
    def feature_encoder(self):
        return FunctionTransformer(lambda x: [x[:, :32], x[:, 32:]])


def test_a_wrapper_of_ones_own_with_two_inputs():
    def two(meta):
        a, b = keras.Input((32,)), keras.Input((32,))
        return keras.Model([a, b], keras.layers.Dense(10, "softmax")(keras.layers.Add()([a, b])))

    estimator = TwoInputs(
        two, loss="sparse_categorical_crossentropy", verbose=0, random_state=0
    ).partial_fit(X, Y)
    twin = pickle.loads(cloudpickle.dumps(estimator))
    np.testing.assert_array_equal(twin.predict_proba(X), estimator.predict_proba(X))
    rounds(twin)
    assert counts["rebuilt"] == 1


def test_an_estimator_weighs_what_its_model_weighs():
    estimator = classifier(model__units=2000).partial_fit(X, Y)
    bytes_of_weights = 4 * (64 * 2000 + 2000 * 10)
    assert getsizeof(estimator) > 3 * bytes_of_weights  # with Adam's slots
    assert getsizeof(copy.deepcopy(estimator)) > 3 * bytes_of_weights


def test_models_go_when_their_estimators_go():
    before = len(POOL)
    rounds(classifier().partial_fit(X, Y))
    gc.collect()
    assert len(POOL) == before


def train_again(estimator):
    twin = copy.deepcopy(estimator)
    twin.partial_fit(X, Y)
    return twin


def counted():
    return dict(counts)


@pytest.mark.more
@pytest.mark.once
@pytest.mark.cluster
def test_workers_pass_estimators_on():
    local = classifier().partial_fit(X, Y)
    expected = [rounds(local, n)[0].predict_proba(X) for n in (1, 2, 3)]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        future = client.scatter(local)
        for proba in expected:
            workers = list(client.scheduler_info(n_workers=-1)["workers"])
            future = client.submit(train_again, future, workers=workers[:1])
            got = future.result()
            np.testing.assert_allclose(got.predict_proba(X), proba, rtol=1e-4, atol=1e-5)
        # trained where it was, the model was kept all along
        counted_there = client.run(counted, workers=workers[:1])[workers[0]]
        assert counted_there == {"rebuilt": 1, "kept": 2}
