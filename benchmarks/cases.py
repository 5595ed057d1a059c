"""What is measured: the settings, the models, and what the rows say of the machine.

Loads Keras only inside functions: the command itself never imports it, so that every
process that measures starts from nothing. Models are seeded and hold no zeros where
memory could stay untouched. Each is what its name says and nothing more, built anew in
each process that measures it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import values
from values import Array

if TYPE_CHECKING:
    import keras

__all__ = ["Array", "Settings", "build", "environment", "tiny", "touch"]

RESNET = "ResNet50"
RESNET_ADAM = "ResNet50 with Adam"
EFFICIENTNET = "EfficientNetB0"
BERT = "BERT base, KerasHub"
LAYERS = "1,000 tiny layers"
TINY = "one tiny layer"
FLOAT16 = "dense, float16"
BFLOAT16 = "dense, bfloat16"
DENSE = "dense"
DENSE_BIG = "dense, big"

#: In the order of the tables.
WORKLOADS = (
    RESNET, RESNET_ADAM, EFFICIENTNET, BERT, LAYERS, TINY, FLOAT16, BFLOAT16, DENSE, DENSE_BIG,
)  # fmt: skip

#: Those of a run that is not asked for all of them.
MAIN = (RESNET, RESNET_ADAM, TINY, DENSE)

#: Those that are measured on the other backends too.
ON_ALL_BACKENDS = (RESNET, RESNET_ADAM, EFFICIENTNET, DENSE)

#: Bytes of random numbers that large variables repeat: making more takes seconds, and no
#: compressor looks back so far.
_BLOCK = 16 << 20


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured; stands in the head of the results.

    Attributes
    ----------
    seed : int
        Of the weights.
    repetitions : int
        Timed ones at most, warm-up apart, of each way; three where models are large.
    seconds : float
        After so many no more repetitions of a peer with a workload are begun; there is
        one at least.
    dense_bytes, big_bytes, half_bytes : int
        The dense models are one kernel of so many bytes each, no bias; the third those of
        16-bit numbers.
    workloads, backends : tuple of str
        Of WORKLOADS; the first backend gets all of them, others ON_ALL_BACKENDS.
    turns : int
        Timed repetitions, in turns, of each figure through the cluster.
    tasks : int
        Sent with ``model=model``.
    layers, sizes, workers, counts : tuple of int
        The abscissas of the curves: layers of a model, bytes of one, workers, tasks.
    """

    seed: int = 20260
    repetitions: int = 5
    seconds: float = 1.0
    dense_bytes: int = 1 << 30
    big_bytes: int = 4 << 30
    half_bytes: int = 64 << 20
    workloads: tuple[str, ...] = MAIN
    backends: tuple[str, ...] = ("tensorflow",)
    turns: int = 3
    tasks: int = 1000
    layers: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    sizes: tuple[int, ...] = tuple(1 << power for power in range(10, 31, 2))
    workers: tuple[int, ...] = (1, 3, 10, 30, 100)
    counts: tuple[int, ...] = (1, 10, 100, 1000, 10000)

    @classmethod
    def everything(cls) -> Settings:
        """All workloads, all backends: twice the time."""
        return cls(workloads=WORKLOADS, backends=("tensorflow", "jax", "torch"))

    @classmethod
    def quick(cls) -> Settings:
        """Few repetitions, small models, one backend: to see that it runs."""
        return cls(
            repetitions=2,
            seconds=0.5,
            dense_bytes=64 << 20,
            workloads=(RESNET, TINY, DENSE),
            turns=2,
            tasks=100,
            layers=(1, 10, 100),
            sizes=(1 << 10, 1 << 17, 1 << 24),
            workers=(1, 4, 16),
            counts=(1, 10, 100, 1000),
        )

    def bytes_of(self, workload: str) -> int:
        """Tell a workload's bytes where they are a setting; 0 elsewhere."""
        sizes = {DENSE: self.dense_bytes, DENSE_BIG: self.big_bytes}
        sizes |= {FLOAT16: self.half_bytes, BFLOAT16: self.half_bytes}
        return sizes.get(workload, 0)

    def title(self, workload: str) -> str:
        """Name a workload for people, with its size where that is a setting."""
        size = self.bytes_of(workload)
        name = DENSE if workload == DENSE_BIG else workload
        return f"{name}, {readable(size)}" if size else name

    def is_large(self, workload: str) -> bool:
        """Say whether processes should not hold it side by side."""
        return self.bytes_of(workload) >= 512 << 20


def build(workload: str, settings: Settings) -> keras.Model:
    """Build a model with seeded weights.

    Parameters
    ----------
    workload : str
        One of WORKLOADS.
    settings : Settings

    Returns
    -------
    keras.Model
        Functional or Sequential; compiled only with Adam, whose slots are built.

    Raises
    ------
    ImportError
        If KerasHub is needed and not installed.
    """
    import keras

    keras.utils.set_random_seed(settings.seed)
    model = _BUILDERS[workload](settings)
    return model if settings.bytes_of(workload) else fill(model, settings.seed)


