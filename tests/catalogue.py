"""Every public class of Keras: how to make one that has been used, and how to use it further."""

from __future__ import annotations

import atexit
import inspect
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import callbacks, distribution, layers, optimizers

from tests import zoo

#: Where classes are looked for; the first that has a class gives it its name.
NAMESPACES = (
    *("layers", "optimizers", "optimizers.schedules", "losses", "metrics", "initializers"),
    *("regularizers", "constraints", "callbacks", "dtype_policies", "quantizers", "random"),
    *("distribution", "distillation", "wrappers", "utils", "", "models", "mixed_precision"),
)
#: What cannot be made here, and why.
ELSEWHERE = {
    "callbacks.OrbaxCheckpoint": "needs orbax",
    "layers.FlaxLayer": "needs flax",
}
if keras.backend.backend() != "jax":
    ELSEWHERE["layers.JaxLayer"] = "needs jax"
elif inspect.isgenerator(getattr(import_module("jax").named_scope("n"), "gen", None)):
    ELSEWHERE["name_scope"] = "an older JAX holds it in a generator, which nothing can pickle"
if keras.backend.backend() != "torch":
    ELSEWHERE["layers.TorchModuleWrapper"] = "needs torch"
#: Layers that Keras makes with TensorFlow alone.
IN_TENSORFLOW = (
    *("layers.Discretization", "layers.HashedCrossing", "layers.Hashing", "layers.IntegerLookup"),
    *("layers.StringLookup", "layers.TextVectorization", "layers.TFSMLayer", "utils.FeatureSpace"),
)
if keras.backend.backend() != "tensorflow":
    ELSEWHERE |= dict.fromkeys(IN_TENSORFLOW, "needs TensorFlow")

#: The Keras that this is the catalogue of; older ones have less.
OF_KERAS = (3, 15)

#: Public names that make an instance of another class.
FACTORIES = {"Model"}


def public_classes() -> dict[str, type]:
    """Find every class in the namespaces, each under one name: its own, else its longest."""
    found: dict[type, list[tuple[bool, int, int, str]]] = {}
    for order, space in enumerate(NAMESPACES):
        try:
            module = attrgetter(space)(keras) if space else keras
        except AttributeError:
            if zoo.KERAS >= OF_KERAS:
                raise
            continue
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if not name.startswith("_"):
                rank = (name != cls.__name__, order, -len(name), f"{space}.{name}".lstrip("."))
                found.setdefault(cls, []).append(rank)
    return dict(sorted((min(names)[-1], cls) for cls, names in found.items()))


class Citizen(NamedTuple):
    """``make()`` after seeding; ``use(x)`` gives, and changes, the same for two that are equal."""

    make: Callable[[], Any]
    use: Callable[[Any], Any]


Specs = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def each(names: str, /, *on: Any, **kwargs: Any) -> Specs:
    """Say for some classes what they are used on and what they are made of."""
    return dict.fromkeys(names.split(), (on, kwargs))


