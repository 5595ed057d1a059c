"""What golden files hold: rich objects that are the same, to the bit, whoever makes them.

The classes here are named in the files: they may gain, not lose or rename.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from tests import zoo
from tests.golden.settled import (
    WIDTH,
    batch,
    names_from_nothing,
    numbers,
    seeded,
    settle,
    settled,
    steps,
    two_targets,
)

#: Of a rate that draws numbers and drops none, so that all backends compute the same.
RATE = 1e-9


class Sample(NamedTuple):
    """What makes an object, how it is sent, and the batch that it trains on."""

    make: Callable[[], Any]
    route: str = "pickle"
    batch: Callable[[], tuple[Any, Any]] | None = None
    #: The one backend, and the first Keras, that can make it.
    only: str | None = None
    since: tuple[int, ...] = (3, 11)
    #: The package with which the other backends can read it, though they cannot make it.
    read_with: str | None = None

    def is_read_by(self, backend: str) -> bool:
        """Say whether a backend can read it here."""
        read = self.read_with and importlib.util.find_spec(self.read_with)
        return self.only in (None, backend) or bool(read)


def classifier() -> keras.Model:
    """By config: a frozen layer, a frozen variable, a seed's state, history, built metrics."""
    hidden = layers.Dense(6, activation="relu", name="hidden")
    stack = [hidden, layers.BatchNormalization(name="norm"), layers.Dropout(RATE, name="drop")]
    out = layers.Dense(3, activation="softmax", name="out")
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), *stack, out], name="classifier")
    hidden.trainable = False
    out.bias.trainable = False
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return settled(seeded(model), *batch())


def branched() -> keras.Model:
    """By config: layers shared and nested, several outputs, a schedule, weighted metrics."""
    x = keras.Input((WIDTH,), name="x")
    shared = layers.Dense(WIDTH, activation="tanh", kernel_constraint="max_norm", name="shared")
    inside = keras.Sequential(
        [keras.Input((WIDTH,), name="y"), layers.Dense(4, name="deep")], name="inside"
    )
    hidden = layers.Add(name="add")([shared(shared(x)), x]) * 2.0
    p = layers.Dense(3, activation="softmax", kernel_regularizer="l2", name="p")(inside(hidden))
    q = layers.Dense(1, name="q")(hidden)
    model = keras.Model(x, {"p": p, "q": q}, name="branched")
    rate = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.5, nesterov=True),
        {"p": "sparse_categorical_crossentropy", "q": "mse"},
        loss_weights={"p": 1.0, "q": 0.5},
        metrics={"p": ["accuracy"], "q": ["mae"]},
        weighted_metrics={"p": [], "q": ["mse"]},
    )
    return settled(seeded(model), *two_targets())


def recurrent() -> keras.Model:
    """By config: states of seeds in cells; on torch, kernels that lie in another order."""
    stack = [layers.GRU(2, dropout=RATE, name="gru")]
    model = keras.Sequential([keras.Input((5, 2), name="x"), *stack], name="recurrent")
    model.compile("rmsprop", "mse")
    return settled(seeded(model), *steps())


def large() -> keras.Model:
    """By config: a frame of its own of the least bytes, one of the most in the arena."""
    stack = [layers.Dense(n, use_bias=False, name=f"of_{n}") for n in (128, 127)]
    model = keras.Sequential([keras.Input((128,), name="x"), *stack], name="large")
    return settle(seeded(model), model.variables)


def words() -> keras.Model:
    """By config: a vocabulary, as an asset."""
    vectorize = layers.TextVectorization(max_tokens=9, output_sequence_length=3, name="words")
    vectorize.adapt(["a b b é", "a b c"])
    x = keras.Input((), dtype="string", name="x")
    hidden = layers.Embedding(9, 2, name="embed")(vectorize(x))
    model = keras.Model(x, hidden, name="reader")
    return settle(seeded(model), model.variables)


