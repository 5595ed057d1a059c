"""What is measured: the settings, the models, and what the rows say of the machine.

Loads Keras only inside functions: the command itself never imports it, so that every
process that measures starts from nothing. Models are seeded and hold no zeros where
memory could stay untouched. ``digest`` is how a result is compared, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import keras

Array = npt.NDArray[Any]

RESNET = "ResNet50"
RESNET_ADAM = "ResNet50 with Adam"
DENSE = "dense"

#: In the order of the tables.
WORKLOADS = (RESNET, RESNET_ADAM, DENSE)

#: Those that are scattered too.
SCATTERED = (RESNET, DENSE)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is measured; part of every row.

    Attributes
    ----------
    seed : int
        Of the weights.
    repetitions : int
        Timed ones, warm-up apart, of each way.
    scatter_repetitions : int
        Timed ones, warm-up apart, of each scatter.
    dense_side : int
        The dense model is one square float32 kernel of this many rows, no bias.
    workloads : tuple of str
        Of WORKLOADS.
    """

    seed: int = 20260
    repetitions: int = 5
    scatter_repetitions: int = 5
    dense_side: int = 16384
    workloads: tuple[str, ...] = WORKLOADS

    @classmethod
    def quick(cls) -> Settings:
        """Few repetitions and a dense model of 64 MiB: to see that it runs."""
        return cls(repetitions=2, scatter_repetitions=2, dense_side=4096, workloads=(RESNET, DENSE))

    def repetitions_of(self, workload: str, slow: bool) -> int:
        """One for a slow peer and the dense model: tens of seconds and gigabytes."""
        return 1 if slow and workload == DENSE else self.repetitions

    def title(self, workload: str) -> str:
        """Name a workload for people."""
        if workload != DENSE:
            return workload
        mib = self.dense_side**2 * 4 // 2**20
        return f"dense, {mib // 1024} GiB" if mib >= 1024 else f"dense, {mib} MiB"


def build(workload: str, settings: Settings) -> keras.Model:
    """Build a model with seeded weights.

    Parameters
    ----------
    workload : {"ResNet50", "ResNet50 with Adam", "dense"}
    settings : Settings

    Returns
    -------
    keras.Model
        Functional or Sequential; compiled only with Adam, whose slots are built.
    """
    import keras

    keras.utils.set_random_seed(settings.seed)
    if workload == DENSE:
        side = settings.dense_side
        return keras.Sequential(
            [keras.layers.Input((side,)), keras.layers.Dense(side, use_bias=False)]
        )
    model = keras.applications.ResNet50(weights=None)
    if workload == RESNET_ADAM:
        model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(settings.seed)
    for variable in _variables(model):
        if variable.shape and variable.dtype == "float32":
            variable.assign(rng.random(tuple(variable.shape), np.float32))
    return model


def tiny() -> keras.Model:
    """Build the model that warms a process up: imports, caches, first calls."""
    import keras

    return keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])


def weights(model: keras.Model) -> list[Array]:
    """Copy a model's weights, the optimizer's after its own, to writeable arrays."""
    return [np.array(array) for array in _read(model)]


def digest(value: keras.Model | list[Array]) -> str:
    """Hash all weights, their shapes and dtypes: equal only where all bits are."""
    total = hashlib.sha256()
    for array in value if isinstance(value, list) else _read(value):
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def touch(nbytes: int) -> None:
    """Write to so much new memory and give it back.

    The host of a virtual machine may take back what the machine has not used for some
    seconds. The next to touch it waits, up to 2 s for a GiB, which has nothing to do
    with the peer whose turn it is.
    """
    np.empty(nbytes, np.uint8)[::4096] = 1


def _read(model: keras.Model) -> Iterator[Array]:
    import keras

    for variable in _variables(model):
        yield np.asarray(keras.ops.convert_to_numpy(variable))


def _variables(model: keras.Model) -> list[keras.Variable]:
    optimizer = getattr(model, "optimizer", None)
    return [*model.variables, *(optimizer.variables if optimizer is not None else ())]


def environment() -> dict[str, Any]:
    """Describe versions and machine, for every row; call it where Keras is loaded."""
    import keras

    backend = keras.backend.backend()
    # a backend comes under several names, such as tensorflow-cpu
    names = {backend, f"{backend}-cpu"}
    packages = ["keras", "numpy", "dask", "distributed", "dask-keras-serialize"]
    versions = {"python": platform.python_version()}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        if name in names or name in packages:
            versions[backend if name in names else name] = distribution.version
    return {
        "backend": backend,
        "versions": dict(sorted(versions.items())),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory-gib": round(_memory() / 2**30),
            "load": round(os.getloadavg()[0], 1),
        },
    }


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
