"""Pickles that went wrong: parcels, with links to each other, of which parts are asked for.

What becomes of each message alone is ``hostile.py``'s; here are the links between those of one
pickle, the keys of their parts, and what schedulers and people ask of one that stays closed.
"""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import keras
import msgpack
from dask.tokenize import tokenize

from dask_keras_serialize import packed
from dask_keras_serialize.configs import templates
from tests import hostile, zoo

#: A message, and the places in its pickle of those that it has links to.
Linked = tuple[hostile.Message, list[int]]


@functools.cache
def pickles() -> list[list[Linked]]:
    """Take apart pickles of objects that share parts, once in a process."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    first = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(5)(inputs)))
    first.compile("adam", "mse")
    second = keras.Model(inputs, first.layers[1].output)
    lambdas = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(abs), first.layers[1]])
    trained = zoo.build("trained")
    return [
        taken_apart([first, second, keras.Model(inputs, second.output)]),
        taken_apart([second, lambdas, first.optimizer, lambdas.layers[1]]),
        taken_apart([trained, trained.layers[0], trained.optimizer, trained.variables[0]]),
    ]


def taken_apart(objects: list[Any]) -> list[Linked]:
    """Pickle objects together; return the messages in it."""
    found: list[tuple[packed.Parcel, hostile.Message]] = []

    def receive(header: bytes, links: Any, *buffers: Any) -> Any:
        parcel = packed.receive(header, links, *buffers)
        wire = msgpack.unpackb(header, use_list=False)
        found.append((parcel, (wire, [bytes(memoryview(each)) for each in buffers])))
        return parcel

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == (packed.__name__, "receive"):
                return receive
            return super().find_class(module, name)

    Unpickler(io.BytesIO(pickle.dumps(objects, protocol=5))).load()
    places = {id(parcel): place for place, (parcel, _) in enumerate(found)}
    return [(message, [places[id(each)] for each in parcel.links]) for parcel, message in found]


def outcome(choose: hostile.Choose) -> str:
    """Choose what goes wrong with a pickle; say what became of it, as :func:`hostile.outcome`."""
    pickles(), hostile.messages(), hostile.objects()  # made once, by Keras's own random numbers
    before = hostile.settings()
    found = _outcome(choose)
    assert hostile.settings() == before
    return found


def _outcome(choose: hostile.Choose) -> str:
    templates.forget()
    linked = pickles()[choose(len(pickles()))]
    parcels: list[packed.Parcel] = []
    said = "whole"
    for message, places in linked:
        if choose(3) == 0:
            message = hostile.spoiled(message, choose)
        elif choose(6) == 0:  # another where this one is expected
            message = hostile.messages()[choose(len(hostile.messages()))]
        links: Any = [parcels[place] for place in places if place < len(parcels)]
        if choose(4) == 0:
            links = other_links(links, parcels, choose)
        header, frames = message
        try:
            wire = msgpack.packb(header)
        except (ValueError, OverflowError):  # nothing that a pickle could have brought
            return "refused"
        parcel = hostile.refused(functools.partial(packed.receive, wire, links, *frames))
        if parcel is None:
            said = "refused"
            continue
        parcels.append(parcel)
        ask(parcel)
        key = keys(parcel)[choose(len(keys(parcel)))] if choose(2) else None
        obj = hostile.refused(functools.partial(packed.take, parcel, key))
        if obj is None:
            said = "refused"
        elif key is None and not links:
            hostile.compare(obj, msgpack.unpackb(wire, use_list=False), list(frames))
    return said


def other_links(links: list[Any], parcels: list[Any], choose: hostile.Choose) -> Any:
    """Choose other links than those of a parcel."""
    if not parcels:
        return hostile.STRANGE[choose(len(hostile.STRANGE))]
    one = parcels[choose(len(parcels))]
    return [
        [], [*links, one], [one, *links], links[::-1], links * 50, [one] * 100, tuple(links),
        [None], [*links, one._packed_header], one, hostile.STRANGE[choose(len(hostile.STRANGE))],
    ][choose(11)]  # fmt: skip


def keys(parcel: packed.Parcel) -> list[Any]:
    """List what parts of an object somebody may ask for."""
    strange = [0, 1, -1, 10**9, (), ("layers",), ("variables", 0), "x", b"x", [], {}, 1.5, True]
    if parcel._rebuilt is None:
        return strange
    return [*sorted(parcel._rebuilt.parts(), key=repr)[:20], *strange]


def ask(parcel: packed.Parcel) -> None:
    """Ask of a parcel all that schedulers, spilling and people ask of one that stays closed."""
    closed = packed.PackedObject(parcel)
    for question in (
        lambda: repr(closed), closed._repr_html_, lambda: closed.nbytes, lambda: tokenize(closed),
        closed.__sizeof__, lambda: parcel.config, lambda: parcel.variables, lambda: parcel.versions,
        lambda: parcel.code,
    ):  # fmt: skip
        hostile.refused(question)
    again = pickle.loads(pickle.dumps(parcel))
    assert again._packed_header == parcel._packed_header
    assert list(map(bytes, again.frames)) == list(map(bytes, parcel.frames))
