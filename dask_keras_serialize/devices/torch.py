"""PyTorch: takes a GPU's memory as it is needed, and may be capped at any time."""

from __future__ import annotations

import torch

from dask_keras_serialize.devices import Limits, StartedError


def started() -> bool:
    """Return True: Keras counted the GPUs when it was imported, and chose (``torch/core.py``)."""
    return True


def settle(limits: Limits) -> None:
    """Set limits; every thread that runs a task has a pool of its own."""
    if limits.cpu and gpus():
        raise StartedError("Keras has chosen the GPU")
    if limits.threads is not None:
        settle_thread(limits)  # and every thread that has not computed yet
        try:
            torch.set_num_interop_threads(limits.threads)
        except RuntimeError as error:  # in use, or set before
            if torch.get_num_interop_threads() != limits.threads:
                raise StartedError(f"torch runs {error}") from error
    if limits.fraction is not None and gpus():
        torch.cuda.set_per_process_memory_fraction(limits.fraction, 0)


def settle_thread(limits: Limits) -> None:
    """Set the number of threads of the pool that this thread has of its own."""
    if limits.threads is not None:
        torch.set_num_threads(max(1, limits.threads // limits.tasks))


def gpus() -> list[str]:
    """Return the names of the GPUs in use."""
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def memory() -> str:
    """Say how memory is taken; not every torch tells its cap."""
    cap = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return "as needed" if cap >= 1 else f"as needed, up to {cap:.2f} of the card's"


def threads() -> int | None:
    """Return the cores of one task."""
    return int(torch.get_num_threads())
