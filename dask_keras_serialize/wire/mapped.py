"""The bytes of a file that holds pickles: mapped, not read; decompressed where they are not.

What compressed files and open ones hold is written to a temporary file, which vanishes with
what is mapped of it. So neither costs memory, and who keeps a part of the bytes keeps
nothing else of them.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.frames import LARGE, Frame

#: How compressed files begin. joblib writes zlib's bare streams where it is told no format.
_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"]\x00\x00": lzma.open,
}
_ZLIB = (b"x\x01", b"x^", b"x\x9c", b"x\xda")
_LZ4 = b"\x04\x22\x4d\x18"

_STEP = 1 << 16

#: A file may be decompressed to this many times its size, which is all that zlib can reach,
#: and to so many bytes more.
_RATIO, _SLACK = 1032, 1 << 26


class Content:
    """The bytes of a file, read as :func:`pickletools.genops` reads.

    Parameters
    ----------
    mapped : mmap.mmap
    """

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._view = memoryview(mapped)
        self._at = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all the content."""
        return self._view.nbytes

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._at

    def startswith(self, prefix: bytes) -> bool:
        """Say whether what is to be read next begins so."""
        return self._view[self._at : self._at + len(prefix)] == prefix

    def __contains__(self, part: bytes) -> bool:
        return self._mapped.find(part) >= 0

    def read(self, size: int) -> bytes | Frame:
        """Read so many bytes, or those that are left; many of them are not copied."""
        part = self._view[self._at : self._at + size]
        self._at += part.nbytes
        return part if part.nbytes >= LARGE else bytes(part)

    def readline(self) -> bytes:
        """Read to the end of the line."""
        end = self._mapped.find(b"\n", self._at) + 1
        return bytes(self.read((end or self.nbytes) - self._at))

    def take(self, size: int) -> Frame:
        """Read so many bytes without copying them.

        Raises
        ------
        DecodeError
            If fewer are left.
        """
        if not 0 <= size <= self.nbytes - self._at:
            raise DecodeError(f"truncated: {size} bytes are said to follow byte {self._at}")
        self._at += size
        return self._view[self._at - size : self._at]


def content(file: str | os.PathLike[str] | IO[bytes]) -> Content:
    """Map what a file holds.

    Parameters
    ----------
    file : path, or file open for reading
        Plain, or compressed by zlib, gzip, bz2, xz or lzma.

    Returns
    -------
    Content

    Raises
    ------
    DecodeError
        If it is no file of bytes, is empty or cannot be decompressed.
    OSError
        If there is no such file, or it may not be read.

    Notes
    -----
    Copies: none of a plain file given by its path; else one, into a temporary file.
    """
    if isinstance(file, (str, os.PathLike)):
        if os.path.exists(file) and not os.path.isfile(file):  # a pipe would be waited for
            raise DecodeError("not a file of bytes")
        with open(file, "rb") as opened:
            return _content(opened)
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        return _content(copy)


def _content(file: IO[bytes]) -> Content:
    file.seek(0)
    start = file.read(6)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    chunks = _decompressed(file, start)
    if chunks is None:
        return _map(file)
    with tempfile.TemporaryFile() as whole:
        try:
            for chunk in chunks:
                whole.write(chunk)
                if whole.tell() > _RATIO * size + _SLACK:
                    raise DecodeError(
                        f"its {size} bytes decompress to over {whole.tell()}, as no model "
                        "does: decompress it first if it can be trusted"
                    )
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DecodeError(f"cannot be decompressed: {error}") from error
        return _map(whole)


def _map(file: IO[bytes]) -> Content:
    file.flush()
    if not os.fstat(file.fileno()).st_size:
        raise DecodeError("empty")
    return Content(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _decompressed(file: IO[bytes], start: bytes) -> Iterator[bytes] | None:
    """Decompress a file by how it starts; None for a plain one."""
    if start.startswith(_LZ4):
        raise DecodeError("compressed by lz4, which is not supported here: decompress it first")
    if start.startswith(_ZLIB):
        return _inflated(file)
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            return _chunks(opener(file))
    return None


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(_STEP), b"")


def _inflated(file: IO[bytes]) -> Iterator[bytes]:
    stream = zlib.decompressobj()
    for chunk in _chunks(file):
        yield stream.decompress(chunk)
    if not stream.eof:
        raise EOFError("the compressed stream ended before its end was reached")
