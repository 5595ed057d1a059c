"""The header: everything about a packed object but its bytes, typed and checked.

On the wire a header is a dict of plain values under keys that are lower-case with
hyphens, so that it survives msgpack with ``use_list=False`` (lists come back as
tuples; ``distributed/protocol/core.py``). In the process it is a frozen dataclass.
:meth:`Header.from_wire` trusts nothing: types, sizes, shapes against sizes, and
versions are checked before anything else is looked at. ``docs/protocol.md`` is the
same thing in words.
"""

from __future__ import annotations

import functools
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import msgpack
import numpy as np

from dask_keras_serialize.errors import DecodeError, FormatError
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.fingerprints import fingerprints
from dask_keras_serialize.wire.frames import AnyFrame, Location

FORMAT = "dask-keras-serialize"

#: Raised whenever a reader of the old format would misread the new one.
FORMAT_VERSION = 1

Encoding = Literal["config", "value"]

#: Axes, as many as NumPy has; parcels, each with a link to the one before: it takes a recursion.
MOST_AXES, MOST_LINKS = 64, 250

#: Keras's dtype whose elements have no size; see :mod:`dask_keras_serialize.wire.strings`.
STRING = "string"

#: Bytes of one element of every dtype that can travel, by Keras's name for it; of a
#: string, of its length.
ITEMSIZE = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    STRING: 8,
}


