"""Measure how models travel: python benchmarks/bench.py [--quick] [--only SECTION ...].

Three sections, one heavy process at a time: "peers", out and in beside what people would
use instead (``processes``, ``peers``); "cluster", through real processes (``cluster``);
"scale", against layers, bytes, workers and tasks (``scale``). Every result is compared
after its time was taken. Prints every row and how the targets were met; writes the rows
as JSON, pictures, and the tables in README.md and docs/performance.md. A quick run, or
one of some sections or workloads, writes only what it is asked for. Nothing here fails
for being slow.
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
IMAGES = ROOT / "docs" / "images"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

SECTIONS = ("peers", "cluster", "scale")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows: benchmarks/results.json")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures: docs/images")
    parser.add_argument("--quick", action="store_true", help="see that it runs; keeps no files")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--workloads", nargs="+", choices=cases.WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--backends", nargs="+", metavar="BACKEND")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    settings = cases.Settings.quick() if options.quick else cases.Settings()
    asked = {"workloads": options.workloads, "backends": options.backends}
    asked = {name: tuple(value) for name, value in asked.items() if value}
    settings = dataclasses.replace(settings, **asked)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends
    whole = not (options.quick or asked or tuple(options.only) != SECTIONS)
    if whole:
        options.json, options.images = options.json or RESULTS, options.images or IMAGES
    results: dict[str, Any] = {"head": head(settings), "rows": []}
    for rows in measure(settings, options.only):
        results["rows"] += rows
        if options.json and not whole:  # what there is, should the rest fail
            write(results, options.json)
    if options.json:
        write(results, options.json)
    print(report.text(results))
    if options.images:
        pictures.draw(results, options.images)
    if whole:
        for page, tables in zip(PAGES, (pages.README, pages.WHOLE), strict=True):
            page.write_text(pages.fill(page.read_text(), results, tables))


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
