"""Find regressions: python benchmarks/compare.py OLD.json NEW.json [--tolerance 1.3].

Compares each row that both files have by its ratio to its limit's row of the same run
(``report.limit_of``), never by seconds: another machine, or a busy one, slows both. Bytes, of
memory, copies and the wire, are compared as they are, and so is what came back equal. Prints what
is worse, and what cannot be compared; the exit status is 1 if anything is worse or is not measured
any more (but for ``--part``), 2 if the files cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import peers
import report

Row = dict[str, Any]

#: Times below it say more about the clock and the scheduler of the system, in seconds.
FLOOR = 0.0005

#: Of the bytes of the model: what allocators keep and give back differs by as much.
SLACK = 0.04

#: Said of a row that only the older file has.
GONE = "not measured any more"

#: The peers whose rows are this package's.
OURS = (peers.OURS, peers.OURS_FIRST, peers.OURS_PICKLE, peers.RAY)


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=1.3, help="1.3: a third more is found")
    parser.add_argument("--part", action="store_true", help="NEW has a part of OLD's rows")
    options = parser.parse_args()
    try:
        old, new = (read(path) for path in (options.old, options.new))
        worse, compared, skipped = compare(old, new, options.tolerance)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for row in worse:
        print(
            f"{row['name']}: {row['old']:.3g} -> {row['new']:.3g} of {row['limit']}, "
            f"{row['new'] / row['old']:.2f} times as much"
        )
    bytes_worse = more_bytes(old, new, options.tolerance)
    for line in bytes_worse:
        print(line)
    for name in skipped:
        print(f"not compared: {name}")
    print(f"{compared} rows compared, {len(worse)} beyond {options.tolerance:g}")
    gone = [] if options.part else [name for name in skipped if name.endswith(GONE)]
    return 1 if worse or bytes_worse or gone else 0


def read(path: Path) -> list[Row]:
    """Read the rows of a results file; ValueError if it is none."""
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            if not {"workload", "peer", "figure"} <= row.keys():
                raise ValueError(f"a row lacks its workload, peer or figure: {row}")
            if "failed" not in row and not row["minimum"] > 0:
                raise ValueError(f"a row has no time: {row}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results: {error}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return list(rows)


def compare(old: list[Row], new: list[Row], tolerance: float) -> tuple[list[Row], int, list[str]]:
    """Compare this package's rows by their ratio to their limits.

    Parameters
    ----------
    old, new : list of dict
    tolerance : float
        The new ratio over the old one, at most.

    Returns
    -------
    worse : list of dict
        name, limit, and the ratios old and new. A row that was measured and now fails is
        worse by infinity.
    compared : int
    skipped : list of str
        Rows of one file without a counterpart in the other, or whose limit is not in both.

    Raises
    ------
    ValueError
        If the files have no row in common.
    """
    worse, skipped, compared = [], [], 0
    for row in new:
        if row["peer"] not in OURS:
            continue
        name, before = _name(row), _counterpart(row, old)
        if before is None or "failed" in before:
            skipped.append(f"{name}: not measured before")
            continue
        limit = report.limit_of(row)
        was, now = (report.ratio(*each, limit) for each in ((old, before), (new, row)))
        if "failed" in row:
            now = float("inf")
        if was is None or now is None:
            skipped.append(f"{name}: {limit} is not in both")
            continue
        compared += 1
        small = "failed" not in row and max(row["minimum"], before["minimum"]) < FLOOR
        if now / was > tolerance and not small:
            worse.append({"name": name, "limit": limit, "old": was, "new": now})
    skipped += [
        f"{_name(row)}: {GONE}"
        for row in old
        if row["peer"] in OURS and _counterpart(row, new) is None
    ]
    if not compared:
        raise ValueError("the files have no row in common")
    return worse, compared, skipped


def more_bytes(old: list[Row], new: list[Row], tolerance: float) -> list[str]:
    """Say which rows take, copy or send more bytes than they did, or bring back other things."""
    found = []
    for row in new:
        before = _counterpart(row, old)
        if row["peer"] not in OURS or before is None or "failed" in row or "failed" in before:
            continue
        if row.get("equal") != before.get("equal"):
            found.append(f"{_name(row)}: {before.get('equal')} -> {row.get('equal')}")
        slack = SLACK * (row.get("weights_bytes") or 0)
        for key in ("extra_bytes", "copied_bytes", "wire_bytes"):
            was, now = before.get(key), row.get(key)
            if was is not None and now is not None and now > max(was, 0) * tolerance + slack:
                found.append(f"{_name(row)}: {key} {was:,} -> {now:,}")
    return found


def _name(row: Row) -> str:
    keys = ("workload", "x", "peer", "figure", "backend")
    return ", ".join(str(row[key]) for key in keys if row.get(key))


def _counterpart(row: Row, rows: list[Row]) -> Row | None:
    key = (row["workload"], row["peer"], row["figure"], row.get("backend"), row.get("x"))
    return report.find(rows, *key)


if __name__ == "__main__":
    sys.exit(main())
