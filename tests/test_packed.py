import dataclasses
import json
import pickle
from html.parser import HTMLParser

import keras
import msgpack
import numpy as np
import pytest
from dask.base import tokenize
from dask.sizeof import sizeof
from distributed import protocol

from dask_keras_serialize import packed, views
from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.errors import DecodeError, FormatError, MissingPackageError
from dask_keras_serialize.packed import PackedObject, Parcel
from dask_keras_serialize.pickling import pack
from dask_keras_serialize.wire.header import FORMAT, package_version
from tests import leaks, zoo


def test_a_parcel_opens_to_new_models():
    model = zoo.build("trained")
    parcel = pack(model)
    zoo.assert_same(model, parcel.open())
    assert parcel.open() is not parcel.open()
    assert "96 bytes" not in repr(parcel)
    assert model.name in repr(parcel)


def test_it_pickles_again_to_the_same_bytes_without_touching_them():
    parcel = pack(zoo.build("trained subclassed"))
    buffers = []
    stream = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(stream, buffers=buffers)
    assert [addresses(f) for f in again.frames] == [addresses(f) for f in parcel.frames]
    assert again.header == parcel.header
    assert tokenize(again) == tokenize(parcel)
    assert sizeof(PackedObject(again)) >= again.nbytes == parcel.nbytes


@pytest.mark.parametrize("key", [("layer", 10**9), ("none", [1]), [1], {}, 10**9])
def test_a_part_that_there_is_not(key):
    with pytest.raises(DecodeError, match="it has no part"):
        packed.take(pack(zoo.build("trained")), key)


def test_what_is_inside_can_be_read():
    parcel = pack(zoo.build("trained"))
    assert parcel.config["model"] == json.loads(parcel.header.body["config"])["model"]
    parcel.config.clear()  # a dict of the caller's own
    assert parcel.config
    assert parcel.variables is parcel.header.variables
    assert parcel.versions == parcel.header.versions
    assert parcel.code == ()
    by_value = pack(zoo.build("trained subclassed"))
    assert by_value.config is None
    assert ("tests.zoo.Subclassed", "reference") in by_value.code
    with pytest.raises(AttributeError):
        parcel.config = {}


def lying(parcel, **changes):
    header = dataclasses.replace(parcel.header, **changes)
    return Parcel(header.to_bytes(), parcel.frames)


def test_a_config_or_code_that_is_none():
    parcel = pack(zoo.build("trained"))
    for text in ("{", "[1]", "[" * 100_000, 5, None):
        with pytest.raises(DecodeError, match="its config is no JSON"):
            _ = lying(parcel, body={"config": text}).config
    for code in (5, [5], [["a"]], [["a", "b", "c"]]):
        with pytest.raises(DecodeError, match="malformed"):
            lying(parcel, body={"code": code})


def test_its_line_says_what_matters():
    parcel = pack(zoo.build("trained subclassed"))
    line = repr(parcel)
    assert line == repr(PackedObject(parcel)).replace("PackedObject", "Parcel")
    backend = keras.backend.backend()
    size = "2.33 kiB" if backend == "tensorflow" else "2.32 kiB"  # whose seeds are of 64 bits
    for part in (parcel.header.owner, "by value", backend, f"19 variables, {size}"):
        assert part in line
    assert "code: zoo.Subclassed>" in line
    assert "PackedObject ('layer', 1) of model" in repr(PackedObject(parcel, ("layer", 1)))
    many = lying(parcel, body={"code": [[f"mod.f{i}", "value"] for i in range(9)]})
    assert "code: mod.f0, mod.f1, mod.f2 and 6 more>" in repr(many)


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert not attrs
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


EVIL = "<script>alert('1')</script>&\"\n\x1b[2J\u202e" + "x" * 10_000


