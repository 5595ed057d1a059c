"""Sides that differ: byte orders, versions, and the bytes of every format ever released."""

import copy
import inspect
import io
import json
import pickle
import pickletools
import sys
from dataclasses import replace
from itertools import pairwise

import keras
import numpy as np
import pytest

from dask_keras_serialize import backends, by_value, skew
from dask_keras_serialize.errors import DecodeError, KerasSerializeError
from dask_keras_serialize.fingerprints import fingerprints
from dask_keras_serialize.frames import as_frames, layout
from dask_keras_serialize.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.header import (
    FORMAT,
    FORMAT_VERSION,
    STRING,
    Header,
    VariableEntry,
    minor,
    numpy_dtype,
    package_version,
)
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


def skeleton(value):
    """Return what plain data is made of: keys, and the kinds of all that a list holds, in order."""
    if isinstance(value, dict):
        return {key: skeleton(each) for key, each in sorted(value.items())}
    if isinstance(value, list | tuple):
        kinds = []
        for each in map(skeleton, value):
            kinds += [each] * (each not in kinds)
        return kinds
    return type(value).__name__


def fields_of(value):
    """Return the kinds of the fields of rows, in order."""
    return [[type(field).__name__ for field in row] for row in value]


class Read(pickle.Unpickler):
    """Reads what goes by value without making shells: each is the tuple that names it."""

    def persistent_load(self, pid):
        return pid


def stream_now():
    """Return what readers of the pickle rely on of what this package adds to Keras's own."""
    model = zoo.build("trained subclassed")
    body, _, extras, *_ = by_value.dump(zoo.build("trained with setstate"))
    stream, names = io.BytesIO(extras[0].tobytes()), []
    for _ in range(1 + body["objects"]):  # each a pickle of its own, with one memo
        said = [argument for _, argument, _ in pickletools.genops(stream)]
        names += [each for each in said if isinstance(each, str)]
    named = {pair for pair in pairwise(names) if pair[0].startswith("dask_keras_serialize")}
    body, variables, extras, *_ = by_value.dump(model)
    reader = Read(io.BytesIO(extras[0].tobytes()), buffers=map(np.ndarray.tobytes, extras[1:]))
    root = reader.load()
    pairs = [reader.load() for _ in range(body["objects"])]
    states = [state for pid, state in pairs if issubclass(pid[1], keras.Variable)]
    added = set.union(*map(set, states)) - set.union(*(set(vars(v)) for v in variables))
    return {
        "root": [type(field).__name__ for field in root],
        "pairs": sorted({type(each).__name__ for pair in pairs for each in [pair]}),
        "added to variables": sorted(added),
        "named": sorted(map(list, named)),
    }


def placements_now():
    """Return the rows that say how variables lie, of a model that lies as if on two devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.current()[1], "placement", lambda variable: ["mesh", "axis"])
        header, _ = serialize_keras(zoo.build("sequential"))
    return skeleton(header["body"]["placements"])


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
        "seeds": fields_of(json.loads(header["body"]["config"])["seeds"][:1]),
        "placements": placements_now(),
        "unread": skeleton(replace(plain, unread=(0,)).to_wire())["unread"],
        "code": fields_of(by_value["body"]["code"][:1]),
        "stream": stream_now(),
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


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("name", golden.BY_VALUE)
def test_models_by_value_of_every_release(name, backend):
    """Read where versions allow it, refused with both sides' where not."""
    sent, *rest = golden.read(golden.FOLDER / "by-value", backend)[name]
    versions = golden.read(golden.FOLDER / "by-value", backend)["versions"]
    here = skew.versions()
    other = [what for what in ("python", "keras") if minor(versions[what]) != minor(here[what])]
    if not other:
        golden.check(name, sent, *rest)
        return
    with pytest.raises(DecodeError) as refused:
        pickle.loads(sent)
    assert f"{other[0]} {versions[other[0]]}" in str(refused.value)
    assert f"{other[0]} {here[other[0]]}" in str(refused.value)


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


def test_who_reads_another_format_is_told_of_what_and_by_whom():
    header, frames = serialize_keras(zoo.build("trained"))
    header["versions"] = header["versions"] | {FORMAT: "9.9.9"}
    header["format-version"] = "2" * 3000
    with pytest.raises(DecodeError) as refused:
        deserialize_keras(header, frames)
    said = str(refused.value)
    assert said.startswith(header["owner"])
    assert f"{FORMAT} 9.9.9" in said
    assert f"{FORMAT} {package_version()} here" in said
    assert len(said) < 500


@pytest.mark.parametrize("name", ["trained", "trained subclassed"])
@pytest.mark.parametrize("what", [FORMAT, keras.backend.backend(), "python"])
def test_errors_name_what_differs_at_both_sides(name, what):
    header, frames = serialize_keras(zoo.build(name))
    here = header["versions"][what]
    # a patch: another minor is refused by value before anything is read
    header["versions"] = header["versions"] | {what: f"{here}.77"}
    if header["encoding"] == "config":
        config = json.loads(header["body"]["config"])
        config["model"]["config"]["layers"][-1]["config"]["units"] = "many"
        header["body"] = header["body"] | {"config": json.dumps(config)}
    else:
        frames = [bytes(frame).replace(b"Subclassed", b"Subclasses") for frame in frames]
        hostile.repair(header, frames)
    with pytest.raises(DecodeError) as refused:
        deserialize_keras(header, frames)
    said = str(refused.value)
    assert said.endswith(
        f"it was sent by {what} {here}.77, this is {what} {here}: use the same on both sides"
    )


def test_errors_of_the_same_versions_say_so():
    header, frames = serialize_keras(zoo.build("trained"))
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["layers"][-1]["config"]["units"] = "many"
    with pytest.raises(DecodeError, match=rf"both sides run .*{FORMAT} .*: report it"):
        deserialize_keras(
            header | {"body": header["body"] | {"config": json.dumps(config)}}, frames
        )
