"""TensorFlow's adapter: what it views, what it adopts, what it must never write to."""

import asyncio
import copy
import gc
import json
import pickle
import re
import subprocess
import sys

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from distributed.comm import tcp
from keras import layers
from tensorflow.python.ops import gen_resource_variable_ops

from dask_keras_serialize.backends import tensorflow as backend
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.errors import EncodeError
from tests import zoo
from tests.test_backends import at, over_tcp
from tests.test_hard_objects import WAYS, X
from tests.zoo import to_bytes


def address(variable):
    return backend.view(variable).ctypes.data


@pytest.mark.parametrize("jit", [False, True])
def test_training_never_writes_to_what_was_adopted(jit):
    """Not even where several variables adopted the same memory."""
    arrays = [at(0, count=64 * 64).reshape(64, 64), at(0, count=64)]
    before = [array.tobytes() for array in arrays]

    def build():
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
        for variable, array in zip(model.variables, arrays, strict=True):
            variable._value = None
            variable._initialize(backend.tensor(array))
            assert address(variable) == array.ctypes.data
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=jit)
        return model

    trained, idle = build(), build()
    trained.fit(np.ones((32, 64)), np.ones((32, 64)), epochs=2, verbose=0)
    for model in (trained, build()):
        kernel = model.variables[0].value
        kernel.assign_add(tf.ones_like(kernel))
        kernel.scatter_nd_update([[0]], tf.ones((1, 64)))
        kernel[0].assign(tf.zeros(64))
        kernel.scatter_update(tf.IndexedSlices(tf.ones((1, 64)), [1]))
        assert kernel.numpy().tobytes() != before[0]
    assert [array.tobytes() for array in arrays] == before
    assert [v.numpy().tobytes() for v in idle.variables] == before


def test_the_memory_lives_as_long_as_the_variable():
    array = at(0, count=10**6)
    expected = array.copy()
    variable = tf.Variable(backend.tensor(array))
    del array
    garbage = [np.full(10**6, 7, "float32") for _ in range(8)]
    assert np.array_equal(variable.numpy(), expected)
    assert garbage


def test_without_aligned_buffers_they_are_copied(monkeypatch):
    """A distributed whose buffers are its own: other alignment, the same model."""

    def misaligned(n):
        return np.empty(n + 16, np.uint8)[16:].data

    monkeypatch.setattr(tcp, "host_array", misaligned)
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)])
    replica = asyncio.run(over_tcp(model))
    for ours, theirs in zip(model.variables, replica.variables, strict=True):
        assert np.array_equal(ours, theirs)


WRITES = {
    "assign": lambda w: w.assign(w * 2 + 1),
    "assign_add": lambda w: w.assign_add(tf.ones_like(w)),
    "assign_sub": lambda w: w.assign_sub(tf.ones_like(w)),
    "slice": lambda w: w[0].assign(w[0] + 5),
    "scatter_nd": lambda w: w.scatter_nd_update([[0, 0]], tf.cast([99.0], w.dtype)),
    "scatter": lambda w: w.scatter_add(tf.IndexedSlices(tf.ones_like(w[:1]), [3])),
    "xla": lambda w: tf.function(lambda: w.assign_add(tf.ones_like(w)), jit_compile=True)(),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("first", [True, False], ids=["the model", "its copy"])
def test_a_deepcopy_shares_memory_until_one_of_the_two_is_written_to(dtype, write, first):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1024, dtype=dtype)])
    before = to_bytes(model.layers[0].kernel)
    twin = copy.deepcopy(model)
    kernels = [each.layers[0].kernel for each in (model, twin)]
    assert address(kernels[0]) == address(kernels[1])
    written, other = kernels if first else kernels[::-1]
    for _ in range(2):
        WRITES[write](written.value)
        assert to_bytes(written) != before
        assert to_bytes(other) == before
    del model, twin, written
    assert to_bytes(other) == before


@pytest.fixture(params=WAYS)
def send(request):
    return WAYS[request.param]


def test_lookups_half_way(send):
    layer = layers.StringLookup()
    layer.update_state(tf.constant(["a", "b", "a"]))
    replica = send(layer)
    for each in (layer, replica):
        each.update_state(tf.constant(["b", "b"]))
        each.finalize_state()
    assert replica.get_vocabulary() == layer.get_vocabulary() == ["[UNK]", "b", "a"]


