"""This environment's versions and another's, in files and in one cluster.

``make test-versions`` installs the oldest versions that ``setup.cfg`` allows, and the newest there
are, and runs the whole suite in each, with the other's Python in ``OTHER_PYTHON``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from distributed import Client

from dask_keras_serialize.errors import DecodeError
from tests import golden, zoo
from tests.conftest import ROOT, run_module, start_cluster

OTHER = Path(os.environ["OTHER_PYTHON"]).absolute()

HERE = {"python": sys.version.split()[0], "keras": keras.version()}


@pytest.fixture(scope="session")
def there():
    """Versions in the other environment."""
    code = (
        "import json, keras, sys;"
        "print(json.dumps({'python': sys.version.split()[0], 'keras': keras.version()}))"
    )
    ran = subprocess.run([OTHER, "-W", "ignore", "-c", code], capture_output=True, timeout=120)
    return json.loads(ran.stdout.splitlines()[-1])


def names_both(error, there):
    """Say whether an error names what differs, on both sides, in one line."""
    sides = [all(f"{what} {side[what]}" in error for side in (HERE, there)) for what in HERE]
    return any(sides) and "\n" not in error and "\\n" not in error


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What became here of every model that the other environment wrote."""
    folder = tmp_path_factory.mktemp("written there")
    run_module("tests.golden", "write-all", folder, python=OTHER)
    (models,) = golden.check_models(folder).values()
    return models


def test_models_by_config_arrive(found, there, capsys):
    by_config = {name: what for name, what in found.items() if name in zoo.BY_CONFIG}
    assert len(by_config) > 20
    arrived = {name: what for name, what in by_config.items() if isinstance(what, float)}
    with capsys.disabled():
        print(f"\nkeras {there['keras']} -> {HERE['keras']}: {len(arrived)} of {len(by_config)}")
    refused = {name: by_config[name] for name in by_config.keys() - arrived.keys()}
    assert not refused


def test_models_by_value_are_refused_and_both_sides_are_named(found, there):
    by_value = {name: what for name, what in found.items() if name in zoo.BY_VALUE}
    assert len(by_value) > 20
    for name, what in by_value.items():
        assert isinstance(what, str), f"{name} went between {HERE} and {there}"
        assert what.startswith("DecodeError"), what
        assert names_both(what, there), what


def train(model):
    model.fit(zoo.X, zoo.TARGETS["sparse"], epochs=1, batch_size=8, shuffle=False, verbose=0)
    return keras.version(), model


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::distributed.versions.VersionMismatchWarning")
def test_a_client_and_a_worker(there, processes, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    bin_ = Path(sys.executable).parent
    with Client(start_cluster(processes, bin_, OTHER.parent, tmp_path, ({},))) as client:
        model = zoo.build("trained")
        before = model.predict(zoo.X, verbose=0)
        far = client.scatter(model, hash=False)
        predicted = client.submit(keras.Model.predict, far, zoo.X, verbose=0).result(60)
        np.testing.assert_allclose(predicted, before, atol=golden.TOLERANCE)
        version, trained = client.submit(train, far, pure=False).result(60)
        assert version == there["keras"]
        assert int(trained.optimizer.iterations) > int(model.optimizer.iterations)
        trained.fit(zoo.X, zoo.TARGETS["sparse"], verbose=0)
        far = client.scatter(zoo.build("trained subclassed"), hash=False)
        with pytest.raises(DecodeError) as refused:
            client.submit(train, far).result(60)
        assert names_both(str(refused.value), there), refused.value