def new(name: str, /, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Look the class up only when it is made: older versions of Keras lack some."""

    def make() -> Any:
        cls = attrgetter(name)(keras)
        if zoo.KERAS >= OF_KERAS:
            return cls(*args, **kwargs)
        taken = inspect.signature(cls).parameters
        some = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        return cls(*args, **{k: v for k, v in kwargs.items() if some or k in taken})

    return make


def citizens(space: str, way: Callable[..., Citizen], specs: Specs) -> dict[str, Citizen]:
    names = {name: f"{space}.{name}" for name in specs}
    return {names[name]: way(new(names[name], **kw), *on) for name, (on, kw) in specs.items()}


def one_of_each(space: str, specs: Specs) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Make one of each class that there is on this backend, and say what it is used on."""
    for name, (on, kwargs) in specs.items():
        if f"{space}.{name}" not in ELSEWHERE and attrgetter(space)(keras).__dict__.get(name):
            yield new(f"{space}.{name}", **kwargs)(), on


def around(obj: keras.Layer, data: Any) -> keras.Model:
    """Make a model of a layer, for inputs like the data that it is used on."""
    inputs = inputs_like(data)
    return keras.Model(inputs, obj(inputs))


def inputs_like(data: Any, name: str | None = None) -> Any:
    if isinstance(data, dict):
        return {key: inputs_like(value, key) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [inputs_like(each) for each in data]
    array = np.asarray(data)
    dtype = "string" if array.dtype.kind in "UO" else str(array.dtype)
    return keras.Input(array.shape[1:], dtype=dtype, name=name)


def plain(value: Any) -> Any:
    """Turn tensors and variables into arrays, whatever they are nested in."""

    def one(x: Any) -> Any:
        tensor = isinstance(x, keras.Variable) or keras.ops.is_tensor(x)
        return keras.ops.convert_to_numpy(x) if tensor else x

    return keras.tree.map_structure(one, value)


def is_plain(x: Any) -> bool:
    if isinstance(x, list | tuple | set | dict):
        return all(map(is_plain, [*x, *(x.values() if isinstance(x, dict) else ())]))
    return x is None or isinstance(x, bool | int | float | str | np.ndarray | np.generic)


def attributes(obj: Any) -> dict[str, Any]:
    """Get a class's name and what ``vars`` has of plain values: no models, functions, files."""
    found = {k: v.copy() if hasattr(v, "copy") else v for k, v in vars(obj).items() if is_plain(v)}
    return {"class": type(obj).__name__} | found


def config(obj: Any) -> Any:
    return plain(obj.get_config()), attributes(obj)


def variables(obj: Any) -> Any:
    return obj.name, plain(obj.variables)


def called(obj: Any) -> Any:
    return plain(obj(REAL[0])), attributes(obj)


def by(use: Callable[[Any], Any]) -> Callable[..., Citizen]:
    return lambda make: Citizen(make, use)


def double(x: Any) -> Any:
    return x * 2


def square(y: Any, p: Any) -> Any:
    return keras.ops.square(y - p)


def halve(epoch: int, rate: Any) -> Any:
    return rate / 2 if isinstance(rate, float) else epoch


#: Removed when the interpreter exits: until then a copy in another process finds what it needs.
SCRATCH = tempfile.mkdtemp(prefix="catalogue-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    return RNG.normal(size=shape).astype("float32")


# ---- layers

FLAT, SEQUENCE, LONG = floats(4, 6), floats(2, 5, 4), floats(2, 256)
IMAGE = RNG.uniform(0, 255, (2, 8, 8, 3)).astype("float32")
GRID = {1: SEQUENCE, 2: IMAGE, 3: floats(2, 4, 4, 4, 2)}
TIMED = {1: floats(2, 3, 4, 2), 2: floats(2, 3, 4, 4, 2), 3: floats(2, 2, 3, 3, 3, 2)}
COUNTS, WORDS = np.array([[1, 2], [3, 0]]), np.array([["a"], ["c"], ["é"]])
BOXES = {"boxes": np.arange(16.0).reshape(2, 2, 4), "labels": COUNTS}
BOXED = {"images": IMAGE, "bounding_boxes": BOXES}
LABELLED = {"images": IMAGE, "labels": np.eye(2, dtype="float32")}


def product(params: Any, inputs: Any) -> Any:
    """Compute what a JaxLayer does."""
    return inputs @ params["w"]


def torch_module() -> Any:
    import torch

    return layers.TorchModuleWrapper(torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.ReLU()))


def copied(args: Any) -> Any:
    """Copy arrays: on torch SimpleRNNCell writes to the states that it is given."""
    return keras.tree.map_structure(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, args)


def layer(make: Callable[[], Any], *args: Any, adapt: Any = None) -> Citizen:
    def modes(obj: Any) -> list[dict[str, bool]]:
        takes = "training" in inspect.signature(obj.call).parameters
        return [{"training": False}, {"training": True}] if takes else [{}]

    def made() -> Any:
        obj = make()
        if adapt is not None:
            obj.adapt(adapt)
        obj(*copied(args), **modes(obj)[-1])
        return obj

    def use(obj: Any) -> Any:
        random.seed(1)  # AugMix draws from it besides its own seed
        calls = [(plain(obj(*copied(args), **mode)), plain(obj.losses)) for mode in modes(obj)]
        said = plain(obj.get_config()) | attributes(obj) | {"policy": obj.dtype_policy.name}
        for name in [name for name in said if name.startswith("_self_")]:
            del said[name]  # TensorFlow's own, made when asked for
        said.pop("filepath", None)  # a replica of TFSMLayer has the files in a folder of its own
        return calls, plain(obj.variables), said, obj.trainable, obj.path

    return Citizen(made, use)


def adapted(make: Callable[[], Any], data: Any, *args: Any) -> Citizen:
    return layer(make, *args, adapt=data)


def tfsm() -> Any:
    path = tempfile.mkdtemp(dir=SCRATCH)
    small().export(path, verbose=False)
    return layers.TFSMLayer(path)


def wrapper() -> Any:
    obj = layers.Wrapper(layers.Dense(2), name="w")
    obj.build((None, 3))
    return obj


#: By the rank that {} stands for.
RANKED: Specs = {
    **each("AdaptiveAveragePooling{}D AdaptiveMaxPooling{}D", GRID, output_size=3),
    **each("AveragePooling{}D MaxPooling{}D", GRID, pool_size=3, strides=1, padding="same"),
    **each("Conv{}D SeparableConv{}D", GRID, filters=3, kernel_size=2, activation="elu"),
    **each("Conv{}DTranspose", GRID, filters=2, kernel_size=3, strides=2, use_bias=False),
    **each("ConvLSTM{}D", TIMED, filters=2, kernel_size=2, stateful=True, dropout=0.2, seed=4),
    **each("Cropping{}D", GRID, cropping=1),
    **each("DepthwiseConv{}D", GRID, kernel_size=2, bias_constraint="max_norm"),
    **each("GlobalAveragePooling{}D GlobalMaxPooling{}D", GRID, keepdims=True),
    **each("SpatialDropout{}D", GRID, rate=0.4, seed=5),
    **each("UpSampling{}D", GRID, size=3),
    **each("ZeroPadding{}D", GRID, padding=2),
}
RECURRENT = {"stateful": True, "dropout": 0.2, "recurrent_dropout": 0.1, "seed": 7}
HEADS = {"head_dim": 3, "num_query_heads": 4, "num_key_value_heads": 2}
LAYERS: Specs = {
    **{
        name.format(rank): ((x[0][rank],), kwargs)
        for name, (x, kwargs) in RANKED.items()
        for rank in x[0]
        if hasattr(layers, name.format(rank))
    },
    **each("Add Average Maximum Minimum Multiply Subtract", [FLAT, -FLAT], dtype="float64"),
    **each("Concatenate", [FLAT, -FLAT], axis=0),
    **each("Dot", [FLAT, FLAT**2], axes=1, normalize=True),
    **each("Activation", FLAT, activation="gelu"),
    **each("ActivityRegularization", FLAT, l1=0.1, l2=0.2),
    **each("AlphaDropout Dropout GaussianDropout", FLAT, rate=0.3, seed=8),
    **each("BatchNormalization", FLAT, momentum=0.7, epsilon=0.01, gamma_regularizer="l1"),
    **each("Dense", FLAT, units=3, kernel_regularizer="l2", use_bias=False),
    **each("ELU", FLAT, alpha=0.5),
    **each("GaussianNoise", FLAT, stddev=0.3, seed=8),
    **each("GroupNormalization", FLAT, groups=3, scale=False),
    **each("Identity", FLAT, dtype="float16"),
    **each("LayerNormalization RMSNormalization", FLAT, epsilon=0.1),
    **each("LeakyReLU", FLAT, negative_slope=0.2),
    **each("PReLU", FLAT, alpha_initializer="ones", alpha_regularizer="l2"),
    **each("ReLU", FLAT, max_value=0.6, negative_slope=0.1, threshold=0.1),
    **each("RepeatVector", FLAT, n=3),
    **each("Rescaling", FLAT, scale=0.5, offset=2.0),
    **each("Softmax UnitNormalization", FLAT, axis=0),
    **each("Lambda", FLAT, function=double),
    **each("GRU LSTM SimpleRNN", SEQUENCE, units=3, **RECURRENT),
    **each("GRUCell SimpleRNNCell", FLAT, [FLAT], units=6, dropout=0.2, seed=7),
    **each("LSTMCell", FLAT, [FLAT, -FLAT], units=6, dropout=0.2, seed=7),
    **each("AdditiveAttention", [SEQUENCE, -SEQUENCE], dropout=0.2, seed=9),
    **each("Attention", [SEQUENCE, -SEQUENCE], score_mode="concat", dropout=0.2, seed=9),
    **each("EinsumDense", SEQUENCE, equation="abc,cd->abd", output_shape=(None, 3), lora_rank=2),
    **each("Embedding", COUNTS, input_dim=5, output_dim=3, embeddings_constraint="max_norm"),
    **each("ReversibleEmbedding", COUNTS, input_dim=5, output_dim=3, dtype="mixed_bfloat16"),
    **each("GroupQueryAttention", SEQUENCE, SEQUENCE, **HEADS, dropout=0.2, seed=9),
    **each("MultiHeadAttention", SEQUENCE, SEQUENCE, num_heads=2, key_dim=3, dropout=0.2, seed=9),
    **each("Flatten", IMAGE, data_format="channels_first"),
    **each("Masking", np.round(SEQUENCE * 2) / 2, mask_value=0.5),
    **each("MelSpectrogram", LONG, fft_length=64, sequence_stride=32, sampling_rate=900),
    **each("Permute", SEQUENCE, dims=(2, 1)),
    **each("Reshape", SEQUENCE, target_shape=(-1, 2)),
    **each("STFTSpectrogram", LONG[..., None], mode="angle", frame_length=32, fft_length=32),
    # of images
    **each("AugMix", IMAGE, num_chains=2, seed=6),
    **each("AutoContrast", IMAGE, value_range=(0, 200)),
    **each("CenterCrop", IMAGE, height=4, width=5),
    **each("RandomCrop", IMAGE, height=4, width=5, seed=6),
    **each("ContrastLimitedAdaptiveHistogramEqualization", IMAGE, tile_grid_size=(2, 2)),
    **each("CutMix", LABELLED, factor=0.7, seed=6),
    **each("Equalization", IMAGE, bins=16),
    **each("MixUp", LABELLED, alpha=0.7, seed=6),
    **each("RandAugment", IMAGE, num_ops=3, seed=6),
    **each("RandomBrightness RandomColorDegeneration RandomContrast", IMAGE, factor=0.3, seed=6),
    **each("RandomElasticTransform RandomErasing RandomGrayscale", IMAGE, factor=0.9, seed=6),
    **each("RandomGaussianBlur RandomInvert RandomPerspective", IMAGE, factor=0.8, seed=6),
    **each("RandomHue RandomRotation RandomSaturation RandomSharpness", IMAGE, factor=0.4, seed=6),
    **each("RandomColorJitter", IMAGE, brightness_factor=0.2, hue_factor=0.1, seed=6),
    **each("RandomFlip", IMAGE, mode="vertical", seed=6),
    **each("RandomPosterization", IMAGE, factor=3, seed=6),
    **each("RandomShear", IMAGE, x_factor=0.3, y_factor=0.2, seed=6),
    **each("RandomTranslation", IMAGE, height_factor=0.2, width_factor=0.3, seed=6),
    **each("RandomZoom", IMAGE, height_factor=0.3, fill_mode="constant", seed=6),
    **each("Resizing", IMAGE, height=5, width=4, crop_to_aspect_ratio=True),
    **each("Solarization", IMAGE, addition_factor=0.3, threshold_factor=0.6, seed=6),
    **each("MaxNumBoundingBoxes", BOXED, max_number=3, fill_value=-7, bounding_box_format="xyxy"),
    # of words and numbers
    **each("CategoryEncoding", COUNTS, num_tokens=4, output_mode="count"),
    **each("HashedCrossing", (WORDS, WORDS[::-1]), num_bins=5, output_mode="one_hot"),
    **each("Hashing", WORDS, num_bins=5, mask_value="a", salt=[1, 2]),
}
#: Adapted to the first, called on the second.
ADAPTED: Specs = {
    **each("Discretization", FLAT[:, :1], FLAT[:, 1:2], num_bins=4, output_mode="one_hot"),
    **each("IntegerLookup", COUNTS, COUNTS, output_mode="count", num_oov_indices=2),
    **each("Normalization", FLAT, FLAT, invert=True),
    **each("StringLookup", WORDS, WORDS, output_mode="tf_idf"),
    **each("TextVectorization", ["a b c", "b"], WORDS, ngrams=2, output_sequence_length=4),
}
WRAPPING = {
    "Bidirectional": layer(lambda: layers.Bidirectional(layers.GRU(2, **RECURRENT)), SEQUENCE),
    "Pipeline": layer(lambda: layers.Pipeline([layers.RandomFlip(seed=6)]), IMAGE),
    "RNN": layer(
        lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], stateful=True), SEQUENCE
    ),
    "SpectralNormalization": layer(lambda: layers.SpectralNormalization(layers.Dense(3)), FLAT),
    "StackedRNNCells": layer(
        lambda: layers.StackedRNNCells([layers.SimpleRNNCell(6), layers.LSTMCell(6)]),
        *(FLAT, [[FLAT], [FLAT, -FLAT]]),
    ),
    "TFSMLayer": layer(tfsm, FLAT),
    "JaxLayer": layer(
        lambda: layers.JaxLayer(product, params={"w": np.ones((6, 2), "float32")}), FLAT
    ),
    "TorchModuleWrapper": layer(torch_module, FLAT),
    "TimeDistributed": layer(lambda: layers.TimeDistributed(layers.Dense(2)), SEQUENCE),
    "Wrapper": Citizen(wrapper, variables),
}

