"""How much of a machine a process takes, said before its backend starts the devices.

One module for each backend, with the same verbs:

``started()``
    Whether the backend has started its devices, after which little can be changed.
``settle(limits)``
    Sets :class:`Limits`. Raises :class:`StartedError` if it cannot any more.
``settle_thread(limits)``
    Sets what each thread has of its own, on a thread that may have computed before.
``gpus()``
    Names of the GPUs that the backend uses; starts them.
``memory()``
    How the backend takes their memory, in a word or two; starts them.
``threads()``
    How many cores a computation may use, or None for all of the machine's.

Which GPU a process sees is the driver's to say, for all backends: ``CUDA_VISIBLE_DEVICES``.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from dask.utils import parse_bytes

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

    def settle_thread(self, limits: Limits) -> None:
        """Set those that a thread has of its own."""

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


def is_number(value: Any, kind: type) -> bool:
    """Say whether a value is one, and not True or False."""
    return isinstance(value, kind) and not isinstance(value, bool)


def memory_limit(given: Any) -> str | int | float | None:
    """Return what stands for a limit: "growth", bytes as int, a part of the card as float."""
    memory = given
    if memory is None:
        return None
    if memory == "growth":
        return "growth"
    if isinstance(memory, str):
        try:
            memory = int(parse_bytes(memory))
        except ValueError as error:
            raise ValueError(f"memory={memory!r} is no number of bytes, or 'growth'") from error
    if is_number(memory, int) and memory >= 1 << 20:
        return int(memory)
    if is_number(memory, float) and 0 < memory <= 1:
        return float(memory)
    raise ValueError(
        f"memory={given!r} is neither 'growth', nor bytes from 1 MiB, nor a part of the card "
        "between 0.0 and 1.0"
    )


#: Seconds to wait for threads that run tasks.
_PATIENCE = 10.0


async def settle_threads(executor: Any, limits: Limits) -> None:
    """Set limits that threads have of their own on all of a pool that may have computed before.

    Parameters
    ----------
    executor : ThreadPoolExecutor
        Of ``limits.tasks`` threads.
    limits : Limits

    Raises
    ------
    StartedError
        If they run tasks that do not end.
    """
    if not getattr(executor, "_threads", True):  # there are none yet: they will take the process's
        return
    together = threading.Barrier(limits.tasks, timeout=_PATIENCE)

    def settle() -> None:
        together.wait()
        current().settle_thread(limits)

    settled = [asyncio.wrap_future(executor.submit(settle)) for _ in range(limits.tasks)]
    try:
        await asyncio.gather(*settled)
    except threading.BrokenBarrierError:
        raise StartedError(
            "its threads have computed before, and run tasks that do not end: place workers before "
            "they are given any"
        ) from None


def driver_gpus() -> int | None:
    """Ask CUDA's driver how many GPUs it shows this process, for good; None where it is not."""
    count = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        failed = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return None
    return None if failed else count.value


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
