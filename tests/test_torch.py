"""PyTorch's own: modules inside Keras's layers, models that are modules too."""

import copy
import itertools
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

from dask_keras_serialize.backends import ADDED
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.errors import DecodeError
from tests import zoo
from tests.routes import ROUTES

X, Y = zoo.X, np.ones((zoo.ROWS, 3), "float32")


@pytest.fixture(params=ROUTES)
def send(request):
    return ROUTES[request.param]


def wrapped():
    torch.manual_seed(0)
    nn = torch.nn
    inner = nn.Sequential(nn.Linear(zoo.WIDTH, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    inner[0].bias.requires_grad = False
    model = keras.Sequential([keras.Input((zoo.WIDTH,)), keras.layers.TorchModuleWrapper(inner)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(X, Y, verbose=0)
    return model


def assert_same(model, replica):
    for ours, theirs in zip(model.variables, replica.variables, strict=True):
        assert zoo.describe(ours) == zoo.describe(theirs)
        assert zoo.to_bytes(ours) == zoo.to_bytes(theirs)
    np.testing.assert_array_equal(model.predict(X, verbose=0), replica.predict(X, verbose=0))


def test_a_users_module_shares_its_parameters_with_the_layers_variables(send):
    model = wrapped()
    replica = send(model)
    assert_same(model, replica)
    layer = replica.layers[-1]
    values = {id(variable.value) for variable in layer.variables}
    assert {id(parameter) for parameter in layer.module.parameters()} == values
    assert [p.requires_grad for p in layer.module.parameters()] == [
        p.requires_grad for p in model.layers[-1].module.parameters()
    ]
    before = [zoo.to_bytes(variable) for variable in model.variables]
    for each in (replica, model):  # in this order: neither trains the other
        each.fit(X, Y, shuffle=False, verbose=0)
        assert [zoo.to_bytes(variable) for variable in each.variables] != before
    assert_same(model, replica)


def test_a_modules_parameters_travel_once():
    inner = torch.nn.Linear(1000, 1000)
    model = keras.Sequential([keras.Input((1000,)), keras.layers.TorchModuleWrapper(inner)])
    assert len(pickle.dumps(model)) < 1.1 * 4 * 1000 * 1000


def test_modules_that_are_not_keras_s_are_copied_as_ever():
    linear = torch.nn.Linear(2, 2)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin.weight, linear.weight)
    assert twin.weight is not linear.weight
    assert torch.equal(pickle.loads(pickle.dumps(linear)).weight, linear.weight)


IMPORTS = ("import torch", "import keras", "import distributed.protocol", "import dask")
HANDLER = """
from distributed import protocol
import keras
class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)
    def call(self, x):
        return self.dense(x)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
for obj in (model, Sub(), model.layers[0]):
    header, frames = protocol.serialize(obj)
    print(header["sub-header"].get("format"), end=" ")
"""


@pytest.mark.parametrize("first", range(len(IMPORTS)))
def test_our_handler_wins_over_the_one_for_modules(first):
    """distributed has one for torch.nn.Module, which a Keras model is (``protocol/torch.py``)."""
    rest = itertools.islice(itertools.cycle(IMPORTS), first, first + len(IMPORTS))
    script = "\n".join([*rest, HANDLER])
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert result.stdout.split() == ["dask-keras-serialize"] * 3, result.stderr


@pytest.mark.parametrize("route", ["pickle 5", "deepcopy"])
def test_a_value_lies_in_memory_as_it_lay(route):
    layer = keras.layers.Dense(4)
    layer.build((None, 6))
    layer.kernel._value = torch.nn.Parameter(torch.randn(4, 6).t())
    replica = ROUTES[route](layer)
    assert replica.kernel.value.stride() == layer.kernel.value.stride() == (1, 6)
    assert torch.equal(replica.kernel.value, layer.kernel.value)


@pytest.mark.parametrize("placement", [[0], [0, 0], [0, 5], ["x", 0], [0, 1, 2], [-1, 0]], ids=str)
def test_how_it_lay_may_be_malformed(placement):
    header, frames = serialize_keras(keras.Variable(np.ones((4, 6), "float32")))
    header["body"]["placements"] = [[0, placement]]
    with pytest.raises(DecodeError, match=r"cannot be placed|malformed header"):
        deserialize_keras(header, frames)


def test_tensors_of_a_layer_share_their_memory_as_they_did():
    layer = keras.layers.Layer()
    layer.whole = torch.arange(12.0).reshape(3, 4)
    layer.row, layer.turned = layer.whole[1], layer.whole.t()
    layer.half = torch.tensor(0.5, dtype=torch.bfloat16)
    layer.nothing = torch.empty(0, 3)
    layer.short = torch.tensor([1, 2], dtype=torch.uint16)
    layer.learned = torch.ones(2, requires_grad=True)
    first = pickle.loads(pickle.dumps(layer))
    replica = pickle.loads(pickle.dumps(first))  # of tensors in memory that torch did not allocate
    for name in ("whole", "row", "turned", "half", "nothing", "learned", "short"):
        ours, theirs = getattr(layer, name), getattr(replica, name)
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert ours.requires_grad == theirs.requires_grad
    replica.whole[1, 0] = 99.0
    assert float(replica.row[0]) == float(replica.turned[0, 1]) == 99.0
    assert float(layer.row[0]) == float(first.row[0]) == 4.0


@pytest.mark.parametrize("make", [torch.zeros, lambda n: torch.from_numpy(np.zeros(n, "float32"))])
def test_what_is_written_after_a_view_is_sent_next_time(make):
    layer = keras.layers.Layer()
    layer.constant = make(4)
    first = serialize_keras(layer)  # keeps the memory as it was
    layer.constant[0] = 1.0
    assert float(deserialize_keras(*serialize_keras(layer)).constant[0]) == 1.0
    assert float(deserialize_keras(*first).constant[0]) == 0.0


def doubled(module, inputs, output):
    return output * 2


def test_what_was_done_to_a_layer_as_to_a_module_arrives(send):
    model = zoo.build("sequential")
    first, last = model.layers[0], model.layers[-1]
    first.kernel.value.requires_grad_(False)
    first.register_buffer("seen", torch.arange(3))
    last.register_forward_hook(doubled)
    last.eval()
    replica = send(model)
    ours = replica.layers[0]
    assert not ours.kernel.value.requires_grad
    assert ours.kernel.trainable
    assert ours.bias.value.requires_grad
    assert torch.equal(ours.seen, first.seen)
    assert not replica.layers[-1].training
    zoo.assert_same(model, replica)  # its predictions are doubled


def test_what_another_backend_sent_of_a_module_is_dropped():
    assert set(torch.nn.Module().__dict__) == {
        name for name in torch.nn.Module().__dict__ if ADDED["torch"].fullmatch(name)
    }