# ---- models


def small() -> Any:
    dense = [layers.Dense(width, name=f"d{width}") for width in (3, 2)]
    return keras.Sequential([keras.Input((6,)), *dense])


def trained(obj: Any, *followers: Any) -> Any:
    obj.compile(optimizers.SGD(0.01, momentum=0.9, **zoo.AVERAGES), "mse", metrics=["mae"])
    obj.fit(FLAT, FLAT[:, :2], epochs=2, verbose=0, callbacks=list(followers))
    return obj


def functional() -> Any:
    x = keras.Input((6,))
    return trained(keras.Model(x, layers.Dropout(0.3, seed=1)(layers.Dense(2)(x)) * 2.0))


def distiller() -> Any:
    d = keras.distillation
    parts = [d.LogitsDistillation(2.0), d.FeatureDistillation("mae", "d3", "d3")]
    return trained(d.Distiller(small(), small(), parts, [0.7, 0.2], student_loss_weight=0.3))


def use_model(obj: Any) -> Any:
    before = plain([obj(FLAT, training=False), obj.losses])
    logs = obj.train_on_batch(FLAT, FLAT[:, :2], return_dict=True)
    return before, plain([logs, obj(FLAT), obj.variables, obj.optimizer.variables])


def regression(X: Any, y: Any, width: int) -> Any:  # noqa: N803
    x = keras.Input((X.shape[-1],))
    obj = keras.Model(x, layers.Dense(y.shape[-1] if y.ndim > 1 else 1)(layers.Dense(width)(x)))
    obj.compile("sgd", "mse")
    return obj


