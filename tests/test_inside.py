"""Looking into files: what is there is found, what is not whole is refused, nothing runs."""

import contextlib
import dataclasses
import gzip
import importlib.metadata
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zlib
from configparser import ConfigParser

import click
import cloudpickle
import joblib
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from dask.cli import _register_command_ep

import dask_keras_serialize
from dask_keras_serialize import cli, inside
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.inside import inspect
from dask_keras_serialize.pickling import pack
from dask_keras_serialize.wire import mapped
from tests import zoo
from tests.conftest import ROOT

COMPRESSED = [0, 3, ("zlib", 9), ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)]


class Net(keras.Model):
    """Custom code, which goes by value."""

    def __init__(self):
        super().__init__(name="net")
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


@dataclasses.dataclass
class Record:
    note: str
    model: object


@pytest.fixture(scope="module")
def config():
    return zoo.build("trained")


@pytest.fixture(scope="module")
def value():
    net = Net()
    net(zoo.X)
    return net


@pytest.fixture(scope="module")
def large():
    """Large enough for a frame of its own beside the arena."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((200,)), keras.layers.Dense(200)])


def one(file):
    (parcel,) = inspect(file)
    return parcel


def same(parcel, model):
    expected = pack(model)
    assert parcel.header == expected.header
    assert parcel.frames == expected.frames


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["config", "value", "large"])
def test_pickles(kind, protocol, tmp_path, request):
    model = request.getfixturevalue(kind)
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(model, protocol=protocol))
    same(one(file), model)
    same(one(str(file)), model)
    with file.open("rb") as opened:
        same(one(opened), model)


@pytest.mark.parametrize("compress", COMPRESSED)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_joblib(large, compress, protocol, tmp_path):
    file = tmp_path / "model"
    around = {"a": [np.arange(3.0), large], "b": np.array([1, "x", None], object)}
    joblib.dump([around, np.zeros((2, 3), ">f4", "F")], file, compress=compress, protocol=protocol)
    same(one(file), large)


def test_dtypes_of_every_kind_in_the_way(config, tmp_path):
    import ml_dtypes

    record = np.dtype([("a", "i4"), ("b", "U3")])
    holds = np.dtype([("a", "i4"), ("b", "O")])
    arrays = [np.zeros(3, each) for each in ("?", "U5", "S7", "M8[s]", "c16", record, holds)]
    arrays += [np.zeros(3, ml_dtypes.bfloat16), np.zeros((2, 0)), np.array(1.0)]
    file = tmp_path / "x.joblib"
    joblib.dump([*arrays, config], file)
    same(one(file), config)


def test_compressed_pickles(config, tmp_path):
    stream = pickle.dumps(config)
    for i, squeeze in enumerate((gzip.compress, zlib.compress)):
        file = tmp_path / str(i)
        file.write_bytes(squeeze(stream))
        same(one(file), config)


def test_inside_what_users_pickle(config, value, tmp_path):
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = Pipeline([("scale", StandardScaler().fit(zoo.X)), ("model", config)])
    file = tmp_path / "x"
    for held in ({"deep": [Record("a", (1, config))]}, pipeline, {config}, {"key": config}):
        file.write_bytes(cloudpickle.dumps(held))
        same(one(file), config)
    file.write_bytes(pickle.dumps(config) + pickle.dumps(Record("next", value)))
    first, second = inspect(file)
    same(first, config)
    same(second, value)
    file.write_bytes(pickle.dumps(pack(config)) + b"\n")  # a closed one, and what nobody reads
    same(one(file), config)


def test_what_it_says(config, value):
    parcel = one(io.BytesIO(pickle.dumps(config)))
    assert parcel.config["model"]["class_name"] == "Sequential"
    assert [v.path for v in parcel.variables][:2] == [v.path for v in config.variables][:2]
    assert parcel.versions["keras"] == keras.version()
    assert parcel.code == ()
    parcel = one(io.BytesIO(cloudpickle.dumps(value)))
    assert parcel.config is None
    assert dict(parcel.code)[f"{Net.__module__}.Net"] == "reference"
    assert "test_inside.Net" in repr(parcel)


def test_found_objects_open(value, tmp_path):
    file = tmp_path / "x.joblib"
    joblib.dump(value, file)
    twin = one(file).open()
    assert type(twin) is Net
    assert [zoo.describe(v) for v in twin.variables] == [zoo.describe(v) for v in value.variables]
    assert [zoo.to_bytes(v) for v in twin.variables] == [zoo.to_bytes(v) for v in value.variables]


def test_links_are_found_too(config, tmp_path):
    shared = keras.layers.Dense(2)
    models = [keras.Sequential([keras.Input((3,)), shared]) for _ in range(2)]
    found = inspect(io.BytesIO(pickle.dumps(models)))
    assert len(found) == 2
    assert [len(parcel.links) for parcel in found] in ([0, 1], [1, 0])


def test_large_arrays_are_not_read(tmp_path):
    """They are views of the mapped file, wherever it can be mapped."""
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(1000)])
    for dump in (pickle.dump, joblib.dump):
        file = tmp_path / dump.__module__
        with file.open("wb") as opened:
            dump(model, opened)
        parcel = one(file)
        assert type(parcel.frames[1].obj).__name__ == "mmap"


# what is refused


def refused(content, message, tmp_path):
    file = tmp_path / "bad file"
    file.write_bytes(content)
    with pytest.raises(DecodeError, match=message) as info:
        inspect(file)
    assert "\n" not in str(info.value)
    assert str(file) in str(info.value)


def test_no_keras_object(tmp_path):
    nothing = "no Keras object packed by dask-keras-serialize in"
    refused(pickle.dumps([1, "dask_keras_serialize"]), nothing, tmp_path)
    refused(b"a text file", nothing, tmp_path)
    refused(pickle.dumps("dask_keras_serialize.packed"), nothing, tmp_path)
    refused(b"dask_keras_serialize.packed", "not a whole pickle", tmp_path)
    refused(b"", "empty", tmp_path)
    refused(b"\x04\x22\x4d\x18", "lz4, which is not supported", tmp_path)
    with pytest.raises(DecodeError, match="not a file of bytes"):
        inspect(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DecodeError, match="not a file of bytes"):
        inspect(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "none")


def test_buffers_kept_elsewhere(config, tmp_path):
    stream = pickle.dumps(config, protocol=5, buffer_callback=lambda buffer: None)
    refused(stream, "buffers were pickled out of band and are kept elsewhere", tmp_path)


def files(config, value, tmp_path):
    for protocol in (0, 2, 4, 5):
        yield pickle.dumps([config, Record("a", value)], protocol=protocol)
    for compress in (0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3)):
        joblib.dump([config, np.array([None])], tmp_path / "x", compress=compress)
        yield (tmp_path / "x").read_bytes()


def test_truncated(config, value, tmp_path):
    for content in files(config, value, tmp_path):
        for end in range(0, len(content) - 1, len(content) // 25):
            refused(content[:end], ".", tmp_path)


def test_mutated(config, value, tmp_path):
    """Found or refused, and nothing else."""
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for content in files(config, value, tmp_path):
        for _ in range(40):
            bad = bytearray(content)
            for _ in range(rng.choice((1, 1, 4))):
                # headers and opcodes are at the ends, weights between
                bad[rng.choice((rng.randrange(len(bad)), rng.randrange(300)))] = rng.randrange(256)
            try:
                found = inspect(io.BytesIO(bad))
                outcomes[bool(found)] += 1
                assert [repr(p) + p._repr_html_() for p in found]
            except DecodeError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 20


# what is hostile


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Where the shell commands below would leave a file."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


COMMAND = "touch canary"
CODE = "open('canary', 'w').close()"


class Gadget:
    """Runs when it is unpickled, by the way it is reduced."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


