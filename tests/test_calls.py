"""What a config calls its layers on: tensors and plain data, in an order that Keras can follow."""

import inspect
import json

import keras
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import layerwise
from dask_keras_serialize.limits import budget, calls, nests, symbols
from tests import hostile, zoo
from tests.test_vetting import at, call, kinds_of, layer, refused, tensor, with_more_layers

RAN = []


@keras.saving.register_keras_serializable(package="called")
def registered(x):
    RAN.append("called")
    return x


def operation(name, module="keras.src.ops.core", /, **config):
    node = layer(name, module, **config) | {"registered_name": name}
    del node["build_config"]  # which operations have not
    return node


RELU = {"module": "keras.activations", "class_name": "function", "config": "relu"}
INPUT = tensor("input")


@pytest.mark.parametrize(
    "arguments",
    [
        ["called>registered", INPUT],
        [{"a": "called>registered"}, INPUT],
        [INPUT, [RELU], INPUT],
        [{"f": {"class_name": "__slice__", "config": {"start": RELU, "stop": INPUT}}}, INPUT],
        [INPUT, [layer("SpectralNormalization", power_iterations=9, layer=layer("Dense"))]],
        [INPUT, layer("RandomNormal", "keras.initializers")],
        [INPUT, {"class_name": ["x"]}],
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("name", ["Map", "Switch", "Scan", "Add"])
def test_nothing_is_called_on_what_it_may_run(name, arguments):
    RAN.clear()
    module = "keras.src.ops.numpy" if name == "Add" else "keras.src.ops.core"
    node = operation(name, module, name="called")
    refused(*with_more_layers(at(node, call(*arguments))), "which it may run|this process regist")
    refused(*with_more_layers(at(layer("Dense", units=2, name="d"), call(*arguments))), "cannot be")
    assert RAN == []


@pytest.mark.parametrize("name", [*layerwise.RUN_THEIR_ARGUMENTS, "Operation"])
def test_operations_that_run_what_they_are_given_are_not_made(name):
    module = {"JVP": "keras.src.ops.linalg", "Operation": "keras.src.ops.operation"}.get(
        name, "keras.src.ops.core"
    )
    if not any(cls.__name__ == name for cls in kinds_of(keras.Operation)):
        pytest.skip("a newer Keras's")
    node = at(operation(name, module, function=RELU, name="o"), call(tensor("big", shape=(1,))))
    big = at(layer("InputLayer", batch_shape=[10**9], dtype="float32", name="big"))
    refused(*with_more_layers(big, node), "would be run for its shapes")


def test_which_operations_run_what_they_are_given():
    """All others of Keras's say their shapes, and run nothing for it."""
    found = set()
    for cls in kinds_of(keras.Operation) - kinds_of(keras.Layer):
        if symbols.of_keras(cls.__module__):
            source = inspect.getsource(cls.compute_output_spec)
            if "compute_output_spec(" in source.partition("\n")[2]:
                found.add(cls.__name__)
    # a graph of operations, each of which says its own
    assert found - {"Operation", "Function"} <= set(layerwise.RUN_THEIR_ARGUMENTS)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: keras.ops.map(keras.ops.relu, x),
        lambda x: keras.ops.vectorized_map(keras.activations.tanh, x),
        lambda x: keras.ops.tile(x, [2, 3]),
        lambda x: keras.ops.einsum("ij,kj->ik", x, x),
        lambda x: keras.ops.pad(x, ((0, 0), (1, 1))),
        lambda x: keras.ops.tensordot(x, x, axes=[[1], [1]]),
        lambda x: keras.ops.one_hot(keras.ops.cast(x, "int32"), 6, dtype="float16"),
        lambda x: x[:, ::2, None] + 1.5,
    ],
)
def test_honest_operations_arrive(function):
    inputs = keras.Input((2,), batch_size=3)
    source = keras.Model(inputs, function(inputs))
    batch = keras.ops.reshape(keras.ops.arange(6, dtype="float32"), (3, 2))
    again = deserialize_keras(*serialize_keras(source))
    zoo.assert_same(source, again)
    expected, found = (keras.ops.convert_to_numpy(model(batch)) for model in (source, again))
    assert expected.dtype == found.dtype
    assert expected.tolist() == found.tolist()


