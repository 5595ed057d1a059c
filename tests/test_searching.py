"""The setting with which dask-ml's adaptive searches run, without dask-ml."""

from __future__ import annotations

import asyncio
import pickle
import threading

import dask
import dask.array as da
import pytest
from dask import delayed
from distributed import Client, LocalCluster, futures_of

from dask_keras_serialize.workflows.searching import adaptive_search

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        yield client


def setting():
    return dask.config.get("scheduler", None)


async def search():
    """Do what dask-ml does: persist in the event loop of the client."""
    (kept,) = dask.persist(delayed(sum)([1, 2]))
    return await futures_of(kept)[0]


def refused(client):
    with pytest.raises(RuntimeError, match="asynchronous Client in a synchronous context"):
        client.sync(search)


def test_a_search_runs_within_it_alone(client):
    before = setting()
    refused(client)
    with adaptive_search():
        assert client.sync(search) == 3
        with adaptive_search():
            assert client.sync(search) == 3
        assert client.sync(search) == 3
    assert setting() == before
    refused(client)


def test_what_else_is_computed_meanwhile_is_as_ever(client):
    x = da.arange(10, chunks=5)
    with adaptive_search():
        assert x.sum().compute() == 45
        assert client.who_has(futures_of(x.persist()))
        assert delayed(sum)([1, 2]).compute(scheduler="threads") == 3
        assert client.submit(lambda: da.arange(4, chunks=2).sum().compute()).result() == 6


def test_it_ends_when_the_search_raises(client):
    before = setting()
    with pytest.raises(ZeroDivisionError), adaptive_search():
        _ = 1 / 0
    assert setting() == before


def test_blocks_of_two_threads_that_overlap(client):
    before = setting()
    entered, leave = threading.Event(), threading.Event()

    def other():
        with adaptive_search():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with adaptive_search():
        thread.start()
        assert entered.wait(60)
    assert client.sync(search) == 3  # the other's block goes on
    leave.set()
    thread.join(60)
    assert setting() == before
    refused(client)


def test_within_another_setting_of_the_scheduler(client):
    with dask.config.set(scheduler="threads"), adaptive_search():
        assert client.sync(search) == 3
        with dask.config.set(scheduler="threads"), adaptive_search():
            assert client.sync(search) == 3
        assert client.sync(search) == 3
    with dask.config.set(scheduler="threads"):
        with adaptive_search():
            pass
        assert setting() == "threads"


def test_a_client_that_is_closed_within_it(cluster):
    before = setting()
    client = Client(cluster)
    with adaptive_search():
        client.close()
    assert setting() == before
    assert delayed(sum)([1, 2]).compute(scheduler="sync") == 3


def test_without_a_client():
    with pytest.raises(RuntimeError, match=r"^there is no Dask client, .*Client\(\)$"):
        adaptive_search().__enter__()
    assert setting() is None


def test_an_asynchronous_client():
    async def main():
        async with Client(processes=False, n_workers=1, asynchronous=True, dashboard_address=":0"):
            with pytest.raises(RuntimeError, match="asynchronous Client"):
                await search()
            with adaptive_search():
                assert await asyncio.gather(search(), search()) == [3, 3]
                with pytest.raises(RuntimeError, match="cannot wait"):
                    delayed(sum)([1, 2]).compute()

    asyncio.run(main())


@pytest.mark.once
def test_workers_that_join_are_told_nothing_of_it():
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        adaptive_search(),
    ):
        assert pickle.loads(pickle.dumps(setting())) is None
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        assert client.sync(search) == 3
        there = client.run(lambda: (dask.config.get("scheduler", None), da.ones(3).sum().compute()))
        assert set(there.values()) == {(None, 3.0)}, there
