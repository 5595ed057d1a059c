"""scikit-learn's searches and cross-validation, in processes of Dask's and of loky's.

With scikeras's estimators around Keras models, by joblib's backends: each search gives what the
same search gives here, one fit after the other.
"""

import os
import pickle
from collections import Counter
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from unittest import mock

import joblib
import keras
import numpy as np
import pytest
import scikeras._saving_utils
import sklearn.experimental.enable_halving_search_cv  # noqa: F401
from joblib.externals.loky import get_reusable_executor
from keras.src.saving import saving_lib
from scikeras.wrappers import KerasClassifier, KerasRegressor
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.datasets import load_diabetes, load_digits
from sklearn.ensemble import VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import ClassifierTags
from sklearn.utils.parallel import Parallel, delayed

import dask_keras_serialize
from dask_keras_serialize import protocol
from tests import zoo
from tests.conftest import local_client

pytestmark = [pytest.mark.cluster, pytest.mark.programs]

# whole batches of 32 in each fold: JAX compiles for each size
DIGITS = [part[:192] for part in load_digits(return_X_y=True)]
DIABETES = [part[:128].astype("float32") for part in load_diabetes(return_X_y=True)]
DIABETES[0] = DIABETES[0][:, :4]
FOLDS = KFold(2)

#: What happened in this process while it was watched.
SEEN: Counter[str] = Counter()
#: Holds what `watch` began: what is left to itself ends.
WATCHES = ExitStack()


@contextmanager
def watching():
    """Count the models that our decoder opens in this process, and those that Keras's does."""
    if SEEN["watching"]:  # the scheduler, in this process, unpickles tasks too
        yield
        return
    SEEN["watching"] = 1
    decode_parts, load_model = protocol.decode_parts, saving_lib.load_model

    def count_ours(*arguments):
        SEEN["ours"] += 1
        return decode_parts(*arguments)

    def count_theirs(*arguments, **options):
        SEEN["theirs"] += 1
        return load_model(*arguments, **options)

    with (
        mock.patch.object(protocol, "decode_parts", count_ours),
        mock.patch.object(saving_lib, "load_model", count_theirs),
        mock.patch.object(scikeras._saving_utils, "load_model", count_theirs),
    ):
        yield


def watch():
    """Do so for as long as this process lives."""
    WATCHES.enter_context(watching())


class Watch:
    """Where it is unpickled, `watch` runs: before what comes after it in the pickle."""

    def __reduce__(self):
        return watch, ()


def seen(watched=None, estimator=None):
    """Return what happened in this process, which package it runs, and the estimator."""
    return os.getpid(), dask_keras_serialize.__file__, dict(SEEN), estimator


# Seeds where they are used. scikeras's random_state seeds Python's and numpy's generators, and
# TensorFlow's, of the process: torch's, which shuffles and draws dropout that has no seed, it
# leaves alone, and a worker's event loop draws from Python's while a task fits (dask/sizeof.py)
SEEDED = {"random_state": 0, "fit__shuffle": False, "verbose": 0}


def dense(units, activation=None):
    weights = keras.initializers.GlorotUniform(seed=0)
    return keras.layers.Dense(units, activation, kernel_initializer=weights)


def build_classifier(meta, units):
    return keras.Sequential(
        [
            keras.Input((meta["n_features_in_"],)),
            dense(units, "relu"),
            keras.layers.Dropout(0.1, seed=0),
            dense(meta["n_classes_"], "softmax"),
        ]
    )


def build_regressor(units):
    return keras.Sequential([keras.Input((4,)), dense(units, "relu"), dense(1)])