def test_each_operation_that_goes_by_config_arrives():
    messages = hostile.operation_messages()
    assert len(messages) > 150
    for header, frames in messages:
        assert hostile.outcome(header, frames) == "whole", header["owner"]


@pytest.mark.parametrize("repeats", [["a", "b"], "ab", [10, "a"], [[1, 2], [3]], {"a": 1}], ids=str)
def test_operations_multiply_numbers_alone(repeats):
    big = at(layer("InputLayer", batch_shape=[10**9, 10**9], dtype="float32", name="big"))
    tile = operation("Tile", "keras.src.ops.numpy", repeats=repeats, name="t")
    more = with_more_layers(big, at(tile, call(tensor("big", shape=(1, 1)))))
    refused(*more, "'repeats' of Tile is not made of numbers")


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="others trace it without data")
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_torch_runs_nothing_on_data_for_its_shapes(name):
    big = at(layer("InputLayer", batch_shape=[10**7], dtype="float32", name="big"))
    state = [tensor("big", shape=(1,))] * 2
    cell = at(layer(name, units=1, name="cell"), call(tensor("big", shape=(1,)), state))
    refused(*with_more_layers(big, cell), "not known without running it on data of .10000000.")


def backwards(count, *more):
    chain = [
        at(layer("Identity", name=f"c{i}"), call(tensor(f"c{i - 1}") if i else INPUT))
        for i in range(count)
    ]
    chain.append(at(layer("Identity", name="last"), call([tensor(f"c{count - 1}"), *more])))
    return with_more_layers(*chain[::-1])


def test_calls_that_wait_for_others_too_often():
    refused(*backwards(150, [0] * 200_000), "calls in it wait for others, and Keras would read")
    refused(*backwards(600), "calls in it wait for others")


def shared(times):
    first, second = keras.layers.Dense(3), keras.layers.Dense(3)
    inputs = x = keras.Input((3,))
    for _ in range(times):
        x = second(first(x))
    return keras.Model(inputs, x)


def test_layers_that_are_called_in_turn(monkeypatch):
    source = shared(20)
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    zoo.assert_same(source, deserialize_keras(header, frames))
    monkeypatch.setattr(calls, "MOST_READ", 1000)
    refused(header, frames, "calls in it wait for others")
    header, frames = serialize_keras(source)  # and whoever would be refused goes by value
    assert header["encoding"] == "value"
    zoo.assert_same(source, deserialize_keras(header, frames))


@pytest.mark.more
@pytest.mark.once
def test_orders_of_calls_cost_real_models_nothing():
    for build in (keras.applications.ResNet50, keras.applications.DenseNet121):
        model = build(weights=None, input_shape=(64, 64, 3))
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))["config"]
        assert calls.Calls().read_too_often(config) is None


def nested(depth, letters):
    node = layer("Flatten", name="f", nonsense="x" * letters)
    for i in range(depth):
        node = layer("Sequential", "keras", name=f"s{i}", layers=[node])
    return with_more_layers(at(node))


def test_errors_of_nested_layers_are_not_worded_at_any_length():
    refused(*nested(60, 500_000), "too much in too many layers")
    refused(*nested(3, 500_000), "Flatten")


def test_deep_models_go_by_value_where_a_receiver_would_refuse(monkeypatch):
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    for _ in range(4):
        inner = keras.Sequential([keras.Input((2,)), inner])
    header, frames = serialize_keras(inner)
    assert header["encoding"] == "config"
    monkeypatch.setattr(nests, "MOST_WORDS", 1000)
    monkeypatch.setattr(nests, "MOST_WORDS_OF_ONE", 1)
    refused(header, frames, "too much in too many layers")
    header, frames = serialize_keras(inner)
    assert header["encoding"] == "value"
    zoo.assert_same(inner, deserialize_keras(header, frames))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: keras.ops.rot90(x, axes=(1, 2)),
        lambda x: keras.ops.norm(x, ord="fro", axis=(1, 2)),
        lambda x: keras.ops.max_pool(x, (2,), strides=(1,), padding="same"),
        lambda x: keras.ops.pad(x, ((0, 0), [1, 1], (0, 0))),
        lambda x: keras.ops.transpose(x, [0, 2, 1]),
        lambda x: keras.ops.image.extract_patches(
            keras.ops.expand_dims(x, -1), (2, 2), padding="same"
        ),
    ],
)
def test_tuples_that_operations_are_given_stay_tuples(function):
    inputs = keras.Input((4, 4), batch_size=2)
    source = keras.Model(inputs, function(inputs))
    header, frames = serialize_keras(source)
    again = deserialize_keras(header, frames)
    assert str([vars(op).get("axes") for op in source.operations]) == str(
        [vars(op).get("axes") for op in again.operations]
    )
    assert source.get_config() == again.get_config()
    batch = keras.ops.reshape(keras.ops.arange(32, dtype="float32"), (2, 4, 4))
    results = [keras.ops.convert_to_numpy(m.predict(batch, verbose=0)) for m in (source, again)]
    assert results[0].tolist() == results[1].tolist()


