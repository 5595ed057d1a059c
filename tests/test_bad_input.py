"""What a comm may deliver: each case is one clear error, and nothing half made."""

import copy
import json
from typing import ClassVar

import keras
import msgpack
import numpy as np
import pytest
from distributed import protocol

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import skew
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.rebuilding.rebuild import check_range
from dask_keras_serialize.values import by_value
from dask_keras_serialize.wire import frames as packing
from dask_keras_serialize.wire.fingerprints import fingerprints
from dask_keras_serialize.wire.header import Header
from tests import zoo

KINDS = ["trained", "trained subclassed"]


@pytest.fixture(scope="module", params=KINDS)
def good(request):
    model = zoo.build(request.param)
    # large enough for frames of its own beside the arena
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((200,)),
            keras.layers.Dense(200),
            keras.layers.Dense(200),
            keras.layers.Dense(3),
        ]
    )
    if request.param == "trained subclassed":
        model.note = 1  # by value
    header, frames = serialize_keras(model)
    assert header["encoding"] == ("config" if request.param == "trained" else "value")
    return header, [bytes(frame) for frame in frames]


def refused(header, frames, message):
    """Fail unless it is refused with one line that matches."""
    before = keras.Variable._initialize_with_initializer
    wire = msgpack.unpackb(msgpack.packb(header), use_list=False)
    with pytest.raises(DecodeError, match=message) as info:
        deserialize_keras(wire, frames)
    assert "\n" not in str(info.value)
    assert keras.Variable._initialize_with_initializer is before


def test_good_is_good(good):
    header, frames = good
    assert isinstance(deserialize_keras(header, frames), keras.Sequential)


def test_frames(good):
    header, frames = good
    owner = r"model 'sequential\w*' \(keras.src.models.sequential.Sequential\)"
    refused(header, frames[:-1], f"{owner}: . frames arrived where .* were sent")
    refused(header, [*frames, b"x"], f"{owner}: . frames arrived where")
    refused(header, [], f"{owner}: 0 frames arrived where")
    refused(header, [frames[0], frames[2], frames[1], *frames[3:]], f"{owner}: frame 1 .*order")
    refused(header, [frames[1], frames[0], *frames[2:]], f"{owner}: frame 0 .*order")
    refused(header, [frames[0][:-1], *frames[1:]], f"{owner}: frame 0 has .*truncated")
    refused(header, [frames[0] + b"x", *frames[1:]], f"{owner}: frame 0 has")
    refused(header, [frames[0], frames[1][:-1] + b"\xff", *frames[2:]], f"{owner}: frame 1 does")
    refused(header, ["text", *frames[1:]], f"{owner}: a frame is not a contiguous buffer")


def changed(header, **changes):
    return copy.deepcopy(header) | {k.replace("_", "-"): v for k, v in changes.items()}


def test_versions_and_backends(good):
    header, frames = good
    refused(changed(header, format="pickle"), frames, "not a header written by")
    refused(
        changed(header, format_version=99),
        frames,
        r"sent in wire format 99 by .*cannot read: it reads format 1",
    )
    refused(changed(header, backend="abacus"), frames, "unknown backend 'abacus'")
    refused({}, frames, "not a header written by")


def test_by_value_wants_the_same_minor_versions(good):
    header, frames = good
    other = changed(header, versions=header["versions"] | {"keras": "3.1.0"})
    if header["encoding"] == "value":
        refused(other, frames, "sent by value from keras 3.1.0, which keras 3.* here cannot read")
    else:
        deserialize_keras(other, frames)


def test_a_table_that_lies(good):
    header, frames = good
    table = [list(row) for row in header["variables"]]

    def row(index, **fields):
        lie = copy.deepcopy(table)
        for position, value in fields.items():
            lie[index][int(position[1:])] = value
        return changed(header, variables=lie)

    refused(row(0, _1=[200, 201]), frames, r"variable '.*kernel' .*takes 160800 bytes, but 160000")
    refused(row(0, _2="float64"), frames, "takes 320000 bytes, but 160000")
    refused(row(0, _6=10**12, _1=[10**12], _2="int8"), frames, "do not lie where|was sent as")
    refused(row(0, _5=64), frames, "do not lie where")
    refused(row(0, _4=99), frames, "do not lie where")


def test_a_table_that_does_not_fit_the_config():
    keras.utils.set_random_seed(0)
    stack = [keras.layers.Dense(200), keras.layers.Dense(200), keras.layers.Dense(3)]
    header, frames = serialize_keras(keras.Sequential([keras.Input((200,)), *stack]))
    table = [list(row) for row in header["variables"]]
    refused(changed(header, variables=table[:-1]), frames, "rebuilds 6 variables here where 5")
    swapped = [table[1], table[0], *table[2:]]
    refused(changed(header, variables=swapped), frames, "variable 0 was sent as '.*bias'.*rebuilt")


def test_a_body_that_lies(good):
    header, frames = good
    for extras in (3, [[0]], [["a", 0, 1]], [[float("inf"), 0, 1]]):
        refused(changed(header, body={"extras": extras}), frames, "malformed header")
    for body in ({}, {"extras": []}):
        refused(changed(header, body=body), frames, "malformed header|rebuilt")
    refused(
        changed(header, body=header["body"] | {"extras": [[0, 0, 10**9]]}), frames,
        "do not lie where",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Dense", "Dance"),
        ('"module": "keras.layers"', '"module": "os"'),
        ('"units": 200', '"units": -1'),
        ('"units": 200', '"units": 300'),
        ("{", "["),
    ],
)
def test_a_config_that_lies(old, new):
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(200)])
    header, frames = serialize_keras(model)
    body = header["body"] | {"config": header["body"]["config"].replace(old, new)}
    refused(changed(header, body=body), frames, "rebuilt|larger than all")


