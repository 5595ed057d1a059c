"""Messages that went wrong: mutations of good ones, and what has to become of each.

The property tests (``test_hostile.py``, hypothesis) and the fuzzer (``fuzz.py``, atheris) choose
the mutations; here is what there is to choose from. A mutated message is either refused with one
line of this package's own, or gives an object that holds, bit for bit, what the mutated header says
that the mutated frames hold.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import random
import resource
from collections.abc import Callable, Iterator
from typing import Any

import keras
import msgpack
import numpy as np
import psutil

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import templates
from dask_keras_serialize.errors import KerasSerializeError
from dask_keras_serialize.protocol import REPORT
from dask_keras_serialize.wire.fingerprints import fingerprints
from dask_keras_serialize.wire.frames import as_frames
from tests import catalogue, zoo

#: Returns a number from 0 to below the one it is given.
Choose = Callable[[int], int]

Message = tuple[dict[str, Any], list[bytes]]

#: What stands where something else should.
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 255, 2**31, 2**53 + 1, 2**63 - 1, 10**12, 1.5, float("nan"),
    float("inf"), "", "x", "x" * 2000, "a\0b\n", "../..", "/etc/passwd", "__class__", "os",
    "system", "keras", "keras.layers", "keras.ops", "keras.utils", "Lambda", "Dense", "Functional",
    "function",
    "float16", "float64", "string", "complex128", "int4", "object", "relu", "get_file", [], {},
    [[]], [0], [None], [2**31, 2**31], [1] * 100, {"class_name": "Lambda", "config": {}},
    {"class_name": "__lambda__", "config": {"value": ""}},
    {"class_name": "__numpy__", "config": {"value": [1], "dtype": "S9999999"}},
    functools.reduce(lambda inner, _: [inner], range(60), 0),
    functools.reduce(lambda inner, _: {"class_name": inner, "config": {}}, range(20), "Dense"),
]  # fmt: skip

#: What arguments that count something may be, when somebody wishes harm.
HUGE: list[Any] = [
    10**4, 10**6, 2**31 - 1, 10**9, 2**63 - 1, [10**6, 10**6], [10**9], [1] * 300, "a" * 10_000,
    {"a": 10**9}, 1e30, ["a", "b"], "ab", [10**9, "a"], [[1] * 100, [2]],
]  # fmt: skip

_ARRAY: dict[str, Any] = {"value": [[1.0] * 8] * 8, "dtype": "float32"}
_OF_NOBODY = {"shape": [None, 8], "dtype": "float32", "keras_history": ["nobody", 0, 0]}

#: What a config may call its layers on, beside tensors of its model, or what looks like one.
CALLED_ON: list[Any] = [
    None, 1, 1.5, "x", [], {}, [[1.0] * 8], {"a": 1}, {"class_name": "__ellipsis__", "config": {}},
    {"class_name": "__numpy__", "config": _ARRAY}, {"class_name": "__tensor__", "config": _ARRAY},
    {"class_name": "__keras_tensor__", "config": _OF_NOBODY},
    *({"class_name": "__keras_tensor__", "config": each} for each in ({}, [], 1, None)),
    *(
        {"class_name": "__slice__", "config": {"start": 0, "stop": each, "step": 1}}
        for each in (1, 10**9, {"class_name": "__keras_tensor__", "config": _OF_NOBODY})
    ),
]  # fmt: skip

#: What of the zoo is mutated: what there is in headers and configs, in few bytes.
MODELS = ("sequential", "trained", "trained two outputs", "vocabulary", "trained subclassed")


@functools.cache
def messages() -> list[Message]:
    """Serialize the good ones, once in a process."""
    good = []
    for name in MODELS:
        if name in zoo.ALL:
            header, frames = serialize_keras(zoo.build(name))
            good.append((header, [bytes(frame) for frame in frames]))
    keras.utils.set_random_seed(0)
    large = keras.Sequential([keras.Input((200,)), *map(keras.layers.Dense, (200, 200, 2))])
    header, frames = serialize_keras(large)  # with frames beside the arena
    return [*good, (header, [bytes(frame) for frame in frames])]


@functools.cache
def objects() -> list[dict[str, Any]]:
    """Describe one of each class as configs do, but for those that hold code."""
    spaces = {
        "layers": catalogue.LAYERS,
        "optimizers": catalogue.OPTIMIZERS,
        "optimizers.schedules": catalogue.SCHEDULES,
        "losses": catalogue.LOSSES,
        "metrics": catalogue.METRICS,
        "initializers": catalogue.INITIALIZERS,
        "constraints": catalogue.CONSTRAINTS,
    }
    found = []
    for space, specs in spaces.items():
        for obj, _ in catalogue.one_of_each(space, specs):
            described = keras.saving.serialize_keras_object(obj)
            if "__lambda__" not in json.dumps(described, default=repr):
                found.append(described)
    return found


@functools.cache
def layer_messages() -> list[Message]:
    """Serialize a model of each layer and operation that can be one's, by config."""
    found = operation_messages()
    for layer, on in catalogue.one_of_each("layers", catalogue.LAYERS):
        try:
            model = catalogue.around(layer, on[0])
        except (TypeError, ValueError):  # cells, layers of more arguments, of shapes all known
            continue
        header, frames = serialize_keras(model)
        if header["encoding"] == "config":
            found.append((header, [bytes(frame) for frame in frames]))
    return found


