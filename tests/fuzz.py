"""Fuzzing of the decoder, guided by its coverage: make fuzz FUZZ_SECONDS=300.

The bytes that atheris (libFuzzer) makes up choose among the mutations of ``hostile.py``, or are a
header themselves. A crash, a hang of 15 s, a GiB more of addresses than the process began with, or
an outcome that is neither refusal nor whole ends the run with another status than 0 and writes the
input to ``build/fuzz/found-*``; ``python -m tests.fuzz FILE`` runs it again. Inputs that found new
ways through the decoder stand in ``build/fuzz``; those that together go all of these ways are kept
in ``tests/corpus``, where the next run begins, and ``test_hostile.py`` runs them too. Where the
mutations are others, so are the ways: ``python -m tests.fuzz -merge=1 NEW build/fuzz tests/corpus``
in the fuzzer's environment copies to the folder NEW what is needed of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def run(data: bytes) -> str:
    """Run one input: its first byte chooses the target; say what became of it."""
    from dask_keras_serialize.errors import DecodeError
    from dask_keras_serialize.wire.header import Header
    from tests import hostile, parcels

    if data[:1] < b"\x20":
        try:
            Header.from_bytes(data[1:])
        except DecodeError:
            return "refused"
        return "whole"
    if data[:1] < b"\x40":
        return parcels.outcome(hostile.chosen_by(data[1:]))
    return hostile.outcome(*hostile.mutated(hostile.chosen_by(data[1:])))


def main() -> None:
    """Run the command; the arguments are libFuzzer's."""
    import atheris

    with atheris.instrument_imports(include=["dask_keras_serialize"]):
        from tests import hostile, parcels
    # made once
    hostile.messages(), hostile.layer_messages(), hostile.objects(), parcels.pickles()
    hostile.limit_memory(1 << 30)
    # a merge runs its first argument as a program, by a shell
    arguments = [f"{sys.executable} -m tests.fuzz", *sys.argv[1:]]
    atheris.Setup(arguments, lambda data: run(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
