"""How many symbolic tensors a config may have Keras make, and how many constants.

Each tensor is a call of a layer that Keras traces, for some tenth of a millisecond. A config says
with few bytes that a model is called often, and calls another often: three of 40 layers and 40
calls, one in the other, are 18 kB and 64,000 calls.

A Normalization that is told its mean keeps it, no variable, as wide as its inputs, which a config
makes as wide as it likes (``keras/src/layers/preprocessing/normalization.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.header import MOST_AXES
from dask_keras_serialize.hooks import in_this_thread

#: Of a config; more of each object that is named in it. Honest models take two or three each.
MOST, MOST_OF_ONE = 20_000, 20

#: Of all Normalizations together: features of their inputs.
MOST_FEATURES = 10**7


@contextmanager
def counted(most: int, owner: str) -> Iterator[None]:
    """Let this thread make no more symbolic tensors than so many, and no wider constants.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock.

    Raises
    ------
    DecodeError
        In the midst of what would make more.
    """
    made = features = 0

    def count(original: Any, tensor: Any, shape: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal made
        made += 1
        if isinstance(shape, list | tuple) and len(shape) > MOST_AXES:
            raise DecodeError(
                f"{owner}: its config has a tensor of {len(shape)} axes, not more than "
                f"{MOST_AXES} of which any array has; send it again"
            )
        if made > most:
            raise DecodeError(
                f"{owner}: its config asks for more than {most} symbolic tensors, for more "
                "than it names; send it by value, or in parts"
            )
        original(tensor, shape, *arguments, **keywords)

    def keep(original: Any, layer: Any, input_shape: Any, **keywords: Any) -> None:
        nonlocal features
        if layer.input_mean is not None and layer.axis:
            features += math.prod(input_shape[axis] or 0 for axis in layer.axis)
        if features > MOST_FEATURES:
            raise DecodeError(
                f"{owner}: its config has a mean for each of {features} features, "
                f"not more than {MOST_FEATURES} of which are made of one number; send it by value"
            )
        original(layer, input_shape, **keywords)

    with (
        in_this_thread(keras.KerasTensor, "__init__", count),
        in_this_thread(keras.layers.Normalization, "build", keep),
    ):
        yield
