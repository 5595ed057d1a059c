"""Clusters whose processes differ in the version of this package, or have none, or an older Keras.

What can work does; else it is one line that names both sides. Nothing waits for ever.
"""

import asyncio
import re
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import dask
import keras
import numpy as np
import pytest
from distributed import Client, futures_of

from dask_keras_serialize import DecodeError, EncodeError, MissingPackageError
from dask_keras_serialize.wire.header import FORMAT, package_version
from tests import zoo
from tests.conftest import ROOT, shipped, start_cluster, travelling_by_value
from tests.test_cluster import environment_without_us, make_model, predict

pytestmark = [pytest.mark.programs, pytest.mark.timeout(240)]

HERE = Path(sys.executable).parent
CHUNKS = [zoo.X[:8], zoo.X[8:16]]
WAIT = 60


@pytest.fixture(autouse=True)
def code_travels_by_value():
    with travelling_by_value(sys.modules[__name__], zoo):
        yield


@shipped
def versions():
    from dask_keras_serialize.wire.header import FORMAT_VERSION, package_version

    return package_version(), FORMAT_VERSION


@pytest.fixture(scope="session")
def other_version(tmp_path_factory):
    """A folder for PYTHONPATH with this package as version 0.99.0, of wire format 2."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "dask_keras_serialize", folder / "dask_keras_serialize")
    header = folder / "dask_keras_serialize" / "wire" / "header.py"
    text = header.read_text()
    assert text.count("\nFORMAT_VERSION = 1\n") == 1
    header.write_text(text.replace("\nFORMAT_VERSION = 1\n", "\nFORMAT_VERSION = 2\n"))
    info = folder / "dask_keras_serialize-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {FORMAT}\nVersion: 0.99.0\n")
    entry_points = distribution(FORMAT).read_text("entry_points.txt")
    assert entry_points
    (info / "entry_points.txt").write_text(entry_points)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def without_us(tmp_path_factory):
    return environment_without_us(tmp_path_factory.mktemp("without"))


@pytest.fixture
def start(processes, tmp_path):
    """Start a scheduler and a worker, each out of an environment, with variables; the address."""

    def start(*, scheduler=HERE, scheduler_env=None, worker=HERE, worker_env=None):
        environments = [worker_env or {}]
        return start_cluster(processes, scheduler, worker, tmp_path, environments, scheduler_env)

    return start


def ways(client, model):
    """All routes of a model to a worker and of its predictions back."""
    return {
        "scatter": lambda: client.submit(predict, CHUNKS[0], client.scatter(model)),
        "submit": lambda: client.submit(predict, CHUNKS[0], model),
        "method": lambda: client.submit(model.predict, CHUNKS[0], batch_size=8, verbose=0),
        "map": lambda: client.map(predict, CHUNKS, model=model)[0],
        "map of a method": lambda: client.map(model.predict, CHUNKS, batch_size=8, verbose=0)[0],
        "compute": lambda: client.compute(dask.delayed(predict)(CHUNKS[0], model)),
        "persist": lambda: futures_of(client.persist(dask.delayed(predict)(CHUNKS[0], model)))[0],
        "delayed": lambda: Now(dask.delayed(predict)(CHUNKS[0], model).compute()),
    }


class Now:
    """What is computed already, as a future."""

    def __init__(self, value):
        self.value = value

    def result(self, timeout):
        return self.value


GRAPHS = {"submit", "method", "map", "map of a method", "compute", "persist", "delayed"}


def refused(attempt, kind, *words):
    with pytest.raises(kind) as caught:
        attempt().result(timeout=WAIT)
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said
    return said


def refused_in_an_event_loop(address, model, message):
    async def refuse():
        async with Client(address, asynchronous=True) as client:
            for way in ("submit", "method", "map", "compute"):
                with pytest.raises(MissingPackageError, match=message):
                    await asyncio.wait_for(ways(client, model)[way](), WAIT)

    asyncio.run(refuse())


@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
def test_a_scheduler_of_another_version_passes_models_on(start, other_version, name):
    address = start(scheduler_env=other_version)
    model = zoo.build(name)
    expected = predict(CHUNKS[0], model)
    with Client(address) as client:
        assert client.run_on_scheduler(versions) == ("0.99.0", 2)
        for way, attempt in ways(client, model).items():
            np.testing.assert_array_equal(attempt().result(timeout=WAIT), expected, err_msg=way)
        assert client.submit(make_model, pure=False).result(timeout=WAIT).built
        assert "keras" not in client.run_on_scheduler(lambda: list(__import__("sys").modules))


def test_a_worker_of_another_version_names_both(start, other_version):
    address = start(worker_env=other_version)
    model = zoo.build("trained")
    both = "wire format 1", f"{FORMAT} {package_version()}", f"{FORMAT} 0.99.0 here", "install"
    back = "wire format 2", f"{FORMAT} 0.99.0", f"{FORMAT} {package_version()} here", "install"
    with Client(address) as client:
        for attempt in ways(client, model).values():
            refused(attempt, DecodeError, "model 'sequential", *both)
        refused(lambda: client.submit(make_model, pure=False), DecodeError, "model 'seq", *back)
        assert client.submit(sum, [1, 2]).result(timeout=WAIT) == 3
        assert len(client.nthreads()) == 1


def test_a_client_of_another_version_names_both(start, other_version):
    """Scheduler and worker are of one, and so is what they are sent of the other."""
    address = start(scheduler_env=other_version, worker_env=other_version)
    model = zoo.build("trained subclassed")
    both = "wire format 1", f"{FORMAT} {package_version()}", f"{FORMAT} 0.99.0 here", "install"
    with Client(address) as client:
        for attempt in ways(client, model).values():
            refused(attempt, DecodeError, "model 'subclassed", *both)
        assert client.submit(sum, [1, 2]).result(timeout=WAIT) == 3


def test_a_scheduler_without_the_package_is_named(start, without_us):
    address = start(scheduler=without_us)
    model = zoo.build("trained")
    expected = predict(CHUNKS[0], model)
    with Client(address) as client:
        routes = ways(client, model)
        for way in GRAPHS:
            refused(routes[way], MissingPackageError, "on the scheduler", "pip install")
        # values it does not open
        np.testing.assert_array_equal(routes["scatter"]().result(timeout=WAIT), expected)
        assert client.submit(make_model, pure=False).result(timeout=WAIT).built
    refused_in_an_event_loop(address, model, "on the scheduler")


def test_a_worker_without_the_package_is_named(start, without_us):
    address = start(worker=without_us)
    model = zoo.build("trained")
    with Client(address) as client:
        for attempt in ways(client, model).values():
            refused(attempt, MissingPackageError, "1 of 1 workers", "tcp://", "pip install")
        refused(lambda: client.submit(make_model, pure=False), MissingPackageError, "pip install")
        assert client.submit(sum, [1, 2]).result(timeout=WAIT) == 3
    refused_in_an_event_loop(address, model, "1 of 1 workers")


#: Has Keras say that it is an older one, as it is imported.
OLDER = """
import wrapt

