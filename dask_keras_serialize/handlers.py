"""What Dask asks of a value, answered for Keras models.

Serialize and deserialize it, weigh it, name it. Loads neither Keras nor a backend
until it is given a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.header import FORMAT

if TYPE_CHECKING:
    import keras

    from dask_keras_serialize.packed import BrokenModel


def serialize_keras_model(model: keras.Model) -> tuple[dict[str, Any], list[memoryview]]:
    """Serialize a model for Dask's family of serializers.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    header : dict
        Plain values, safe for msgpack.
    frames : list of memoryview
        Read-only; see :func:`dask_keras_serialize.protocol.encode` for
        copies.

    Raises
    ------
    EncodeError
        If the model cannot travel without losing something.
    """
    from dask_keras_serialize.protocol import encode

    header, frames = encode(model)
    return header.to_wire(), list(frames)


def deserialize_keras_model(header: dict[str, Any], frames: list[Any]) -> keras.Model | BrokenModel:
    """Deserialize what :func:`serialize_keras_model` wrote.

    Parameters
    ----------
    header : dict
    frames : list of objects with the buffer protocol
        What a comm or a file handed over, the model's own from now on, as those of a
        numpy array are (``distributed/protocol/numpy.py``): it uses large writeable ones
        in place where its backend can, and never writes to them.

    Returns
    -------
    keras.Model
        Or, on a worker where it cannot be rebuilt, BrokenModel: an exception while a
        worker reads what it fetches from another would leave its task waiting forever.

    Raises
    ------
    DecodeError
        If header and frames are not whole, or the model cannot be rebuilt here.
    """
    from dask_keras_serialize.header import Header
    from dask_keras_serialize.packed import broken, importing_keras

    try:
        checked = Header.from_wire(header)
        with importing_keras(checked):
            from dask_keras_serialize.protocol import decode

        return decode(checked, frames, keep=True)
    except DecodeError as error:
        return broken(error)


def loads(original: Callable[..., Any], header: dict[str, Any], frames: list[Any]) -> Any:
    """Load what Dask's family of serializers wrote, models by our own header.

    Dask would unpickle the model's class first, to look up who loads it, and where that
    cannot be imported, fail without a word on the model (``dask_loads`` in
    ``distributed/protocol/serialize.py``).
    """
    ours = header.get("sub-header")
    if isinstance(ours, dict) and ours.get("format") == FORMAT:
        return deserialize_keras_model(ours, frames)
    return original(header, frames)


def sizeof_model(model: keras.Model) -> int:
    """Count the bytes of all variables, uncopied, and of the objects around them."""
    from dask_keras_serialize.protocol import graph_nbytes, nbytes

    return nbytes(model) + graph_nbytes(model)


def tokenize_model(model: keras.Model) -> Any:
    """Return what tells models apart: header and bytes, which Dask then hashes."""
    from dask_keras_serialize.packed import PackedModel
    from dask_keras_serialize.protocol import encode

    header, frames = encode(model, for_token=True)
    return PackedModel(header.to_bytes(), frames).__dask_tokenize__()