class Setter:
    def __setstate__(self, state):
        os.system(COMMAND)


REDUCED = {
    "system": Gadget(os.system, (COMMAND,)),
    "eval": Gadget(eval, (CODE,)),
    "exec": Gadget(exec, (CODE,)),
    "import": Gadget(getattr, (Gadget(__import__, ("os",)), "system")),
    "setstate": Gadget(Setter, (), {"a": 1}),
    "Popen": Gadget(subprocess.Popen, (["touch", "canary"],)),
    "loads": Gadget(pickle.loads, (pickle.dumps(Gadget(os.system, (COMMAND,))),)),
    "receive": Gadget(dask_keras_serialize.packed.take, (Gadget(os.system, (COMMAND,)), None)),
    "array": np.array([Gadget(os.system, (COMMAND,))], object),
}

#: INST, OBJ, NEWOBJ_EX, PERSID, EXT1, and BUILD of functions and classes, by hand.
BY_HAND = {
    "inst": b"(S'touch canary'\nios\nsystem\n",
    "obj": b"(cos\nsystem\nS'touch canary'\no",
    "newobj_ex": b"\x80\x04csubprocess\nPopen\n]S'touch'\naS'canary'\na\x85}\x92",
    "newobj": b"\x80\x04csubprocess\nPopen\n]S'touch'\naS'canary'\na\x85\x81",
    "persid": b"\x80\x04Pos.system\n",
    "reduced twice": b"\x80\x04cos\nsystem\n\x8c\x0ctouch canary\x85RS'touch canary'\n\x85R",
    "build receive": b"cdask_keras_serialize.packed\nreceive\nN}S'__defaults__'\n(I1\nts\x86b",
    "build find_class": b"cdask_keras_serialize.inside\n_Machine\n}S'receive'\ncos\nsystem\nsb",
    "append": b"]cos\nsystem\nS'touch canary'\n\x85Ra",
}