def test_a_config_cannot_ask_for_memory_that_was_not_sent(monkeypatch):
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(200)])
    header, frames = serialize_keras(model)
    config = header["body"]["config"].replace('"units": 200', '"units": 5000000')
    asked = []
    monkeypatch.setattr(
        keras.initializers.GlorotUniform, "__call__", lambda *a, **k: asked.append(a)
    )
    body = header["body"] | {"config": config}
    refused(changed(header, body=body), frames, "larger than all the bytes that were sent")
    assert not asked


def test_a_pickle_and_a_table_that_differ():
    model = zoo.build("subclassed")
    header, frames = serialize_keras(model)
    frames = [bytes(frame) for frame in frames]
    refused(changed(header, body=header["body"] | {"objects": 0}), frames, "not whole")
    table = [list(row) for row in header["variables"]]
    flat = copy.deepcopy(table)
    flat[0][1] = [table[0][1][0] * table[0][1][1]]
    refused(changed(header, variables=flat), frames, "variable 0 was sent as")


def test_what_others_raise_is_cut_to_one_line():
    assert str(DecodeError("a\n b" + "c" * 9999)) == "a b" + "c" * 697 + " ... " + "c" * 300


def test_a_config_cannot_run_code(monkeypatch):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    header, frames = serialize_keras(model)
    config = json.loads(header["body"]["config"])
    dense = config["model"]["config"]["layers"][1]["config"]
    dense["activation"] = {"class_name": "__lambda__", "config": {"value": "x"}}
    body = header["body"] | {"config": json.dumps(config)}
    refused(changed(header, body=body), frames, "lambda")


def test_a_truncated_pickle_is_an_error_not_half_a_model():
    model = zoo.build("subclassed")
    body, _, extras, *_ = by_value.dump(model)
    for keep in (0, 1, 10, len(extras[0]) // 2, len(extras[0]) - 1):
        values = type("Values", (), {"header": Named, "tensor": None, "backend": None})
        with pytest.raises(DecodeError, match="cannot be rebuilt by value"):
            by_value.load(body, values, [extras[0][:keep].copy(), *extras[1:]])


class Named:
    owner = "model 'm'"
    code = ()
    backend = keras.backend.backend()
    versions: ClassVar = skew.versions()


def test_another_family_hands_the_error_on():
    header, frames = protocol.serialize(zoo.build("sequential"))
    with pytest.raises(DecodeError):
        protocol.deserialize(header, frames[:-1])


@pytest.mark.parametrize("frames", [None, 5, "ab", {}])
def test_frames_that_are_no_list(good, frames):
    with pytest.raises(DecodeError, match="its frames came as"):
        deserialize_keras(good[0], frames)


def as_sent_by_another_backend(built, array, path=None):
    """Return what has another array, and path, for a model's first variable."""
    header, _ = serialize_keras(built)
    (location,), packed = packing.pack([array])
    entry = header["variables"][0]
    marks, whole = fingerprints(packed)
    return header | {
        "variables": [[path or entry[0], entry[1], str(array.dtype), entry[3], *location]],
        "frame-sizes": [frame.nbytes for frame in packed],
        "fingerprints": marks,
        "whole": whole,
        "backend": "jax" if keras.backend.backend() != "jax" else "torch",
    }, packed


@pytest.mark.parametrize("dtype", ["complex64", "float64", "int64", "bool", "float16"])
def test_another_backend_is_no_reason_for_another_dtype(dtype):
    """Nothing of a value would be lost but unseen."""
    layer = keras.layers.Dense(2, use_bias=False, dtype=dtype if dtype == "float16" else None)
    built = keras.Sequential([keras.Input((2,)), layer])
    array = np.ones((2, 2), dtype if dtype != "float16" else "float32")
    header, packed = as_sent_by_another_backend(built, array)
    refused(header, packed, f"was sent as .*{array.dtype} but is rebuilt here as")


def test_numbers_that_another_backend_has_not():
    """Each has its own dtype for counts."""
    variable = keras.Variable(np.zeros(2, "int32"), dtype="int32", trainable=False)
    header = Header.from_wire(serialize_keras(zoo.build("trained"))[0])
    check_range(variable, np.array([0, 2**31 - 1]), header)
    with pytest.raises(DecodeError, match="with numbers that int32 has not"):
        check_range(variable, np.array([0, 2**31]), header)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="it trains no whole numbers")
@pytest.mark.parametrize("path", ["p/alpha", "p/seed_generator_state"])
def test_nor_under_the_name_of_a_seed(path):
    """Seeds may lose their upper halves; what they are, the receiver's model says."""
    source = keras.Sequential([keras.Input((3,)), keras.layers.PReLU(dtype="int32", name="p")])
    header, packed = as_sent_by_another_backend(source, np.array([2**33 + 5, 7, 2**40]), path)
    refused(header, packed, "with numbers that (int32 has not|this process has not)|int64 that")
