"""What objects share within one pickle they share when they arrive; nothing else."""

import copy
import gc
import io
import pickle
import tempfile
from collections import OrderedDict

import cloudpickle
import joblib
import keras
import numpy as np
import pytest
from distributed import protocol
from keras import layers

from dask_keras_serialize import pickling
from dask_keras_serialize.errors import EncodeError
from tests import zoo
from tests.routes import out_of_band


def by_dask(obj):
    """As a task's result, which distributed takes apart."""
    header, frames = protocol.serialize(protocol.Serialize(obj), on_error="raise")
    return protocol.deserialize(header, frames)


def by_joblib(obj):
    with tempfile.NamedTemporaryFile() as file:
        joblib.dump(obj, file.name)
        return joblib.load(file.name)


WAYS = {
    "pickle": out_of_band,
    "cloudpickle": lambda obj: cloudpickle.loads(cloudpickle.dumps(obj)),
    "deepcopy": copy.deepcopy,
    "joblib": by_joblib,
    "dask": by_dask,
}


@pytest.fixture(params=WAYS)
def send(request):
    if pickling._alive().count:
        gc.collect()  # the traceback of another test holds a pickler; takes seconds late in a run
    yield WAYS[request.param]
    assert pickling._alive().count == 0, "a parcel outlives its pickle"


def gan():
    generator, discriminator = zoo.mlp(zoo.WIDTH, None), zoo.mlp()
    both = keras.Sequential([keras.Input((zoo.WIDTH,)), generator, discriminator])
    return {"generator": generator, "discriminator": discriminator, "both": both}


@pytest.mark.parametrize("order", ["generator discriminator both", "both generator discriminator"])
def test_models_that_share_models(send, order):
    models = gan()
    sent = {name: models[name] for name in order.split()}
    arrived = send(sent)
    assert arrived["both"].layers[0] is arrived["generator"]
    assert arrived["both"].layers[1] is arrived["discriminator"]
    for name in models:
        zoo.assert_same(models[name], arrived[name])
    arrived["generator"].trainable_variables[0].assign_add(
        arrived["generator"].trainable_variables[0] + 1
    )
    before = models["both"].predict(zoo.X, verbose=0)
    assert not np.array_equal(arrived["both"].predict(zoo.X, verbose=0), before)


@pytest.mark.parametrize("custom", [False, True], ids=["by config", "by value"])
def test_models_that_share_layers_and_tensors(send, custom):
    inputs = keras.Input((zoo.WIDTH,))
    hidden = (zoo.Scale(abs) if custom else layers.Dense(zoo.WIDTH))(inputs)
    encoder = keras.Model(inputs, hidden)
    whole = keras.Model(inputs, layers.Dense(3)(hidden))
    first, second = send([encoder, whole])
    assert first.layers[1] is second.layers[1]
    zoo.assert_same(encoder, first)
    zoo.assert_same(whole, second)
    # the graph is one: a third model can be made across both
    third = keras.Model(first.input, second.output)
    np.testing.assert_array_equal(third.predict(zoo.X, verbose=0), whole.predict(zoo.X, verbose=0))


@pytest.mark.more
@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
@pytest.mark.parametrize("last", [False, True], ids=["model first", "model last"])
def test_a_model_and_its_parts(send, name, last):
    model = zoo.build(name)
    parts = {
        "weights": model.variables,
        "optimizer": model.optimizer,
        "history": model.history,
        "metrics": model.metrics,
        "layers": model.layers,
        "slots": model.optimizer.variables,
    }
    sent = parts | {"model": model} if last else {"model": model} | parts
    arrived = send(sent)
    replica = arrived["model"]
    zoo.assert_same(model, replica)
    assert all(a is b for a, b in zip(arrived["weights"], replica.variables, strict=True))
    assert all(a is b for a, b in zip(arrived["slots"], replica.optimizer.variables, strict=True))
    assert all(a is b for a, b in zip(arrived["layers"], replica.layers, strict=True))
    assert all(a is b for a, b in zip(arrived["metrics"], replica.metrics, strict=True))
    assert arrived["optimizer"] is replica.optimizer
    assert arrived["history"] is replica.history
    assert arrived["history"].model is replica


class Trainer:
    def __init__(self):
        self.model = zoo.build("functional")
        self.optimizer = keras.optimizers.Adam()
        self.optimizer.build(self.model.trainable_variables)
        self.average = keras.models.clone_model(self.model)
        self.loss = keras.losses.Huber(delta=3.0)
        self.again = {"model": self.model, "losses": [self.loss, self.loss]}


def test_inside_a_users_own_object(send):
    trainer = Trainer()
    arrived = send([trainer])[0]
    assert arrived.again["model"] is arrived.model
    assert arrived.again["losses"][0] is arrived.again["losses"][1] is arrived.loss
    ours = {id(v) for v in arrived.model.trainable_variables}
    assert {id(v) for v in arrived.optimizer._trainable_variables} == ours
    assert not ours & {id(v) for v in arrived.average.variables}  # nor is sharing invented
    gradients = [keras.ops.ones_like(v.value) for v in arrived.model.trainable_variables]
    arrived.optimizer.apply(gradients, arrived.model.trainable_variables)
    trainer.optimizer.apply(gradients, trainer.model.trainable_variables)
    zoo.assert_same(trainer.model, arrived.model)


