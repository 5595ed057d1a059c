"""Messages of every released format, with what was in them: read by every later version.

``tests/golden/<format>/<backend>/<sample>.xz`` holds a message, what its object was and predicted,
and what one more step of training made of it. ``python -m tests.golden`` writes those of the
format that this version writes, and of the backend that ``KERAS_BACKEND`` names, but none that is
there; ``--again`` writes these too. Versions are of one minor version's by value: what is of
another is refused.

With ``write FOLDER`` it writes all models of the tests that can change backend, those by value too;
with ``write-all FOLDER`` those as well that cannot; and with ``check FOLDER`` it reads all that is
there, of every backend, and prints as JSON what became of it.
"""

from __future__ import annotations

import lzma
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import msgpack
import numpy as np
from distributed.protocol import deserialize, serialize

from dask_keras_serialize.configs import skew
from dask_keras_serialize.wire.frames import as_frames, layout
from dask_keras_serialize.wire.header import FORMAT, FORMAT_VERSION, Header, VariableEntry, minor
from tests import zoo
from tests.golden import added, facts, samples, wire
from tests.golden.facts import TOLERANCE as TOLERANCE

FOLDER = Path(__file__).parent
HEADER = "header.msgpack"

#: Of arrays in a header: around those that make a frame of their own, and a line of a cache.
SIZES = (0, 1, 63, 64, 65, 65535, 65536, 65537, 0, 10**9)

#: Those that hold what only the backend has where they are made.
BOUND = {*zoo.IN_TENSORFLOW, "trained under float64", "trained under mixed_float16"}

#: What backends compute otherwise: torch alone takes NumPy's numbers for Python's.
_OTHERWISE = {"trained under bfloat16", "a number of NumPy's"}

#: Have no inputs yet.
_UNBUILT = {name for name in zoo.ALL if "unbuilt" in name or "argument" in name}


def models() -> dict[str, Callable[[], keras.Model]]:
    """Return what makes each model that can change backend."""
    makers = every_model()
    for name in (BOUND | _OTHERWISE) & makers.keys():
        del makers[name]
    if find_spec("keras_hub"):
        from tests import hub

        makers |= {name: lambda name=name: hub.backbone(name) for name in hub.BACKBONES}
        if keras.backend.backend() != "tensorflow":  # there its tokenizer keeps a tf.name_scope
            makers["task"] = hub.classifier
    return makers


def every_model() -> dict[str, Callable[[], keras.Model]]:
    """Return what makes each model that has inputs."""
    return {name: lambda name=name: zoo.build(name) for name in zoo.ALL if name not in _UNBUILT}


def inputs_for(model: keras.Model) -> Any:
    """Make a batch the model takes, of NumPy's arrays."""
    if type(model).__module__.startswith("keras_hub"):
        from tests import hub

        return hub.inputs_for(model)
    return keras.tree.map_structure(np.asarray, zoo.inputs_for(model))


def send(obj: Any, route: str) -> Any:
    """Return what an object is on a route: bytes of a pickle, or a header and frames."""
    if route == "dask":
        header, frames = serialize(obj, serializers=["dask"], on_error="raise")
        return msgpack.packb(header, use_bin_type=True), [bytes(frame) for frame in frames]
    if route == "cloudpickle":
        return bytes(cloudpickle.dumps(obj))
    return pickle.dumps(obj, int(route.partition(" ")[2] or 5))


def receive(sent: Any) -> Any:
    """Return the object of what :func:`send` returned."""
    if isinstance(sent, bytes):
        return pickle.loads(sent)
    header, frames = sent
    return deserialize(msgpack.unpackb(header, use_list=False), frames)


def goes_by_value(sent: Any) -> bool:
    """Say whether anything in a message goes by value."""
    return b"\xa8encoding\xa5value" in (sent if isinstance(sent, bytes) else sent[0])


def record(obj: Any, route: str = "pickle", batch: Any = None) -> dict[str, Any]:
    """Return a message with what is known of its object, which is used up."""
    first = obj[0] if isinstance(obj, tuple) else obj
    content = {"versions": skew.versions(), "sent": send(obj, route), "is": facts.of(obj)}
    if batch is not None:
        content["batch"] = batch
        content["predicted"] = facts.predictions(first, batch[0])
        content["step"] = facts.step(first, *batch)
    return content


def check(content: dict[str, Any], targets: Any = None) -> float:
    """Fail unless an object arrives as it was and goes on so; return how its predictions differ.

    With other targets than the file's, it trains on with the optimizer that it came with.
    """
    obj = receive(content["sent"])
    first = obj[0] if isinstance(obj, tuple) else obj
    facts.same(facts.of(obj), content["is"])
    most = 0.0
    if "batch" in content:
        is_own = keras.backend.backend() in content["versions"]
        least = TOLERANCE if is_own else facts.tolerance(first)
        predicted = facts.predictions(first, content["batch"][0])
        most = facts.close(predicted, content["predicted"], least)
    if "step" in content:
        facts.close(facts.step(first, *content["batch"]), content["step"])
    if targets is not None:
        assert first.compiled
        assert int(first.optimizer.iterations) > 0
        first.fit(zoo.X, targets, batch_size=16, verbose=0)
        assert np.isfinite(first.history.history["loss"]).all()
    return most


