"""Sequential models that are built once, where Keras builds them once for every layer.

``Sequential.from_config`` adds its layers one by one, and each time calls all that it has so far
(``keras/src/models/sequential.py``): 200 layers take 5 s, and a config of 34 kB a quarter of a
minute. What it ends with is what the last of these builds makes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

#: What a config may have for layers to be added here; with anything else Keras adds them.
_KNOWN = {"name", "trainable", "dtype", "layers", "build_input_shape"}


@contextmanager
def built_once() -> Iterator[None]:
    """Have this thread's Sequential models built when they have their last layer.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock.
    """
    original = vars(keras.Sequential)["from_config"]
    builder = threading.get_ident()

    def from_config(
        cls: type[keras.Sequential], config: Any, custom_objects: dict[str, Any] | None = None
    ) -> keras.Sequential:
        if threading.get_ident() == builder and cls is keras.Sequential and _is_known(config):
            return _build(config, custom_objects)
        model: keras.Sequential = original.__func__(cls, config, custom_objects)
        return model

    keras.Sequential.from_config = classmethod(from_config)
    try:
        yield
    finally:
        keras.Sequential.from_config = original


def _is_known(config: Any) -> bool:
    """Say whether a config is what ``get_config`` writes; not so of Keras 2's layers."""
    return (
        isinstance(config, dict)
        and {"name", "layers"} <= config.keys() <= _KNOWN
        and isinstance(config["layers"], list)
        and len(config["layers"]) > 0
        and all(isinstance(each, dict) and "module" in each for each in config["layers"])
    )


def _build(config: dict[str, Any], custom_objects: dict[str, Any] | None) -> keras.Sequential:
    layers = [keras.saving.deserialize_keras_object(each, custom_objects)
              for each in config["layers"]]  # fmt: skip
    model = keras.Sequential(name=config["name"])
    for layer in layers[:-1]:
        model.add(layer, rebuild=False)
    model.add(layers[-1])
    shape = config.get("build_input_shape")
    if not model.built and isinstance(shape, tuple | list) and shape:
        model.build(shape)
    return model
