"""Strings <-> bytes: the one dtype of Keras whose elements have no size.

The length of each string in bytes, as 64-bit little-endian integers in C order, then
all strings one after the other.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.frames import Bytes

_LENGTH = np.dtype("<u8")


def to_bytes(strings: npt.NDArray[Any]) -> Bytes:
    """Turn an array of ``bytes`` objects, of any shape, into an array of uint8."""
    flat = [bytes(each) for each in strings.reshape(-1)]
    lengths = np.array([len(each) for each in flat], _LENGTH)
    return np.frombuffer(lengths.tobytes() + b"".join(flat), np.uint8)


def from_bytes(raw: Bytes, shape: tuple[int, ...], owner: str) -> npt.NDArray[np.object_]:
    """Turn what :func:`to_bytes` wrote back into an array of ``bytes`` objects.

    Raises
    ------
    DecodeError
        If the lengths do not add up to the bytes.
    """
    head = math.prod(shape) * _LENGTH.itemsize
    content = raw[head:].tobytes()
    ends = [0]
    for length in raw[:head].view(_LENGTH).tolist():
        ends.append(ends[-1] + length)
    if len(ends) != math.prod(shape) + 1 or ends[-1] != len(content):
        raise DecodeError(
            f"{owner}: strings of {ends[-1]} bytes are said to lie in {len(content)}; send it again"
        )
    strings = np.empty(math.prod(shape), object)
    for i, (start, end) in enumerate(pairwise(ends)):
        strings[i] = content[start:end]
    return strings.reshape(shape)