class Scale(layers.Layer):
    """A layer that no config holds."""

    def __init__(self, function: Callable[[Any], Any], name: str) -> None:
        super().__init__(name=name)
        self.function = function

    def build(self, shape: Any) -> None:
        self.bias = self.add_weight(shape=(shape[-1],), name="bias")

    def call(self, x: Any) -> Any:
        return self.function(x) + self.bias


class Everything(keras.Model):
    """By value: containers that Keras watches, arrays, a closed file, variables of all sizes."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.hidden = [layers.Dense(4, name="first"), layers.Dense(4, name="second")]
        self.named = {"out": layers.Dense(3, activation="softmax", name="out"), "note": {"a": 1}}
        self.words = {"b", "a"}
        self.drop = layers.Dropout(RATE, name="drop")
        self.log = open(__file__)  # noqa: SIM115  a file that is closed is what travels
        self.log.close()
        self.array, self.fixed = np.arange(5), np.arange(6.0)
        self.fixed.flags.writeable = False
        for size in (0, 65535, 65536):
            self.zeros(f"of_{size}", size)
        # alike wherever a fingerprint looks
        self.zeros("like_that", 65536)

    def zeros(self, name: str, size: int) -> None:
        weight = self.add_weight(
            shape=(size,), dtype="uint8", initializer="zeros", trainable=False, name=name
        )
        setattr(self, name, weight)

    def call(self, x: Any, training: bool = False) -> Any:
        for layer in self.hidden:
            x = layer(x)
        return self.named["out"](self.drop(x, training=training))


def everything() -> keras.Model:
    """And a variable that is excluded from weight decay."""
    model = Everything("everything")
    model(batch()[0])
    optimizer = keras.optimizers.AdamW(weight_decay=0.25)
    model.hidden[0].trainable = False
    optimizer.build(model.trainable_variables)
    optimizer.exclude_from_weight_decay([model.hidden[1].bias])
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model = settled(seeded(model), *batch())
    for name in ("of_65535", "of_65536", "like_that"):
        getattr(model, name).assign(np.zeros(getattr(model, name).shape, "uint8"))
    model.like_that.assign(np.eye(1, 65536, 300, dtype="uint8")[0])
    return model


class Restored(Everything):
    """Says itself what its state is."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "log"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self)["log"] = "restored"


def restored() -> keras.Model:
    model = Restored("restored")
    model(batch()[0])
    for name in ("of_65535", "of_65536", "like_that"):
        vars(model).pop(name)
    return settle(seeded(model), model.variables[:-4])


def graph() -> keras.Model:
    """By value: a functional model's nodes and tensors; a layer that is called twice."""
    x = keras.Input((WIDTH,), name="x")
    shared = layers.Dense(WIDTH, name="shared")
    scale = Scale(keras.ops.abs, name="scale")
    hidden = layers.Add(name="add")([shared(x), scale(shared(x))]) * 2.0
    model = keras.Model(x, layers.Dense(3, name="out")(hidden), name="graph")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return settled(seeded(model), *batch())


def doubled() -> keras.Model:
    """By value: code that is sent, and not named."""
    function = eval("lambda x: x * 2")  # of one line of no file
    stack = [layers.Lambda(function, name="double"), layers.Dense(2, name="out")]
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), *stack], name="doubled")
    return settle(seeded(model), model.variables)


def chosen() -> keras.Model:
    """By value: an optimizer of optimizers."""
    stack = [layers.Dense(2, name="first"), layers.Dense(3, name="second")]
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), *stack], name="chosen")
    each = keras.optimizers.OptimizerMap(
        default_optimizer=keras.optimizers.SGD(0.5),
        optimizer_map={"second": keras.optimizers.Adam()},
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.MultiOptimizer(each), loss)
    return settled(seeded(model), *batch())


