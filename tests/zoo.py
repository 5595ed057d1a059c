"""Models to test with: seeded builders by name, and what makes two models the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from dask_keras_serialize.configs.by_config import variables_of

ROWS, WIDTH = 32, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WIDTH)).astype("float32")
LABELS = RNG.integers(0, 3, ROWS)
TARGETS: dict[str, Any] = {
    "sparse": LABELS,
    "one-hot": np.eye(3, dtype="float32")[LABELS],
    "binary": (LABELS > 0).astype("float32"),
    "two": {"p": LABELS, "q": RNG.normal(size=ROWS).astype("float32")},
}


#: What PyTorch's trainer refuses; torch.compile fails on Keras's own layers.
EXECUTION: dict[str, Any] = {"steps_per_execution": 4}
#: On JAX, a fit or predict after one that averaged weights finds the averages deleted: they
#: are the same arrays as the weights, which Keras gives away (keras/src/backend/jax/trainer.py).
AVERAGES = {"use_ema": True}
if keras.backend.backend() == "torch":
    EXECUTION = {}
if keras.backend.backend() == "jax":
    AVERAGES = {}


class Subclassed(keras.Model):
    """No config, a list of layers, a custom train step, Python state."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden = [layers.Dense(width, activation="relu") for width in widths]
        self.drop = layers.Dropout(0.2)
        self.out = layers.Dense(3, activation="softmax")
        self.notes: dict[str, Any] = {"made of": list(widths), "steps": 0}

    def call(self, x: Any, training: bool = False) -> Any:
        for layer in self.hidden:
            x = layer(x)
        return self.out(self.drop(x, training=training))


class Scale(layers.Layer):
    """A custom layer without a config, called before it is asked for one."""

    def __init__(self, factor: Callable[[Any], Any]) -> None:
        super().__init__()
        self.factor = factor

    def build(self, shape: Any) -> None:
        self.bias = self.add_weight(shape=(shape[-1],), name="bias", initializer="ones")

    def call(self, x: Any) -> Any:
        return self.factor(x) + self.bias


class Sees(layers.Layer):
    """Keeps shapes and dtypes as the backend has them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None

    def call(self, x: Any) -> Any:
        if self.seen is None:
            self.seen = x.shape, x.dtype
        shape, dtype = self.seen
        return keras.ops.cast(keras.ops.reshape(x, (-1, min(shape[-1], 4))), dtype)


def sees_shapes() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, layers.SpectralNormalization(layers.Dense(4))(inputs))
    seen = Sees()
    seen(keras.ops.convert_to_tensor(X))
    return keras.Sequential([keras.Input((WIDTH,)), model, seen])


def mlp(units: int = 3, activation: str | None = "softmax") -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(16, activation="relu"),
            layers.Dropout(0.3),
            layers.BatchNormalization(),
            layers.Dense(units, activation=activation),
        ]
    )


def functional() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    a = layers.Dense(WIDTH, name="a")(inputs)
    shared = layers.Dense(WIDTH, activation="tanh")
    b = layers.Add()([shared(a), shared(inputs)])
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(b * 2.0))


def subclassed() -> keras.Model:
    model = Subclassed((16, WIDTH))
    model(X)
    return model


def two_outputs() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    hidden = layers.Dense(WIDTH)(inputs)
    p = layers.Dense(3, activation="softmax", name="p")(hidden)
    q = layers.Dense(1, name="q")(hidden)
    return keras.Model(inputs, {"p": p, "q": q})


def trained(
    model: keras.Model,
    loss: Any = "sparse_categorical_crossentropy",
    target: str = "sparse",
    metrics: Any = ("accuracy",),
    optimizer: Any = "adam",
) -> keras.Model:
    metrics = list(metrics) if isinstance(metrics, tuple) else metrics
    model.compile(optimizer, loss, metrics=metrics)
    model.fit(X, TARGETS[target], epochs=2, batch_size=8, verbose=0)
    return model


def compiled(model: keras.Model) -> keras.Model:
    model.compile("adam", "mse", metrics=["mae"])
    return model


def frozen() -> keras.Model:
    model = mlp()
    model.layers[0].trainable = False
    return compiled(model)


def frozen_variable() -> keras.Model:
    model = mlp()
    model.layers[0].bias.trainable = False
    return model


def adapted() -> keras.Model:
    normalization = layers.Normalization()
    normalization.adapt(X)
    return keras.Sequential([keras.Input((WIDTH,)), normalization, layers.Dense(3)])


def with_attribute() -> keras.Model:
    model = mlp()
    model.note = {"a": 1}
    return model


class Keeper(Subclassed):
    """Leaves an attribute that cannot travel out of its state, the usual way."""

    def __init__(self) -> None:
        super().__init__((4,))
        self.log = open(__file__)  # noqa: SIM115
        self.log.close()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("log", None)
        return state


class Opener(Keeper):
    """And makes it anew."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["log"] = "opened"