@pytest.mark.parametrize("how", REDUCED)
def test_reduced_gadgets_do_not_run(how, config, canary):
    held = [REDUCED[how], config, Record("a", REDUCED[how])]
    for protocol in range(6):
        same(one(io.BytesIO(pickle.dumps(held, protocol=protocol))), config)
    joblib.dump(held, "x.joblib")
    same(one("x.joblib"), config)


@pytest.mark.parametrize("how", BY_HAND)
def test_gadgets_by_hand_do_not_run(how, config, canary):
    body = BY_HAND[how]
    stream = body + b"0" + pickle.dumps(config, protocol=2).removeprefix(b"\x80\x02")
    same(one(io.BytesIO(stream)), config)


def test_the_gadgets_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for how in ("system", "eval", "setstate", "loads", "array"):
        pickle.loads(pickle.dumps(REDUCED[how]))
        (tmp_path / "canary").unlink()
    for how in ("inst", "obj", "reduced twice"):
        with contextlib.suppress(TypeError):  # what os.system returns is no function
            pickle.loads(BY_HAND[how] + b".")
        (tmp_path / "canary").unlink()


def test_extensions_do_not_run(config, canary):
    import copyreg

    copyreg.add_extension("os", "system", 240)
    try:
        stream = b"\x80\x02\x82\xf0S'touch canary'\n\x85R0"
        same(one(io.BytesIO(stream + pickle.dumps(config, protocol=2)[2:])), config)
    finally:
        copyreg.remove_extension("os", "system", 240)


RECEIVE = b"cdask_keras_serialize.packed\nreceive\n"


@pytest.mark.parametrize(
    "stream",
    [
        RECEIVE + b"\x8e" + struct.pack("<Q", 1 << 40) + b"xx",  # BINBYTES8
        RECEIVE + b"\x96" + struct.pack("<Q", 1 << 40) + b"xx",  # BYTEARRAY8
        RECEIVE + b"\x96" + struct.pack("<Q", 1 << 63) + b"xx",
        RECEIVE + b"\x8b" + struct.pack("<i", 1 << 30) + b"xx",  # LONG4
        RECEIVE + b"(I1\ntR.",
        RECEIVE + b"NR.",
        RECEIVE + b"(NNNtR.",
        RECEIVE + b"(S'x'\n(tS'x'\ntR.",
        RECEIVE + b"\x86\x86\x86",
        RECEIVE + b"h\x07.",
        RECEIVE + b"ttt.",
        RECEIVE + b"I" + b"9" * 10_000 + b"\n.",
        # tuples whose hash, or comparison, would take for ever
        RECEIVE + b"}(K\x01" + b"2\x86" * 100 + b"K\x01d.",
        RECEIVE + b")" + b"2\x86" * 100 + b"(0)" + b"2\x86" * 100 + b"R.",
        RECEIVE + b"(" + b"2\x86" * 100 + b"\x91.",
        RECEIVE + b")" + b"\x85" * 300_000 + b"}2(h\x00d.",
    ],
)
def test_lies_of_pickles(stream, tmp_path):
    refused(stream, ".", tmp_path)


def wrapped(dtype, shape, rest=b""):
    """Write a pickle of an array wrapper of joblib's, as it is on disk."""
    wrapper = joblib.numpy_pickle.NumpyArrayWrapper(np.ndarray, shape, "C", np.dtype(dtype))
    stream = pickle.dumps([dask_keras_serialize.packed.receive, wrapper], protocol=2)
    return stream[: stream.rindex(b"b") + 1] + rest


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 80, 1 << 80), (-1,), (-1, -5000), ("x",), 5])
def test_lies_of_joblib(shape, tmp_path):
    refused(wrapped("u1", shape, b"\x01\xff" + b"x" * 100 + b"e."), ".", tmp_path)


def test_a_nest_of_pickles_is_not_followed_for_ever(tmp_path):
    refused(wrapped("O", (1,)) * 5000, "RecursionError", tmp_path)