class Classifier(KerasClassifier):
    """Says that it is one: scikeras's own does not since scikit-learn 1.6 (its wrappers.py)."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.estimator_type, tags.classifier_tags = "classifier", ClassifierTags()
        return tags


def classifier(cls=KerasClassifier):
    return cls(
        build_classifier,
        units=8,
        loss="sparse_categorical_crossentropy",
        optimizer="adam",
        optimizer__learning_rate=0.01,
        epochs=2,
        **SEEDED,
    )


def regressor():
    return KerasRegressor(build_regressor, units=8, loss="mse", optimizer="adam", **SEEDED)


class Embed(TransformerMixin, BaseEstimator):
    """A Keras model as a step in the middle, trained elsewhere."""

    def __init__(self, model):
        self.model = model

    def fit(self, x, y=None):
        return self

    def transform(self, x):
        return self.model.predict(x, verbose=0)

    def __sklearn_is_fitted__(self):
        return True


def scaled(cls=KerasClassifier):
    return Pipeline([("scale", StandardScaler()), ("net", classifier(cls))])


def embedded(model):
    """Keras in the middle."""
    last = LogisticRegression(max_iter=500)
    return Pipeline([("scale", StandardScaler()), ("embed", Embed(model)), ("last", last)])


@pytest.fixture(scope="module")
def client():
    with local_client() as client:
        client.run(watch)
        yield client


@pytest.fixture(params=["dask", "loky"], scope="module")
def elsewhere(request):
    """Return what calls a function that is to use other processes, two on any machine."""
    if request.param == "dask":
        request.getfixturevalue("client")

    def call(function):
        with (
            mock.patch.dict(os.environ, LOKY_MAX_CPU_COUNT="2"),
            joblib.parallel_config(request.param, n_jobs=-1),
        ):
            return function()

    # loky's pool is there before the first test, and so is nothing that one leaves behind; with
    # Keras in it: a process that has 300 MB more than after its first task is ended as one that
    # leaks (joblib/externals/loky/process_executor.py)
    call(lambda: joblib.Parallel()([joblib.delayed(keras.utils.set_random_seed)(0)] * 4))
    return call


@pytest.fixture(scope="module", autouse=True)
def watched():
    """Watch this process too, and end loky's."""
    with mock.patch.dict(SEEN), watching():
        yield
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture(scope="module")
def fitted():
    """A pipeline with a trained model at its end."""
    return scaled(Classifier).fit(*DIGITS)


@pytest.fixture(scope="module")
def trained(fitted):
    """The inner layers of that model, as a model."""
    model = fitted[-1].model_
    return keras.Sequential([keras.Input((64,)), *model.layers[:2]])


SEARCHES = {
    "regressor": lambda: GridSearchCV(regressor(), {"units": [4, 16]}, cv=FOLDS),
    "pipeline": lambda: GridSearchCV(scaled(), {"net__units": [4, 16]}, cv=FOLDS),
    "halving": lambda: HalvingGridSearchCV(
        regressor(), {"units": [4, 16]}, cv=FOLDS, factor=2, random_state=0
    ),
}


def data_of(name):
    return DIGITS if name == "pipeline" else DIABETES


@pytest.fixture(scope="module")
def expected():
    """What each search gives here, one fit after the other; made when it is asked for."""
    done = {}

    def search_here(name):
        if name not in done:
            done[name] = SEARCHES[name]().fit(*data_of(name))
        return done[name]

    return search_here


def assert_same_search(search, expected, x):
    assert search.best_params_ == expected.best_params_
    assert search.cv_results_.keys() == expected.cv_results_.keys()
    for key, column in expected.cv_results_.items():
        if not key.endswith("_time"):
            np.testing.assert_array_equal(search.cv_results_[key], column, key)
    np.testing.assert_array_equal(search.predict(x), expected.predict(x))


def assert_same_model(ours, theirs):
    """All that training goes on from, but for names, which Keras counts up in each process."""
    for each in ("variables", "optimizer.variables", "metrics_variables"):
        here, there = (attrgetter(each)(model) for model in (ours, theirs))
        assert list(map(zoo.to_bytes, here)) == list(map(zoo.to_bytes, there)), each
    assert theirs.optimizer.iterations > 0


@pytest.mark.parametrize("name", ["regressor", "pipeline"])
def test_search(elsewhere, name, expected):
    x, y = data_of(name)
    search = elsewhere(lambda: SEARCHES[name]().fit(x, y))
    assert_same_search(search, expected(name), x)
    scores = expected(name).cv_results_["mean_test_score"]
    assert len(set(scores)) > 1  # or any search would be right


def test_search_by_halves(client, expected):
    """On Dask's workers alone: it asks joblib for nothing that the others do not."""
    x, y = data_of("halving")
    with joblib.parallel_config("dask"):
        search = SEARCHES["halving"]().fit(x, y)
    assert search.n_resources_ == [64, 128]
    assert_same_search(search, expected("halving"), x)


