"""JAX: its clients read the environment once, when they are made: at the first array."""

from __future__ import annotations

import os

import jax

from dask_keras_serialize.devices import Limits, StartedError


def started() -> bool:
    """Say whether the clients are made; False where this JAX does not tell."""
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:
        return False
    return bool(backends_are_initialized())


def settle(limits: Limits) -> None:
    """Set limits; one pool of threads serves all tasks.

    The names are those of https://docs.jax.dev/en/latest/gpu_memory_allocation.html, and
    ``NPROC`` of ``xla/pjrt/utils.cc``, ``DefaultThreadPoolSize``.
    """
    wanted: dict[str, str] = {}
    if limits.threads is not None:
        wanted["NPROC"] = str(limits.threads)
    if limits.fraction is not None:
        wanted[_part_name()] = repr(limits.fraction)
    elif limits.growth:
        wanted["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    new = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    if started():
        if new or (limits.cpu and gpus()):
            raise StartedError("JAX has started its devices")
        return
    os.environ.update(new)
    if limits.cpu:
        jax.config.update("jax_platforms", "cpu")


def _part_name() -> str:
    """Return the name that a part of the card is told by: the new one fails beside the old."""
    new, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return new if new in os.environ else old


def settle_thread(limits: Limits) -> None:
    """Do nothing: threads share a pool."""


def gpus() -> list[str]:
    """Return the names of the GPUs in use."""
    return [str(device) for device in jax.devices() if device.platform != "cpu"]


def memory() -> str:
    """Say how memory is taken, by the names in :func:`settle`; JAX's default is 75 %."""
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return "as needed"
    part = os.environ.get(_part_name())
    at_once = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower()
    if at_once in ("false", "0"):
        return f"as needed, up to {part} of the card's" if part else "as needed"
    return f"{part or '0.75'} of the card's at once"


def threads() -> int | None:
    """Return the cores of the pool."""
    number = os.environ.get("NPROC", "")
    return int(number) if number.isdigit() else None