def older(keras):
    keras.version = lambda: "3.10.0"

wrapt.register_post_import_hook(older, "keras")
"""


def test_a_worker_with_a_keras_too_old_is_named_in_both_directions(start, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OLDER)
    address = start(worker_env={"PYTHONPATH": str(tmp_path / "site")})
    model = zoo.build("trained")
    old = "keras 3.10.0 is older than 3.11"
    with Client(address) as client:
        said = refused(lambda: client.submit(make_model, pure=False), EncodeError, old, "upgrade")
        assert "Sequential" in said
        assert len(said) < 300
        sent = f"keras {keras.version()}", f"{FORMAT} {package_version()}", "this is python"
        for attempt in ways(client, model).values():
            refused(attempt, DecodeError, "model 'sequential", old, *sent)
        assert client.submit(sum, [1, 2]).result(timeout=WAIT) == 3


def test_a_worker_that_cannot_send_says_why_in_one_line(start):
    @shipped
    def with_a_lock():
        import threading

        import keras

        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)], name="locked")
        model.lock = threading.Lock()
        return model

    with Client(start()) as client:
        said = refused(lambda: client.submit(with_a_lock), EncodeError, "attribute lock, a lock")
        assert said.startswith("model 'locked'")
        listed = client.submit(lambda make: [make()], with_a_lock)
        refused(lambda: listed, EncodeError, "model 'locked'", "attribute lock, a lock")


# pandas is not there either
@pytest.mark.filterwarnings("ignore:Mismatched versions")
def test_a_worker_without_keras_names_both(start, core_bin):
    address = start(scheduler=core_bin, worker=core_bin)
    with Client(address) as client:
        for attempt in ways(client, zoo.build("trained")).values():
            said = refused(
                attempt, DecodeError, "No module named 'keras'", f"keras {keras.version()}", "pip"
            )
            assert re.search(r"sent by python 3\S+ keras .*, this is python 3\S+ no keras", said)
        assert client.submit(sum, [1, 2]).result(timeout=WAIT) == 3