def dense(nbytes: int, seed: int, dtype: str = "float32") -> keras.Model:
    """Build a model of one kernel of so many bytes, with seeded weights from the start.

    With zeros first, TensorFlow's oneDNN allocator, which gives nothing back, would keep
    as much memory again.
    """
    import keras

    count = nbytes // (2 if "16" in dtype else 4)
    rows = 1 << (count.bit_length() // 2)
    units = max(1, count // rows)

    def kernel(shape: tuple[int, ...], dtype: str) -> Any:
        return keras.ops.convert_to_tensor(_numbers(_block(seed), 0, shape), dtype)

    layer = keras.layers.Dense(units, use_bias=False, kernel_initializer=kernel, dtype=dtype)
    model = keras.Sequential([keras.layers.Input((rows,)), layer])
    layer.kernel_initializer = keras.initializers.GlorotUniform()  # what it has in real life
    return model


def many_layers(count: int) -> keras.Model:
    """Build a model of many small layers, side by side: Keras cannot nest 1,000 deep."""
    import keras

    start = keras.Input((4,))
    ends = [keras.layers.Dense(4)(start) for _ in range(count)]
    return keras.Model(start, keras.layers.Add()(ends) if count > 1 else ends[0])


def tiny() -> keras.Model:
    """Build the model that warms a process up: imports, caches, first calls."""
    import keras

    return keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])


def fill(model: keras.Model, seed: int) -> keras.Model:
    """Give all floating-point variables seeded random numbers; return the model."""
    block = _block(seed)
    for place, variable in enumerate(values.variables(model)):
        if variable.shape and "float" in str(variable.dtype):
            variable.assign(_numbers(block, place, variable.shape))
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):  # as after loading weights
            layer.finalize_state()
    return model


def _block(seed: int) -> Array:
    return np.random.default_rng(seed).random(_BLOCK // 4, np.float32)


def _numbers(block: Array, place: int, shape: tuple[int, ...]) -> Array:
    """Repeat a block, from another place for each variable."""
    size = int(np.prod(shape))
    numbers = np.resize(np.roll(block, 31 * place), size).reshape(shape)
    if numbers.ndim > 1:  # so that what a model predicts is finite
        numbers *= 2 * numbers.shape[-1] / size
    return numbers


def touch(nbytes: int) -> None:
    """Write to so much new memory and give it back.

    The host of a virtual machine may take back what the machine has not used for some
    seconds. The next to touch it waits, up to 2 s for a GiB, which has nothing to do
    with the peer whose turn it is. No more is touched than half of what is there: others
    may be about to ask for it too.
    """
    import psutil

    np.empty(min(nbytes, psutil.virtual_memory().available // 2), np.uint8)[::4096] = 1


def readable(nbytes: float) -> str:
    """Write a number of bytes for people, in binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.3g} {unit}"


def environment() -> dict[str, Any]:
    """Describe backend, versions and machine; call it where Keras is loaded."""
    import keras

    backend = keras.backend.backend()
    return {"backend": backend, "versions": versions(backend), "machine": machine()}


def versions(*backends: str) -> dict[str, str]:
    """Tell the versions of what is measured, by the names that people use."""
    names = {name: name for name in _PACKAGES}
    for backend in backends:  # comes under several names, such as tensorflow-cpu
        names |= {f"{backend}{suffix}": backend for suffix in ("", "-cpu")}
    found = {"python": platform.python_version()}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name in names:
            found[names[name]] = distribution.version
    return dict(sorted(found.items()))


def machine() -> dict[str, Any]:
    """Describe the machine, and how busy it is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory-gib": round(memory / 2**30),
        "load": round(os.getloadavg()[0], 1),
    }


_PACKAGES = (
    "keras", "keras-hub", "numpy", "dask", "distributed", "dask-keras-serialize", "ray",
    "safetensors", "scikeras",
)  # fmt: skip


def _resnet(_: Settings) -> keras.Model:
    import keras

    return keras.applications.ResNet50(weights=None)


def _resnet_adam(settings: Settings) -> keras.Model:
    model = _resnet(settings)
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


def _efficientnet(_: Settings) -> keras.Model:
    import keras

    return keras.applications.EfficientNetB0(weights=None)


def _bert(_: Settings) -> keras.Model:
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=30522,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=512,
    )


_BUILDERS: dict[str, Callable[[Settings], keras.Model]] = {
    RESNET: _resnet,
    RESNET_ADAM: _resnet_adam,
    EFFICIENTNET: _efficientnet,
    BERT: _bert,
    LAYERS: lambda _: many_layers(1000),
    TINY: lambda _: tiny(),
    FLOAT16: lambda settings: dense(settings.half_bytes, settings.seed, "float16"),
    BFLOAT16: lambda settings: dense(settings.half_bytes, settings.seed, "bfloat16"),
    DENSE: lambda settings: dense(settings.dense_bytes, settings.seed),
    DENSE_BIG: lambda settings: dense(settings.big_bytes, settings.seed),
}