def test_its_html_shows_the_table_and_no_markup_of_others():
    parcel = pack(zoo.build("trained"))
    plain = Tags(parcel._repr_html_())
    assert {"(8, 16)", "float32", "512", parcel.variables[0].path} <= set(plain.texts)
    assert "... 7 more" in plain.texts
    assert PackedObject(parcel)._repr_html_() == parcel._repr_html_()
    evil = lying(
        parcel,
        owner=EVIL,
        backend=EVIL,
        versions={EVIL: EVIL},
        body={"code": [[EVIL, EVIL]] * 100},
        variables=tuple(dataclasses.replace(v, path=EVIL) for v in parcel.variables),
    )
    shown = Tags(evil._repr_html_())
    assert set(shown.tags) == set(plain.tags)
    assert any("<script>" in each for each in shown.texts)
    for view in (repr(evil), views.text(evil.header), evil._repr_html_()):
        assert view.replace("\n", "").isprintable()
        assert len(max(view.split(), key=len)) < 10_000
    assert "\n" not in repr(evil)
    assert len(views.text(evil.header).splitlines()) == len(parcel.variables) + 9
    assert len(evil._repr_html_()) < 40_000


def test_a_closed_model_has_no_notebook_views_but_its_own():
    """IPython asks a canary first, and shows nothing of what answers to any name."""
    closed = PackedObject(pack(zoo.build("trained")))
    for name in ("_ipython_canary_method_should_not_exist_", "_repr_png_", "_ipython_display_"):
        assert not hasattr(closed, name)
    assert "<table>" in closed._repr_html_()


def of_another_format(name):
    """Pickle a model as another version might, and return what a receiver makes of that."""
    receive, (header, links, *frames) = pack(zoo.build(name)).__reduce_ex__(5)
    wire = msgpack.unpackb(header) | {"format-version": 2}
    wire["versions"][FORMAT] = "9.9.9"
    header = msgpack.packb(wire)
    return header, receive(header, links, *frames)


def test_another_format_is_passed_on_unread(monkeypatch):
    header, parcel = of_another_format("trained")
    monkeypatch.setattr(packed, "take", keep)
    closed = pickle.loads(pickle.dumps(PackedObject(parcel).predict))
    assert "predict of <PackedObject of model 'sequential" in repr(closed)
    again = closed._packed.parcel
    assert again._packed_header == header
    assert sizeof(PackedObject(again)) >= again.nbytes == parcel.nbytes
    assert tokenize(again) == tokenize(parcel) != tokenize(pack(zoo.build("trained")))
    assert [bytes(f) for f in again.frames] == [bytes(f) for f in parcel.frames]
    for view in (repr(again), again._repr_html_()):
        assert "sent in wire format 2 by dask-keras-serialize 9.9.9" in view
        assert view.isprintable()


def test_another_format_is_refused_when_it_is_asked_for_anything():
    _, parcel = of_another_format("trained subclassed")
    for use in (
        parcel.open,
        lambda: parcel.header,
        lambda: parcel.config,
        lambda: parcel.variables,
        lambda: parcel.versions,
        lambda: parcel.code,
        lambda: PackedObject(parcel).open(),
        lambda: PackedObject(parcel).predict(zoo.X),
        lambda: packed.take(parcel, None),
        lambda: Parcel(parcel._packed_header, parcel.frames),
    ):
        with pytest.raises(FormatError, match=rf"^model 'sub.* 9\.9\.9.* {package_version()} here"):
            use()
    evil = msgpack.unpackb(parcel._packed_header) | {"owner": "<b>&"}
    assert "<b>" not in packed.receive(msgpack.packb(evil), ())._repr_html_()


def keep(parcel, key):
    return PackedObject(parcel, key)


def addresses(frame):
    return np.frombuffer(frame, np.uint8).ctypes.data