@dataclass(frozen=True, slots=True)
class VariableEntry:
    """One row of the table of variables.

    Attributes
    ----------
    path : str
        Keras's path of the variable, such as ``"sequential/dense/kernel"``.
    shape : tuple of int
    dtype : str
        A key of :data:`ITEMSIZE`.
    trainable : bool
    location : Location
        Where its bytes lie, in C order and little-endian.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    location: Location


@dataclass(frozen=True, slots=True)
class Header:
    """What a packed object says of itself.

    Attributes
    ----------
    encoding : {"config", "value"}
        Which twin, ``by_config`` or ``by_value``, wrote ``body``.
    owner : str
        What errors call the object, such as ``"model 'net' (keras.src....Sequential)"``.
    name, class_name : str
        The object's name, empty if it has none, and the full name of its class.
    backend : str
        ``keras.backend.backend()`` of the sender.
    versions : dict of str to str
        Of python, keras, the backend and this package, at the sender.
    body : dict
        What the encoding needs beside the variables; plain msgpack values.
    variables : tuple of VariableEntry
    frame_sizes, fingerprints : tuple of int
        Of each frame, in order; see :mod:`dask_keras_serialize.wire.fingerprints`.
    whole : tuple of int
        Frames whose fingerprint is over all their bytes.
    unread : tuple of int
        Frames without a fingerprint, which left from a GPU's memory.
    byteorder : str
        ``sys.byteorder`` of the sender.
    """

    encoding: Encoding
    owner: str
    name: str
    class_name: str
    backend: str
    versions: dict[str, str]
    body: dict[str, Any] = field(repr=False)
    variables: tuple[VariableEntry, ...] = field(repr=False)
    frame_sizes: tuple[int, ...] = field(default=(), repr=False)
    fingerprints: tuple[int, ...] = field(default=(), repr=False)
    whole: tuple[int, ...] = field(default=(), repr=False)
    unread: tuple[int, ...] = field(default=(), repr=False)
    byteorder: str = sys.byteorder

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return sum(self.frame_sizes)

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """Names of code that is not Keras's own, each with "reference" or "value"."""
        return tuple((str(name), str(how)) for name, how in self.body.get("code", ()))

    def is_of(self, cls: type) -> bool:
        """Say whether a class has the name of the object's, in whatever module it is here."""
        return cls.__name__ == self.class_name.rpartition(".")[2]

    def with_frames(self, frames: Sequence[AnyFrame]) -> Header:
        """Return this header with the frames it describes."""
        marks, whole = fingerprints(frames)
        return replace(
            self,
            frame_sizes=tuple(frame.nbytes for frame in frames),
            fingerprints=tuple(marks),
            whole=tuple(whole),
            unread=tuple(i for i, frame in enumerate(frames) if isinstance(frame, DeviceFrame)),
        )

    def to_wire(self) -> dict[str, Any]:
        """Return the header as plain values, safe for msgpack."""
        return {
            "format": FORMAT,
            "format-version": FORMAT_VERSION,
            "encoding": self.encoding,
            "owner": self.owner,
            "name": self.name,
            "class-name": self.class_name,
            "backend": self.backend,
            "byteorder": self.byteorder,
            "versions": self.versions,
            "body": self.body,
            "variables": [
                [v.path, list(v.shape), v.dtype, v.trainable, *v.location] for v in self.variables
            ],
            "frame-sizes": list(self.frame_sizes),
            "fingerprints": list(self.fingerprints),
            "whole": list(self.whole),
            **({"unread": list(self.unread)} if self.unread else {}),
        }

    @classmethod
    def from_wire(cls, wire: object) -> Header:
        """Read a header, trusting nothing.

        Parameters
        ----------
        wire : dict
            What :meth:`to_wire` returned, before or after msgpack.

        Raises
        ------
        DecodeError
            If it is no header of this package, of a format this version cannot
            read (FormatError), or not of one piece: a missing field, a wrong type, a shape that
            does not fit the bytes, an unknown dtype.
        """
        if not isinstance(wire, Mapping) or wire.get("format") != FORMAT:
            raise DecodeError(
                f"not a header written by {FORMAT}; the sender and this process must "
                "both have the package installed and registered"
            )
        version = wire.get("format-version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(_other_format(wire, version))
        try:
            header = cls._read(wire)
            header.code  # noqa: B018  raises if it is malformed
            header._check()
        except DecodeError:
            raise
        except Exception as error:  # bytes that lie break what reads them in any way
            raise DecodeError(f"malformed {FORMAT} header: {error!r}; send it again") from None
        return header

    @classmethod
    def _read(cls, wire: Mapping[str, Any]) -> Header:
        encoding = wire["encoding"]
        if encoding not in ("config", "value"):
            raise DecodeError(f"malformed {FORMAT} header: unknown encoding {encoding!r}")
        return cls(
            encoding=encoding,
            owner=_typed(wire, "owner", str),
            name=_typed(wire, "name", str),
            class_name=_typed(wire, "class-name", str),
            backend=_typed(wire, "backend", str),
            byteorder=_typed(wire, "byteorder", str),
            versions={str(k): str(v) for k, v in _typed(wire, "versions", Mapping).items()},
            body=dict(_typed(wire, "body", Mapping)),
            variables=tuple(_entry(row) for row in wire["variables"]),
            frame_sizes=tuple(_natural(n) for n in wire["frame-sizes"]),
            fingerprints=tuple(_natural(n) for n in wire["fingerprints"]),
            whole=tuple(_natural(n) for n in wire["whole"]),
            unread=tuple(_natural(n) for n in wire.get("unread", ())),
        )

    def _check(self) -> None:
        if self.byteorder not in ("little", "big"):
            raise DecodeError(
                f"{self.owner}: malformed header: unknown byte order {self.byteorder[:40]!r}"
            )
        if self.byteorder != sys.byteorder and self.encoding != "config":
            raise DecodeError(
                f"{self.owner}: sent by value by a {self.byteorder}-endian machine (Python "
                f"{self.versions.get('python')}, keras {self.versions.get('keras')}), which this "
                f"{sys.byteorder}-endian one (Python {python_version()}) cannot read: send a model "
                "that travels by its config"
            )
        if len(self.frame_sizes) != len(self.fingerprints):
            raise DecodeError(f"{self.owner}: malformed header: sizes and fingerprints differ")
        for v in self.variables:
            if v.dtype not in ITEMSIZE:
                raise DecodeError(f"{self.owner}: variable {v.path!r} has unknown dtype {v.dtype}")
            if not fits_in_an_array(v.shape):
                raise DecodeError(f"{self.owner}: variable {v.path!r} has no possible shape")
            need = math.prod(v.shape) * ITEMSIZE[v.dtype]
            if v.dtype == STRING and v.location.nbytes >= need:
                continue
            if need != v.location.nbytes:
                raise DecodeError(
                    f"{self.owner}: variable {v.path!r} of shape {v.shape} and dtype "
                    f"{v.dtype} takes {need} bytes, but {v.location.nbytes} were sent"
                )

    def to_bytes(self) -> bytes:
        """Return the header packed by msgpack."""
        packed: bytes = msgpack.packb(self.to_wire(), use_bin_type=True)
        return packed

    @classmethod
    def from_bytes(cls, packed: bytes) -> Header:
        """Read what :meth:`to_bytes` wrote; see :meth:`from_wire` for what it raises."""
        try:
            wire = msgpack.unpackb(packed, use_list=False)
        except Exception as error:  # msgpack has no common base for what bad bytes raise
            raise DecodeError(f"not a header written by {FORMAT}: {error!r}") from None
        return cls.from_wire(wire)


def fits_in_an_array(shape: Sequence[int]) -> bool:
    """Say whether a backend can hold a shape; some end the process over others, of no bytes too."""
    return len(shape) <= MOST_AXES and math.prod(n or 1 for n in shape) <= sys.maxsize // 16


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of one of Keras's, not for strings."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes  # float8 and bfloat16; a dependency of every keras

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype


@functools.cache
def package_version() -> str:
    """Return the installed version of this package."""
    return metadata.version("dask-keras-serialize")


def python_version() -> str:
    """Return the running Python's version, such as ``"3.12.1"``."""
    return platform.python_version()


def minor(version: str) -> list[str]:
    """Return the part of a version that an object by value needs the same: of 3.12.1, 3 and 12."""
    return re.findall(r"\d+", version)[:2]


def _other_format(wire: Mapping[str, Any], version: object) -> str:
    """Say that a header is of a format that cannot be read; nothing in it is checked yet."""
    owner, versions = wire.get("owner"), wire.get("versions")
    theirs = versions.get(FORMAT) if isinstance(versions, Mapping) else None
    named = f"{owner[:200]}: " if isinstance(owner, str) else ""
    sent = f" by {FORMAT} {theirs[:40]}" if isinstance(theirs, str) else ""
    plain = isinstance(version, float | str | None) or (type(version) is int and version < 2**64)
    number = repr(version if plain else type(version))
    return (
        f"{named}sent in wire format {number[:40]}{sent}, which {FORMAT} {package_version()} here "
        f"cannot read: it reads format {FORMAT_VERSION}; install the same version of the package "
        "on both sides"
    )


def _typed(wire: Mapping[str, Any], key: str, kind: type) -> Any:
    value = wire[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _entry(row: Any) -> VariableEntry:
    path, shape, dtype, trainable, frame, offset, nbytes = row
    if not isinstance(path, str) or not isinstance(dtype, str) or type(trainable) is not bool:
        raise TypeError("a row of the table of variables has fields of wrong types")
    return VariableEntry(
        path,
        tuple(_natural(n) for n in shape),
        dtype,
        trainable,
        Location(_natural(frame), _natural(offset), _natural(nbytes)),
    )
