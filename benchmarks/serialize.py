"""Measure how models travel: python benchmarks/serialize.py [--quick] [--json] [--picture].

Each workload and peer has a process of its own (``peers``); their repetitions take
turns, one process at work at a time, so that all see the same machine. Then the whole
``scatter`` (``scatter``). Every result is compared, bit for bit, after its time was
taken. Prints every row and how the targets were met; writes the rows as JSON, a picture,
and the tables in README.md. A quick run writes only what it is asked for. Nothing here
fails for being slow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cases
import peers
import report
import scatter

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PICTURE = ROOT / "docs" / "images" / "serialize.svg"
README = ROOT / "README.md"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows: benchmarks/results.json")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="docs/images/serialize.svg")
    parser.add_argument("--quick", action="store_true", help="see that it runs; keeps no files")
    options = parser.parse_args()
    if not options.quick:
        options.json = options.json or RESULTS
        options.picture = options.picture or PICTURE
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    settings = cases.Settings.quick() if options.quick else cases.Settings()

    rows = []
    for workload in settings.workloads:
        rows += measure_peers(settings, workload)
        if workload in cases.SCATTERED:
            rows += measure_scatter(settings, workload)
    report.add_ratios(rows)
    print(report.text(rows), report.targets(rows), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        report.draw(rows, options.picture)
    if not options.quick:
        README.write_text(report.fill(README.read_text(), rows))


def measure_peers(settings: cases.Settings, workload: str) -> list[Row]:
    """Measure all peers on one workload, taking turns.

    Parameters
    ----------
    settings : Settings
    workload : str

    Returns
    -------
    list of dict
        A row for each peer and direction, without ratios.
    """
    counts = {
        name: settings.repetitions_of(workload, slow=name in peers.SLOW) for name in peers.PEERS
    }
    lines: dict[str, Connection] = {}
    common: dict[str, Row] = {}
    memory: dict[str, Row] = {}
    timed: dict[str, list[Row]] = {name: [] for name in peers.PEERS}
    with _processes() as begin:
        for name in peers.PEERS:
            _say(f"{settings.title(workload)}: {name}")
            lines[name] = begin(peers.serve, settings, workload, name)
            common[name] = lines[name].recv()
            if counts[name] > 1:
                _ask(lines[name], False)  # warm-up, beside the tiny one
            memory[name] = _ask(lines[name], True)
        for repetition in range(settings.repetitions):
            for name in peers.PEERS:
                if counts[name] == 1 and repetition == 0:
                    timed[name].append(memory[name])
                elif repetition < counts[name]:
                    timed[name].append(_ask(lines[name], False))
    return [
        {
            **_head(settings, workload, name, direction, timed[name][0][direction]),
            "extra_bytes": memory[name][direction]["extra_bytes"],
            **_times([repetition[direction]["seconds"] for repetition in timed[name]]),
            **common[name],
        }
        for name in peers.PEERS
        for direction in ("out", "in")
    ]


def measure_scatter(settings: cases.Settings, workload: str) -> list[Row]:
    """Measure the whole scatter of one workload; the first repetition is warm-up.

    Parameters
    ----------
    settings : Settings
    workload : str

    Returns
    -------
    list of dict
        A row for each value and variant, without ratios.
    """
    _say(f"{settings.title(workload)}: scatter")
    with _processes() as begin:
        line = begin(scatter.serve, settings, workload)
        common = line.recv()
        taken = [_ask(line, True) for _ in range(1 + settings.scatter_repetitions)][1:]
    return [
        {
            **_head(settings, workload, value, "scatter", {"variant": variant}),
            **_times([repetition[value, variant] for repetition in taken]),
            **common,
        }
        for variant in scatter.VARIANTS
        for value in scatter.VALUES
    ]


def _head(settings: cases.Settings, workload: str, peer: str, direction: str, more: Row) -> Row:
    head = {"workload": settings.title(workload), "peer": peer, "direction": direction}
    more = {key: value for key, value in more.items() if key != "seconds"}
    return {**head, **more, "equal": True, "settings": asdict(settings)}


def _times(seconds: Iterable[float]) -> Row:
    seconds = list(seconds)
    return {"seconds": seconds, "median": statistics.median(seconds), "minimum": min(seconds)}


def _ask(line: Connection, request: object) -> dict[Any, Any]:
    line.send(request)
    answer: dict[Any, Any] = (
        line.recv()
    )  # EOFError if the process failed; its traceback is on stderr
    return answer


@contextmanager
def _processes() -> Iterator[Callable[..., Connection]]:
    """Start processes from scratch, each at the other end of a line; end them all."""
    context = multiprocessing.get_context("spawn")
    started = []

    def begin(target: Callable[..., None], *arguments: object) -> Connection:
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *arguments))
        process.start()
        there.close()
        started.append((process, here))
        return here

    try:
        yield begin
        for _, line in started:
            line.send(None)
    finally:
        for process, line in started:
            line.close()
            process.join()


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
