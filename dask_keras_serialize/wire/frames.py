"""Arrays <-> frames: where each array's bytes lie, and every copy that is made.

A *frame* is one contiguous run of bytes, a ``memoryview`` of format ``B``. Arrays of at
least :data:`LARGE` bytes are frames of their own: views of the caller's memory, not
copied. Smaller arrays are copied, once, into one *arena*, frame 0, each at a multiple
of :data:`ALIGNMENT` bytes, because a comm awaits every frame apart
(``distributed/comm/tcp.py``).

Ownership: a frame keeps the memory it views alive. Frames that are sent are read-only.
Of those that arrive, the few that are the receiver's to keep are writeable, see
:func:`as_frames`. Nothing here ever writes to a frame. Dask's "cuda" family has some that lie in a
GPU's memory, in the place of large arrays (:mod:`dask_keras_serialize.wire.cuda`).
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.cuda import DeviceFrame, to_host

#: Arrays of this many bytes or more are sent as frames of their own, uncopied.
LARGE = 65536

#: Offsets inside the arena are multiples of this many bytes, a cache line, which is
#: what every backend wants of a buffer it is to use in place.
ALIGNMENT = 64

Frame = memoryview
AnyFrame = Frame | DeviceFrame
Bytes = npt.NDArray[np.uint8]


class Location(NamedTuple):
    """Where an array's bytes lie: ``frames[frame][offset:offset + nbytes]``."""

    frame: int
    offset: int
    nbytes: int


def as_frame(array: npt.NDArray[np.generic]) -> Frame:
    """View an array's memory as a frame.

    Parameters
    ----------
    array : ndarray
        Any shape and dtype without Python objects.

    Returns
    -------
    memoryview
        Read-only, format ``B``, ``array.nbytes`` long; keeps ``array`` alive.

    Notes
    -----
    Copies: none for a C-contiguous array, else one.
    """
    # view(u1), not memoryview(array): the buffer protocol has no letter for bfloat16
    # and of the class it is: a backend may know its own views again
    whole = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    flat = whole.reshape(-1).view(np.uint8)
    return flat.data.toreadonly()


def layout(sizes: Sequence[int]) -> list[Location]:
    """Say where arrays of these sizes, in bytes, lie: small ones in the arena, frame 0.

    Sender and receiver derive it alike, so that no header can say anything else.
    """
    locations = []
    offset, frame = 0, 0
    for size in sizes:
        if size < LARGE:
            locations.append(Location(0, offset, size))
            offset += _aligned(size)
        else:
            frame += 1
            locations.append(Location(frame, 0, size))
    return locations


def pack(
    arrays: Sequence[npt.NDArray[np.generic] | DeviceFrame],
) -> tuple[list[Location], list[AnyFrame]]:
    """Lay arrays out in frames.

    Parameters
    ----------
    arrays : sequence of ndarray or DeviceFrame
        Any shapes and dtypes without Python objects; device frames of at least :data:`LARGE` bytes.

    Returns
    -------
    locations : list of Location
        One for each array, in order, as :func:`layout` says.
    frames : list of memoryview or DeviceFrame
        Read-only. The arena first, then the large arrays in order.

    Notes
    -----
    Copies: one for each array under :data:`LARGE` bytes (into the arena); none for
    the others if they are C-contiguous.
    """
    locations = layout([array.nbytes for array in arrays])
    small: list[Frame | bytes] = []
    frames: list[AnyFrame] = []
    for array, location in zip(arrays, locations, strict=True):
        if isinstance(array, DeviceFrame):
            frames.append(array)
        elif location.frame == 0:
            small += [as_frame(array), bytes(_aligned(array.nbytes) - array.nbytes)]
        else:
            frames.append(as_frame(array))
    goes_first = bool(frames) and _goes_first(frames[0])
    # Never of no bytes, which comms have trouble with, and there even if nothing is small: the
    # first frame may be received into one buffer with the header, and so at any address.
    least = _PASSED_ON if goes_first else ALIGNMENT
    size = sum(_aligned(each.nbytes) for each in locations if each.frame == 0)
    small.append(bytes(max(0, least - size)))
    arena = b"".join(small)
    # an arena that is known to be bytes counts as header
    first = memoryview(arena) if goes_first else np.frombuffer(arena, np.uint8).data
    return locations, [first.toreadonly(), *frames]


def unpack(frames: Sequence[AnyFrame], location: Location, owner: str) -> Bytes:
    """View one array's bytes inside the frames.

    Parameters
    ----------
    frames : sequence of memoryview or DeviceFrame
        As received.
    location : Location
        Where the bytes are said to lie.
    owner : str
        Whose bytes they are, for the error.

    Returns
    -------
    ndarray of uint8, shape ``(location.nbytes,)``
        View of the frame; give it its dtype and shape with ``view`` and ``reshape``.
        Writeable only if it is all of a frame that is.

    Raises
    ------
    DecodeError
        If the location lies outside the frames.

    Notes
    -----
    Copies: none; one of a device frame, to the host's memory.
    """
    index, offset, nbytes = location
    if not 0 <= index < len(frames):
        raise DecodeError(f"{owner}: its bytes are said to lie in frame {index} of {len(frames)}")
    if offset < 0 or nbytes < 0 or offset + nbytes > frames[index].nbytes:
        raise DecodeError(
            f"{owner}: its bytes are said to lie at {offset}:{offset + nbytes} "
            f"of a frame of {frames[index].nbytes} bytes"
        )
    frame = frames[index]
    if isinstance(frame, DeviceFrame):
        frame = to_host(frame, owner)
    view = np.frombuffer(frame, np.uint8, count=nbytes, offset=offset)
    if nbytes < frame.nbytes:
        view.flags.writeable = False
    return view