def operation_messages() -> list[Message]:
    """Serialize a model of each operation that takes one tensor or two, and little else."""
    x = keras.Input((4, 4), batch_size=2)
    arguments = ((x,), (x, x), ([x, x],), (x, 1), (x, (1, 1)), (x, (2, 16)), (x, "float16"))
    found = []
    for name, operation in sorted(vars(keras.ops).items()):
        for given in arguments if callable(operation) else ():
            try:
                model = keras.Model(x, operation(*given), name=name)
                header, frames = serialize_keras(model)
            except Exception:  # whatever it says of arguments that it does not take
                continue
            if header["encoding"] == "config":
                found.append((header, [bytes(frame) for frame in frames]))
                break
    return found


def mutated(choose: Choose) -> Message:
    """Choose a message, and what goes wrong with it."""
    good = layer_messages() if choose(2) else messages()
    return spoiled(good[choose(len(good))], choose)


def spoiled(message: Message, choose: Choose) -> Message:
    """Choose what goes wrong with a message: one thing, or several."""
    header, frames = copy.deepcopy(message[0]), list(message[1])
    by_value = header["encoding"] == "value"
    for _ in range(1 + choose(3)):
        what = choose(10)
        if what < 4 and not by_value:
            header["body"]["config"] = change_config(header["body"]["config"], choose)
        elif what < 5 and not by_value:
            header["body"]["config"] = cut(header["body"]["config"], choose)
        elif what < 8:
            header = change(header, choose)
        else:
            change_frames(frames, choose, bits=not by_value)
        if not isinstance(header, dict) or not isinstance(header.get("body"), dict):
            return header, frames
        if not isinstance(header["body"].get("config", ""), str):
            return header, frames
        if not by_value:
            header["body"].setdefault("config", "")
        by_value |= header.get("encoding") != "config"  # nobody can mutate a pickle and be safe
    if choose(2):
        repair(header, frames)
    return header, frames