def estimator(make: Callable[[], Any], target: Any) -> Citizen:
    def use(obj: Any) -> Any:
        out = obj.transform(FLAT) if hasattr(obj, "transform") else obj.predict(FLAT)
        return out, plain(obj.model_.variables), obj.history_.history

    return Citizen(lambda: make().fit(FLAT, target), use)


ESTIMATED = {"model": regression, "model_kwargs": {"width": 3}, "fit_kwargs": {"verbose": 0}}

# ---- optimizers

GRADIENTS = {"kernel": floats(4, 3), "bias": floats(3)}
OPTIMIZERS: Specs = {
    **each("Adadelta", rho=0.9, weight_decay=0.1),
    **each("Adafactor", clip_threshold=0.5, relative_step=False),
    **each("Adagrad", initial_accumulator_value=0.3, clipvalue=0.2),
    **each("Adam", amsgrad=True, gradient_accumulation_steps=3, **zoo.AVERAGES),
    **each("AdamW", weight_decay=0.1, global_clipnorm=0.5),
    **each("Adamax", beta_1=0.8, loss_scale_factor=2.0),
    **each("Ftrl", l1_regularization_strength=0.1, beta=0.2),
    **each("Lamb", beta_2=0.9, weight_decay=0.1),
    **each("Lion", beta_1=0.8, clipnorm=0.4),
    **each("Muon", momentum=0.8, ns_steps=3, exclude_layers=["bias"]),
    **each("Nadam", beta_1=0.8, ema_overwrite_frequency=2, **zoo.AVERAGES),
    **each("RMSprop", centered=True, momentum=0.5),
    **each("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    **each("ScheduleFreeAdamW", warmup_steps=3, weight_decay=0.1),
}
RATE = {"initial_learning_rate": 0.1}
SCHEDULES: Specs = {
    **each("CosineDecay", **RATE, decay_steps=9, warmup_target=0.2, warmup_steps=2),
    **each("CosineDecayRestarts", **RATE, first_decay_steps=3, m_mul=0.7),
    **each("ExponentialDecay InverseTimeDecay", **RATE, decay_steps=3, decay_rate=0.5),
    **each("PiecewiseConstantDecay", boundaries=[2, 5], values=[0.3, 0.2, 0.1]),
    **each("PolynomialDecay", **RATE, decay_steps=5, power=2.0, cycle=True),
}


def step(obj: Any, *names: str) -> Any:
    obj.apply([keras.ops.convert_to_tensor(GRADIENTS[name]) for name in names or GRADIENTS])
    return obj


def built(make: Callable[[], Any], *names: str) -> Any:
    over = [keras.Variable("ones", GRADIENTS[n].shape, name=n) for n in names or GRADIENTS]
    obj = make()
    if isinstance(obj, optimizers.AdamW):
        obj.exclude_from_weight_decay(var_list=over[1:])
    obj.build(over)
    return obj


def use_optimizer(obj: Any, *names: str) -> Any:
    return plain([step(obj, *names)._trainable_variables, obj.variables])


def optimizer(make: Callable[[], Any]) -> Citizen:
    return Citizen(lambda: step(built(make)), use_optimizer)


def optimizer_map(start: Callable[..., Any] = lambda make, _: make()) -> Any:
    sgd = start(new("optimizers.SGD", 0.1, momentum=0.9), "bias")
    return optimizers.OptimizerMap(sgd, {"ker.*": start(new("optimizers.Adam", 0.2), "kernel")})


def scaled() -> Any:
    inner = optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9)
    return optimizers.LossScaleOptimizer(inner, initial_scale=4.0, dynamic_growth_steps=3)


