"""Fails, naming the entry, when something private that we touch has moved upstream."""

import copy
import inspect
import sys
import threading
from contextlib import contextmanager
from importlib import import_module

import cloudpickle
import dask.utils
import distributed
import keras
import pytest
from distributed import protocol
from distributed.comm import tcp
from distributed.comm import utils as comm_utils
from distributed.protocol.cuda import cuda_loads
from distributed.protocol.serialize import dask_loads, families
from distributed.scheduler import Scheduler
from joblib import numpy_pickle
from keras.src.backend.common import global_state
from keras.src.models import functional as functional_module
from keras.src.models import model as model_module
from keras.src.random import seed_generator

from dask_keras_serialize import private, registration
from dask_keras_serialize.cluster import presence
from dask_keras_serialize.configs import defaults
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.protocol import encode
from dask_keras_serialize.values import by_value, shells
from tests import zoo
from tests.catalogue import CITIZENS
from tests.routes import make


@pytest.fixture(scope="module")
def model():
    return zoo.build("trained")


FOUND = {
    "Variable._initialize_with_initializer": lambda m: keras.Variable._initialize_with_initializer,
    "Variable._initialize": lambda m: keras.Variable._initialize,
    "Variable._shape": lambda m: vars(m.variables[0])["_shape"],
    "Functional.get_config": lambda m: (
        (
            functional_module.copy is copy
            and "return copy.deepcopy(config)" in inspect.getsource(functional_module.Functional)
        )
        or None
    ),
    "Variable._path": lambda m: m.variables[0]._path,
    "Layer._flatten_layers": lambda m: m._flatten_layers,
    "Layer._trainable_variables": lambda m: m.layers[0]._trainable_variables,
    "Layer._non_trainable_variables": lambda m: m.layers[0]._non_trainable_variables,
    "Layer._seed_generators": lambda m: m.layers[0]._seed_generators,
    "remat.get_current_remat_mode": lambda m: (
        import_module("keras.src.backend.common.remat").get_current_remat_mode(),
        1,
    ),
    "Layer.__new__": lambda m: shells._wrappers(),
    "Layer._losses": lambda m: (m._losses, m._losses_override, m._loss_ids),
    "Sequential._functional": lambda m: m._functional,
    "Function._outputs_struct": lambda m: zoo.functional()._outputs_struct,
    "Operation._inbound_nodes": lambda m: m.layers[0]._inbound_nodes[0],
    "Operation._outbound_nodes": lambda m: m.layers[0]._outbound_nodes[0],
    "KerasTensor._keras_history": lambda m: m.inputs[0]._keras_history.node_index,
    "KerasHistory": lambda m: isinstance(m.inputs[0]._keras_history, private.KerasHistory) or None,
    "Function._operations": lambda m: zoo.functional()._operations,
    "Function._run_through_graph": lambda m: private.Function._run_through_graph,
    "Function._nodes": lambda m: zoo.functional()._nodes,
    "Trainer._compile_config": lambda m: m._compile_config.config["optimizer"],
    "Trainer._compile_metrics": lambda m: m._compile_metrics,
    "Trainer._loss_tracker": lambda m: m._loss_tracker.total,
    "Trainer._compile_loss": lambda m: m._compile_loss.metrics,
    "CompileMetrics._flat_metrics": lambda m: m._compile_metrics._flat_metrics,
    "CompileMetrics._flat_weighted_metrics": lambda m: m._compile_metrics._flat_weighted_metrics,
    "Optimizer._trainable_variables": lambda m: m.optimizer._trainable_variables[0],
    "global_state.GLOBAL_STATE_TRACKER": lambda m: (
        isinstance(global_state.GLOBAL_STATE_TRACKER, threading.local) or None
    ),
    "global_state.get_global_attribute": lambda m: (
        global_state.get_global_attribute("dtype_policy") is keras.config.dtype_policy() or None
    ),
    "config.floatx": lambda m: (
        (
            keras.config.floatx.__code__.co_names == ("_FLOATX",)
            and defaults.can_hook(keras.config.floatx)
        )
        or None
    ),
    "Optimizer._learning_rate": lambda m: m.optimizer._learning_rate,
    "Optimizer._var_key": lambda m: m.optimizer._var_key(m.trainable_variables[0]),
    "Optimizer._trainable_variables_indices": lambda m: m.optimizer._trainable_variables_indices,
    "inject_functional_model_class": lambda m: model_module.inject_functional_model_class,
    "RandomInitializer._init_seed": lambda m: hasattr(m.layers[0].kernel_initializer, "_init_seed"),
    "Layer._path": lambda m: m.layers[0]._path,
    "global_state.object_name_uids": lambda m: global_state.get_global_attribute(
        "object_name_uids"
    )["dense"],
    "MultiOptimizer._var_to_optimizer_idx": lambda m: (
        make(CITIZENS["optimizers.MultiOptimizer"])._var_to_optimizer_idx
    ),
    "TFSMLayer._reloaded_obj": lambda m: make(CITIZENS["layers.TFSMLayer"])._reloaded_obj,
    "seed_generator.python_random": lambda m: seed_generator.python_random.randint,
    "IndexLookup.lookup_table": lambda m: keras.layers.StringLookup(vocabulary=["a"]).lookup_table,
    "KerasSaveable": lambda m: issubclass(keras.Layer, private.KerasSaveable) or None,
    "Node": lambda m: isinstance(m.layers[0]._inbound_nodes[0], private.Node) or None,
    "Tracker": lambda m: isinstance(m._tracker, private.Tracker) and m._tracker.stored_ids,
    "Function": lambda m: isinstance(zoo.functional(), private.Function) or None,
    "TrackedList": lambda m: isinstance(m.metrics_names, private.TRACKED[0]) or private.TRACKED,
    "CallbackList._executor": lambda m: (keras.callbacks.CallbackList()._executor, 1),
    "in_symbolic_scope": lambda m: (
        hasattr(sys.modules["keras.src.backend.common.symbolic_scope"], "in_symbolic_scope") or None
    ),
    "ALL_OBJECTS_DICT": lambda m: sys.modules["keras.src.losses"].ALL_OBJECTS_DICT["mse"],
    "DynamicBackend": lambda m: private.DynamicBackend()._backend,
}


