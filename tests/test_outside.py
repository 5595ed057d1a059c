"""What is not Keras's and lies both in a Keras object and beside it arrives once."""

import pickle
import sys
from collections import deque
from types import SimpleNamespace

import cloudpickle
import joblib
import keras
import numpy as np
import pytest
from keras import layers
from sklearn.preprocessing import StandardScaler

from dask_keras_serialize import pickling
from tests import zoo
from tests.test_sharing import WAYS


@pytest.fixture(params=WAYS)
def send(request):
    yield WAYS[request.param]
    assert pickling._alive().count == 0, "a parcel outlives its pickle"


class Log(keras.callbacks.Callback):
    def __init__(self, trainer=None):
        super().__init__()
        self.trainer = trainer

    def on_epoch_end(self, epoch, logs=None):
        self.trainer.losses.append(logs["loss"])


class Trainer:
    """Held by what it holds, as trainers are."""

    def __init__(self):
        self.losses = []
        self.data = zoo.X, zoo.LABELS
        self.options = {"epochs": 2}
        self.model = zoo.build("subclassed")
        self.model.compile("adam", "sparse_categorical_crossentropy")
        self.model.trainer = self
        self.log = Log(self)
        self.again = keras.Sequential([keras.Input((zoo.WIDTH,)), self.model.layers[0]])

    def train(self):
        self.model.fit(*self.data, verbose=0, callbacks=[self.log], **self.options)


def check(trainer, arrived):
    assert arrived.model.trainer is arrived
    assert arrived.log.trainer is arrived
    assert arrived.again.layers[0] is arrived.model.layers[0]
    zoo.assert_same(trainer.model, arrived.model)
    arrived.train()
    assert len(arrived.losses) == 2
    assert not trainer.losses


@pytest.mark.parametrize("end", ["trainer", "model", "log", "again", "list"])
def test_a_cycle_from_every_end(send, end):
    trainer = Trainer()
    if end == "trainer":
        arrived = send(trainer)
    elif end == "model":
        arrived = send(trainer.model).trainer
    elif end == "log":
        arrived = send(trainer.log).trainer
    elif end == "again":
        again, arrived = send([trainer.again, trainer])
        assert arrived.again is again
    else:
        model, log, arrived, losses = send([trainer.model, trainer.log, trainer, trainer.losses])
        assert arrived.model is model
        assert arrived.log is log
        assert arrived.losses is losses
    check(trainer, arrived)


class Bag:
    """An object of a module that can be imported."""

    def __init__(self, *things):
        self.things = things


def holder(thing, private=False):
    """Everything that Keras does not wrap: a callback's attributes are as they were set."""
    callback = keras.callbacks.Callback()
    setattr(callback, "_thing" if private else "thing", thing)
    return callback


THINGS = {
    "list": lambda: [1, 2],
    "dict": lambda: {"a": {"b": [1]}},
    "set": lambda: {1, "a"},
    "bytearray": lambda: bytearray(b"abc"),
    "deque": lambda: deque([1, 2], 5),
    "namespace": lambda: SimpleNamespace(a=[1]),
    "generator": lambda: np.random.default_rng(0),
    "instance": lambda: Bag([1], 2),
    "with a model": lambda: Bag(keras.Sequential([keras.Input((2,)), layers.Dense(2)])),
    "list of models": lambda: [keras.Sequential([keras.Input((2,)), layers.Dense(2)])],
}


@pytest.mark.parametrize("last", [False, True], ids=["holder first", "holder last"])
@pytest.mark.parametrize("name", THINGS)
def test_what_two_hold_is_one(send, name, last):
    thing = THINGS[name]()
    first, second = holder(thing), holder(Bag(thing), private=True)
    sent = [thing, first, second]
    arrived = send(sent[::-1] if last else sent)
    thing, first, second = arrived[::-1] if last else arrived
    assert first.thing is thing
    assert second._thing.things[0] is thing
    assert type(thing) is type(THINGS[name]())


