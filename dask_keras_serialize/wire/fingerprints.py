"""Telling frames apart, so that none can take another's place unseen.

Fingerprints cost the same for any size: they are no checksum, which TCP and TLS
already carry. Where two frames of one message are alike in all that is sampled, and
yet different, all their bytes count. Of frames in a GPU's memory the length alone counts: to look
at them is to copy them.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence

import numpy as np

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.frames import AnyFrame, Frame

#: Bytes of one sample that :func:`fingerprint` reads, and how many it spreads out.
_SAMPLE, _SAMPLES = 256, 16


def check(
    frames: Sequence[AnyFrame],
    sizes: Sequence[int],
    fingerprints: Sequence[int],
    whole: Collection[int],
    owner: str,
    unread: Collection[int] = (),
) -> None:
    """Refuse frames that are not, one for one, those that were sent.

    Parameters
    ----------
    frames : sequence of memoryview or DeviceFrame
        What arrived.
    sizes, fingerprints : sequence of int
        Length in bytes and the fingerprint of each frame as it was sent.
    whole : collection of int
        Frames whose fingerprint is over all their bytes.
    owner : str
        Whose frames they are, for the error.
    unread : collection of int
        Frames that were sent from a GPU's memory, without a fingerprint.

    Raises
    ------
    DecodeError
        If a frame is missing, extra, truncated, lengthened, or out of order; of a mapped
        file, all but the first frame are taken at their lengths, unread.
    """
    if len(frames) != len(sizes):
        raise DecodeError(
            f"{owner}: {len(frames)} frames arrived where {len(sizes)} were sent; "
            "frames are missing or extra, send it again"
        )
    whole, unread = frozenset(whole), frozenset(unread)
    for i, (frame, size, mark) in enumerate(zip(frames, sizes, fingerprints, strict=True)):
        if frame.nbytes != size:
            raise DecodeError(
                f"{owner}: frame {i} has {frame.nbytes} bytes where {size} were sent; "
                "it was truncated or the frames are out of order, send it again"
            )
        if isinstance(frame, DeviceFrame) or i in unread:
            continue
        if i and isinstance(frame.obj, np.memmap):
            continue  # to look at a page of a mapped file is to read it, and those beside it
        if (zlib.crc32(frame) if i in whole else fingerprint(frame)) != mark:
            raise DecodeError(
                f"{owner}: frame {i} does not hold the bytes that were sent; "
                "it was altered or the frames are out of order, send it again"
            )


def fingerprint(frame: Frame) -> int:
    """Tell frames apart at a cost that does not grow with them.

    A CRC-32 over at most 4 KiB sampled evenly over the frame, its first and last
    bytes among them. It is no checksum of the whole, which TCP and TLS already carry.

    Parameters
    ----------
    frame : memoryview
        Format ``B``, contiguous.

    Returns
    -------
    int
        32 bits.
    """
    size = frame.nbytes
    if size <= _SAMPLE * _SAMPLES:
        return zlib.crc32(frame)
    mark = 0
    for i in range(_SAMPLES):
        start = (size - _SAMPLE) * i // (_SAMPLES - 1)
        mark = zlib.crc32(frame[start : start + _SAMPLE], mark)
    return mark


def fingerprints(frames: Sequence[AnyFrame]) -> tuple[list[int], list[int]]:
    """Tell frames of one message apart, so that none can take another's place.

    Parameters
    ----------
    frames : sequence of memoryview or DeviceFrame

    Returns
    -------
    fingerprints : list of int
        :func:`fingerprint` of each; the CRC-32 of all its bytes where two frames of the
        same size and fingerprint are different; 0 for those in a GPU's memory.
    whole : list of int
        Which those are.
    """
    here = {i: frame for i, frame in enumerate(frames) if not isinstance(frame, DeviceFrame)}
    marks = [fingerprint(here[i]) if i in here else 0 for i in range(len(frames))]
    alike: dict[tuple[int, int], list[int]] = {}
    for i, frame in here.items():
        alike.setdefault((frame.nbytes, marks[i]), []).append(i)
    whole = []
    for places in alike.values():
        if any(not _equal(here[places[0]], here[i]) for i in places[1:]):
            whole += places
    for i in whole:
        marks[i] = zlib.crc32(here[i])
    return marks, sorted(whole)


def _equal(a: Frame, b: Frame) -> bool:
    step = 2**17  # stop early, and need no memory of their size
    dtype = np.uint8 if a.nbytes % 8 else np.uint64
    x, y = np.frombuffer(a, dtype), np.frombuffer(b, dtype)
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))