# ---- losses and metrics, by what they compare

SHARES = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], "float32")
LABELS = np.array([2, 0, 1, 1])
REAL = (floats(4, 3), floats(4, 3))
BINARY = ((SHARES > 0.25).astype("float32"), SHARES[::-1].copy())
ONE_HOT, SPARSE = (np.eye(3, dtype="float32")[LABELS], SHARES), (LABELS, SHARES)
CLASSES = (LABELS, LABELS[::-1].copy())
LOSSES: Specs = {
    **each("BinaryCrossentropy", *BINARY, label_smoothing=0.1, from_logits=True),
    **each("BinaryFocalCrossentropy", *BINARY, alpha=0.4, apply_class_balancing=True),
    **each("CTC", np.array([[1, 2]] * 2), floats(2, 5, 4), reduction="sum"),
    **each("CategoricalCrossentropy", *ONE_HOT, label_smoothing=0.2),
    **each("CategoricalFocalCrossentropy", *ONE_HOT, gamma=3.0, alpha=[0.1, 0.2, 0.3]),
    **each("CategoricalGeneralizedCrossEntropy", *SPARSE, q=0.7),
    **each("CategoricalHinge KLDivergence", *ONE_HOT, reduction="mean"),
    **each("Circle", *SPARSE, gamma=8.0, margin=0.3, remove_diagonal=False),
    **each("CosineSimilarity", *REAL, axis=0),
    **each("Dice", *ONE_HOT, axis=(0,)),
    **each("Hinge Poisson SquaredHinge", *BINARY, reduction="none"),
    **each("Huber", *REAL, delta=3.0, reduction="none"),
    **each("LogCosh MeanSquaredError", *REAL, name="mine", dtype="float64"),
    **each("MeanAbsoluteError", *REAL, reduction=None),
    **each("MeanAbsolutePercentageError", *REAL, reduction="mean_with_sample_weight"),
    **each("MeanSquaredLogarithmicError", *BINARY, reduction="sum"),
    **each("SparseCategoricalCrossentropy", *SPARSE, ignore_class=1),
    **each("Tversky", *ONE_HOT, alpha=0.3, beta=0.7),
}
METRICS: Specs = {
    **each("AUC", *BINARY, num_thresholds=5, curve="PR", multi_label=True, num_labels=3),
    **each("Accuracy", *CLASSES, dtype="float64"),
    **each("BinaryAccuracy", *BINARY, threshold=0.4),
    **each("BinaryCrossentropy", *BINARY, label_smoothing=0.1),
    **each("BinaryIoU", *BINARY, target_class_ids=(1,), threshold=0.4),
    **each("CategoricalAccuracy CategoricalHinge KLDivergence", *ONE_HOT, dtype="float64"),
    **each("CategoricalCrossentropy", *ONE_HOT, from_logits=True),
    **each("ConcordanceCorrelation CosineSimilarity PearsonCorrelation", *REAL, axis=0),
    **each("F1Score", *ONE_HOT, average="macro", threshold=0.4),
    **each("FBetaScore", *ONE_HOT, average="weighted", beta=2.0),
    **each("FalseNegatives FalsePositives", *BINARY, thresholds=[0.3, 0.6]),
    **each("TrueNegatives TruePositives", *BINARY, thresholds=0.2),
    **each("Hinge MeanSquaredLogarithmicError Poisson SquaredHinge", *BINARY, dtype="float64"),
    **each("IoU", *CLASSES, num_classes=3, target_class_ids=(0, 2)),
    **each("MeanIoU", *CLASSES, num_classes=3, ignore_class=0),
    **each("OneHotIoU", *ONE_HOT, num_classes=3, target_class_ids=(1,)),
    **each("OneHotMeanIoU", *ONE_HOT, num_classes=3, ignore_class=2),
    **each("LogCoshError MeanAbsoluteError MeanSquaredError", *REAL, dtype="float64"),
    **each("MeanAbsolutePercentageError RootMeanSquaredError", *REAL, dtype="float64"),
    **each("Mean Sum", LABELS, SHARES[:, 0], dtype="float64"),
    **each("MeanMetricWrapper", *REAL, fn=square),
    **each("Precision", *BINARY, thresholds=[0.3, 0.6], class_id=1),
    **each("PrecisionAtRecall", *BINARY, recall=0.6, num_thresholds=7),
    **each("R2Score", *REAL, class_aggregation="variance_weighted_average", num_regressors=1),
    **each("Recall", *BINARY, top_k=2),
    **each("RecallAtPrecision", *BINARY, precision=0.6, num_thresholds=7),
    **each("SensitivityAtSpecificity", *BINARY, specificity=0.6, num_thresholds=7),
    **each("SpecificityAtSensitivity", *BINARY, sensitivity=0.6, num_thresholds=7),
    **each("SparseCategoricalAccuracy", *SPARSE, dtype="float64"),
    **each("SparseCategoricalCrossentropy", *SPARSE, ignore_class=1),
    **each("SparseTopKCategoricalAccuracy", *SPARSE, k=2),
    **each("TopKCategoricalAccuracy", *ONE_HOT, k=2),
}