def test_functions_are_found_without_a_registry_too(monkeypatch):
    asked = {"activations": "silu", "losses": "mean_squared_error"}
    found = {name: private.functions(registry)[name] for registry, name in asked.items()}
    for registry, name in asked.items():
        monkeypatch.delattr(sys.modules[f"keras.src.{registry}"], "ALL_OBJECTS_DICT")
        assert private.functions.__wrapped__(registry)[name] is found[name]
        assert "get" not in private.functions.__wrapped__(registry)


def test_every_entry_is_checked():
    assert FOUND.keys() == private.KERAS.keys()


IN_TENSORFLOW = {"TFSMLayer._reloaded_obj", "IndexLookup.lookup_table"}


#: The Keras that they came with.
SINCE = {"MultiOptimizer._var_to_optimizer_idx": (3, 15), "remat.get_current_remat_mode": (3, 9)}


def _version():
    return tuple(map(int, keras.version().split(".")[:2]))


@pytest.mark.parametrize("name", private.KERAS)
def test_keras(name, model):
    if _version() < SINCE.get(name, (3,)):
        pytest.skip("a newer Keras's")
    if name in IN_TENSORFLOW and keras.backend.backend() != "tensorflow":
        pytest.skip("a layer that Keras makes with TensorFlow alone")
    try:
        found = FOUND[name](model)
    except AttributeError as error:
        pytest.fail(f"{name} ({private.KERAS[name][0]}) has moved: {error}")
    assert found is not None, name


def test_nothing_is_missing():
    assert private.MISSING == []
    # an older Keras has no ordered one, and that is no gap: so it is asked for here
    since = [] if _version() < (3, 14) else ["TrackedOrderedDict"]
    found = {cls.__name__ for cls in private.TRACKED}
    assert found == {"TrackedList", "TrackedDict", "TrackedSet", *since}


def test_layers_are_found_without_flatten_layers(monkeypatch):
    model = zoo.build("nested")
    expected = {each.name for each in private.flatten_layers(model)}
    monkeypatch.delattr(keras.Layer, "_flatten_layers")
    # Sequential.layers leaves its input out
    assert len(expected - {each.name for each in private.flatten_layers(model)}) == 1


def test_what_has_moved_sends_by_value_or_says_so(monkeypatch):
    model = zoo.build("sequential")
    monkeypatch.delattr(keras.Layer, "_flatten_layers")
    monkeypatch.setattr(private, "own", lambda layer: layer.moved)
    assert encode(model)[0].encoding == "value"
    monkeypatch.setattr(by_value, "MISSING", ["keras.src.ops.node.Node"])
    with pytest.raises(EncodeError, match=r"model 'sequential.*Node is gone.*use an older one"):
        encode(model)


def test_keys_of_nodes_are_written_as_we_read_them():
    functional = zoo.functional()
    operation = functional._operations[0]
    assert f"{id(operation)}_ib-0" in functional._nodes


def test_dask_and_distributed():
    assert isinstance(dask.utils.Dispatch()._lookup, dict), "Dispatch._lookup"
    assert isinstance(dask.utils.Dispatch()._lazy, dict), "Dispatch._lazy"
    assert inspect.iscoroutinefunction(Scheduler.update_graph), "Scheduler.update_graph"
    assert "deserialize(expr_ser" in inspect.getsource(Scheduler.update_graph)
    assert presence.UNREADABLE_GRAPH in inspect.getsource(Scheduler.update_graph)
    assert "self.exception = exception" in inspect.getsource(
        distributed.client.FutureState.set_error.__wrapped__
    )
    assert "def _from_frames" in inspect.getsource(comm_utils.from_frames)
    for of_distributed in (distributed.Worker, Scheduler):
        assert hasattr(of_distributed, "_instances"), f"{of_distributed.__name__}._instances"
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


def test_joblib():
    with registration_undone():
        wrapper = numpy_pickle.NumpyArrayWrapper
        assert inspect.signature(wrapper).parameters["numpy_array_alignment_bytes"].default == 16
        assert wrapper.__init__.__defaults__[-1] == 16
    assert numpy_pickle.NumpyArrayWrapper(None, None, None, None).numpy_array_alignment_bytes == 64


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's")
def test_where_keras_puts_new_variables_on_torch():
    """``get_device`` of ``keras/src/backend/torch/core.py``; else Keras moves what we made."""
    from keras.src.backend.torch.core import get_device

    from dask_keras_serialize.backends import torch as adapter

    assert adapter.get_device is get_device
    with keras.device("meta"):
        assert adapter._device().type == "meta"
    assert adapter._device() is None


def test_families_of_serializers():
    assert "cuda" in families, "distributed/protocol/cuda.py"
    assert list(inspect.signature(families["cuda"][0]).parameters) == ["x"]
    assert 'loads(header["sub-header"], frames)' in inspect.getsource(cuda_loads)
    assert '"type-serialized"' in inspect.getsource(cuda_loads)


def test_collections():
    """distributed takes lists and dicts apart, and calls itself by its module's name."""
    source = inspect.getsource(protocol.serialize.__wrapped__)
    assert source.count(" serialize(") >= 3, "cluster.serialize_together"
    assert "iterate_collection" in inspect.signature(protocol.serialize).parameters


def test_cloudpickle():
    assert hasattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS")
