"""What cannot be read here, for its versions, says so of all of them at once."""

import keras
import pytest

from dask_keras_serialize import DecodeError
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.wire import sides
from dask_keras_serialize.wire.header import FORMAT, Header, package_version, python_version
from dask_keras_serialize.wire.sides import importing_keras
from tests import zoo

pytestmark = pytest.mark.once


def sent_by(name, **versions):
    header, frames = serialize_keras(zoo.build(name))
    return header | {"versions": header["versions"] | versions}, frames


def refused(header, frames):
    with pytest.raises(DecodeError) as info:
        deserialize_keras(header, frames)
    assert str(info.value).startswith(header["owner"])
    assert "\n" not in str(info.value)
    return str(info.value)


def test_by_value_all_that_differs_is_named():
    python, here = python_version(), keras.version()
    said = refused(*sent_by("subclassed", python="3.99.1", keras="9.8.7"))
    assert "from python 3.99.1 and keras 9.8.7, which" in said
    assert f"which python {python} and keras {here} here cannot read" in said
    assert said.endswith("use the same minor versions on both sides")
    said = refused(*sent_by("subclassed", python="3.99.1"))
    assert f"from python 3.99.1, which python {python} here" in said
    assert said.endswith("use the same minor version on both sides")


def test_a_keras_too_old_names_both_sides(monkeypatch):
    sent = sent_by("trained", keras="3.14.2")
    monkeypatch.setattr(keras, "version", lambda: "3.10.0")
    said = refused(*sent)
    assert "keras 3.10.0 is older than 3.11" in said
    backend = keras.backend.backend()
    assert f"keras 3.14.2, {backend} {sent[0]['versions'][backend]}, {FORMAT} " in said
    assert said.endswith(
        f"this is python {python_version()}, keras 3.10.0, {FORMAT} {package_version()}"
    )


def test_who_cannot_import_keras_names_both_sides():
    header = Header.from_wire(sent_by("trained", keras="3.14.2")[0])
    said = r"No module named 'keras'.*set KERAS_BACKEND; it was sent by .*keras 3\.14\.2, "
    with pytest.raises(DecodeError, match=said), importing_keras(header):
        raise ModuleNotFoundError("No module named 'keras'")


def test_versions_that_lie_stay_short():
    lies = {f"{i}" * 100: "9" * 10_000 for i in range(1000)}
    header = Header.from_wire(sent_by("trained")[0] | {"versions": lies})
    assert len(sides.named(header)) < 700
    assert "by unknown versions, this" in sides.named(
        Header.from_wire(sent_by("trained")[0] | {"versions": {}})
    )