def test_search_as_a_task(client, expected):
    """All of it on a worker, which gives the best estimator back, fitted."""
    x, y = DIGITS
    search = client.submit(SEARCHES["pipeline"]().fit, x, y).result()
    assert_same_search(search, expected("pipeline"), x)
    ours, theirs = (each.best_estimator_[-1] for each in (expected("pipeline"), search))
    assert_same_model(ours.model_, theirs.model_)
    assert theirs.history_ == ours.history_


def test_scores(elsewhere, expected):
    """Those of the search, whose folds and first candidate these are."""
    x, y = DIABETES
    search = expected("regressor")
    estimator = regressor().set_params(**search.cv_results_["params"][0])
    there = elsewhere(lambda: cross_val_score(estimator, x, y, cv=FOLDS))
    here = [search.cv_results_[f"split{fold}_test_score"][0] for fold in range(2)]
    np.testing.assert_array_equal(there, here)


def validate():
    return cross_validate(scaled(), *DIGITS, cv=FOLDS, return_estimator=True)


@pytest.fixture(scope="module")
def validated():
    return validate()


def test_fitted_models_come_back(elsewhere, validated):
    """Each fold's, as it was fitted there: weights, optimizer, history."""
    there = elsewhere(validate)
    np.testing.assert_array_equal(there["test_score"], validated["test_score"])
    for ours, theirs in zip(validated["estimator"], there["estimator"], strict=True):
        assert_same_model(ours[-1].model_, theirs[-1].model_)
        assert theirs[-1].history_ == ours[-1].history_
        np.testing.assert_array_equal(theirs.predict(DIGITS[0]), ours.predict(DIGITS[0]))


def both(elsewhere, function):
    """Return what a function gives here, and what it gives with the help of others."""
    return function(), elsewhere(function)


def test_keras_in_the_middle(elsewhere, trained):
    x, y = DIGITS
    search = GridSearchCV(embedded(trained), {"last__C": [1e-4, 1.0]}, cv=FOLDS)
    here, there = both(elsewhere, lambda: clone(search).fit(x, y))
    assert_same_search(there, here, x)
    assert len(set(here.cv_results_["mean_test_score"])) > 1
    assert there.best_estimator_["embed"].model is not trained


def test_a_frozen_estimator_votes(elsewhere, fitted):
    """Fitted before, beside another that is fitted there."""
    x, y = DIGITS
    members = [("frozen", FrozenEstimator(fitted)), ("logistic", LogisticRegression(max_iter=500))]
    here, there = both(elsewhere, lambda: VotingClassifier(members, voting="soft").fit(x, y))
    np.testing.assert_array_equal(there.predict_proba(x), here.predict_proba(x))
    ours, theirs = (each.estimators_[0].estimator[-1].model_ for each in (here, there))
    assert ours is not theirs
    assert_same_model(ours, theirs)


def test_importance_by_a_fitted_model(elsewhere, expected):
    x, y = (part[:32] for part in DIABETES)
    model = expected("regressor").best_estimator_
    here, there = both(
        elsewhere, lambda: permutation_importance(model, x, y, n_repeats=1, random_state=0)
    )
    np.testing.assert_array_equal(there.importances, here.importances)
    assert here.importances.any()


def test_models_go_by_our_encoder(elsewhere, fitted, trained):
    """Not by scikeras's, nor by Keras's, in either direction."""
    pipeline = embedded(trained).fit(*DIGITS)
    estimators = [fitted, pipeline, FrozenEstimator(fitted), pipeline]
    for estimator in estimators:
        stream = pickle.dumps(estimator)
        assert b"dask_keras_serialize" in stream
        assert b"_saving_utils" not in stream
        assert b"saving_lib" not in stream
    before = SEEN["ours"]
    results = elsewhere(lambda: Parallel()(delayed(seen)(Watch(), each) for each in estimators))
    assert SEEN["ours"] - before == len(estimators)
    assert "theirs" not in SEEN
    for pid, file, counts, _ in results:
        assert pid != os.getpid()
        assert file == dask_keras_serialize.__file__
        assert counts["ours"] > 0
        assert "theirs" not in counts


def test_no_worker_had_a_model_opened_by_keras(client, fitted):
    """Since the first of these tests that used it, all of which sent models or got them back."""
    client.submit(seen, None, fitted).result()
    counts = [counts for _, _, counts, _ in client.run(seen).values()]
    assert sum(each.get("ours", 0) for each in counts) > 0
    assert not any("theirs" in each for each in counts)
