"""TensorFlow: limits are set by ``tf.config``, until its context is made."""

from __future__ import annotations

import os

import tensorflow as tf

from dask_keras_serialize.devices import Limits, StartedError


def started() -> bool:
    """Say whether TensorFlow has looked what devices there are; True where it does not tell.

    Nothing public says so without looking itself, ``tf.config.threading`` included
    (``Context.config``, ``tensorflow/python/eager/context.py``).
    """
    try:
        from tensorflow.python.eager import context

        made = context._context
        return made is not None and (made._initialized or made._physical_devices is not None)
    except (ImportError, AttributeError):
        return True


def settle(limits: Limits) -> None:
    """Set limits; one pool of threads serves all tasks."""
    try:
        if limits.threads is not None:
            tf.config.threading.set_intra_op_parallelism_threads(limits.threads)
            tf.config.threading.set_inter_op_parallelism_threads(limits.threads)
        gpus = tf.config.list_physical_devices("GPU")
        if limits.cpu:
            tf.config.set_visible_devices([], "GPU")
            return
        for gpu in gpus:
            if limits.nbytes is not None:
                limit = tf.config.LogicalDeviceConfiguration(memory_limit=limits.nbytes >> 20)
                tf.config.set_logical_device_configuration(gpu, [limit])
            elif limits.growth:
                tf.config.experimental.set_memory_growth(gpu, True)
    except (RuntimeError, ValueError) as error:  # ValueError: it was configured otherwise
        raise StartedError(str(error)) from error


def settle_thread(limits: Limits) -> None:
    """Do nothing: threads share a pool."""


def gpus() -> list[str]:
    """Return the names of the GPUs in use."""
    return [device.name for device in tf.config.list_logical_devices("GPU")]


def memory() -> str:
    """Say how memory is taken; the environment has the last word on growth."""
    said = []
    growth = os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH")
    for gpu in tf.config.get_visible_devices("GPU"):
        parts = tf.config.get_logical_device_configuration(gpu) or []
        limits = [f"{part.memory_limit} MiB" for part in parts if part.memory_limit]
        grows = tf.config.experimental.get_memory_growth(gpu)
        if growth in ("true", "false"):
            grows = growth == "true"
        said.append(" + ".join(limits) or ("as needed" if grows else "all at once"))
    return ", ".join(dict.fromkeys(said))


def threads() -> int | None:
    """Return the cores of one computation."""
    return tf.config.threading.get_intra_op_parallelism_threads() or None