def loss(make: Callable[[], Any], y: Any, p: Any) -> Citizen:
    return Citizen(make, lambda obj: (plain(obj(y, p)), attributes(obj)))


def metric(make: Callable[[], Any], y: Any, p: Any) -> Citizen:
    def made() -> Any:
        obj = make()
        obj.update_state(y, p)
        return obj

    def use(obj: Any) -> Any:
        first = plain(obj.result())
        obj.update_state(y, p[::-1].copy())
        return first, plain([obj.result(), obj.variables])

    return Citizen(made, use)


def metric_base() -> Any:
    obj = keras.Metric(name="m")
    obj.total = obj.add_variable((2,), "ones", name="total")
    return obj


# ---- what layers and optimizers are given

INITIALIZERS: Specs = {
    **each("Constant", value=1.5),
    **each("GlorotNormal", seed=11, input_axes=(1,), output_axes=(0,)),
    **each("GlorotUniform HeNormal HeUniform LecunNormal LecunUniform", seed=11),
    **each("Identity", gain=3.0),
    **each("Ones Zeros"),
    **each("Orthogonal", gain=2.0, seed=11),
    **each("RandomNormal TruncatedNormal", mean=1.0, stddev=0.2, seed=11),
    **each("STFT", side="imag", window="hamming", periodic=True),
    **each("VarianceScaling", scale=2.0, mode="fan_out", distribution="uniform", seed=11),
}
CONSTRAINTS: Specs = {
    **each("MaxNorm", max_value=1, axis=1),
    **each("MinMaxNorm", min_value=0.3, max_value=0.5, rate=0.7),
    **each("Constraint NonNeg"),
    **each("UnitNorm", axis=1),
}
POLICIES: Specs = {
    **each("AWQDTypePolicy", mode="awq/4/32", source_name="mixed_bfloat16"),
    **each("DTypePolicy", name="mixed_bfloat16"),
    **each("FloatDTypePolicy", name="mixed_float16"),
    **each("GPTQDTypePolicy", mode="gptq/4/32", source_name="float16"),
    **each("Int4DTypePolicy", mode="int4/32", source_name="float16"),
    **each("QuantizedDTypePolicy", mode="int8", source_name="bfloat16"),
    **each("QuantizedFloat8DTypePolicy", mode="float8", source_name="float32"),
}
CALIBRATED = {"dataset": ["a b"], "tokenizer": double, "weight_bits": 4, "group_size": 8}
ABS_MAX = new("quantizers.AbsMaxQuantizer", axis=0, value_range=(-7, 7))
QUANTIZERS: Specs = {
    **each("AWQConfig", **CALIBRATED, num_grid_points=7),
    **each("Float8QuantizationConfig"),
    **each("Int4QuantizationConfig", block_size=32),
    **each("GPTQConfig", **CALIBRATED, hessian_damping=0.1, symmetric=True),
}


def seeds() -> Any:
    obj = keras.random.SeedGenerator(5, name="seeds")
    obj.next()
    return obj


def use_initializer(obj: Any) -> Any:
    shape = (8, 1, 5) if isinstance(obj, keras.initializers.STFT) else (4, 4)
    return plain([obj(shape, dtype="float32") for _ in range(2)])


def use_policy(obj: Any) -> Any:
    names = (obj.name, obj.compute_dtype, obj.variable_dtype, obj.quantization_mode)
    return names, plain(obj.get_config())


# ---- callbacks


def path(name: str) -> str:
    return os.path.join(tempfile.gettempdir(), "catalogue", name)


CALLBACKS: Specs = {
    **each("BackupAndRestore", backup_dir=path("backup"), save_freq=3),
    **each("CSVLogger", filename=path("log.csv"), separator=";"),
    **each("Callback ProgbarLogger"),
    **each("LambdaCallback", on_epoch_end=halve, mine=halve),
    **each("ModelCheckpoint", filepath=path("best.keras"), save_best_only=True),
    **each("RemoteMonitor", root="http://localhost:1", headers={"a": "b"}, send_as_json=True),
    **each("TensorBoard", log_dir=path("board"), histogram_freq=1, update_freq=2),
}
#: Made by a training.
FOLLOWERS: Specs = {
    **each("EarlyStopping", monitor="loss", mode="max", patience=1, restore_best_weights=True),
    **each("History"),
    **each("LearningRateScheduler", schedule=halve),
    **each("ReduceLROnPlateau", monitor="loss", factor=0.5, patience=3, min_delta=9.0),
    **each("SwapEMAWeights", swap_on_epoch=True),
    **each("TerminateOnNaN", raise_error=True),
}


if not zoo.AVERAGES:
    CALLBACKS["SwapEMAWeights"] = FOLLOWERS.pop("SwapEMAWeights")  # it wants averages to swap


def follower(make: Callable[[], Any]) -> Citizen:
    def made() -> Any:
        obj = make()
        trained(small(), obj)
        return obj

    return Citizen(made, use_callback)


def use_callback(obj: Any) -> Any:
    given = [f(3, 0.5) for name in ("schedule", "mine") if (f := getattr(obj, name, None))]
    return attributes(obj), given, obj.model and obj.model.get_weights()