def test_equal_objects_stay_two(send):
    first, second = send([zoo.build("sequential"), zoo.build("sequential")])
    assert first is not second
    assert not {id(v) for v in first.variables} & {id(v) for v in second.variables}


def test_a_model_does_not_drag_others_along():
    """Every layer knows all models it was used in (``_inbound_nodes``)."""
    backbone = keras.Sequential([keras.Input((512,)), layers.Dense(512)])
    small = keras.Model(backbone.inputs, zoo.Scale(abs)(backbone.inputs[0]))
    assert len(pickle.dumps(small)) < 100_000
    head = keras.Sequential([keras.Input((512,)), backbone.layers[0], layers.Dense(2000)])
    assert len(pickle.dumps(head.layers[0])) < 1_200_000 < len(pickle.dumps(head))


def test_another_pickle_shows_the_new_state():
    """Also while somebody keeps the pickler of an old one, as a traceback does."""
    model = zoo.build("subclassed")
    old = pickle.Pickler(io.BytesIO())
    old.dump({"model": model, "layer": model.out})
    model.out.bias.assign(model.out.bias + 1)
    model.notes["steps"] = 8
    arrived = pickle.loads(pickle.dumps({"layer": model.out, "model": model}))
    zoo.assert_same(model, arrived["model"])
    assert arrived["model"].notes["steps"] == 8
    assert arrived["layer"] is arrived["model"].out


def test_what_changes_while_it_is_pickled_is_refused():
    model = zoo.build("trained")
    old = pickle.Pickler(io.BytesIO())
    old.dump([model, model.optimizer])
    optimizer = model.optimizer
    model.compile("sgd", "mse")
    with pytest.raises(EncodeError, match="was changed while something that shares"):
        pickle.dumps([optimizer, model])
    del old
    zoo.assert_same(model, pickle.loads(pickle.dumps([optimizer, model]))[1])


@pytest.mark.more
@pytest.mark.once
def test_many_objects_do_not_cost_their_square():
    """Parts are looked up, not searched; a thousand layers take a few seconds at most."""
    many = [layers.Dense(1) for _ in range(1000)]
    many[0].build((1,))
    arrived = pickle.loads(pickle.dumps([*many, many[0].kernel]))
    assert arrived[0].kernel is arrived[-1]


class Blocks(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(zoo.WIDTH), layers.Dense(2)]
        self.named = OrderedDict(z=self.blocks[0], a={"deep": [self.blocks[1]]})
        self.chosen = {"x", "y", "z"}

    def call(self, x):
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("last", [False, True], ids=["model first", "model last"])
def test_containers_that_keras_watches(send, last):
    """Keras puts its own lists, dicts and sets in place of those a user assigns."""
    model = Blocks()
    parts = {"blocks": model.blocks, "named": model.named, "chosen": model.chosen}
    arrived = send(parts | {"model": model} if last else {"model": model} | parts)
    replica = arrived["model"]
    for name, part in parts.items():
        assert arrived[name] is getattr(replica, name)
        assert type(arrived[name]) is type(part)
    assert list(replica.named) == ["z", "a"]
    assert replica.chosen == model.chosen
    assert replica.named["a"]["deep"][0] is replica.blocks[1]
    arrived["blocks"].append(layers.Dense(3))  # still watched
    assert [layer.units for layer in replica.layers] == [zoo.WIDTH, 2, 3]
    assert len(model.layers) == 2
    assert replica.named.popitem()[0] == "a"


def test_a_watched_container_alone(send):
    blocks = send(Blocks().blocks)
    assert [layer.units for layer in blocks] == [zoo.WIDTH, 2]
    assert copy.copy(blocks)[0] is blocks[0]


class Bag:
    """An object of a user's own."""

    def __init__(self, *things):
        self.things = things


@pytest.mark.parametrize("thing", [[1], {"a": 1}, np.ones(3), Bag([1])], ids=type)
def test_what_one_object_holds_twice_it_holds_twice(send, thing):
    """Whatever it is, and however deep."""
    callback = keras.callbacks.Callback()
    callback.thing, callback.again = thing, {"a": (thing, Bag([thing]))}
    model = zoo.build("subclassed")
    model.bag, model.callback = Bag(thing, model), callback
    for arrived in (send(callback), (replica := send(model)).callback):
        assert arrived.again["a"][0] is arrived.again["a"][1].things[0][0] is arrived.thing
    assert replica.bag.things[0] is replica.callback.thing
    assert replica.bag.things[1] is replica


def test_what_is_not_keras_s_is_apart_from_what_lies_beside(send, request):
    """A parcel is closed: a scheduler passes it on that may lack the code in it."""
    log = [1]
    callback = keras.callbacks.Callback()
    callback.log = log
    first, second = send([log, callback])
    assert first == second.log
    assert (first is second.log) == ("deepcopy" in request.node.name)
