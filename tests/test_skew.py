"""Sides that differ: byte orders, versions, and the bytes of every format ever released."""

import copy
import inspect
import json
import sys

import keras
import numpy as np
import pytest

from dask_keras_serialize import skew
from dask_keras_serialize.errors import DecodeError, KerasSerializeError
from dask_keras_serialize.fingerprints import fingerprints
from dask_keras_serialize.frames import as_frames, layout
from dask_keras_serialize.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.header import FORMAT_VERSION, STRING, Header, VariableEntry, numpy_dtype
from tests import golden, hostile, zoo

OTHER = {"little": "big", "big": "little"}[sys.byteorder]


def swapped(header, frames):
    """Return a message as a machine of the other byte order sends it."""
    header, frames = copy.deepcopy(header), [bytearray(frame) for frame in frames]
    for row in header["variables"]:
        _, _, name, _, frame, offset, nbytes = row
        if name != STRING and nbytes:
            dtype = numpy_dtype(name)
            halves = 2 if dtype.kind == "c" else 1
            number = np.frombuffer(frames[frame], np.uint8, nbytes, offset)
            number = number.reshape(-1, dtype.itemsize // halves)[:, ::-1]
            frames[frame][offset : offset + nbytes] = number.tobytes()
    header["byteorder"] = OTHER
    hostile.repair(header, frames)
    return header, [bytes(frame) for frame in frames]


#: With numbers of every size, strings, seeds, optimizers.
CROSSING = zoo.BY_CONFIG.keys() & {
    "trained", "trained two outputs", "recurrent", "vocabulary", "adapted",
    "trained under bfloat16", "trained under mixed_float16", "trained under float64",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CROSSING))
def test_models_by_config_cross_byte_orders(name):
    model = zoo.build(name)
    zoo.assert_same(model, deserialize_keras(*swapped(*serialize_keras(model))))


def test_models_by_value_do_not_and_both_sides_are_named():
    header, frames = serialize_keras(zoo.build("subclassed"))
    with pytest.raises(DecodeError, match=rf"{OTHER}-endian.*Python 3.*keras 3.*{sys.byteorder}"):
        deserialize_keras(header | {"byteorder": OTHER}, frames)


FORMATS = golden.FOLDER / "formats"


def format_now():
    """Return what readers of this format rely on, none of it Keras's own to change.

    The fields of header and config, where arrays of all sizes lie, fingerprints, the bytes of a
    header, and which fields a row of the table has.
    """
    header, _ = serialize_keras(zoo.build("trained"))
    by_value, _ = serialize_keras(zoo.build("trained subclassed"))
    content = np.arange(300_000, dtype=np.uint8)
    frames = as_frames([content[:100], content[:5000], content], "it")
    rows = tuple(
        VariableEntry("a/kernel", (25,), "float32", True, location) for location in layout([100])
    )
    plain = Header("config", "it", "a", "B", "jax", {"python": "3"}, {"extras": []}, rows)
    return {
        "header": {key: type(value).__name__ for key, value in sorted(header.items())},
        "body": {
            each["encoding"]: {k: type(v).__name__ for k, v in sorted(each["body"].items())}
            for each in (header, by_value)
        },
        "config": {
            key: type(value).__name__
            for key, value in sorted(json.loads(header["body"]["config"]).items())
        },
        "trainer": sorted(json.loads(header["body"]["config"])["trainer"]),
        "layout": layout([0, 1, 63, 64, 65, 65535, 65536, 65537, 0, 10**9]),
        "fingerprints": fingerprints(frames),
        "bytes": plain.with_frames(frames).to_bytes().hex(),
    }


def test_the_format_is_the_one_that_its_version_says():
    """Who changes what is sent has to raise FORMAT_VERSION, and to keep reading the older ones."""
    found = json.loads(json.dumps(format_now()))
    path = FORMATS / f"{FORMAT_VERSION}.json"
    assert path.exists(), f"a new format: keep it as {path}, and what it sends in {golden.FOLDER}"
    assert found == json.loads(path.read_text()), "raise FORMAT_VERSION in header.py"


#: What sent it says that it is.
NEWER = {"keras": "99.0.0"}


def of_newer_keras(config_of_layer):
    """Serialize a model as a newer Keras might, whose Dense has more arguments."""
    source = zoo.build("trained")
    header, frames = serialize_keras(source)
    config = json.loads(header["body"]["config"])
    dense = [each for each in config["model"]["config"]["layers"] if each["class_name"] == "Dense"]
    for each in dense:
        config_of_layer(each)
    assert dense
    header |= {"versions": header["versions"] | NEWER}
    return source, header | {"body": header["body"] | {"config": json.dumps(config)}}, frames


def test_arguments_of_a_newer_keras_that_are_none_are_left_out():
    more = {"quantized": None}
    source, *sent = of_newer_keras(lambda dense: dense["config"].update(more))
    zoo.assert_same(source, deserialize_keras(*sent))
    sent[0]["versions"]["keras"] = keras.version()  # who says so knows what it sends
    with pytest.raises(DecodeError, match="quantized"):
        deserialize_keras(*sent)


@pytest.mark.parametrize("name", skew.SINCE_OLDEST)
def test_defaults_are_keras_s_own(name):
    """Fails where Keras moves them; an older one has not got them."""
    taken = inspect.signature(getattr(keras.layers, name).__init__).parameters
    for argument, default in skew.SINCE_OLDEST[name].items():
        assert zoo.KERAS < (3, 15) or argument in taken or "Lookup" in name
        assert argument not in taken or taken[argument].default == default


def test_defaults_that_are_known_are_left_out(monkeypatch):
    monkeypatch.setitem(skew.SINCE_OLDEST, "Dense", {"gated": False, "rate": 0.5})
    source, *sent = of_newer_keras(lambda dense: dense["config"].update(gated=False, rate=0.5))
    zoo.assert_same(source, deserialize_keras(*sent))
    _, *sent = of_newer_keras(lambda dense: dense["config"].update(gated=False, rate=0.7))
    with pytest.raises(DecodeError, match="rate"):
        deserialize_keras(*sent)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda dense: dense["config"].update(gated=True), "gated"),
        (lambda dense: dense["config"].update(gate=None, exact=False), "exact"),
        (lambda dense: dense.update(class_name="Denser"), "Denser"),
        (lambda dense: dense["config"].update(activation="newlu"), "newlu"),
    ],
)
def test_what_only_a_newer_keras_can_do_is_refused_and_both_are_named(change, what):
    _, *sent = of_newer_keras(change)
    with pytest.raises(DecodeError, match=rf"{what}.*keras 99\.0\.0.*{keras.version()}") as refused:
        deserialize_keras(*sent)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_an_older_keras_than_works_is_refused(monkeypatch):
    monkeypatch.setattr(keras, "version", lambda: "3.10.0")
    with pytest.raises(KerasSerializeError, match=r"keras 3\.10\.0 is older than 3\.11.*upgrade"):
        serialize_keras(zoo.build("sequential"))