def callback_list() -> Any:
    stop = callbacks.EarlyStopping("loss", patience=2)
    obj = callbacks.CallbackList([stop], add_history=True, model=trained(small()), epochs=3)
    obj.on_train_begin()
    obj.on_epoch_end(0, {"loss": 0.5})
    return obj


# ---- the rest

ROWS = {"a": [0.5, 1.5, 4.0], "b": ["x", "y", "é"], "c": [1, 2, 7]}
MESH = new("distribution.DeviceMesh", (1,), ["x"], ["cpu:0"])


def layout_map() -> Any:
    obj = distribution.LayoutMap(MESH())
    obj["dense/.*kernel"] = ("x", None)
    return obj


def use_mesh(obj: Any) -> Any:
    return obj.shape, obj.axis_names, list(obj.devices)


def use_layout(obj: Any) -> Any:
    return obj.axes, use_mesh(obj.device_mesh)


def use_layout_map(obj: Any) -> Any:
    return list(obj), use_layout(obj["dense/1/kernel"])


def use_distribution(obj: Any) -> Any:
    return attributes(obj), use_mesh(obj.device_mesh), use_layout(obj.get_data_layout((2, 3)))


def feature_space() -> Any:
    import tensorflow as tf

    f = keras.utils.FeatureSpace
    of = {"a": f.float_normalized(), "b": f.string_categorical(), "c": f.integer_hashed(4)}
    obj = f(of, crosses=[("b", "c")], crossing_dim=5, name="space")
    obj.adapt(tf.data.Dataset.from_tensor_slices(ROWS))
    return obj


def progbar() -> Any:
    obj = keras.utils.Progbar(5, width=7, verbose=0, stateful_metrics=["b"])
    obj.update(2, [("a", 0.5), ("b", 0.7)])
    return obj


def use_progbar(obj: Any) -> Any:
    obj.update(3, [("a", 1.5)])
    times = {"_start", "_last_update", "_time_at_epoch_start", "_time_at_epoch_end"}
    return {k: v for k, v in attributes(obj).items() if k not in times}


def frozen_config() -> Any:
    obj = keras.utils.Config(a=1, b={"c": [2.5]})
    obj.freeze()
    return obj


def function() -> Any:
    x, y = keras.KerasTensor((None, 6), name="x"), keras.KerasTensor((None, 6), name="y")
    return keras.Function([x, y], [keras.ops.tanh(x) * 2.0 + y, keras.ops.sum(y, axis=1)], name="f")


def variable() -> Any:
    obj = keras.Variable(FLAT[0], dtype="float16", trainable=False, name="v")
    obj.regularizer = keras.regularizers.L2(0.5)
    obj.assign_add(keras.ops.ones(6))
    return obj


def use_variable(obj: Any) -> Any:
    flags = (obj.name, obj.path, obj.dtype, tuple(obj.shape), obj.trainable)
    return flags, plain([obj, obj.regularizer(obj), obj.assign_add(obj)])


def use_tensor(obj: Any) -> Any:
    return obj.name, obj.shape, obj.dtype