def test_a_closed_model_hands_its_methods_on_closed(monkeypatch):
    """As a scheduler does with ``client.submit(model.predict, x)``."""
    model = zoo.build("trained")
    stream = pickle.dumps(model.predict)
    monkeypatch.setattr(packed, "take", keep)
    closed = pickle.loads(stream)
    assert "predict of <PackedObject" in repr(closed)
    monkeypatch.undo()
    again = pickle.loads(pickle.dumps(closed))
    np.testing.assert_array_equal(again(zoo.X, verbose=0), model.predict(zoo.X, verbose=0))
    np.testing.assert_array_equal(closed(zoo.X, verbose=0), model.predict(zoo.X, verbose=0))


def test_a_broken_model_raises_its_error_on_any_use():
    broken = BrokenObject(DecodeError("model 'm': why"))
    assert "model 'm': why" in repr(broken)
    for use in (
        lambda: broken.predict(1),
        lambda: broken(1),
        lambda: broken.weights,
        lambda: pickle.loads(pickle.dumps(broken)),
        lambda: str(broken),
        lambda: bool(broken),
        lambda: list(broken),
    ):
        with pytest.raises(DecodeError, match="model 'm': why"):
            use()
    assert not hasattr(broken, "__dask_graph__")


def test_errors_travel():
    for error in (DecodeError("a"), MissingPackageError.on_workers(["tcp://x"], 2)):
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), twin.args) == (type(error), error.args)


@pytest.mark.parametrize("links", [3, [1], None, "ab", {1: 2}])
def test_links_that_are_none_are_an_error(links):
    header = pack(zoo.build("sequential"))._packed_header
    with pytest.raises(DecodeError, match="links"):
        packed.receive(header, links)


def test_a_worker_passes_on_what_it_cannot_open(monkeypatch):
    """It may be the only one that has it; and it keeps nothing of what failed to be rebuilt."""

    def fails(self, *arguments):
        raise RuntimeError("no bias")

    source = zoo.build("sequential")
    header, frames = protocol.serialize(source)
    buffers = [bytearray(frame) for frame in frames]
    layers = leaks.layers_alive()
    with monkeypatch.context() as patch:
        patch.setattr("dask_keras_serialize.cluster.broken.read_by_worker", lambda: True)
        patch.setattr(keras.layers.Dense, "build", fails)
        held = protocol.deserialize(header, buffers)
        assert type(held) is BrokenObject
        assert leaks.layers_alive() == layers
        assert sizeof(held) > sum(map(len, buffers))
        for _ in range(2):
            with pytest.raises(DecodeError, match="no bias") as info:
                held()
            assert info.value.__cause__ is info.value.__context__ is None
        assert "no bias" in repr(pickle.loads(pickle.dumps(held)))
    again, passed_on = protocol.serialize(held)
    assert [bytes(frame) for frame in passed_on] == [bytes(frame) for frame in buffers]
    zoo.assert_same(source, protocol.deserialize(again, [bytearray(each) for each in passed_on]))
    del held, passed_on, info
    for buffer in buffers:
        buffer.append(0)


def linked(depth, width=1, parcel=None):
    """Return parcels of an optimizer, each with links to the one before."""
    parcel = parcel or pack(keras.optimizers.SGD())
    receive, (header, _, *frames) = parcel.__reduce_ex__(5)
    for _ in range(depth):
        parcel = receive(header, (parcel,) * width, *frames)
    return parcel


def test_links_that_go_deep():
    deep = linked(200)
    assert isinstance(deep.open(), keras.optimizers.SGD)
    assert isinstance(packed.take(deep, None), keras.optimizers.SGD)
    with pytest.raises(DecodeError, match="links are none, or too deep"):
        linked(2000)


def test_links_in_diamonds_are_looked_at_once():
    """Each of 40 has two links to the one before, which are a million million ways to the first."""
    first = pack(keras.optimizers.SGD())
    one, other, less = (linked(depth, 2, first) for depth in (40, 40, 39))
    assert tokenize(one) == tokenize(other) != tokenize(less)
    assert isinstance(one.open(), keras.optimizers.SGD)
