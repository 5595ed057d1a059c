"""Who says that they have the package, and what is made of others' errors."""

import asyncio
import pickle

import pytest
from distributed import Client, LocalCluster
from distributed.client import FutureState
from distributed.protocol import deserialize
from distributed.protocol.serialize import serialization_error_loads

from dask_keras_serialize.cluster import presence
from dask_keras_serialize.errors import BusyError, DecodeError, EncodeError, MissingPackageError
from dask_keras_serialize.wire.header import FORMAT, package_version
from tests import zoo

pytestmark = pytest.mark.once


def failed(error):
    state = FutureState("key")

    async def fail():
        state.set_error(error, None)

    asyncio.run(fail())
    return state.exception


def refusal(cause):
    try:
        raise RuntimeError(f"\n    {presence.UNREADABLE_GRAPH}. This\n    frequently\n") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("ours", [DecodeError("model 'm': why"), MissingPackageError("why")])
def test_what_a_scheduler_refuses_for_our_reasons_is_raised_as_ours(ours):
    found = failed(refusal(ours))
    assert (type(found), str(found)) == (type(ours), str(ours))
    assert isinstance(found.__cause__, RuntimeError)
    pickle.loads(pickle.dumps(found))


def test_a_scheduler_that_does_not_know_us_lacks_the_package():
    found = failed(refusal(ModuleNotFoundError("No module named 'dask_keras_serialize'")))
    assert type(found) is MissingPackageError
    assert "on the scheduler: pip install" in str(found)


def test_other_errors_are_left_alone():
    mine = RuntimeError("my own")
    mine.__cause__ = DecodeError("why")
    for error in (
        mine,
        ValueError("why"),
        refusal(ModuleNotFoundError("No module named 'torch'")),
        refusal(ImportError("cannot import name 'x' from 'dask_keras_serialize'")),
        refusal(None),
    ):
        assert failed(error) is error


def sent(text):
    frames = [b"Could not serialize object of type Functional", text.encode()]
    return deserialize({"serializer": "error"}, frames)


def test_what_another_process_cannot_send_is_one_line():
    trace = "Traceback (most recent call last):\n  File x\ndask_keras_serialize.errors."
    with pytest.raises(EncodeError, match=r"^model 'm': why$"):
        sent(f"{trace}EncodeError: not this\n\nThe above\n\n{trace}EncodeError: model 'm': why\n")
    with pytest.raises(BusyError, match=r"^another thread$"):
        sent(f"{trace}BusyError: another thread\n")
    with pytest.raises(EncodeError, match=r"^model 'm': new$"):
        sent(f"{trace}NewerError: model 'm': new\n")
    for name in ("KerasSerializeError", "DecodeError"):
        with pytest.raises(EncodeError, match=r"^Could not .* of type Functional: keras is old$"):
            sent(f"{trace}{name}: keras is old\n")
    with pytest.raises(TypeError, match="ValueError: mine") as info:
        sent("Traceback (most recent call last):\n  File x\nValueError: mine\n")
    assert type(info.value) is TypeError
    with pytest.raises(TypeError, match="Traceback"):  # as distributed has it
        serialization_error_loads({}, [b"Traceback"])


@pytest.mark.cluster
def test_a_scheduler_says_that_it_has_the_package_to_any_client():
    ours = {"version": package_version(), "workers": 1, "workers-without": {}}
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        assert client.scheduler_info()[FORMAT] == ours

        async def in_an_event_loop():
            async with Client(cluster.scheduler_address, asynchronous=True) as client:
                assert client.scheduler_info()[FORMAT] == ours
                return await client.submit(zoo.build("trained").count_params)

        assert asyncio.run(in_an_event_loop()) == zoo.build("trained").count_params()
        worker, *_ = cluster.scheduler.workers.values()
        worker.extra.pop(FORMAT)
        for send in (client.scatter, lambda model: client.submit(model.count_params)):
            with pytest.raises(MissingPackageError, match=f"1 of 1 workers .{worker.address}."):
                send(zoo.build("trained"))


@pytest.mark.cluster
def test_workers_that_are_sent_nothing_may_lack_the_package():
    model = zoo.build("trained")
    count = model.count_params()
    with (
        LocalCluster(n_workers=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        lacks, has = cluster.scheduler.workers.values()
        lacks.extra.pop(FORMAT)
        for workers in ([has.address], has.address, has.name, {has.name}):
            future = client.scatter(model, workers=workers, hash=False)
            assert list(client.who_has(future)[future.key]) == [has.address]
            submitted = client.submit(model.count_params, workers=workers, pure=False)
            assert submitted.result(timeout=30) == count
        every = [lacks.address, has.address]
        for named in ({}, {"workers": lacks.name}, {"workers": every}):
            with pytest.raises(MissingPackageError, match=f"1 of 2 workers .{lacks.address}."):
                client.submit(model.count_params, **named)
            with pytest.raises(MissingPackageError, match="is not installed on 1 of 2"):
                client.scatter(model, **named)
        with pytest.raises(MissingPackageError, match="is not installed on 1 of 2"):
            client.submit(model.count_params, workers=has.address, allow_other_workers=True)
