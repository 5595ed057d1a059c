"""Fails, naming the entry, when something private that we touch has moved upstream."""

import inspect
from contextlib import contextmanager

import cloudpickle
import dask.utils
import distributed
import keras
import pytest
from distributed import protocol
from distributed.comm import tcp
from distributed.comm import utils as comm_utils
from distributed.protocol.serialize import dask_loads, families
from distributed.scheduler import Scheduler

from dask_keras_serialize import private, registration
from tests import zoo


@pytest.fixture(scope="module")
def model():
    return zoo.build("trained")


FOUND = {
    "Variable._initialize_with_initializer": lambda m: keras.Variable._initialize_with_initializer,
    "Variable._initialize": lambda m: keras.Variable._initialize,
    "Layer._flatten_layers": lambda m: m._flatten_layers,
    "Layer._trainable_variables": lambda m: m.layers[0]._trainable_variables,
    "Trainer._compile_config": lambda m: m._compile_config.config["optimizer"],
    "Trainer._compile_metrics": lambda m: m._compile_metrics._flat_metrics,
    "Trainer._compile_loss": lambda m: m._compile_loss.metrics,
    "Function._outputs_struct": lambda m: zoo.functional()._outputs_struct,
    "seed_generator.python_random": lambda m: private.seed_generator.python_random.randint,
    "KerasSaveable": lambda m: issubclass(keras.Layer, private.KerasSaveable) or None,
    "Node": lambda m: m.layers[0]._inbound_nodes[0].operation,
    "Tracker": lambda m: m._tracker.stored_ids,
    "Optimizer._var_key": lambda m: m.optimizer._var_key(m.trainable_variables[0]),
    "Function._nodes": lambda m: zoo.functional()._nodes,
}


def test_every_entry_is_checked():
    assert FOUND.keys() == private.KERAS.keys()


@pytest.mark.parametrize("name", private.KERAS)
def test_keras(name, model):
    try:
        found = FOUND[name](model)
    except AttributeError as error:
        pytest.fail(f"{name} ({private.KERAS[name][0]}) has moved: {error}")
    assert found is not None, name


def test_keys_of_nodes_are_written_as_we_read_them():
    functional = zoo.functional()
    operation = functional._operations[0]
    assert f"{id(operation)}_ib-0" in functional._nodes


def test_dask_and_distributed():
    assert isinstance(dask.utils.Dispatch()._lookup, dict), "Dispatch._lookup"
    assert isinstance(dask.utils.Dispatch()._lazy, dict), "Dispatch._lazy"
    assert inspect.iscoroutinefunction(Scheduler.update_graph), "Scheduler.update_graph"
    assert "deserialize(expr_ser" in inspect.getsource(Scheduler.update_graph)
    assert "def _from_frames" in inspect.getsource(comm_utils.from_frames)
    assert hasattr(distributed.Worker, "_instances"), "Worker._instances"
    assert {"dask", "error"} <= families.keys()
    assert 'loads(header["sub-header"], frames)' in inspect.getsource(dask_loads)
    with registration_undone():
        for module in (tcp, protocol.utils):
            buffer = module.host_array(1000)
            assert (type(buffer), buffer.nbytes, buffer.format) == (memoryview, 1000, "B")
            assert not buffer.readonly
    assert "host_array(n)" in inspect.getsource(tcp.read_bytes_rw)
    assert "out = host_array(" in inspect.getsource(protocol.utils.host_array_from_buffers)
    source = inspect.getsource(distributed.client._MapExpr._layer)
    assert "DataNode(k, v)" in source, "Client.map may no longer need our wrapper: cluster.py"


@contextmanager
def registration_undone():
    registration.unregister()
    try:
        yield
    finally:
        registration.register()


def test_cloudpickle():
    assert hasattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS")