def with_lambda() -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), layers.Lambda(lambda x: x * 2), Scale(abs)])


def nested() -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), functional(), layers.Dense(2)])


def tied() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    shared = layers.Dense(WIDTH)
    inner = keras.Sequential([keras.Input((WIDTH,)), shared])
    return keras.Model(inputs, shared(inner(inputs)))


def deep() -> keras.Model:
    stack = [layers.Dense(2) for _ in range(300)]
    return keras.Sequential([keras.Input((2,)), *stack, Scale(abs)])


def scheduled() -> keras.Model:
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, **AVERAGES)
    return trained(mlp(), optimizer=optimizer)


def excluded_from_decay() -> keras.Model:
    model = mlp()
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    optimizer.build(model.trainable_variables)
    optimizer.exclude_from_weight_decay([model.layers[0].bias])
    return trained(model, optimizer=optimizer)


def mixed_precision() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(16, dtype="mixed_float16"),
            layers.Dense(4, dtype="bfloat16"),
            layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )


def recurrent() -> keras.Model:
    inputs = keras.Input((4, 2))
    hidden = layers.Bidirectional(layers.LSTM(3, return_sequences=True, dropout=0.1))(inputs)
    hidden = layers.MultiHeadAttention(2, 3)(hidden, hidden)
    return keras.Model(inputs, layers.GRU(2)(hidden))


def vocabulary() -> keras.Model:
    vectorize = layers.TextVectorization(max_tokens=20, output_sequence_length=4)
    vectorize.adapt(["a b c", "b c d é"])
    inputs = keras.Input((), dtype="string")
    return keras.Model(inputs, layers.Dense(2)(layers.Embedding(20, 3)(vectorize(inputs))))


def numbers_of_numpy() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    # a number of Python's would take int8, and flow over
    return keras.Model(inputs, keras.ops.cast(inputs, "int8") + np.int32(300))


def function_of_an_operation() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, keras.ops.vectorized_map(keras.ops.sin, inputs))


def words_in_bytes() -> keras.Model:
    inputs = keras.Input((), dtype="string")
    return keras.Model(inputs, layers.StringLookup(vocabulary=[b"b", b"a"])(inputs))


def with_weights_of_labels() -> keras.Model:
    metric = keras.metrics.AUC(multi_label=True, num_labels=1, label_weights=[0.3])
    return trained(mlp(1, "sigmoid"), "mse", "binary", (metric,))


def thawed() -> keras.Model:
    model = mlp()
    model.trainable = False
    model.layers[0].trainable = True
    return model


def made_under(policy: str, floatx: str = "float32") -> keras.Model:
    before, before_x = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    try:
        return trained(mlp())
    finally:
        keras.config.set_dtype_policy(before)
        keras.config.set_floatx(before_x)


def relu(x: Any) -> Any:
    """Named like Keras's own."""
    return x * 0 + 7.0


def mae(y: Any, p: Any) -> Any:
    """Named like Keras's own."""
    return keras.ops.mean(keras.ops.abs(p)) + 42.0


