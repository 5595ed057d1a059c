"""What is on the wire, in full, but for what is the machine's: to tell one format from another.

A message becomes nested lists and bytes. Left out are the numbers of versions, where Keras and
this package are installed, and how a pickler names what it has seen. What is Keras's own to
change comes apart, and is compared where its version is the same.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import pickletools
import re
from typing import Any, NamedTuple

import msgpack
import numpy as np

#: What of a config's JSON Keras writes.
KERAS_S = ("model", "compile", "policy")
#: The folders that packages lie in, in the names of source files.
ELSEWHERE = re.compile(r"[^\0]*/(?=(keras/src|tests/golden)/)")
#: By which cloudpickle knows a class again.
RANDOM = re.compile("[0-9a-f]{32}")
ALIGNMENT = 64


class Call(NamedTuple):
    """A function that a pickle calls, and what with."""

    function: str
    arguments: tuple[Any, ...]


class Calls(pickle.Unpickler):
    """Reads a pickle without calling what is this package's."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "dask_keras_serialize":
            return lambda *arguments: Call(f"{module}.{name}", arguments)
        return super().find_class(module, name)


class Parts(NamedTuple):
    """What of a message is this package's, and what of it is Keras's, Python's or a backend's."""

    ours: Any
    theirs: Any


def view(sent: Any) -> Parts:
    """Return what is in a message: pickle, or header and frames as Dask's family sends them."""
    if not isinstance(sent, bytes):
        packed, frames = sent
        header = msgpack.unpackb(packed, use_list=False, object_pairs_hook=list)
        (sub,) = (value for key, value in header if key == "sub-header")
        ours, theirs = message(sub, frames)
        return Parts(["dask", ours], [theirs])
    seen: dict[int, int] = {}
    theirs: list[Any] = []
    return Parts(called(Calls(io.BytesIO(sent)).load(), seen, theirs), theirs)


def called(value: Any, seen: dict[int, int], theirs: list[Any]) -> Any:
    """Return calls as lists, each parcel where it comes first; collect what is Keras's."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.tobytes()]
    if isinstance(value, Call):
        if id(value) in seen:
            return ["again", seen[id(value)]]
        seen[id(value)] = len(seen)
        arguments = value.arguments
        headers = [i for i, each in enumerate(arguments) if isinstance(each, bytes)]
        frames = [each for each in arguments if isinstance(each, np.ndarray)]
        if not headers or not frames:
            return [value.function, *(called(each, seen, theirs) for each in arguments)]
        header = msgpack.unpackb(arguments[headers[0]], use_list=False, object_pairs_hook=list)
        ours, keras_s = message(header, [frame.tobytes() for frame in frames])
        theirs.append(keras_s)
        rest = [
            "frame" if isinstance(each, np.ndarray) else called(each, seen, theirs)
            for i, each in enumerate(arguments)
            if i not in headers
        ]
        rest.insert(headers[0], "header")
        return [value.function, rest, ours]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(called(each, seen, theirs) for each in value)]
    plain = value is None or isinstance(value, str | bytes | int | float)
    return value if plain else type(value).__name__


def message(pairs: Any, frames: list[bytes]) -> Parts:
    """Return a header, in the order of its keys, and frames."""
    header = dict(pairs)
    order = [key for key, _ in pairs]
    body = dict(header["body"])
    header["versions"] = [key for key, _ in header["versions"]]
    if "config" in body:
        body["config"], theirs = of_config(body["config"])
        theirs += [path for path, *_ in header["variables"]]
        header["variables"] = [row[1:] for row in header["variables"]]
        header["body"] = [[key, body[key]] for key, _ in header["body"]]
        return Parts([[[key, header[key]] for key in order], frames], theirs)
    frames, stream = of_value(header, body, frames)
    header["body"] = [[key, body[key]] for key, _ in header["body"]]
    # who else is asked of it: tests.golden.added
    return Parts([order, [*body]], [[[key, header[key]] for key in order], frames, stream])


def of_config(text: str) -> tuple[str, list[str]]:
    """Return a config's text without what Keras wrote, and that."""
    theirs = []
    for key in KERAS_S:
        start = text.index(f'"{key}": ') + len(key) + 4
        # depends on the order alone: a "compile" inside of "model" is gone by then
        _, end = json.JSONDecoder().raw_decode(text, start)
        theirs.append(text[start:end])
        text = f"{text[:start]}...{text[end:]}"
    return text, theirs


def of_value(
    header: dict[str, Any], body: dict[str, Any], frames: list[bytes]
) -> tuple[list[bytes], list[Any]]:
    """Cut the pickle out of what goes by value; return what is left, and its opcodes.

    It is as long as the names of folders are. What lies behind it moves up.
    """
    (number, start, nbytes), *others = body["extras"]
    taken = -(-nbytes // ALIGNMENT) * ALIGNMENT
    frame = frames[number]
    body["extras"] = [[number, start, "pickle"]]
    for n, offset, size in others:
        behind = n == number and offset > start
        body["extras"].append([n, offset - taken if behind else offset, size])
    for key in ("frame-sizes", "fingerprints"):
        header[key] = [each for i, each in enumerate(header[key]) if i != number]
    left = frame[:start] + frame[start + taken :]
    stream = frame[start : start + nbytes]
    return [*frames[:number], left, *frames[number + 1 :]], opcodes(stream)


def opcodes(stream: bytes) -> list[Any]:
    """Return a pickle's opcodes, or several pickles' of one memo.

    A string that was seen before is like one that was not: which of them are the same object is
    Python's own. What else was seen is numbered.
    """
    file = io.BytesIO(stream)
    found: list[Any] = []
    memo: list[Any] = []
    others = itertools.count()
    while file.tell() < len(stream):
        for opcode, argument, _ in pickletools.genops(file):
            name = re.sub(r"^(SHORT_|LONG_)?(BIN)?|\d*$", "", opcode.name)
            if name in ("FRAME", "PROTO"):
                continue
            if name == "MEMOIZE":
                memo.append(found[-1] if found[-1][0] == "UNICODE" else ["GET", next(others)])
            elif name == "GET":
                found.append(memo[argument])
            else:
                found.append([name, located(argument) if isinstance(argument, str) else argument])
    return found


def located(name: str) -> str:
    """Return a string without the folder that a package lies in, or cloudpickle's random number."""
    return "a number" if RANDOM.fullmatch(name) else ELSEWHERE.sub("", name)


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Return where two views differ first, and how."""
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            key = a[0] if isinstance(a, list) and a and isinstance(a[0], str) else i
            if found := difference(a, b, f"{where}/{key}"):
                return found
        return None if len(ours) == len(theirs) else f"{where}: {len(ours)} not {len(theirs)}"
    if ours == theirs:
        return None
    if isinstance(ours, bytes) and isinstance(theirs, bytes):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        return f"{where}: {len(ours)} bytes, not {len(theirs)}, or other ones from {at}"
    return f"{where}: {ours!r:.200}, not {theirs!r:.200}"