def test_what_stands_for_a_tuple_is_looked_at():
    for value in ({"__tuple__": ["a"]}, {"__tuple__": 5}, {"__tuple__": [[1], [2]]}):
        tile = operation("Tile", "keras.src.ops.numpy", repeats=value, name="t")
        more = with_more_layers(at(tile, call(INPUT)))
        refused(*more, "'repeats' of Tile is not made of numbers")


def in_a_model(node, count, more=lambda source: call(source)):
    """Call a layer so often in a model that is called so often, on other batches."""
    name = node["config"]["name"]
    tensors = [tensor("x"), *(tensor(name, i) for i in range(count))]
    x = layer("InputLayer", batch_shape=[None, 2], dtype="float32", name="x")
    inner = layer("Functional", "keras.src.models.functional", name="inner")
    inner["config"] |= {
        "layers": [at(x), at(node, *map(more, tensors[:-1]))],
        "input_layers": [["x", 0, 0]],
        "output_layers": [[name, count - 1, 0]],
    }
    big = at(layer("InputLayer", batch_shape=[3, 2], dtype="float32", name="big"))
    tensors = [tensor("big", shape=(3, 2)), *(tensor("inner", i, (3, 2)) for i in range(count))]
    return with_more_layers(big, at(inner, *map(call, tensors[:-1])))


def test_data_in_calls_is_not_read_at_any_length():
    mask = [True] * 2_000
    more = in_a_model(layer("Softmax", name="s"), 12, lambda source: call(source, mask=mask))
    refused(*more, "has Keras read more than .* arguments of calls")


def test_layers_are_not_run_for_their_shapes_at_any_length():
    node = layer("SimpleRNNCell", units=2, name="c")
    more = in_a_model(node, 40, lambda source: call(source, [source]))
    refused(*more, "has Keras run layers for their shapes more than .* times")


def called_on_itself(count):
    cell, inputs = keras.layers.SimpleRNNCell(2), keras.Input((2,))
    x = inputs
    for _ in range(count):
        x = cell(x, [x])[0]
    inner = keras.Model(inputs, x, name="inner")
    x = outer = keras.Input((2,), batch_size=3)
    for _ in range(count):
        x = inner(x)
    return keras.Model(outer, x)


@pytest.mark.parametrize(("count", "encoding"), [(3, "config"), (9, "value")])
def test_who_would_be_refused_for_that_goes_by_value(count, encoding, monkeypatch):
    monkeypatch.setattr(calls, "MOST_TRACES", 20)
    header, frames = serialize_keras(source := called_on_itself(count))
    assert header["encoding"] == encoding
    zoo.assert_same(source, deserialize_keras(header, frames))


def test_a_clock_ends_what_nothing_else_does(monkeypatch):
    header, frames = serialize_keras(zoo.build("functional"))
    monkeypatch.setattr(budget, "MOST_SECONDS", -1000)
    refused(header, frames, "takes longer to build than .* seconds of a processor")


@pytest.mark.parametrize("nodes", [5, {"a": 1}, "ab"], ids=str)
def test_calls_that_are_no_list(nodes):
    node = {"class_name": "Dense", "name": "zz", "inbound_nodes": nodes}
    refused(*with_more_layers(node), "cannot be rebuilt here: (?!.*did not expect)")


def test_calls_that_fail_do_not_wait():
    chain = [at(layer("Identity", name=f"c{i}"), call(tensor(f"c{i + 1}"))) for i in range(30)]
    chain.append(at(layer("Identity", name="c30"), call(INPUT)))
    odd = at(operation("Squeeze", "keras.src.ops.numpy", axis=9, name="odd"), call(INPUT))
    refused(*with_more_layers(odd, *chain), "calls 'odd' on what it does not take")