def other_loss(y: Any, p: Any) -> Any:
    return keras.ops.mean(keras.ops.square(p))


def stack(*more: Any, **dense: Any) -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), layers.Dense(3, **dense), *more])


def rule_set_later(on: str) -> keras.Model:
    model = stack()
    rule = keras.regularizers.L2(0.5)
    if on == "layer":
        model.layers[0].kernel_regularizer = rule
    else:
        model.layers[0].kernel.regularizer = rule
    return compiled(model)


def masking_set() -> keras.Model:
    model = stack()
    model.layers[0].supports_masking = False
    return model


def recurrent_of(layer: keras.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((4, 2)), layer])


def same_metric_twice() -> keras.Model:
    model, metric = mlp(), keras.metrics.SparseCategoricalAccuracy()
    loss = "sparse_categorical_crossentropy"
    model.compile("adam", loss, metrics=[metric], weighted_metrics=[metric])
    model.fit(X, LABELS, verbose=0)
    return model


def with_history_of_arrays() -> keras.Model:
    model = mlp()
    model.history = {"loss": np.arange(3)}
    return model


class Words(keras.Model):
    """A table of TensorFlow's inside a subclass."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        length = 3 if mode == "int" else None
        self.vectorize = layers.TextVectorization(output_mode=mode, output_sequence_length=length)
        self.vectorize.adapt(["a b c", "b c d é"])
        self.dense = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.cast(self.vectorize(x), "float32"))


def words(mode: str) -> keras.Model:
    model = Words(mode)
    model(keras.ops.convert_to_tensor(["a b", "c"]))
    return model


def frequencies() -> keras.Model:
    vectorize = layers.TextVectorization(output_mode="tf_idf")
    vectorize.adapt(["a b c", "b c d é"])
    inputs = keras.Input((), dtype="string")
    return keras.Model(inputs, layers.Dense(2)(vectorize(inputs)))


class Stateful(layers.Layer):
    """Says itself how its variables and assets are saved, and would lose some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = {"a": 1}
        self.scale = self.add_weight(shape=(WIDTH,), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale * len(self.words)

    def save_own_variables(self, store: Any) -> None:
        store["halved"] = self.scale / 2

    def load_own_variables(self, store: Any) -> None:
        self.scale.assign(store["halved"])

    def save_assets(self, folder: str) -> None:
        raise AssertionError("by value it need not be asked")


class Step(Subclassed):
    """A train step of its own, and a constructor argument that Keras cannot serialize."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__((4,))
        self.change = change

    def train_step(self, *state_and_data: Any) -> Any:
        *state, (x, y) = state_and_data  # a state on JAX alone
        return super().train_step(*state, (self.change(x), y))


class Table(keras.Model):
    """Strings among its variables."""

    def __init__(self) -> None:
        super().__init__()
        words = np.array([["a", "é"], ["", "ccc"]])
        self.table = keras.Variable(words, dtype="string", trainable=False)
        self.dense = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def quantized(mode: str) -> keras.Model:
    model = keras.Sequential([keras.Input((WIDTH,)), layers.Dense(16), layers.Dense(3)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer InputLayer does not have a `quantize`")
        model.quantize(mode)
    return model


def with_lora() -> keras.Model:
    model = mlp()
    model.layers[0].enable_lora(2)
    return trained(model)


def accumulated() -> keras.Model:
    optimizer = keras.optimizers.Adam(
        gradient_accumulation_steps=3, ema_overwrite_frequency=5, clipnorm=1.0, **AVERAGES
    )
    return trained(mlp(), optimizer=optimizer)


def loss_scaled() -> keras.Model:
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    return trained(mlp(), optimizer=keras.optimizers.LossScaleOptimizer(inner))


def by_closures() -> keras.Model:
    factor = 3.0

    def loss(y: Any, p: Any) -> Any:
        return keras.ops.mean(keras.ops.square(y - p)) * factor

    def metric(y: Any, p: Any) -> Any:
        return keras.ops.max(p) * factor

    return trained(mlp(1, None), loss, "binary", (metric,))


def compiled_with(model: keras.Model, **arguments: Any) -> keras.Model:
    loss = "sparse_categorical_crossentropy"
    model.compile("rmsprop", loss, metrics=["accuracy"], **arguments)
    model.fit(X, LABELS, batch_size=8, verbose=0)
    return model


def stateful() -> keras.Model:
    inputs = keras.Input(batch_shape=(4, 3, 2))
    model = keras.Model(inputs, layers.LSTM(3, stateful=True)(inputs))
    model(np.ones((4, 3, 2), "float32"))
    return model


def augmented() -> keras.Model:
    layer = layers.RandomFlip(seed=5)
    model = keras.Sequential([keras.Input((4, 4, 3)), layer, layers.GaussianNoise(0.1)])
    model(np.ones((2, 4, 4, 3), "float32"), training=True)  # draws from the seeds
    return model


#: How each travels, by name; the reason it goes by value is in fidelity's tests.
BY_CONFIG: dict[str, Callable[[], keras.Model]] = {
    "sequential": mlp,
    "functional": functional,
    "two outputs": two_outputs,
    "unbuilt sequential": lambda: keras.Sequential([layers.Dense(3)]),
    "compiled": lambda: compiled(mlp()),
    "trained": lambda: trained(mlp()),
    "trained functional": lambda: trained(functional()),
    "trained one-hot": lambda: trained(mlp(), "categorical_crossentropy", "one-hot"),
    "trained binary": lambda: trained(mlp(1, "sigmoid"), "binary_crossentropy", "binary"),
    "trained two outputs": lambda: trained(
        two_outputs(),
        {"p": "sparse_categorical_crossentropy", "q": "mse"},
        "two",
        {"p": ["accuracy"], "q": ["mae"]},
    ),
    "scheduled": scheduled,
    "frozen": frozen,
    "frozen variable": frozen_variable,
    "adapted": adapted,
    "nested": nested,
    "mixed precision": mixed_precision,
    "recurrent": recurrent,
    "vocabulary": vocabulary,
    "thawed": thawed,
    "trained under mixed_float16": lambda: made_under("mixed_float16"),
    "trained under bfloat16": lambda: made_under("bfloat16"),
    "trained in accumulated steps": accumulated,
    "augmented": augmented,
    "unbuilt compiled": lambda: compiled(keras.Sequential([layers.Dense(3)])),
    "trained eagerly": lambda: compiled_with(mlp(), run_eagerly=True),
    "trained on a focal loss": lambda: trained(
        mlp(), keras.losses.CategoricalFocalCrossentropy(gamma=3.0), "one-hot"
    ),
    "trained by XLA": lambda: compiled_with(mlp(), jit_compile=bool(EXECUTION), **EXECUTION),
    "with constraints": lambda: compiled(
        stack(kernel_constraint="max_norm", bias_regularizer="l2", activation="relu")
    ),
    "trained with loss scaling": loss_scaled,
    "trained with Muon": lambda: trained(mlp(), optimizer="muon"),
}
BY_VALUE: dict[str, Callable[[], keras.Model]] = {
    "subclassed": subclassed,
    "unbuilt subclassed": lambda: Subclassed((4,)),
    "trained subclassed": lambda: trained(Subclassed((16,))),
    "lambda and custom layer": with_lambda,
    "attribute": with_attribute,
    "trained with getstate": lambda: trained(Keeper()),
    "trained with setstate": lambda: trained(Opener()),
    "tied across nesting": tied,
    "300 layers deep": deep,
    "lossy loss": lambda: trained(
        mlp(1, None), keras.losses.Huber(delta=3.0), "binary", ("mae", keras.metrics.AUC())
    ),
    "excluded from decay": excluded_from_decay,
    "activation named like Keras's": lambda: stack(activation=relu),
    "keras.ops.gelu": lambda: stack(activation=keras.ops.gelu),
    "lambda activation": lambda: stack(activation=lambda x: x + 1),
    "loss of one's own": lambda: trained(mlp(1, None), other_loss, "binary", ()),
    "metric named like Keras's": lambda: trained(mlp(1, None), "mse", "binary", (mae,)),
    "regularizer of one's own": lambda: stack(kernel_regularizer=lambda w: keras.ops.sum(w)),
    "rule set on a layer later": lambda: rule_set_later("layer"),
    "rule set on a variable": lambda: rule_set_later("variable"),
    "augmentation's argument": lambda: keras.Sequential(
        [layers.RandomFlip(), layers.MaxNumBoundingBoxes(3, fill_value=-7)]
    ),
    "argument no config has": lambda: recurrent_of(layers.SimpleRNN(3, seed=7)),
    "initializer's argument": lambda: keras.Sequential(
        [layers.Dense(WIDTH, kernel_initializer=keras.initializers.Identity(gain=3.0))]
    ),
    "masking set": masking_set,
    "a number of NumPy's": numbers_of_numpy,
    "function of an operation": function_of_an_operation,
    "words in bytes": words_in_bytes,
    "trained with weights of labels": with_weights_of_labels,
    "trained under float64": lambda: made_under("float64", "float64"),
    "R2Score": lambda: trained(mlp(1, None), "mse", "binary", (keras.metrics.R2Score(),)),
    "same metric twice": same_metric_twice,
    "history of arrays": with_history_of_arrays,
    "words": lambda: words("int"),
    "word counts": lambda: words("count"),
    "document frequencies": frequencies,
    "int8": lambda: quantized("int8"),
    "int4": lambda: quantized("int4"),
    "float8": lambda: quantized("float8"),
    "stateful": stateful,
    "saves itself": lambda: keras.Sequential([keras.Input((WIDTH,)), Stateful()]),
    "shapes and dtypes": sees_shapes,
    "strings": lambda: (model := Table(), model(X))[0],
    "trained with LoRA": with_lora,
    "trained by closures": by_closures,
    "trained by a step of its own": lambda: trained(Step(lambda x: x * 2)),
    "trained in fewer executions": lambda: compiled_with(Subclassed((4,)), **EXECUTION),
}

#: Layers of words keep their tables in TensorFlow whatever the backend; variables of
#: strings are of its backend.
IN_TENSORFLOW = {"vocabulary", "words", "word counts", "document frequencies", "strings"}
IN_TENSORFLOW |= {"words in bytes"}
#: Marks tests of such layers.
tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a layer that Keras makes with TensorFlow alone"
)
#: JAX keeps 64 bits in 32, with a warning, unless told otherwise.
NOT_HERE = {"tensorflow": set[str](), "torch": IN_TENSORFLOW}.get(
    keras.backend.backend(), IN_TENSORFLOW | {"trained under float64"}
)
#: The first Keras that has them.
SINCE = {"regularizer of one's own": (3, 15), "trained with Muon": (3, 13)}
KERAS = tuple(map(int, keras.version().split(".")[:2]))
NOT_HERE |= {name for name, first in SINCE.items() if first > KERAS}
for models in (BY_CONFIG, BY_VALUE):
    for name in NOT_HERE & models.keys():
        del models[name]
ALL = BY_CONFIG | BY_VALUE

#: One for each way in which they differ: what tests that take a second for each model are run with.
TYPICAL = {
    "sequential", "trained two outputs", "frozen variable", "adapted", "nested", "vocabulary",
    "trained under bfloat16", "augmented", "trained subclassed", "unbuilt subclassed", "attribute",
    "trained with setstate", "tied across nesting", "excluded from decay", "words", "int8",
    "stateful", "strings", "trained with LoRA", "trained with loss scaling", "trained by closures",
}  # fmt: skip


def some(
    names: Iterable[str],
    typical: Collection[str] = TYPICAL,
    others: pytest.MarkDecorator = pytest.mark.slow,
) -> list[Any]:
    """Return parameters for a test: the typical ones, and all others where their mark is run."""
    return [name if name in typical else pytest.param(name, marks=others) for name in names]


#: What a trained model's targets are, but for the usual.
TARGET = {
    "trained one-hot": "one-hot",
    "trained on a focal loss": "one-hot",
    "trained binary": "binary",
    "trained by closures": "binary",
    "trained two outputs": "two",
}


def build(name: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    return ALL[name]()


def inputs_for(model: keras.Model) -> Any:
    """Make a batch the model takes."""
    if isinstance(model, Words):
        return keras.ops.convert_to_tensor(["a b", "c e é"])
    if not isinstance(model, (Subclassed, Table)):
        spec = model.inputs[0]
        if spec.dtype == "string":
            return keras.ops.convert_to_tensor(["a b", "c e é"])
        return RNG.normal(size=(4, *spec.shape[1:])).astype("float32")
    return X[:4]


def assert_same(a: keras.Model, b: keras.Model) -> None:
    """Fail unless two models are equal to the bit and share nothing."""
    assert type(a) is type(b)
    assert (a.name, a.built, a.compiled) == (b.name, b.built, b.compiled)
    assert a.dtype_policy == b.dtype_policy
    assert len(a.trainable_variables) == len(b.trainable_variables)
    assert flags(a) == flags(b)
    if a.built and getattr(a, "inputs", None):
        for x, y in zip(a.losses, b.losses, strict=True):
            assert_equal(x, y)
    ours, theirs = variables_of(a), variables_of(b)
    assert [describe(v) for v in ours] == [describe(v) for v in theirs]
    for x, y in zip(ours, theirs, strict=True):
        assert x is not y
        assert to_bytes(x) == to_bytes(y), x.path
    if a.built:
        batch = inputs_for(a)
        # not by predict(), which is traced anew for each model: test_protocol.py does that
        computed = [keras.tree.flatten(model(batch, training=False)) for model in (a, b)]
        for p, q in zip(*computed, strict=True):
            assert_equal(p, q)


def assert_predict_the_same(a: keras.Model, b: keras.Model, batch: Any) -> None:
    """Fail unless ``predict()``, which compiles, gives the same of two models."""
    for p, q in zip(predictions(a, batch), predictions(b, batch), strict=True):
        np.testing.assert_array_equal(p, q)


def flags(model: keras.Model) -> list[bool]:
    return [layer.trainable for layer in [model, *model._flatten_layers(include_self=False)]]


def predictions(model: keras.Model, batch: Any) -> list[Any]:
    return keras.tree.flatten(model.predict(batch, verbose=0))


def describe(variable: keras.Variable) -> tuple[Any, ...]:
    return variable.path, tuple(variable.shape), variable.dtype, variable.trainable


def to_bytes(variable: keras.Variable) -> bytes:
    if keras.backend.backend() == "torch":  # NumPy lacks some of its dtypes
        import torch

        value = variable.value.detach().cpu().contiguous().reshape(-1)
        return bytes(value.view(torch.uint8).numpy().tobytes()) if value.numel() else b""
    array = np.asarray(keras.ops.convert_to_numpy(variable.value))
    return repr(array.tolist()).encode() if array.dtype == object else array.tobytes()


def bits(model: keras.Model) -> list[bytes]:
    return [to_bytes(variable) for variable in model.variables]


def address(variable: keras.Variable) -> int:
    """Say where a variable's value lies."""
    if keras.backend.backend() == "torch":
        import torch

        return int(torch._C._data_address(variable.value))
    if keras.backend.backend() == "jax":
        return int(variable.value.unsafe_buffer_pointer())
    return int(np.asarray(memoryview(variable.value.value())).ctypes.data)


def assert_equal(a: Any, b: Any) -> None:
    """Fail unless two of the backend's tensors are equal, gradients or not."""
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
