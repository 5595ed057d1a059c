"""Sequential models that are built once, where Keras builds them once for every layer.

``Sequential.from_config`` adds its layers one by one, and each time calls all that it has so far
(``keras/src/models/sequential.py``): 200 layers take 5 s, and a config of 34 kB a quarter of a
minute. What it ends with is what the last of these builds makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from dask_keras_serialize.rebuilding.hooks import in_this_thread


@contextmanager
def built_once() -> Iterator[None]:
    """Have this thread's Sequential models built when they have their last layer.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock.
    """

    def from_config(
        original: Any, cls: type[keras.Sequential], config: Any, custom_objects: Any = None
    ) -> Any:
        if cls is keras.Sequential and _has_layers(config):
            return _build(config, custom_objects)
        return original(cls, config, custom_objects)

    with in_this_thread(keras.Sequential, "from_config", from_config):
        yield


def _has_layers(config: Any) -> bool:
    """Say whether a config has layers; those of Keras 2, without modules, get to no receiver."""
    layers = config.get("layers") if isinstance(config, dict) else None
    return isinstance(layers, list) and len(layers) > 0


def _build(config: dict[str, Any], custom_objects: dict[str, Any] | None) -> keras.Sequential:
    layers = [keras.saving.deserialize_keras_object(each, custom_objects)
              for each in config["layers"]]  # fmt: skip
    model = keras.Sequential(name=config.get("name"))
    for layer in layers[:-1]:
        model.add(layer, rebuild=False)
    model.add(layers[-1])
    shape = config.get("build_input_shape")
    if not model.built and isinstance(shape, tuple | list) and shape:
        model.build(shape)
    return model
