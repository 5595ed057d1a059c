"""Sides that differ: byte orders, versions, and the bytes of every format ever released."""

import copy
import inspect
import json
import sys

import keras
import numpy as np
import pytest

from dask_keras_serialize import backends
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import by_config, skew
from dask_keras_serialize.errors import DecodeError, KerasSerializeError
from dask_keras_serialize.wire.header import (
    FORMAT,
    FORMAT_VERSION,
    STRING,
    Header,
    minor,
    numpy_dtype,
    package_version,
)
from tests import golden, hostile, zoo
from tests.golden import samples, wire

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


HERE = keras.backend.backend()

#: How to go on where bytes change; a format that nobody has yet may be written again.
REMEDY = (
    f"the bytes of format {FORMAT_VERSION} changed: raise FORMAT_VERSION in header.py, keep "
    f"tests/golden/{FORMAT_VERSION} and read it, and write the new format's files on each backend: "
    f"KERAS_BACKEND={HERE} python -m tests.golden (add --again if {FORMAT_VERSION} is unreleased)"
)

#: Formats that are refused, by decision, in one line; none so far.
NO_LONGER_READ = frozenset[int]()


@pytest.mark.parametrize("name", samples.here())
def test_the_bytes_are_those_of_the_format(name):
    """Who changes what is sent has to raise FORMAT_VERSION, and to keep reading the older ones."""
    changed = golden.changed(name)
    assert not changed, f"{name}, {changed}: {REMEDY}"


def test_the_bytes_of_a_header_are_those_of_the_format():
    path = golden.FOLDER / str(FORMAT_VERSION) / golden.HEADER
    assert golden.bare_header() == path.read_bytes(), REMEDY
    Header.from_bytes(path.read_bytes())


def test_how_values_lie_is_said_as_the_format_has_it(monkeypatch):
    """As if on several devices, which few machines have."""
    monkeypatch.setattr(backends.current()[1], "placement", lambda variable: ["mesh", "axis"])
    header, _ = serialize_keras(samples.make("large"))
    assert header["body"]["placements"] == [[0, ["mesh", "axis"]], [1, ["mesh", "axis"]]], REMEDY


RELEASED = range(1, FORMAT_VERSION + 1)


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("number", RELEASED)
def test_every_format_has_files_of_every_backend(number, backend):
    found = golden.names(number, backend)
    assert found, f"keep the files of format {number}; of a new one, write them: {REMEDY}"
    if number == FORMAT_VERSION:
        every = {name for name, each in samples.SAMPLES.items() if each.only in (None, backend)}
        assert found == sorted(every)


def test_samples_share_parts_under_every_kind_of_key():
    known = {key[0] for key in by_config.parts_of(samples.make("shared")[0])}
    sent = wire.view(golden.read(FORMAT_VERSION, HERE, "shared")["sent"])
    assert known <= set(map(str, keras.tree.flatten(list(sent))))


FILES = [
    (number, backend, name)
    for number in RELEASED
    for backend in backends.NAMES
    for name in golden.names(number, backend)
]


@pytest.mark.parametrize(("number", "backend", "name"), FILES)
def test_every_file_of_every_format_is_read(number, backend, name):
    """By value where versions allow it, refused with both sides' where not."""
    content = golden.read(number, backend, name)
    versions, here = content["versions"], skew.versions()
    other = [what for what in ("python", "keras") if minor(versions[what]) != minor(here[what])]
    refused = []
    if number in NO_LONGER_READ:
        refused = [f"wire format {number}", f"it reads format {FORMAT_VERSION}"]
    elif golden.goes_by_value(content["sent"]) and other:
        refused = [f"{other[0]} {side[other[0]]}" for side in (versions, here)]
    elif not samples.SAMPLES[name].is_read_by(HERE):
        refused = ["ensorflow"]
    if not refused:
        golden.check(content)
        return
    with pytest.raises(DecodeError) as info:
        golden.receive(content["sent"])
    said = str(info.value)
    assert "\n" not in said
    assert all(each in said for each in refused), said


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
        config["model"]["config"]["layers"][-1]["config"]["units"] = -3
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
    config["model"]["config"]["layers"][-1]["config"]["units"] = -3
    with pytest.raises(DecodeError, match=rf"both sides run .*{FORMAT} .*: report it"):
        deserialize_keras(
            header | {"body": header["body"] | {"config": json.dumps(config)}}, frames
        )