def folder(number: int, backend: str) -> Path:
    """Return where a backend's files of a format are."""
    return FOLDER / str(number) / backend


def read(number: int, backend: str, name: str) -> dict[str, Any]:
    """Read a file."""
    path = folder(number, backend) / f"{name}.xz"
    content: dict[str, Any] = pickle.loads(lzma.decompress(path.read_bytes()))
    return content


def names(number: int, backend: str) -> list[str]:
    """Return the names of a format's files of a backend."""
    return sorted(path.stem for path in folder(number, backend).glob("*.xz"))


def bare_header() -> bytes:
    """Return a header of this format with all that can be in it, on every machine the same."""
    frames = as_frames([bytes(range(250)) * 4, bytes(range(256)) * 300], "it")
    variables = tuple(
        VariableEntry(f"a/{i}", (size,), "uint8", bool(i % 2), location)
        for i, (size, location) in enumerate(zip(SIZES, layout(SIZES), strict=True))
    )
    body = {"extras": [], "placements": [[0, [[2], ["mesh"], ["mesh", None]]]]}
    versions = {"python": "3", "keras": "4", "jax": "5", FORMAT: "6"}
    header = Header("config", "model 'a'", "a", "A", "jax", versions, body, variables)
    header = replace(header.with_frames(frames), unread=(1,), whole=(0,), byteorder="little")
    return header.to_bytes()


def write(again: bool = False) -> None:
    """Write what is missing of this backend and format, or all."""
    where = folder(FORMAT_VERSION, keras.backend.backend())
    where.mkdir(parents=True, exist_ok=True)
    makers: dict[Path, Callable[[], bytes]] = {where.parent / HEADER: bare_header}
    makers |= {where / f"{name}.xz": partial(written, name) for name in samples.here()}
    for path, make in makers.items():
        if path.exists() and not again:
            print(f"{path} is there, and is kept; --again writes it anew")
        else:
            path.write_bytes(make())


def written(name: str) -> bytes:
    """Return the file of a sample."""
    obj = samples.make(name)
    sample = samples.SAMPLES[name]
    batch = sample.batch() if sample.batch else None
    content = {"added": added.to(obj)} | record(obj, sample.route, batch)
    return lzma.compress(pickle.dumps(content, 5))


def changed(name: str) -> str | None:
    """Say what of a sample's bytes is not as this format's file has it; None if nothing."""
    content = read(FORMAT_VERSION, keras.backend.backend(), name)
    obj = samples.make(name)
    then, now = wire.view(content["sent"]), wire.view(send(obj, samples.SAMPLES[name].route))
    ours, theirs = added.to(obj), content["added"]
    same_versions = alike(content["versions"])
    if not same_versions:
        ours, theirs = map(added.of_any_version, (ours, theirs))
    found = wire.difference(now.ours, then.ours)
    found = found or wire.difference([ours], [theirs], "/added")
    if not found and same_versions:
        found = wire.difference(now.theirs, then.theirs, "/theirs")
    return found


def alike(versions: dict[str, str]) -> bool:
    """Say whether Keras is of these versions, and Python and the backend of their minor ones."""
    here = skew.versions()
    minors = (minor(here[what]) == minor(versions[what]) for what in here if what != FORMAT)
    return here["keras"] == versions["keras"] and all(minors)


def write_models(where: Path, makers: dict[str, Callable[[], keras.Model]]) -> None:
    """Write one file of this process's backend, of models of the tests."""
    content = {}
    for name, make in makers.items():
        model = make()
        inputs = inputs_for(model)
        content[name] = record(model) | {"batch": (inputs,)}
        content[name]["predicted"] = facts.predictions(model, inputs)
    (where / f"{keras.backend.backend()}.pickle").write_bytes(pickle.dumps(content, 5))


def check_models(where: Path) -> dict[str, dict[str, float | str]]:
    """Check all models of every backend; return their differences, or what was wrong."""
    found: dict[str, dict[str, float | str]] = {}
    for path in sorted(where.glob("*.pickle")):
        for name, content in pickle.loads(path.read_bytes()).items():
            targets = zoo.TARGETS[zoo.TARGET.get(name, "sparse")] if "trained" in name else None
            try:
                found.setdefault(path.stem, {})[name] = check(content, targets)
            except Exception as error:  # reported by name, whatever it is; the next is checked too
                found.setdefault(path.stem, {})[name] = repr(error)
    return found