def change(value: Any, choose: Choose) -> Any:
    """Change one thing somewhere in a nest of lists and dicts."""
    inside = isinstance(value, (dict, list, tuple)) and len(value) > 0
    if not inside or choose(8) == 0:
        return STRANGE[choose(len(STRANGE))]
    if isinstance(value, dict):
        key = sorted(value, key=str)[choose(len(value))]
        match choose(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {str(STRANGE[choose(len(STRANGE))])[:20]: value[key]}
            case _:
                return value | {key: change(value[key], choose)}
    items = list(value)
    place = choose(len(items))
    match choose(8):
        case 0:
            items.pop(place)
        case 1:
            items.insert(place, items[choose(len(items))])
        case 2:
            other = choose(len(items))
            items[place], items[other] = items[other], items[place]
        case 3:
            items = items * (1 + choose(3))
        case 4:
            items[place:place] = [items[place]] * choose(100)
        case _:
            items[place] = change(items[place], choose)
    return items


def change_config(text: str, choose: Choose) -> str:
    """Change one thing in a config, if it still is one: mostly of what Keras would build."""
    try:
        config = json.loads(text)
    except ValueError:
        return text
    objects = list(named(config))
    if objects and choose(3) == 0:
        ask_too_much(objects[choose(len(objects))], choose)
        return json.dumps(config)
    called = [each for each in objects if each.get("inbound_nodes")]
    if called and choose(3) == 0:
        call_otherwise(called[choose(len(called))], choose)
        return json.dumps(config)
    within = ("model", "compile", "model", "")[choose(4)]
    if isinstance(config, dict) and within in config:
        return json.dumps(config | {within: change(config[within], choose)})
    return json.dumps(change(config, choose))


def named(value: Any) -> Iterator[dict[str, Any]]:
    """Find the objects of classes that a config names, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("class_name"), str) and isinstance(value.get("config"), dict):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from named(each)


def ask_too_much(described: dict[str, Any], choose: Choose) -> None:
    """Have an object, or one of another class in its place, take arguments that cost a lot."""
    if choose(2):
        other = copy.deepcopy(objects()[choose(len(objects()))])
        if "name" in described["config"]:
            other["config"]["name"] = described["config"]["name"]
        described |= other
    taken = sorted(described["config"])
    for _ in range(1 + choose(2)):
        if taken:
            described["config"][taken[choose(len(taken))]] = HUGE[choose(len(HUGE))]


def call_otherwise(described: dict[str, Any], choose: Choose) -> None:
    """Have a layer called on something else, or on more, or more often."""
    nodes = described["inbound_nodes"]
    if not isinstance(nodes, list):
        return
    place = choose(len(nodes))
    call = nodes[place] if isinstance(nodes[place], dict) else {}
    tensors = call.get("args")
    other = copy.deepcopy(CALLED_ON[choose(len(CALLED_ON))])
    match choose(6):
        case 0:  # on that alone
            nodes[place] = call | {"args": [other]}
        case 1:  # on that, and on what it was called on
            nodes[place] = call | {"args": [[other, tensors], [tensors, other]][choose(2)]}
        case 2:  # on what it was called on, out of its sight
            hidden = {"class_name": "__slice__", "config": {"start": tensors, "stop": other}}
            nodes[place] = call | {"args": [other, [hidden, {"x": tensors}][choose(2)]]}
        case 3:
            name = ("mask", "training", "initial_state", "x")[choose(4)]
            nodes[place] = call | {"kwargs": {name: [other, tensors][choose(2)]}}
        case 4:
            nodes[place:place] = [call] * (1 + choose(100))
        case _:
            nodes[place] = change(call, choose)


def cut(text: str, choose: Choose) -> str:
    """Cut a piece out of a text, or put one in twice."""
    if not text:
        return text
    start = choose(len(text))
    end = min(len(text), start + 1 + choose(40))
    return text[:start] + (text[start:end] * 2 if choose(2) else "") + text[end:]


def change_frames(frames: list[bytes], choose: Choose, *, bits: bool) -> None:
    """Lose, double, swap, cut, lengthen a frame, or flip a bit of it."""
    if not frames:
        frames.append(b"x")
        return
    place, other = choose(len(frames)), choose(len(frames))
    frame = frames[place]
    match choose(7 if bits else 5):
        case 0:
            frames.pop(place)
        case 1:
            frames.insert(other, frame)
        case 2:
            frames[place], frames[other] = frames[other], frame
        case 3:
            frames[place] = frame[: choose(len(frame) + 1)]
        case 4:
            frames[place] = frame + bytes(1 + choose(200))
        case _ if frame:
            at = choose(len(frame))
            frames[place] = frame[:at] + bytes([frame[at] ^ (1 << choose(8))]) + frame[at + 1 :]


def repair(header: dict[str, Any], frames: list[bytes]) -> None:
    """Make the header say what the frames are, so that what follows gets to see them."""
    marks, whole = fingerprints(as_frames(frames, "it"))
    header["frame-sizes"] = [len(frame) for frame in frames]
    header["fingerprints"], header["whole"] = list(marks), list(whole)


def limit_memory(nbytes: int) -> None:
    """Let this process have so many bytes of addresses more, for good."""
    limit = psutil.Process().memory_info().vms + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def outcome(header: Any, frames: list[bytes]) -> str:
    """Deserialize a message; say "refused" or "whole", AssertionError if it is neither.

    Or if it has changed what Keras is set to, or what of it is patched during a rebuild.
    """
    before = settings()
    found = _outcome(header, frames)
    assert settings() == before
    return found


def settings() -> list[Any]:
    """Return what a rebuild may change of Keras for as long as it takes, and no longer."""
    patched = {
        keras.Variable: "_initialize_with_initializer",
        keras.Sequential: "from_config",
        keras.KerasTensor: "__init__",
        keras.Operation: "__call__",
    }
    values = [getattr(cls, name) for cls, name in patched.items()]
    values.append(keras.config.floatx.__code__)
    defaults = keras.config.floatx(), keras.config.dtype_policy().name
    return [*values, *defaults, random.getstate(), gc.isenabled()]


def _outcome(header: Any, frames: list[bytes]) -> str:
    try:
        wire = msgpack.unpackb(msgpack.packb(header), use_list=False)
    except (ValueError, OverflowError):  # nothing that a comm could have brought
        return "refused"
    templates.forget()
    obj = refused(lambda: deserialize_keras(wire, list(frames)))
    if obj is None:
        return "refused"
    compare(obj, wire, frames)
    return "whole"


def refused(attempt: Callable[[], Any]) -> Any:
    """Return what an attempt gives; None if it is refused, in one line of this package's own."""
    try:
        return attempt()
    except KerasSerializeError as error:
        reason = str(error)
    assert reason
    assert "\n" not in reason
    assert len(reason) < 2000
    assert REPORT not in reason
    return None


def compare(obj: Any, wire: dict[str, Any], frames: list[Any]) -> None:
    """Assert that an object holds, bit for bit, what its message says."""
    again, there = serialize_keras(obj)
    values, expected = held(again, there), held(wire, frames)
    if {wire["encoding"], again["encoding"]} != {"config"}:  # by value they come in any order
        values.sort(), expected.sort()
    assert values == expected


def held(header: Any, frames: list[Any]) -> list[tuple[str, bytes]]:
    """List what variables a message has, in order: dtype, shape and bytes of each."""
    found = []
    for _, shape, dtype, _, frame, offset, nbytes in header["variables"]:
        content = bytes(memoryview(frames[frame]).cast("B")[offset : offset + nbytes])
        found.append((f"{dtype} {list(shape)}", content))
    return found


def at_random(seed: int) -> Choose:
    """Choose at random, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return lambda below: int(rng.integers(below))


def chosen_by(data: bytes) -> Choose:
    """Choose by two bytes each, and 0 when there are none left."""
    numbers = iter(np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist())
    return lambda below: int(next(numbers, 0)) % below
