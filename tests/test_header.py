import msgpack
import pytest

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.frames import Location
from dask_keras_serialize.wire.header import FORMAT_VERSION, Header, VariableEntry

pytestmark = pytest.mark.once


def header(**changes):
    fields = {
        "encoding": "config",
        "owner": "model 'm' (keras.Sequential)",
        "name": "m",
        "class_name": "keras.Sequential",
        "backend": "tensorflow",
        "versions": {"keras": "3.15.1"},
        "body": {"config": "{}", "extras": []},
        "variables": (VariableEntry("d/kernel", (2, 3), "float32", True, Location(0, 0, 24)),),
        "frame_sizes": (64,),
        "fingerprints": (7,),
    }
    return Header(**fields | changes)


def test_survives_msgpack_that_makes_tuples_of_lists():
    before = header()
    wire = msgpack.unpackb(msgpack.packb(before.to_wire()), use_list=False)
    assert isinstance(wire["variables"], tuple)
    after = Header.from_wire(wire)
    assert after.variables == before.variables
    assert after.frame_sizes == before.frame_sizes
    assert Header.from_bytes(before.to_bytes()).versions == before.versions


def test_keys_are_lower_case_with_hyphens():
    assert all(key == key.lower() and "_" not in key for key in header().to_wire())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a header written by"),
        ({"format-version": FORMAT_VERSION + 1}, "sent in wire format 2"),
        ({"format-version": None}, "sent in wire format None"),
        ({"format-version": float(FORMAT_VERSION)}, "sent in wire format 1.0"),
        ({"format-version": 10**9999}, "sent in wire format <class 'int'>"),
        ({"byteorder": "middle"}, "unknown byte order 'middle'"),
        ({"encoding": "magic"}, "unknown encoding 'magic'"),
        ({"name": 3}, "name is a int"),
        ({"variables": None}, "malformed"),
        ({"variables": [["k", [2, 3], "float32", True, 0, 0]]}, "malformed"),
        ({"variables": [["k", [2, -3], "float32", True, 0, 0, 24]]}, "-3 is not a size"),
        ({"variables": [["k", [2, 3], "float32", True, 0, 0, 20]]}, "takes 24 bytes, but 20"),
        ({"variables": [["k", [2, 3], "float99", True, 0, 0, 24]]}, "unknown dtype float99"),
        ({"variables": [["k", [2, 3], "float32", 1, 0, 0, 24]]}, "wrong types"),
        ({"frame-sizes": [1, 2]}, "sizes and fingerprints differ"),
        ({"frame-sizes": ["1"]}, "'1' is not a size"),
        ({"body": []}, "body is a list"),
    ],
)
def test_bad_headers_name_what_is_wrong(changes, message):
    wire = header().to_wire() | changes
    with pytest.raises(DecodeError, match=message) as info:
        Header.from_wire(wire)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("key", sorted(header().to_wire()))
def test_a_missing_field_is_an_error(key):
    wire = header().to_wire()
    del wire[key]
    with pytest.raises(DecodeError):
        Header.from_wire(wire)


@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x93\x01", b"not msgpack at all", 3])
def test_bytes_that_are_no_header(packed):
    with pytest.raises(DecodeError, match="not a header"):
        Header.from_bytes(packed)