def as_frames(buffers: Sequence[object], owner: str, *, keep: bool = False) -> list[Frame]:
    """Take whatever a comm, a pickle or a file handed over as frames.

    Parameters
    ----------
    buffers : sequence of objects with the buffer protocol
        bytes, bytearray, memoryview, PickleBuffer or ndarray, all contiguous.
    owner : str
        Whose frames they are, for the error.
    keep : bool
        Whether they are the caller's own from now on, and nobody else will write to
        them. Then those that are writeable, and fill the memory that they keep alive,
        stay writeable.

    Returns
    -------
    list of memoryview
        Format ``B``; each keeps its buffer alive. Read-only but for what ``keep`` says.

    Raises
    ------
    DecodeError
        If one is not a contiguous buffer.

    Notes
    -----
    Copies: none.
    """
    try:
        views = [memoryview(buffer) for buffer in buffers]  # type: ignore[arg-type]
        # an empty view with a zero in its shape cannot be cast
        views = [view.cast("B") if view.nbytes else memoryview(b"") for view in views]
    except (TypeError, ValueError) as error:  # ValueError: a released one, a dtype without letter
        raise DecodeError(f"{owner}: a frame is not a contiguous buffer: {error}") from None
    return [view if keep and _fills_its_buffer(view) else view.toreadonly() for view in views]


def own_mapping(buffer: Any) -> Any:
    """Map a mapped file anew, privately: what is written there never reaches the file.

    Parameters
    ----------
    buffer : object
        A ``np.memmap``, as ``joblib.load(mmap_mode="r")`` makes them, of any mode.

    Returns
    -------
    np.memmap
        Of the same bytes, writeable and nobody else's; ``buffer`` itself if it is no
        mapped file, or its file is gone.

    Notes
    -----
    Copies: none; pages are read when they are used.
    """
    # a slice of one says that it begins where the whole does, but is not based on the file
    base: Any = getattr(buffer, "base", None)
    if not isinstance(buffer, np.memmap) or not isinstance(base, mmap.mmap) or not buffer.filename:
        return buffer
    try:
        return np.memmap(buffer.filename, buffer.dtype, "c", buffer.offset, buffer.shape)
    except (OSError, ValueError):
        return buffer


def allocate(nbytes: int) -> Bytes:
    """Allocate memory that every backend can use in place.

    Parameters
    ----------
    nbytes : int

    Returns
    -------
    ndarray of uint8, shape ``(nbytes,)``
        Uninitialised. Starts at a multiple of :data:`ALIGNMENT`, where malloc's own
        large blocks start 16 bytes into a page.
    """
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


def host_array(n: int) -> memoryview:
    """Allocate a buffer for a comm to receive into.

    Stands in for the function of the same name and result in
    ``distributed/protocol/utils.py``, so that what arrives need not be copied again.

    Parameters
    ----------
    n : int

    Returns
    -------
    memoryview
        Of ``n`` bytes, writeable. It starts at a multiple of :data:`ALIGNMENT`; the first of a
        message (:func:`a_message`) ends at one: it has headers, and last a frame.

    Raises
    ------
    OSError
        ENOMEM, if there is no memory. A worker asks its peer again after an error of the network;
        after any other while it fetches, a MemoryError too, the task that needs the value waits
        for ever (``Worker.gather_dep`` in ``distributed/worker.py``).
    """
    flag = _first.get(None)
    first = bool(flag and flag.pop())
    surplus = -n % ALIGNMENT if first else 0
    try:
        array = np.empty(n, np.uint8) if n < LARGE else allocate(n + surplus)[surplus:]
    except MemoryError as error:
        raise OSError(errno.ENOMEM, f"no memory to receive {n} bytes into") from error
    return array.data


@contextmanager
def a_message() -> Iterator[None]:
    """Say that a comm reads a message meanwhile, in this context."""
    token = _first.set([True])
    try:
        yield
    finally:
        with suppress(ValueError):  # closed by who collects what was never finished
            _first.reset(token)


#: Whether the buffer that is asked for next is the first of a message.
_first: ContextVar[list[bool]] = ContextVar("the first buffer of a message")

#: Frames over so many bytes are cut, as ``distributed.comm.shard`` has it unless a user says else.
_SHARD = 64 << 20


#: Bytes of an arena before such a frame, at least. Where a scheduler passes it on it is no
#: ``bytes``, and has to be twenty times what stands before it (``_add_frames_header``).
_PASSED_ON = 256 << 10


def _goes_first(frame: AnyFrame) -> bool:
    """Say whether a comm had better receive the first large frame in one buffer with the headers.

    A frame that is cut arrives in as many buffers, which are joined by a copy; but not what comes
    first in a message but for bytes (``_add_frames_header`` of ``distributed/comm/tcp.py``).
    """
    return frame.nbytes > _SHARD and not frame.nbytes % ALIGNMENT


def _fills_its_buffer(view: memoryview) -> bool:
    # a view keeps all of its object alive, such as a whole message or spilled file
    return not view.readonly and view.nbytes >= _MOST * memoryview(view.obj).nbytes


#: What part of a buffer has to be one frame's for that frame to be kept in it.
_MOST = 0.9


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
