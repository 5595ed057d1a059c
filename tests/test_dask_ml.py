"""dask-ml's searches and wrappers over Keras models, on processes; `make test-dask-ml` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from dask_ml import model_selection
from dask_ml.model_selection._incremental import _create_model, _partial_fit, _score
from dask_ml.wrappers import Incremental, ParallelPostFit
from distributed import Client
from sklearn.datasets import load_digits

from dask_keras_serialize.workflows.inference import predict
from dask_keras_serialize.workflows.searching import adaptive_search
from tests import searched
from tests.conftest import ROOT, Processes, local_client, start_cluster
from tests.searched import KINDS, TwoInputs, estimator, halves
from tests.test_readme import PROGRAMS

pytestmark = pytest.mark.cluster

CLASSES = {"classes": list(range(10))}
PARAMETERS = {"hidden": [16, 32, 64], "batch_size": [8, 16]}

X, Y = load_digits(return_X_y=True)
X, Y = (X / 16).astype("float32")[:900], Y[:900]

#: Each adaptive search, and how often it calls `partial_fit` for each of its candidates.
ADAPTIVE = {
    "Hyperband": (
        lambda model: model_selection.HyperbandSearchCV(
            model, PARAMETERS, max_iter=4, aggressiveness=4, random_state=0
        ),
        [1, 1, 1, 4, 4, 4],
    ),
    "SuccessiveHalving": (
        lambda model: model_selection.SuccessiveHalvingSearchCV(
            model, PARAMETERS, n_initial_parameters=4, n_initial_iter=1, aggressiveness=2,
            random_state=0,
        ),
        [1, 1, 2, 4],
    ),
    "Incremental": (
        lambda model: model_selection.IncrementalSearchCV(
            model, PARAMETERS, n_initial_parameters=2, max_iter=2, decay_rate=None, random_state=0
        ),
        [2, 2],
    ),
    "InverseDecay": (
        lambda model: model_selection.InverseDecaySearchCV(
            model, PARAMETERS, n_initial_parameters=6, decay_rate=0.5, max_iter=3, random_state=0
        ),
        [1, 1, 1, 1, 3, 3],
    ),
}  # fmt: skip


def arrays():
    return da.from_array(X, chunks=(225, 64)), da.from_array(Y, chunks=225)


def scores_of(search):
    return {(row["model_id"], row["partial_fit_calls"]): row["score"] for row in search.history_}


def calls_of(search):
    return sorted(rows[-1]["partial_fit_calls"] for rows in search.model_history_.values())


def accuracy(estimator):
    return float(np.mean(np.asarray(estimator.predict(X)) == Y))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and two workers, each a process that computes with one thread."""
    folder = tmp_path_factory.mktemp("dask-ml")
    running, bin_folder = Processes(folder), Path(sys.executable).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TF_NUM_INTRAOP_THREADS", "1")
        try:
            yield start_cluster(running, bin_folder, bin_folder, folder)
        finally:
            running.stop()


@pytest.fixture
def client(cluster):
    """A client, at whose end every move of a model on its workers was ours, and there were some."""
    with Client(cluster) as client:
        client.run(searched.count)
        yield client
        seen = client.run(searched.counted).values()
        assert all(each["keras"] == each["scikeras"] == 0 for each in seen), seen
        assert any(each["ours"] + each["our copies"] for each in seen), seen
        assert client.run_on_scheduler(searched.models_alive) == 0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_search(name, client):
    search_for, calls = ADAPTIVE[name]
    scores = {}
    for kind, wrapper in KINDS.items():
        search = search_for(estimator(kind))
        with adaptive_search():
            search.fit(*arrays(), **CLASSES)
        assert calls_of(search) == calls
        assert type(search.best_estimator_) is wrapper
        assert search.best_score_ == max(search.cv_results_["test_score"])
        # it was trained on all but the test set, of which it was not scored on all
        assert abs(accuracy(search) - search.best_score_) < 0.15
        assert accuracy(search.best_estimator_) == accuracy(search)
        scores[kind] = scores_of(search)
    assert scores["warm"] == scores["scikeras"]
    assert len(set(scores["warm"].values())) > 2


@pytest.mark.parametrize("name", ["Grid", "Randomized"])
def test_a_search_by_cross_validation(name, client):
    scores = {}
    for kind in KINDS:
        model = estimator(kind)
        some = {"hidden": [8, 32]}
        if name == "Grid":
            search = model_selection.GridSearchCV(model, some, cv=2)
        else:
            search = model_selection.RandomizedSearchCV(model, some, n_iter=2, cv=2, random_state=0)
        search.fit(X, Y)
        rows = search.cv_results_
        scores[kind] = dict(zip(rows["param_hidden"], rows["mean_test_score"], strict=True))
        assert search.best_params_ == {"hidden": 32}
        assert accuracy(search.best_estimator_) > 0.2
    assert scores["warm"] == scores["scikeras"]


