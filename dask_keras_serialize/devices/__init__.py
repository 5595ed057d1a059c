"""How much of a machine a process takes, said before its backend starts the devices.

One module for each backend, with the same verbs:

``started()``
    Whether the backend has started its devices, after which little can be changed.
``settle(limits)``
    Sets :class:`Limits`. Raises :class:`StartedError` if it cannot any more.
``gpus()``
    Names of the GPUs that the backend uses; starts them.
``memory()``
    How the backend takes their memory, in a word or two; starts them.
``threads()``
    How many cores a computation may use, or None for all of the machine's.

Which GPU a process sees is the driver's to say, for all backends: ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from dask_keras_serialize import backends


class StartedError(RuntimeError):
    """The backend has started its devices."""


@dataclass(frozen=True)
class Limits:
    """What a process may take.

    Parameters
    ----------
    cpu : bool
        No GPU at all.
    growth : bool
        Take a GPU's memory as it is needed, not most of it at once.
    nbytes : int or None
        Of a GPU's memory, in bytes.
    fraction : float or None
        The same, as a part of the card's.
    threads : int or None
        Cores, for all tasks together.
    tasks : int
        That run at the same time.
    """

    cpu: bool = False
    growth: bool = False
    nbytes: int | None = None
    fraction: float | None = None
    threads: int | None = None
    tasks: int = 1


class Devices(Protocol):
    """What the modules offer."""

    def started(self) -> bool:
        """Say whether the backend has started its devices."""

    def settle(self, limits: Limits) -> None:
        """Set limits; StartedError if that cannot be done any more."""

    def gpus(self) -> list[str]:
        """Start the devices; return the names of the GPUs among them."""

    def memory(self) -> str:
        """Say how the memory of those GPUs is taken."""

    def threads(self) -> int | None:
        """Return the cores that one computation may use, None for all."""


def current() -> Devices:
    """Choose the module of the backend that Keras runs on in this process."""
    name, _ = backends.current()
    module: Any = import_module(f"{__name__}.{name}")
    return cast(Devices, module)


def describe() -> str:
    """Say which devices Keras uses in this process, and how it takes their memory; starts them.

    Returns
    -------
    str
        Such as ``"cpu, 2 threads"`` or ``"GPU:0, memory as needed"``.
    """
    here = current()
    gpus = here.gpus()
    if gpus:
        return f"{', '.join(gpus)}, memory {here.memory()}"
    threads = here.threads()
    if threads is None:
        return "cpu, all cores"
    return f"cpu, {threads} thread{'' if threads == 1 else 's'}"
