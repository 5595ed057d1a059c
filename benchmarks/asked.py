"""What Dask and users ask of a value in their own process: its token, size, deep copy."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import cases
import peers
import values
from bed import Bed, off, timed
from meter import Row


def ask(bed: Bed) -> Iterator[Row]:
    """Ask for token, size and deep copy, of a model and of arrays in turn."""
    from dask.sizeof import sizeof
    from dask.tokenize import tokenize

    for figure, ask in (("tokenize", tokenize), ("sizeof", sizeof)):
        times: dict[str, list[float]] = {kind: [] for kind in bed.kinds}
        answers: dict[str, set[Any]] = {kind: set() for kind in bed.kinds}
        for turn in range(1 + bed.settings.turns):
            for kind, value in bed.kinds.items():
                seconds, answer = timed(ask, value)
                answers[kind].add(answer)
                times[kind] += [seconds] if turn else []
        for kind in bed.kinds:
            more = {"answer": max(answers[kind])} if figure == "sizeof" else {}
            same = "the same each time" if len(answers[kind]) == 1 else "another each time"
            yield bed.row(kind, figure, times[kind], equal=same, **more)
    yield from deepcopies(bed)
    with off():
        seconds, answer = timed(sizeof, bed.model)
        yield bed.row(peers.KERAS, "sizeof", [seconds], answer=answer)
        if bed.nbytes < 512 << 20:
            taken = [timed(tokenize, bed.model) for _ in range(2)]
            same = "the same each time" if taken[0][1] == taken[1][1] else "another each time"
            yield bed.row(peers.KERAS, "tokenize", [t for t, _ in taken], equal=same)


def deepcopies(bed: Bed) -> Iterator[Row]:
    """Copy a model, arrays, and a model by Keras's way, in turn."""
    times: dict[str, list[float]] = {}
    equal = {}
    slow = 0 if bed.nbytes >= 512 << 20 else 2
    for turn in range(bed.settings.turns):
        for kind in (*bed.kinds, peers.KERAS):
            if kind == peers.KERAS and turn >= slow:
                continue
            value = bed.kinds.get(kind, bed.model)
            cases.touch((6 if kind == peers.KERAS else 1) * bed.nbytes)
            with off() if kind == peers.KERAS else contextlib.nullcontext():
                seconds, twin = timed(copy.deepcopy, value)
            equal[kind] = values.equal(value, twin)
            del twin
            times.setdefault(kind, []).append(seconds)
    for kind, seconds in times.items():
        yield bed.row(kind, "deepcopy", seconds, equal=equal[kind])
