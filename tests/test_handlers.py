import copy
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from dask.base import tokenize
from dask.sizeof import sizeof

from tests import zoo


@pytest.mark.parametrize("name", ["sequential", "trained", "trained subclassed"])
def test_tokens_tell_models_apart_by_any_bit(name):
    model = zoo.build(name)
    token = tokenize(model)
    assert tokenize(model) == token
    variable = model.variables[-1]
    raw = np.array(keras.ops.convert_to_numpy(variable.value))
    raw.view(np.uint8).reshape(-1)[0] ^= 1
    variable.assign(raw)
    assert tokenize(model) != token
    raw.view(np.uint8).reshape(-1)[0] ^= 1
    variable.assign(raw)
    assert tokenize(model) == token


def test_tokens_tell_configs_apart():
    def build(activation):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(2, activation, name="dense")
        return keras.Sequential([keras.Input((2,), name="in"), dense], name="m")

    assert tokenize(build("relu")) == tokenize(build("relu"))
    assert tokenize(build("relu")) != tokenize(build("tanh"))


TOKENS = """
import keras, numpy as np
from dask.base import tokenize
keras.utils.set_random_seed(0)
class Net(keras.Model):
    def __init__(self, width):
        super().__init__()
        self.dense = keras.layers.Dense(width)
        self.tags = {"b": 1, "a": 2}
        self.words = {"one", "two", "three"}
    def call(self, x):
        return self.dense(x) + 1
net = Net(3)
net(np.ones((1, 2)))
net.compile("adam", lambda y, p: (y - p) ** 2)
plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
plain.compile("sgd", "mse")
print(tokenize(net), tokenize(net), tokenize(plain))
"""


@pytest.mark.programs
def test_tokens_are_the_same_in_every_process(tmp_path):
    script = tmp_path / "tokens.py"
    script.write_text(TOKENS)
    printed = {
        subprocess.run(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    first, second, _ = printed.pop().split()
    assert first == second


@pytest.mark.parametrize("name", ["trained", "trained subclassed", "attribute"])
def test_tokens_stay_the_same_in_use_and_on_the_way(name):
    model = zoo.build(name)
    model.predict(zoo.X, verbose=0)
    token = tokenize(model)
    model.predict(zoo.X[:8], verbose=0)
    assert tokenize(model) == token
    assert tokenize(copy.deepcopy(model)) == token
    assert tokenize(copy.deepcopy(copy.deepcopy(model))) == token


def test_sizeof_counts_variables_and_the_graph_around_them():
    small = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    large = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)])
    assert sizeof(large) - sizeof(small) == 4 * (512 * 512 + 512) - 4 * (2 * 2 + 2)
    assert sizeof(zoo.build("sequential")) > 1e5


def test_sizeof_reads_no_variable(monkeypatch):
    model = zoo.build("trained")
    monkeypatch.setattr(type(model.variables[0]), "value", property(refuse))
    assert sizeof(model) > 1e5


def refuse(variable):
    raise AssertionError(f"{variable.path} was read")