def test_incremental(client):
    x, y = arrays()
    predicted = {}
    for kind in KINDS:
        model = Incremental(estimator(kind), random_state=0, shuffle_blocks=False)
        model.fit(x, y, **CLASSES)
        assert model.estimator_.current_epoch == x.npartitions
        predicted[kind] = np.asarray(model.predict(x))
        here = estimator(kind)
        for begin in range(0, len(X), 225):
            here.partial_fit(X[begin : begin + 225], Y[begin : begin + 225], **CLASSES)
        assert np.mean(here.predict(X) == predicted[kind]) > 0.99
        assert np.mean(predicted[kind] == Y) > 0.2
    np.testing.assert_array_equal(predicted["warm"], predicted["scikeras"])


def test_parallel_post_fit(client):
    x, _ = arrays()
    for kind in KINDS:
        model = ParallelPostFit(estimator(kind)).fit(X, Y)
        here = model.estimator.predict_proba(X)
        np.testing.assert_allclose(model.predict_proba(x).compute(), here, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(model.predict(x)), here.argmax(axis=1))
        ours = predict(model.estimator.model_, x)
        theirs = model.predict_proba(x)
        assert (ours.chunks, ours.dtype) == (theirs.chunks, theirs.dtype)
        np.testing.assert_array_equal(ours.compute(), theirs.compute())


def test_a_search_over_a_wrapper_of_ones_own(client):
    model = TwoInputs(halves, hidden=8, verbose=0, random_state=0, fit__shuffle=False)
    search = model_selection.SuccessiveHalvingSearchCV(
        model, PARAMETERS, n_initial_parameters=2, n_initial_iter=1, aggressiveness=2,
        random_state=0,
    )  # fmt: skip
    with adaptive_search():
        search.fit(*arrays(), **CLASSES)
    assert calls_of(search) == [1, 2]
    assert type(search.best_estimator_) is TwoInputs
    assert [each.name for each in search.best_estimator_.model_.inputs] == ["upper", "lower"]
    assert abs(accuracy(search) - search.best_score_) < 0.15


def test_upstream_still_needs_adaptive_search(client):
    """When this fails dask or dask-ml was mended (dask/dask-ml#1016): remove `searching.py`."""
    search = ADAPTIVE["Incremental"][0](estimator("warm"))
    with pytest.raises(RuntimeError, match="asynchronous Client in a synchronous context"):
        search.fit(*arrays(), **CLASSES)
    client.submit(estimator("warm").fit, X[:50], Y[:50]).result()  # a move, for the fixture


def test_two_threads_of_a_worker(monkeypatch):
    """A candidate is scored while it is copied and trained on, as dask-ml speculates."""
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    # scikeras's random_state takes it out of the environment, where it was not: KeyError in threads
    monkeypatch.setenv("TF_DETERMINISTIC_OPS", "1")
    search_for, calls = ADAPTIVE["Incremental"]
    expected = None
    with local_client(threads=2) as client, adaptive_search():
        for kind in KINDS:
            search = search_for(estimator(kind)).fit(*arrays(), **CLASSES)
            assert calls_of(search) == calls
            assert expected in (None, scores_of(search))
            expected = scores_of(search)
            assert abs(accuracy(search) - search.best_score_) < 0.15
        assert len(client.nthreads()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_while_training_goes_on_from_a_copy(kind):
    """What dask-ml's tasks of two threads do with one candidate, at the same instant."""
    batches = [(X[i : i + 90], Y[i : i + 90]) for i in range(0, 270, 90)]

    def run(at_once):
        candidate, history = _create_model(estimator(kind), 0, hidden=32), []
        candidate = _partial_fit(candidate, *batches[0], CLASSES)
        for batch in batches[1:]:
            results = {}
            together = threading.Barrier(2 if at_once else 1)

            def score(candidate=candidate, results=results, together=together):
                together.wait(60)
                results["score"] = _score(candidate, X, Y, None)["score"]

            def train(candidate=candidate, results=results, together=together, batch=batch):
                together.wait(60)
                results["trained"] = _partial_fit(candidate, *batch, CLASSES)

            threads = [threading.Thread(target=each) for each in (score, train)]
            for thread in threads:
                thread.start()
                if not at_once:
                    thread.join(120)
            for thread in threads:
                thread.join(120)
            history.append((results["score"], _score(candidate, X, Y, None)["score"]))
            candidate = results["trained"]
        return history

    expected = run(at_once=False)
    assert len(set(expected)) == len(expected)
    assert run(at_once=True) == expected


def test_the_readme_says_it_as_it_runs(tmp_path):
    """README's block on searches, as a program of a user's."""
    (program,) = [program for program in PROGRAMS if "adaptive_search" in program]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\{.*'hidden': \d+.*\} 0\.\d+", done.stdout), done.stdout