def test_lookups_in_another_encoding(send):
    layer = layers.StringLookup(vocabulary=["é"], encoding="latin-1", invert=True)
    for twin in (send(layer), send(keras.Sequential([layer])).layers[0]):
        assert twin(tf.constant([1])).numpy().tolist() == layer(tf.constant([1])).numpy().tolist()


def test_a_traced_function_is_traced_again(send):
    model = zoo.Subclassed((4,))
    model.fast = tf.function(model.call, reduce_retracing=True)
    expected = model.fast(X)
    replica = send(model)
    np.testing.assert_array_equal(replica.fast(X), expected)
    replica.out.bias.assign(replica.out.bias + 1)
    assert not np.array_equal(replica.fast(X), expected)


class Lookup(layers.StringLookup):
    def __init__(self, words):
        super().__init__(vocabulary=words.split())


def test_a_lookup_made_of_other_arguments(send):
    assert send(Lookup("a b")).get_vocabulary() == ["[UNK]", "a", "b"]


@pytest.mark.parametrize("on", [lambda: zoo.Subclassed((4,)), keras.optimizers.Adam])
def test_a_dataset_is_refused_by_name(on):
    obj = on()
    obj.thing = tf.data.Dataset.range(3)
    with pytest.raises(EncodeError, match="attribute thing"):
        pickle.dumps(obj)


def test_to_ask_whether_devices_were_started_starts_none():
    script = """
import keras
from tensorflow.python.eager import context
from dask_keras_serialize.devices import Limits, tensorflow
assert not tensorflow.started()
tensorflow.tf.config.threading.set_intra_op_parallelism_threads(1)
assert context._context is None or context._context._physical_devices is None
assert not tensorflow.started()
tensorflow.settle(Limits(threads=1))
assert tensorflow.started()  # which devices there are is known; limits can still be set
tensorflow.settle(Limits(threads=2, growth=True))
keras.ops.ones(3)
try:
    tensorflow.settle(Limits(threads=3))
except RuntimeError as error:
    print(type(error).__name__)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "StartedError", run.stderr


@pytest.mark.parametrize("by_value", [False, True])
def test_variables_are_made_with_one_name_and_told_their_own(by_value, monkeypatch):
    model = zoo.build("trained")
    if by_value:
        model.note = 1
    header, frames = serialize_keras(model)
    assert header["encoding"] == ("value" if by_value else "config")
    made = gen_resource_variable_ops.var_handle_op
    names = []

    def spy(*args, debug_name, **kwargs):
        names.append(debug_name)
        return made(*args, debug_name=debug_name, **kwargs)

    monkeypatch.setattr(gen_resource_variable_ops, "var_handle_op", spy)
    replica = deserialize_keras(header, frames)
    twin = copy.deepcopy(replica)
    assert len(names) >= 2 * len(header["variables"])
    assert len({*names}) == 1
    for each in (model, replica, twin):  # the first as Keras names them
        variables = each.variables + each.optimizer.variables
        assert [v.value.name for v in variables] == [f"{v.path}:0" for v in variables]


def test_tensorflow_keeps_nothing_of_new_names():
    """Of each that it has not had yet it would keep 36 KB; of thousands of models, gigabytes."""
    header, frames = serialize_keras(zoo.build("trained"))
    count = len(header["variables"])

    def rebuild_renamed(number):
        def renamed(text, pattern):
            return re.sub(pattern, rf"\1x{number}\2", text)

        config = json.loads(header["body"]["config"])
        names = r'("dense|"batch_normalization)((?:_\d+)?")'
        config["model"] = json.loads(renamed(json.dumps(config["model"]), names))
        body = header["body"] | {"config": json.dumps(config)}
        paths = r"(dense|batch_normalization)(_|\b)"
        rows = [(renamed(row[0], paths), *row[1:]) for row in header["variables"]]
        replica = deserialize_keras(header | {"body": body, "variables": rows}, frames)
        assert f"densex{number}" in replica.variables[0].path

    for number in range(20):
        rebuild_renamed(number)
    before = resident()
    for number in range(20, 120):
        rebuild_renamed(number)
    assert resident() - before < 100 * count * 36_000 / 5


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_names_are_those_that_tensorflow_gives():
    """Of variables without one too, and of those on several devices."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])

    def names():
        lone = [tf.Variable(1.0).name, tf.Variable(1.0, name="n").name]
        with strategy.scope():
            dense = keras.layers.Dense(2, name="dense")
            dense.build((None, 3))
        return [*lone, *(each.value.name for each in dense.variables)]

    expected = names()
    with backend.creating():
        assert names() == expected
