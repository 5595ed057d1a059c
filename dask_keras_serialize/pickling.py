"""Pickle for Keras models, over the same encoder as everything else.

The reducer sits on ``keras.Model`` as ``__reduce_ex__``, which pickle, cloudpickle,
copy and joblib ask before ``__reduce__``: so ours is asked first whatever else, such
as scikeras, puts on ``__reduce__``, and in whatever order things are imported.
"""

from __future__ import annotations

from typing import Any

import keras

from dask_keras_serialize.packed import PackedModel


def pack(model: keras.Model) -> PackedModel:
    """Close a model into a parcel.

    Raises
    ------
    EncodeError
        If it cannot travel without losing something.

    Notes
    -----
    Copies: as :func:`dask_keras_serialize.protocol.encode`.
    """
    # here, not above: this module is loaded as keras is, which protocol may be importing
    from dask_keras_serialize.protocol import encode

    header, frames = encode(model)
    return PackedModel(header.to_bytes(), frames)


def reduce_model(model: keras.Model, protocol: Any) -> Any:
    """Reduce a model for pickle; stands on ``keras.Model`` as ``__reduce_ex__``.

    A subclass that defines ``__reduce__`` keeps it.

    Notes
    -----
    Copies: under protocol 5 with a buffer callback, as ``encode``; else pickle copies
    every byte once more into its stream.
    """
    for cls in type(model).__mro__:
        if cls is keras.Model:
            break
        if "__reduce__" in vars(cls):
            return model.__reduce__()
    return pack(model).__reduce_ex__(protocol)


def install() -> None:
    """Put the reducer on ``keras.Model``."""
    keras.Model.__reduce_ex__ = reduce_model


def uninstall() -> None:
    """Take it off again."""
    if vars(keras.Model).get("__reduce_ex__") is reduce_model:
        del keras.Model.__reduce_ex__
