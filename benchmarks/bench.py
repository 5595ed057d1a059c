"""Measure how models travel: python benchmarks/bench.py [--all | --quick] [--only SECTION ...].

Three sections, one heavy process at a time: "peers", out and in beside what people would
use instead (``processes``, ``peers``); "cluster", through real processes (``cluster``);
"scale", against layers, bytes, workers and tasks (``scale``). Every result is compared
after its time was taken. Prints every row and how the targets were met. Without arguments
it takes the main workloads on TensorFlow, in about 15 minutes on two cores, and writes the
rows as JSON, pictures, and the tables of README.md; with ``--all`` it takes every workload,
backend and section, and writes those of docs/performance.md too. A quick run, or one of
some sections or workloads, writes only what it is asked for. Nothing here fails for being
slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import cluster
import pages
import pictures
import processes
import report
import scale

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
MAIN = ROOT / "benchmarks" / "results-main.json"
IMAGES = ROOT / "docs" / "images"
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"

SECTIONS = ("peers", "cluster", "scale")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows: benchmarks/results*.json")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures: docs/images")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--all", action="store_true", help="every workload, backend and section")
    size.add_argument("--quick", action="store_true", help="see that it runs; keeps no files")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="peers and cluster")
    parser.add_argument("--workloads", nargs="+", choices=cases.WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--backends", nargs="+", metavar="BACKEND")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    settings = cases.Settings.quick() if options.quick else cases.Settings()
    settings = cases.Settings.everything() if options.all else settings
    asked = {"workloads": options.workloads, "backends": options.backends}
    asked = {name: tuple(value) for name, value in asked.items() if value}
    settings = dataclasses.replace(settings, **asked)
    sections = options.only or (SECTIONS if options.all or options.quick else SECTIONS[:2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends
    whole = not (options.quick or asked or options.only)
    if whole:
        options.json = options.json or (RESULTS if options.all else MAIN)
        options.images = options.images or IMAGES
    results: dict[str, Any] = {"head": head(settings), "rows": []}
    for rows in measure(settings, sections):
        results["rows"] += rows
        if options.json and not whole:  # what there is, should the rest fail
            write(results, options.json)
    if options.json:
        write(results, options.json)
    print(report.text(results))
    if options.images:
        pictures.draw(results, options.images)
    if whole:
        tables = {README: pages.README} | ({PERFORMANCE: pages.WHOLE} if options.all else {})
        for page, content in tables.items():
            page.write_text(pages.fill(page.read_text(), results, content))


def measure(settings: cases.Settings, sections: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """Measure sections; yield the rows of each."""
    with processes.progress() as say:
        if "peers" in sections:
            for backend in settings.backends:
                yield processes.measure(settings, backend, say)
        if "cluster" in sections:
            yield cluster.measure(settings, say)
        if "scale" in sections:
            yield scale.measure(settings, say)


def head(settings: cases.Settings) -> dict[str, Any]:
    """Say what all rows have in common: settings, versions, machine."""
    return {
        "settings": dataclasses.asdict(settings),
        "versions": cases.versions(*settings.backends),
        "machine": cases.machine(),
    }


def write(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, a row a line, so that differences can be read."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    path.write_text(f'{{"head": {json.dumps(results["head"])},\n"rows": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
