"""Models change backend between processes, by value too: needs all backends, and KerasHub.

``make test-together`` installs them into one environment and runs this on each.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from distributed import Client

from dask_keras_serialize import backends
from tests import golden, zoo
from tests.conftest import ROOT, run_module, start_cluster

ELSEWHERE = [name for name in backends.NAMES if name != keras.backend.backend()]


def run(backend, what, folder):
    """Run tests.golden in a process of its own on a backend; return its last line."""
    printed = run_module("tests.golden", what, folder, KERAS_BACKEND=backend)
    return printed.strip().rpartition("\n")[2]


def run_each(what, folder):
    """Run tests.golden on each backend, two processes at a time; return their last lines."""
    with ThreadPoolExecutor(2) as threads:
        lines = threads.map(lambda backend: run(backend, what, folder), backends.NAMES)
        return dict(zip(backends.NAMES, lines, strict=True))


@pytest.fixture(scope="module")
def arrived(tmp_path_factory):
    """Write the models of every backend, and read them on every backend: what became of them."""
    folder = tmp_path_factory.mktemp("sent")
    run_each("write", folder)
    return run_each("check", folder)


@pytest.mark.parametrize("here", backends.NAMES)
def test_models_of_every_backend(here, arrived, capsys):
    found = json.loads(arrived[here])
    assert found.keys() == set(backends.NAMES)
    wrong = {}
    for backend, models in found.items():
        assert len(models) > 60
        differences = [each for each in models.values() if isinstance(each, float)]
        wrong |= {(backend, name): what for name, what in models.items() if isinstance(what, str)}
        with capsys.disabled():
            whole = f"{len(differences)} of {len(models)} models"
            print(f"\n{backend} -> {here}: {whole}, {max(differences, default=0):.1e}")
    assert not wrong, f"to {here}: {wrong}"


@pytest.fixture
def elsewhere(processes, tmp_path, monkeypatch):
    """A client of a cluster whose two workers run on the other backends."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bin_ = Path(sys.executable).parent
    environments = [{"KERAS_BACKEND": name} for name in ELSEWHERE]
    with Client(start_cluster(processes, bin_, bin_, tmp_path, environments)) as client:
        yield client


def train(model, x, y):
    model.fit(x, y, epochs=1, batch_size=8, shuffle=False, verbose=0)
    return keras.backend.backend(), model


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
def test_a_client_and_workers_on_three_backends(name, elsewhere):
    model = zoo.build(name)
    before = model.predict(zoo.X, verbose=0)
    steps = int(model.optimizer.iterations)
    for number, backend in enumerate(ELSEWHERE):
        (far,) = elsewhere.scatter([model], workers=[number], hash=False)
        predicted = elsewhere.submit(lambda m, x: m.predict(x, verbose=0), far, zoo.X).result(60)
        np.testing.assert_allclose(predicted, before, atol=golden.TOLERANCE)
        trained_on, trained = elsewhere.submit(
            train, far, zoo.X, zoo.TARGETS["sparse"], workers=[number], pure=False
        ).result(60)
        assert trained_on == backend
        assert int(trained.optimizer.iterations) > steps
        trained.fit(zoo.X, zoo.TARGETS["sparse"], verbose=0)
        assert not np.array_equal(trained.predict(zoo.X, verbose=0), before)
