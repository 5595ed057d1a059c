"""Classes and functions that the other side cannot import, in interpreters of their own."""

import pickle
import subprocess
import sys
import textwrap

import cloudpickle
import dask
import pytest

from dask_keras_serialize.errors import DecodeError
from tests import zoo

#: Runs as __main__: nothing of it can be imported elsewhere.
SENDER = '''
import sys, pickle, dask, keras, numpy as np
from keras import ops

factor = 3.0

class Scaled(keras.layers.Layer):
    """No get_config, an argument that Keras cannot serialize."""
    def __init__(self, function):
        super().__init__()
        self.function = function
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer=Odd(2.0), name="scale")
    def call(self, x):
        return self.function(x) * self.scale * factor

class Odd(keras.initializers.Initializer):
    def __init__(self, start):
        self.start = start
    def __call__(self, shape, dtype=None):
        return ops.reshape(ops.arange(int(np.prod(shape)), dtype=dtype), shape) + self.start

class Mine(keras.Model):
    def __init__(self, width):
        super().__init__()
        offset = 0.5
        self.first = Scaled(lambda x: x + offset)
        self.large = keras.layers.Dense(width)
        self.out = keras.layers.Dense(1, kernel_regularizer=penalty)
    def call(self, x):
        return self.out(self.large(self.first(x)))
    def train_step(self, *state_and_data):
        self.steps = getattr(self, "steps", 0) + 1
        return super().train_step(*state_and_data)

def penalty(w):
    return ops.sum(ops.abs(w)) * 0.01

class Error(keras.Loss):
    def call(self, y, p):
        return ops.mean(ops.square(y - p), axis=-1) * factor

class Count(keras.Metric):
    def __init__(self):
        super().__init__()
        self.total = self.add_weight(name="total", initializer="zeros")
    def update_state(self, y, p, sample_weight=None):
        self.total.assign_add(ops.cast(ops.size(y), "float32"))
    def result(self):
        return self.total + 0

class Halve(keras.callbacks.Callback):
    pass

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
y = x.sum(axis=1)
model = Mine(20_000)
model.compile("adam", Error(), metrics=[Count(), lambda y, p: ops.max(p)])
model.fit(x, y, verbose=0, callbacks=[Halve()])
buffers = []
value = {"model": model, "others": [Error(), Count(), Odd(5.0), Halve(), Scaled(abs)]}
stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
assert len(stream) < 100_000, len(stream)  # the weights are frames
assert sum(buffer.raw().nbytes for buffer in buffers) > 80_000 * 4
model.make_train_function(force=True)
with open(sys.argv[1], "wb") as file:
    pickle.dump((stream, [bytes(buffer.raw()) for buffer in buffers], x, y), file)
history = model.fit(x, y, shuffle=False, verbose=0).history
print(model.predict(x, verbose=0).tobytes().hex(), history["loss"], model.steps)
'''
RECEIVER = """
import sys, pickle
with open(sys.argv[1], "rb") as file:
    stream, buffers, x, y = pickle.load(file)
value = pickle.loads(stream, buffers=buffers)
model = value["model"]
assert [type(each).__name__ for each in value["others"]] == "Error Count Odd Halve Scaled".split()
assert not hasattr(sys.modules["__main__"], "Mine")
history = model.fit(x, y, shuffle=False, verbose=0).history
print(model.predict(x, verbose=0).tobytes().hex(), history["loss"], model.steps)
"""


def run(tmp_path, name, source, *arguments, fails=""):
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    command = [sys.executable, str(path), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    if fails:
        assert result.returncode, result.stdout
        assert fails in result.stderr.splitlines()[-1], result.stderr[-2000:]
    else:
        assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.programs
def test_code_of_main_travels_and_trains_on(tmp_path):
    sent = run(tmp_path, "sender", SENDER, tmp_path / "file")
    assert sent.strip()
    assert run(tmp_path, "receiver", RECEIVER, tmp_path / "file") == sent


MODULE = """
import keras
class Layer(keras.layers.Dense):
    def call(self, x):
        return super().call(x) + 1
"""
SEND_MODULE = """
import sys, pickle, dask, keras, cloudpickle
sys.path.insert(0, sys.argv[2])
import mylayers
if sys.argv[3] == "value":
    cloudpickle.register_pickle_by_value(mylayers)
model = keras.Sequential([keras.Input((2,)), mylayers.Layer(3)])
with open(sys.argv[1], "wb") as file:
    pickle.dump(model, file)
"""
RECEIVE_MODULE = """
import sys, pickle, numpy as np
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
print(model.predict(np.zeros((1, 2)), verbose=0).tolist())
"""


@pytest.mark.programs
def test_a_module_travels_by_reference_or_as_cloudpickle_is_told(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mylayers.py").write_text(MODULE)
    file = tmp_path / "file"
    run(tmp_path, "send", SEND_MODULE, file, tmp_path / "lib", "reference")
    message = "it holds code of module 'mylayers', which is not installed here"
    run(tmp_path, "receive", RECEIVE_MODULE, file, fails=message)
    run(tmp_path, "send", SEND_MODULE, file, tmp_path / "lib", "value")
    assert run(tmp_path, "receive", RECEIVE_MODULE, file) == "[[1.0, 1.0, 1.0]]\n"


class Gadget:
    """Would leave a mark if anybody unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_by_value_can_be_forbidden(tmp_path):
    model = zoo.build("subclassed")
    model.notes["gadget"] = Gadget(tmp_path / "mark")
    stream = pickle.dumps(model)
    optimizer = pickle.dumps(zoo.build("trained").optimizer)
    allowed = pickle.dumps(zoo.build("trained"))
    with dask.config.set({"dask-keras-serialize.by-value": False}):
        with pytest.raises(DecodeError, match=r"by-value forbids.*tests\.zoo\.Subclassed") as info:
            pickle.loads(stream)
        assert "\n" not in str(info.value)
        with pytest.raises(DecodeError, match=r"optimizer 'adam.*by-value forbids"):
            pickle.loads(optimizer)
        assert pickle.loads(allowed).compiled
    assert not (tmp_path / "mark").exists()
    pickle.loads(stream).notes["gadget"].close()
    assert (tmp_path / "mark").exists()


class Strange(zoo.Subclassed):
    def __reduce__(self):
        return Strange, ((3,),)


def test_a_class_that_says_how_it_is_pickled_is_asked(tmp_path):
    for loads, dumps in ((pickle.loads, pickle.dumps), (cloudpickle.loads, cloudpickle.dumps)):
        twin = loads(dumps([Strange((7,))]))[0]
        assert twin.notes["made of"] == [3]
    holder = zoo.Subclassed((4,))
    holder.inner = Strange((7,))
    assert pickle.loads(pickle.dumps(holder)).inner.notes["made of"] == [3]