def test_the_same_bytes_over_and_over(config, tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "_SLACK", 0)
    _, arguments = pack(config).__reduce_ex__(5)
    put, get = b"r\xff\xff\xff", b"j\xff\xff\xff"  # under numbers that nothing else has
    stream = RECEIVE + put + b"\x00" + pickle.dumps(arguments, 4)[:-1] + put + b"\x01"
    again = get + b"\x00" + get + b"\x01R0"
    assert len(inspect(io.BytesIO(stream + again + b"."))) == 1
    refused(stream + again * 500 + b".", "same bytes read over and over", tmp_path)


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_SLACK", 1000)
    monkeypatch.setattr(mapped, "_RATIO", 2)
    for squeeze in (gzip.compress, zlib.compress):
        refused(squeeze(b"\0" * 10_000_000), "decompress to over", tmp_path)


def test_a_file_whose_frames_are_not_its_headers(config, tmp_path):
    receive, (header, links, *arrays) = pack(config).__reduce_ex__(5)
    for wrong in ([], arrays * 2, [arrays[0][1:]]):
        bad = pickle.dumps(Gadget(receive, (header, links, *wrong)))
        refused(bad, "frames are not of the sizes it says", tmp_path)


# who looks


LOOK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("keras", "tensorflow", "joblib", "sklearn", "tests"):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
from dask_keras_serialize.inside import inspect
for file in sys.argv[1:]:
    (parcel,) = inspect(file)
    print(parcel, parcel.variables[0].path, parcel.versions["keras"], len(parcel._repr_html_()))
"""


def test_without_keras_and_joblib(config, value, tmp_path):
    joblib.dump({"x": config}, tmp_path / "a")
    (tmp_path / "b").write_bytes(cloudpickle.dumps(Record("x", value)))
    done = subprocess.run(
        [sys.executable, "-c", LOOK, tmp_path / "a", tmp_path / "b"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "model 'sequential" in done.stdout
    assert "model 'net'" in done.stdout


def test_the_package_offers_it():
    assert dask_keras_serialize.inspect is inspect
    assert dask_keras_serialize.pack is pack
    assert {"inspect", "pack"} <= set(dask_keras_serialize.__all__)


def run(*arguments):
    return CliRunner().invoke(cli.keras, ["inspect", *map(str, arguments)])


def test_the_command(config, value, tmp_path):
    file = tmp_path / "x.joblib"
    joblib.dump([config, value], file)
    plain = run(file)
    assert plain.exit_code == 0
    assert f"model '{config.name}' (keras.src.models.sequential.Sequential)" in plain.output
    lines = plain.output.splitlines()
    kernel = config.variables[0].path
    row = next(line for line in lines if kernel in line)
    assert row.split() == [kernel, "(8,", "16)", "float32", "512"]
    assert len({len(line) for line in lines if "float32" in line and config.name in line}) == 1
    first, second = json.loads(run(file, "--json").output)
    assert {first["name"], second["name"]} == {config.name, "net"}
    net = first if first["name"] == "net" else second
    assert net["code"][f"{Net.__module__}.Net"] == "reference"
    assert net["bytes"] == sum(v["bytes"] for v in net["variables"]) == 72
    file.write_bytes(pickle.dumps(config))
    shown = run(file, "--config").output
    assert json.loads(shown) == pack(config).config
    assert "\n  " in shown


def test_the_commands_errors(tmp_path):
    for file, message in ((tmp_path / "none", "No such file"), (__file__, "no Keras|not a whole")):
        done = run(file)
        assert done.exit_code == 1
        (line,) = done.output.splitlines()
        assert line.startswith("Error: ")
        assert any(each in line for each in message.split("|")), line


def test_dask_finds_the_command():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["dask_cli"].strip().partition(" = ")
    group = click.Group()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _register_command_ep(group, importlib.metadata.EntryPoint(name, target, "dask_cli"))
    assert group.commands["keras"] is cli.keras


def test_links_that_go_too_deep(config, tmp_path):
    """Nothing could open such a parcel, tell it apart or send it on: Python would recurse."""
    receive, (header, _, *frames) = pack(config).__reduce_ex__(4)
    parts = [header, *map(bytes, frames)]
    kept = [f"q{chr(i + 1)}".encode() for i in range(len(parts))]
    file = tmp_path / "chain"

    def chain(count):
        text = b"\x80\x04" + f"c{receive.__module__}\n{receive.__name__}\n".encode() + b"q\x00"
        for part, keep in zip(parts, kept, strict=True):
            text += b"B" + len(part).to_bytes(4, "little") + part + keep
        again = b"h\x00(" + b"h\x01%sh" + b"h".join(b"%c" % (i + 2) for i in range(len(frames)))
        for i in range(count):
            text += again % (b"h\xff\x85" if i else b")") + b"tRq\xff"
        file.write_bytes(text + b".")
        return inspect(file)

    assert [len(parcel.links) for parcel in chain(3)] == [0, 1, 1]
    assert chain(200)[-1].open().name == config.name
    with pytest.raises(DecodeError, match="too deep"):
        chain(3000)
