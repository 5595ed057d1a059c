import numpy as np
import pytest

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire import fingerprints, frames
from dask_keras_serialize.wire.frames import ALIGNMENT, LARGE, Location

SMALL = np.arange(5, dtype="float32")
BIG = np.arange(LARGE, dtype="uint8")


def check_pack(arrays):
    """Pack, and fail unless every location gives the array's bytes back."""
    locations, parts = frames.pack(arrays)
    for array, location in zip(arrays, locations, strict=True):
        assert frames.unpack(parts, location, "it").tobytes() == array.tobytes()
    return locations, parts


def test_large_arrays_are_views_and_small_ones_share_one_aligned_arena():
    arrays = [SMALL, BIG, SMALL + 1, BIG[::-1].copy(), np.float32(3).reshape(())]
    locations, parts = check_pack(arrays)
    assert len(parts) == 3
    assert [location.frame for location in locations] == [0, 1, 0, 2, 0]
    assert all(location.offset % ALIGNMENT == 0 for location in locations)
    assert address(parts[1]) == arrays[1].ctypes.data
    assert address(parts[2]) == arrays[3].ctypes.data
    assert all(part.readonly and part.format == "B" for part in parts)


@pytest.mark.parametrize(
    "arrays",
    [[], [np.zeros((0, 3), "float32")], [BIG], [np.array(True)], [np.zeros((2, 0)), SMALL]],
    ids=["none", "empty", "one large", "scalar", "empty and small"],
)
def test_odd_sizes(arrays):
    check_pack(arrays)


def test_a_strided_array_is_sent_in_c_order():
    array = np.arange(4 * LARGE, dtype="float32").reshape(2, -1).T
    (location,), parts = frames.pack([array])
    assert frames.unpack(parts, location, "it").tobytes() == array.tobytes()


def test_unpacked_bytes_are_read_only():
    (location,), parts = frames.pack([BIG])
    with pytest.raises(ValueError, match="read-only"):
        frames.unpack(parts, location, "it")[0] = 1


@pytest.mark.parametrize(
    "location",
    [Location(1, 0, 1), Location(-1, 0, 1), Location(0, 5, 100), Location(0, -1, 3)],
)
def test_a_location_outside_the_frames_names_its_owner(location):
    with pytest.raises(DecodeError, match="variable 'kernel'"):
        frames.unpack([memoryview(bytes(20))], location, "variable 'kernel'")


def described(*parts):
    return [part.nbytes for part in parts], *fingerprints.fingerprints(parts)


def test_check_names_what_is_wrong():
    a, b = memoryview(bytes(range(200))), memoryview(bytes(range(1, 201)))
    sizes, marks, whole = described(a, b)
    fingerprints.check([a, b], sizes, marks, whole, "it")
    for wrong, message in [
        ([a], "1 frames arrived where 2"),
        ([a, b, b], "3 frames arrived where 2"),
        ([b, a], "out of order"),
        ([a, b[:-1]], "truncated"),
        ([a, memoryview(bytes(200))], "does not hold the bytes"),
    ]:
        with pytest.raises(DecodeError, match=message):
            fingerprints.check(wrong, sizes, marks, whole, "it")


def test_frames_that_look_alike_cannot_change_places():
    """Sparse tables: no sample shows their difference."""
    one, other, third = (bytearray(10 * LARGE) for _ in range(3))
    other[LARGE + 5] = 1
    parts = [memoryview(part) for part in (one, other, third)]
    assert len({fingerprints.fingerprint(part) for part in parts}) == 1
    sizes, marks, whole = described(*parts)
    assert whole == [0, 1, 2]
    fingerprints.check(parts, sizes, marks, whole, "it")
    fingerprints.check([parts[2], parts[1], parts[0]], sizes, marks, whole, "it")  # equal ones may
    with pytest.raises(DecodeError, match="out of order"):
        fingerprints.check([parts[1], parts[0], parts[2]], sizes, marks, whole, "it")
    assert described(parts[0], parts[2])[2] == []  # costs nothing where nothing differs


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 100_000])
def test_fingerprint_tells_first_and_last_byte(size):
    data = bytearray(size)
    mark = fingerprints.fingerprint(memoryview(data))
    for i in {0, size - 1} if size else ():
        data[i] ^= 1
        assert fingerprints.fingerprint(memoryview(data)) != mark
        data[i] ^= 1


def test_the_arena_is_there_even_if_empty():
    """Else a comm would receive the first large frame into one buffer with the header."""
    _, parts = frames.pack([BIG])
    assert [part.nbytes for part in parts] == [ALIGNMENT, BIG.nbytes]


@pytest.mark.parametrize("nbytes", [0, 1, LARGE - 1, LARGE, LARGE + 1, 10 * LARGE + 7])
def test_memory_is_allocated_aligned(nbytes):
    array, view = frames.allocate(nbytes), frames.host_array(nbytes)
    assert (array.nbytes, view.nbytes, view.format, view.readonly) == (nbytes, nbytes, "B", False)
    assert nbytes == 0 or array.ctypes.data % ALIGNMENT == 0
    assert nbytes < LARGE or address(view) % ALIGNMENT == 0


def test_the_first_buffer_of_a_message_ends_aligned():
    """There, after headers of any length, its last frame begins aligned."""
    with frames.a_message():
        views = [frames.host_array(LARGE + 7) for _ in range(2)]
    views.append(frames.host_array(LARGE + 7))
    assert (address(views[0]) + views[0].nbytes) % ALIGNMENT == 0
    assert [address(view) % ALIGNMENT for view in views[1:]] == [0, 0]
    assert {view.nbytes for view in views} == {LARGE + 7}


def test_frames_to_keep_are_writeable_and_hold_little_else():
    def kept(buffer):
        (frame,) = frames.as_frames([buffer], "it", keep=True)
        return not frame.readonly

    own = np.zeros(LARGE, "uint8")
    assert kept(own)
    assert kept(own.data[:])
    assert kept(frames.host_array(LARGE))
    assert kept(own.data[LARGE // 16 :])
    assert not kept(own.data[LARGE // 8 :])  # it would keep the rest alive
    assert not kept(own.data.toreadonly())
    assert not kept(own.tobytes())
    assert all(frame.readonly for frame in frames.as_frames([own], "it"))


def test_only_whole_frames_are_unpacked_writeable():
    whole = frames.unpack([memoryview(bytearray(9))], Location(0, 0, 9), "it")
    part = frames.unpack([memoryview(bytearray(9))], Location(0, 0, 8), "it")
    assert (whole.flags.writeable, part.flags.writeable) == (True, False)


def test_as_frames_takes_any_contiguous_buffer_uncopied():
    array = np.arange(6, dtype="int16").reshape(2, 3)
    (frame,) = frames.as_frames([array], "it")
    assert (frame.nbytes, frame.readonly, address(frame)) == (12, True, array.ctypes.data)
    assert frames.as_frames([b"", np.zeros((0, 2))], "it")[1].nbytes == 0
    released = memoryview(b"x")
    released.release()
    for wrong in (array.T, "text", None, released, np.zeros(3, "datetime64[s]")):
        with pytest.raises(DecodeError, match="it: a frame is not a contiguous buffer"):
            frames.as_frames([wrong], "it")


def address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data