CITIZENS: dict[str, Citizen] = {
    **citizens("layers", layer, LAYERS),
    **citizens("layers", adapted, ADAPTED),
    **{f"layers.{name}": citizen for name, citizen in WRAPPING.items()},
    **citizens("layers", by(config), each("InputLayer", shape=(3,), dtype="int32", name="i")),
    **citizens("layers", by(config), each("InputSpec", shape=(None, 3), axes={1: 3})),
    **citizens("layers", by(config), each("Layer", trainable=False, dtype="float64", name="l")),
    "Model": Citizen(functional, use_model),
    "Sequential": Citizen(lambda: trained(small()), use_model),
    "distillation.Distiller": Citizen(distiller, use_model),
    **citizens("wrappers", estimator, each("SKLearnRegressor", FLAT[:, 0], **ESTIMATED)),
    **citizens(
        "wrappers", estimator, each("SKLearnClassifier SKLearnTransformer", LABELS, **ESTIMATED)
    ),
    **citizens("optimizers", optimizer, OPTIMIZERS),
    "optimizers.LossScaleOptimizer": optimizer(scaled)
    if keras.backend.backend() != "jax"
    # applied outside of a train step it leaks a tracer there; the zoo has one that trained
    else Citizen(lambda: built(scaled), variables),
    "optimizers.MultiOptimizer": optimizer(lambda: optimizers.MultiOptimizer(optimizer_map())),
    "optimizers.Optimizer": Citizen(
        partial(built, new("optimizers.Optimizer", 0.1, name="o")), variables
    ),
    "optimizers.OptimizerMap": Citizen(
        lambda: optimizer_map(lambda make, name: step(built(make, name), name)),
        lambda obj: [use_optimizer(obj[name], name) for name in GRADIENTS],
    ),
    **citizens(
        "optimizers.schedules",
        by(lambda obj: ([plain(obj(at)) for at in (0, 1, 2, 4, 7, 20)], config(obj))),
        SCHEDULES,
    ),
    **citizens("optimizers.schedules", by(attributes), each("LearningRateSchedule")),
    **citizens("losses", loss, LOSSES),
    **citizens("losses", by(config), each("Loss", name="l", reduction="sum", dtype="float64")),
    **citizens("metrics", metric, METRICS),
    "metrics.Metric": Citizen(metric_base, variables),
    **citizens("initializers", by(use_initializer), INITIALIZERS),
    **citizens("initializers", by(attributes), each("Initializer")),
    # with a seed that has a state
    "initializers.RandomUniform": Citizen(
        lambda: keras.initializers.RandomUniform(-1.0, 2.0, seed=seeds()), use_initializer
    ),
    **citizens("regularizers", by(called), each("L1", l1=0.3) | each("L2", l2=0.2)),
    **citizens("regularizers", by(called), each("L1L2", l1=0.3, l2=0.2)),
    **citizens("regularizers", by(called), each("OrthogonalRegularizer", factor=0.2)),
    **citizens("regularizers", by(attributes), each("Regularizer")),
    **citizens("constraints", by(called), CONSTRAINTS),
    **citizens("dtype_policies", by(use_policy), POLICIES),
    "dtype_policies.DTypePolicyMap": Citizen(
        new("dtype_policies.DTypePolicyMap", "bfloat16", {"a/.*": keras.DTypePolicy("float16")}),
        lambda obj: (use_policy(obj), obj["a/b"].name, obj["b"].name, list(obj)),
    ),
    **citizens("quantizers", by(config), QUANTIZERS),
    **citizens("quantizers", by(attributes), each("Quantizer", output_dtype="uint8")),
    "quantizers.AbsMaxQuantizer": Citizen(ABS_MAX, called),
    "quantizers.Int8QuantizationConfig": Citizen(
        lambda: keras.quantizers.Int8QuantizationConfig(ABS_MAX()), config
    ),
    "quantizers.QuantizationConfig": Citizen(
        lambda: keras.quantizers.QuantizationConfig(ABS_MAX(), ABS_MAX()), config
    ),
    **citizens("callbacks", by(use_callback), CALLBACKS),
    **citizens("callbacks", follower, FOLLOWERS),
    "callbacks.CallbackList": Citizen(
        callback_list, lambda obj: (attributes(obj), [use_callback(x) for x in obj.callbacks])
    ),
    **citizens("distillation", by(attributes), each("DistillationLoss")),
    **citizens(
        "distillation",
        by(lambda obj: (plain(obj.compute_loss(*REAL)), obj.get_config())),
        each("FeatureDistillation", loss="mae") | each("LogitsDistillation", temperature=2.0),
    ),
    "distribution.DeviceMesh": Citizen(MESH, use_mesh),
    "distribution.DataParallel": Citizen(
        lambda: distribution.DataParallel(MESH(), auto_shard_dataset=False), use_distribution
    ),
    "distribution.LayoutMap": Citizen(layout_map, use_layout_map),
    "distribution.ModelParallel": Citizen(
        lambda: distribution.ModelParallel(layout_map=layout_map(), batch_dim_name="x"),
        lambda obj: (use_distribution(obj), use_layout_map(obj._layout_map)),
    ),
    "distribution.TensorLayout": Citizen(
        lambda: distribution.TensorLayout(("x", None), MESH()), use_layout
    ),
    "random.SeedGenerator": Citizen(
        seeds, lambda x: (x.name, plain([keras.random.normal((2,), seed=x), x.next(), x.state]))
    ),
    "utils.Config": Citizen(frozen_config, lambda obj: (obj.as_dict(), obj.frozen)),
    "utils.CustomObjectScope": Citizen(
        new("utils.CustomObjectScope", {"f": double}), lambda obj: obj.custom_objects["f"](3)
    ),
    "utils.FeatureSpace": Citizen(feature_space, lambda obj: (plain(obj(ROWS)), obj.name)),
    "utils.Progbar": Citizen(progbar, use_progbar),
    "utils.PyDataset": Citizen(new("utils.PyDataset", 2, max_queue_size=3), attributes),
    "Function": Citizen(function, lambda obj: (obj.name, plain(obj([FLAT, -FLAT])))),
    "KerasTensor": Citizen(new("KerasTensor", (None, 3), "int32", name="k"), use_tensor),
    "Operation": Citizen(new("Operation", name="op"), lambda obj: obj.name),
    "Variable": Citizen(variable, use_variable),
    # scopes, before they are entered
    "RematScope": Citizen(new("RematScope", "larger_than", output_size_threshold=5), attributes),
    "StatelessScope": Citizen(new("StatelessScope", collect_losses=True), attributes),
    "SymbolicScope": Citizen(new("SymbolicScope"), attributes),
    "name_scope": Citizen(new("name_scope", "n"), attributes),
}

for name in ELSEWHERE.keys() & CITIZENS.keys():
    del CITIZENS[name]
#: What Keras itself could not make or use, on which backends, and up to when.
BROKEN_BEFORE = {
    "distribution.DataParallel": (("tensorflow", "torch"), (3, 15)),
    "distribution.ModelParallel": (("tensorflow", "torch"), (3, 15)),
    "optimizers.Muon": (("tensorflow",), (3, 13)),
}
for name, (on, end) in BROKEN_BEFORE.items():
    if keras.backend.backend() in on and end > zoo.KERAS:
        ELSEWHERE[name] = "Keras's own does not work"
        del CITIZENS[name]
if zoo.KERAS < OF_KERAS:
    here = public_classes().keys() | FACTORIES
    ELSEWHERE = {name: why for name, why in ELSEWHERE.items() if name in here}
    for name in CITIZENS.keys() - here:
        del CITIZENS[name]

# ---- applications

#: The least side that each takes, where it is not 32.
SIDES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}


def application(name: str) -> keras.Model:
    side = SIDES.get(name, 32)
    shape = (side, side, 3)
    return getattr(keras.applications, name)(weights=None, input_shape=shape, classes=3)


APPLICATIONS: dict[str, Callable[[], keras.Model]] = {
    name: partial(application, name)
    for name, _ in inspect.getmembers(keras.applications, inspect.isfunction)
}
#: One small model of each family.
FAMILIES = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2"),
    *("InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small", "NASNetMobile", "ResNet50"),
    *("ResNet50V2", "VGG16", "VGG19", "Xception"),
)
