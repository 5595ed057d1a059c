"""What layers keep in files, such as vocabularies: read for sending, written for loading.

Keras has layers write them into a folder and load them from one (``save_assets``, ``load_assets``,
``keras/src/saving/saving_lib.py``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import keras
import numpy as np

from dask_keras_serialize import private
from dask_keras_serialize.backends import Array
from dask_keras_serialize.cluster.whereabouts import temporary_folder
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits.names import lopsided

_Result = TypeVar("_Result")


def read(model: keras.Model) -> tuple[list[tuple[int, str]], list[Array]]:
    """Return the layers' numbers and the names of their files, and what is in them.

    Raises
    ------
    OSError
        If there is no room for them in any temporary folder.
    """
    names: list[tuple[int, str]] = []
    extras: list[Array] = []
    for i, layer in _with_assets(model):
        for name, content in _in_a_folder(partial(_saved, layer)):
            names.append((i, name))
            extras.append(content)
    return names, extras


def write(model: keras.Model, names: list[tuple[int, str]], extras: list[Array]) -> None:
    """Have layers load what :func:`read` returned.

    Raises
    ------
    DecodeError
        If they are of other layers, or their names are none, or twice the same.
    OSError
        As :func:`read`.
    """
    layers = dict(_with_assets(model))
    files: dict[int, dict[str, Array]] = {}
    for (i, name), content in zip(names, extras, strict=True):
        if i not in layers:
            raise DecodeError(f"model {model.name!r}: assets were sent for no layer that has any")
        if Path(name).name != name or name in files.get(i, ()):
            raise DecodeError(f"model {model.name!r}: asset {name!r} is not a name, or comes twice")
        files.setdefault(i, {})[name] = content
    for i, content_of in sorted(files.items()):
        _in_a_folder(partial(_load, layers[i], content_of))


#: The file in which lookups keep their vocabulary (``index_lookup.py``).
_WORDS = "vocabulary.txt"


def is_lopsided(name: str, content: Array) -> bool:
    """Say whether a file is a vocabulary that takes much more memory than its bytes."""
    # text, as Keras splits it: bytes have fewer kinds of line ends
    words = content.tobytes().decode(errors="replace").splitlines() if name == _WORDS else ()
    return lopsided(words)


def _with_assets(model: keras.Model) -> Iterator[tuple[int, keras.Layer]]:
    for i, layer in enumerate(private.flatten_layers(model)):
        if hasattr(layer, "save_assets"):
            yield i, layer


def _saved(layer: keras.Layer, folder: Path) -> list[tuple[str, Array]]:
    layer.save_assets(str(folder))
    return [
        (path.name, np.frombuffer(path.read_bytes(), np.uint8)) for path in sorted(folder.iterdir())
    ]


def _load(layer: keras.Layer, files: dict[str, Array], folder: Path) -> None:
    for name, content in files.items():
        if is_lopsided(name, content):
            raise DecodeError(f"layer {layer.name!r}: one word of its vocabulary is too long")
        (folder / name).write_bytes(content.tobytes())
    layer.load_assets(str(folder))


def _in_a_folder(use: Callable[[Path], _Result]) -> _Result:
    """Use a new folder; another where a worker's own has no room, as when it has spilled."""
    try:
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
            return use(Path(folder))
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            return use(Path(folder))
