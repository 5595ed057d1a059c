"""Dask's fine performance metrics, as a worker tells them of what it does."""

import pickle

import pytest
from distributed.metrics import context_meter

from dask_keras_serialize.cluster.meters import PACK, PLACE, REBUILD
from dask_keras_serialize.configs.by_config import variables_of
from tests import zoo
from tests.conftest import local_client


def metered(function, *args):
    """Return the sums, by label and unit, and what the function returned."""
    sums = {}

    def callback(label, value, unit):
        sums[label, unit] = sums.get((label, unit), 0) + value

    with context_meter.add_callback(callback):
        return sums, function(*args)


@pytest.mark.parametrize("name", ["trained", "subclassed"])
def test_packing_rebuilding_and_placing_are_told_apart(name):
    model = zoo.build(name)
    nbytes = sum(len(zoo.to_bytes(variable)) for variable in variables_of(model))
    sums, sent = metered(pickle.dumps, model, 5)
    assert set(sums) == {(PACK, "seconds"), (PACK, "bytes")}
    assert nbytes <= sums[PACK, "bytes"] <= len(sent)
    sums, far = metered(pickle.loads, sent)
    assert set(sums) == {
        (label, unit) for label in (REBUILD, PLACE) for unit in ("seconds", "bytes")
    }
    assert sums[PLACE, "bytes"] == nbytes <= sums[REBUILD, "bytes"]
    zoo.assert_same(model, far)


def digests(dask_worker):
    return dict(dask_worker.digests_total)


def same(model):
    return model


@pytest.mark.programs
@pytest.mark.cluster
def test_a_worker_tells_the_dashboard():
    model = zoo.build("trained")
    with local_client() as client:
        here, there = client.nthreads()
        value = client.scatter(model, workers=[here])
        client.submit(same, value, workers=[there], pure=False).result()
        # the last is told when its event loop gets to it
        told = client.run(digests)
        assert {
            ("get-data", PACK, "seconds"),
            ("get-data", PACK, "bytes"),
            ("get-data", "serialize", "seconds"),
        } <= told[here].keys()
        assert {
            ("gather-dep", REBUILD, "seconds"),
            ("gather-dep", REBUILD, "bytes"),
            ("gather-dep", PLACE, "seconds"),
            ("gather-dep", PLACE, "bytes"),
            ("gather-dep", "deserialize", "seconds"),
        } <= told[there].keys()