@pytest.mark.parametrize("last", [False, True], ids=["holder first", "holder last"])
def test_arrays(send, request, last):
    array = np.arange(6.0)
    sent = [array, holder(array), holder({"deep": [array]})]
    arrived = send(sent[::-1] if last else sent)
    array, first, second = arrived[::-1] if last else arrived
    assert array.flags.writeable
    if "joblib" not in request.node.name:  # which makes two of one array by itself
        assert first.thing is array
        assert second.thing["deep"][0] is array
    else:
        assert first.thing.flags.writeable
    np.testing.assert_array_equal(first.thing, array)


def test_what_is_deep_in_one_and_shallow_in_another(send):
    inner = {"a": 1}
    outer = [inner]
    first, second, third = send([holder(outer), holder(inner), holder((inner, outer))])
    assert first.thing[0] is second.thing is third.thing[0]
    assert third.thing[1] is first.thing


def test_what_only_one_holds_twice(send):
    thing = Bag([1])
    callback = holder({"a": (thing, [thing]), "b": thing.things[0]})
    arrived = send(callback).thing
    assert arrived["a"][0] is arrived["a"][1][0]
    assert arrived["a"][0].things[0] is arrived["b"]


def local(thing):
    class Local:
        def __init__(self):
            self.thing = thing
            self.function = lambda: thing

    return Local()


def test_code_that_plain_pickle_cannot_take():
    """It stays in the parcel, and what it holds with it."""
    shared = [1]
    callback = holder(local(shared))
    callback.again = shared
    arrived = pickle.loads(pickle.dumps(callback))
    assert arrived.thing.thing == [1]
    assert arrived.thing.function() is arrived.thing.thing
    # cloudpickle can, and then it is shared
    thing, arrived = cloudpickle.loads(cloudpickle.dumps([callback.thing, callback]))
    assert arrived.thing is thing
    assert arrived.thing.thing is arrived.again is arrived.thing.function()


def test_a_long_row_of_holders():
    """Each holds the model; pickle goes no deeper with every one."""
    model = zoo.build("subclassed")
    model.holders = [Bag(model, i) for i in range(300)]
    arrived = pickle.loads(pickle.dumps(model))
    assert all(bag.things[0] is arrived for bag in arrived.holders)


def test_mapped_arrays_are_the_objects_own(tmp_path):
    callback = holder(np.arange(6.0))
    joblib.dump(callback, tmp_path / "file")
    arrived = joblib.load(tmp_path / "file", mmap_mode="r")
    arrived.thing += 1
    np.testing.assert_array_equal(arrived.thing, callback.thing + 1)


def test_looking_at_one_without_the_others_says_so(tmp_path):
    import dask_keras_serialize as dks

    model = zoo.build("sequential")
    (tmp_path / "file").write_bytes(pickle.dumps([holder([1]), model]))
    parcel, other = dks.inspect(tmp_path / "file")
    assert "Callback" in repr(parcel)
    with pytest.raises(dks.DecodeError, match="shares 1 objects with what it was pickled with"):
        parcel.open()
    zoo.assert_same(model, other.open())


@pytest.fixture
def code_travels_by_value():
    """The workers cannot import this suite."""
    modules = [sys.modules[__name__], zoo]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.cluster
def test_between_processes(client, code_travels_by_value):
    """As data, which no scheduler opens."""
    trainer = Trainer()
    (sent,) = client.scatter([trainer])

    def train(trainer):
        if trainer.model.trainer is trainer.log.trainer is trainer:
            trainer.train()
        return trainer

    train.__module__ = "__main__"
    arrived = client.submit(train, sent).result()
    assert arrived.model.trainer is arrived.log.trainer is arrived
    assert len(arrived.losses) == 2


@pytest.mark.cluster
def test_a_scheduler_opens_nothing(client):
    """It has no scikit-learn, which a model in a task graph may hold an object of."""
    model = zoo.build("sequential")
    model.scaler = StandardScaler().fit(zoo.X)

    def mean(model):
        return model.scaler.mean_

    mean.__module__ = "__main__"
    np.testing.assert_array_equal(client.submit(mean, model).result(), model.scaler.mean_)
    for module in ("sklearn", "keras"):
        assert not client.run_on_scheduler(lambda name: name in __import__("sys").modules, module)
