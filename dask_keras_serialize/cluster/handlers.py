"""What Dask asks of a value, answered for Keras's objects.

Serialize and deserialize it, weigh it, name it. Loads neither Keras nor a backend
until it is given one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.header import FORMAT


def serialize_keras(obj: Any) -> tuple[dict[str, Any], list[Any]]:
    """Serialize a model or another of Keras's objects for Dask's family of serializers.

    Parameters
    ----------
    obj : object

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
        If it cannot travel without losing something.
    NotImplementedError
        If its class says itself how it is pickled: Dask then asks pickle.
    """
    from dask_keras_serialize.protocol import encode
    from dask_keras_serialize.values.shells import reduces_itself

    if reduces_itself(obj.__class__):
        raise NotImplementedError(f"{type(obj).__qualname__} has a __reduce__ of its own")
    header, frames = encode(obj)
    return header.to_wire(), list(frames)


def deserialize_keras(header: dict[str, Any], frames: list[Any]) -> Any:
    """Deserialize what :func:`serialize_keras` or :func:`serialize_on_gpu` wrote.

    Parameters
    ----------
    header : dict
    frames : list of objects with the buffer protocol, or ``__cuda_array_interface__``
        What a comm or a file handed over, the object's own from now on, as those of a
        numpy array are (``distributed/protocol/numpy.py``): it uses large writeable ones
        in place where its backend can, and never writes to them.

    Returns
    -------
    object
        Or, on a worker where it cannot be rebuilt, BrokenObject: an exception while a
        worker reads what it fetches from another would leave its task waiting forever.

    Raises
    ------
    DecodeError
        If header and frames are not whole, or the object cannot be rebuilt here.
    """
    from dask_keras_serialize.cluster.broken import broken
    from dask_keras_serialize.wire.header import Header
    from dask_keras_serialize.wire.sides import importing_keras

    try:
        checked = Header.from_wire(header)
        with importing_keras(checked):
            from dask_keras_serialize.protocol import decode

        return decode(checked, frames, keep=True)
    except DecodeError as error:
        return broken(error, header, frames)


def serialize_on_gpu(obj: Any) -> tuple[dict[str, Any], list[Any]]:
    """Serialize what lies on a GPU for Dask's "cuda" family, which leaves it there.

    Parameters
    ----------
    obj : object

    Returns
    -------
    header : dict
    frames : list of memoryview and DeviceFrame
        Large variables are snapshots on the GPU, see :mod:`dask_keras_serialize.wire.cuda`.

    Raises
    ------
    EncodeError
        If it cannot travel without losing something.
    NotImplementedError
        If no large variable of it lies on a GPU: Dask then asks its own family.
    """
    from dask_keras_serialize.protocol import encode, lies_on_gpu
    from dask_keras_serialize.values.shells import reduces_itself

    if reduces_itself(obj.__class__) or not lies_on_gpu(obj):
        raise NotImplementedError(f"{type(obj).__qualname__} has nothing large on a GPU")
    header, frames = encode(obj, on_device=True)
    return header.to_wire(), list(frames)


def loads(original: Callable[..., Any], header: dict[str, Any], frames: list[Any]) -> Any:
    """Load what Dask's or the "cuda" family of serializers wrote, ours by our own header.

    Dask would unpickle the object's class first, to look up who loads it, and where that
    cannot be imported, fail without a word on it (``dask_loads`` in
    ``distributed/protocol/serialize.py``, ``cuda_loads`` in ``cuda.py`` beside it).
    """
    ours = header.get("sub-header")
    if isinstance(ours, dict) and ours.get("format") == FORMAT:
        return deserialize_keras(ours, frames)
    return original(header, frames)


def sizeof_keras(obj: Any) -> int:
    """Count the bytes of all variables, uncopied, and of what else an object holds."""
    from dask.sizeof import sizeof

    from dask_keras_serialize.protocol import graph_nbytes, nbytes

    size = nbytes(obj) + graph_nbytes(obj)
    if size:
        return size
    held = (value for value in vars(obj).values() if isinstance(value, (list, tuple, dict)))
    return sys.getsizeof(obj) + sum(int(sizeof(value)) for value in held)


def tokenize_keras(obj: Any) -> Any:
    """Return what tells objects apart: header and bytes, which Dask then hashes."""
    from dask_keras_serialize.packed import Parcel
    from dask_keras_serialize.protocol import encode
    from dask_keras_serialize.values.shells import reduces_itself

    if reduces_itself(obj.__class__):
        from dask.tokenize import normalize_token

        return normalize_token([type(obj), obj.__reduce__()])
    header, frames = encode(obj, for_token=True)
    return Parcel(header.to_bytes(), frames).__dask_tokenize__()