def lone() -> tuple[Any, ...]:
    """By value: a loss, a metric, an optimizer, an initializer, a variable, a tensor of a backend.

    PyTorch's go as PyTorch has them, which only it can read.
    """
    variable = keras.Variable(numbers(3), name="v")
    optimizer = keras.optimizers.Adam(0.25)
    optimizer.build([variable])
    metric = keras.metrics.MeanSquaredError(name="mse")
    metric.update_state(numbers(4, seed=5), numbers(4, seed=6))
    settle(optimizer, [*optimizer.variables, *metric.variables])
    drawn = keras.initializers.GlorotUniform()
    drawn.seed = 5
    tensor = keras.ops.convert_to_tensor(numbers(2, 3))
    tensors = () if keras.backend.backend() == "torch" else (tensor,)
    return keras.losses.Huber(delta=3.0), metric, optimizer, drawn, variable, *tensors


def training() -> keras.callbacks.CallbackList:
    """By value: callbacks in the middle of a training that has threads."""
    callbacks = keras.callbacks.CallbackList([keras.callbacks.EarlyStopping(patience=3)])
    callbacks._executor = ThreadPoolExecutor()
    return callbacks


def shared() -> tuple[Any, ...]:
    """A model by config, a model in it by value, and parts of it under every kind of key."""
    loss = keras.losses.SparseCategoricalCrossentropy()
    metric = keras.metrics.SparseCategoricalAccuracy(name="right")
    x = keras.Input((WIDTH,), name="x")
    hidden = layers.Dropout(RATE, name="drop")(layers.Dense(4, name="hidden")(x) * 2.0)
    model = keras.Model(x, layers.Dense(3, activation="softmax", name="out")(hidden), name="whole")
    model.compile("adam", loss, metrics=[metric])
    settled(seeded(model), *batch())
    inner = keras.Model(x, hidden, name="inner")
    stack = keras.Sequential([keras.Input((2,), name="y"), layers.Dense(2, name="d")], name="stack")
    settle(seeded(stack), stack.variables)
    layer, operation = model.get_layer("hidden"), model.operations[2]
    parts = (inner, layer, layer.kernel, model.get_layer("drop").seed_generator, hidden, operation)
    parts += (model.optimizer, loss, metric, model.metrics[0], model.history)
    return (model, *parts, stack, stack._functional)


def table() -> Scale:
    """By value: a table of TensorFlow's, one of what it was shown, and strings."""
    lookup = layers.StringLookup(output_mode="tf_idf", name="lookup")
    lookup.adapt(["a", "b", "a"])
    counts = layers.StringLookup(name="counts")
    counts.update_state(["é"])
    strings = keras.Variable(np.array([["a", "é"], ["", "ccc"]]), dtype="string", trainable=False)
    holder = Scale(keras.ops.abs, name="holder")
    holder.lookups = [lookup, counts]
    holder.strings = strings
    return holder


SAMPLES = {
    "classifier": Sample(classifier, batch=batch),
    "branched": Sample(branched, "dask", two_targets),
    "recurrent": Sample(recurrent, "cloudpickle", steps),
    "large": Sample(large, "dask"),
    "words": Sample(words, only="tensorflow", read_with="tensorflow"),
    "everything": Sample(everything, "dask", batch),
    "restored": Sample(restored),
    "graph": Sample(graph, "cloudpickle", batch),
    "doubled": Sample(doubled),
    "lone": Sample(lone, "protocol 4"),
    "training": Sample(training),
    "shared": Sample(shared, batch=batch),
    "table": Sample(table, only="tensorflow"),
    "chosen": Sample(chosen, "dask", batch, since=(3, 15)),
}


def make(name: str) -> Any:
    """Make a sample."""
    keras.utils.set_random_seed(0)
    with names_from_nothing():
        return SAMPLES[name].make()


def here() -> list[str]:
    """Return the names of those that this backend and Keras can make."""
    backends = (None, keras.backend.backend())
    return [n for n, each in SAMPLES.items() if each.only in backends and each.since <= zoo.KERAS]
