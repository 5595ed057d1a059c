"""Results -> the tables of README.md and docs/performance.md, between marks of their own.

README has the main workloads and figures, ``docs/performance.md`` every row. A table
stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import cluster
import peers
import report

Row = dict[str, Any]
Table = Callable[[Row], str]

#: Of the README's first table: what is ours, what one would use instead, the limits.
_SIDE_BY_SIDE = (
    peers.OURS, peers.OURS_FIRST, peers.KERAS, peers.SCIKERAS, peers.OLD, peers.SAFETENSORS,
    peers.RAY_KERAS, peers.RAY, peers.TORCH, peers.CONFIG, peers.ARRAYS, peers.MEMCPY,
)  # fmt: skip

_MAIN = (cases.RESNET, cases.RESNET_ADAM, "dense, 1 GiB")

_KINDS = (peers.OURS, peers.ARRAYS, peers.TORCH, peers.KERAS)


def fill(page: str, results: Row, tables: dict[str, Table]) -> str:
    """Return a page with tables between their marks.

    Parameters
    ----------
    page : str
    results : dict
    tables : dict of str to callable
        By the name in the marks.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If a mark is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page lacks {begin} or {end}")
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n{table(results)}\n{end}{after}"
    return page


def short(results: Row) -> str:
    """Return README's tables: beside what people use, and through a cluster."""
    rows = results["rows"]
    workloads = [w for w in _MAIN if report.find(rows, w, peers.OURS, "out")]
    heads = [f"{workload}, {way}" for workload in workloads for way in ("out", "in")]
    body = []
    for peer in _SIDE_BY_SIDE:
        cells = [
            _with_ratio(rows, report.find(rows, workload, peer, way))
            for workload in workloads
            for way in ("out", "in")
        ]
        if any(cells):
            body.append([peer, *cells])
    tables = [_table(["by", *heads], body)]
    body = []
    for workload in (*workloads, f"dense, {cases.readable(cluster.SMALL)}"):
        for row in rows:
            if row["workload"] != workload or row["peer"] != peers.OURS or row.get("curve"):
                continue
            if row["figure"] in ("out", "in", "sizeof") or "submit" in row["figure"]:
                continue
            body.append(_beside(rows, row))
    if body:
        heads = ["through a cluster", "model", "the same bytes as arrays", "model / arrays"]
        tables.append(_table([*heads, "model without this package"], body))
    return "\n\n".join([*tables, _measured_on(results)])


def whole(results: Row) -> str:
    """Return every row of out and in."""
    rows = results["rows"]
    heads = ["by", "out", "in", "extra memory, out", "in", "copied or made, out", "in"]
    heads += ["wire", "came back equal"]
    parts = []
    for workload, backend in dict.fromkeys(
        (row["workload"], row["backend"]) for row in rows if row["figure"] == "out"
    ):
        if any(row["workload"] == workload and row.get("curve") for row in rows):
            continue
        body = []
        for row in rows:
            if (row["workload"], row["backend"], row["figure"]) != (workload, backend, "out"):
                continue
            back = report.find(rows, workload, row["peer"], "in", backend)
            assert back is not None
            if "failed" in row:
                body.append([row["peer"], "failed", *[""] * 6, row["failed"]])
                continue
            cells = [row["peer"], _with_ratio(rows, row), _with_ratio(rows, back)]
            for field in ("extra_bytes", "copied_bytes"):
                cells += [report.share(row, field), report.share(back, field)]
            body.append([*cells, report.share(row, "wire_bytes"), back.get("equal", "")])
        parts += [f"**{workload}** ({backend})", _table(heads, body)]
    return "\n\n".join([*parts, _measured_on(results)])


def through_cluster(results: Row) -> str:
    """Return every row through a cluster, and of what Dask asks of a value."""
    rows = [row for row in results["rows"] if not row.get("curve")]
    rows = [row for row in rows if row["figure"] not in ("out", "in")]
    body = []
    for workload, figure in dict.fromkeys((row["workload"], row["figure"]) for row in rows):
        of = [report.find(rows, workload, kind, figure) for kind in _KINDS]
        ours = of[0]
        ratio = None if ours is None else report.ratio(rows, ours, peers.ARRAYS)
        cells = [workload, figure, *map(_cell, of), "" if ratio is None else f"{ratio:.2f}"]
        body.append([*cells, "; ".join(filter(None, map(_memory, of)))])
    heads = ["model", "figure", "this package", "numpy arrays", "torch Module"]
    return _table([*heads, "without this package", "model / arrays", "bytes"], body)


def growth(results: Row) -> str:
    """Return the slope of each curve, and where it ends."""
    body = [
        [
            f"{each['figure']} against {each['curve']}", each["peer"],
            f"{each['slope']:.2f}{' **steeper than linear**' if each['steep'] else ''}",
            f"{report.seconds(each['end'][1])} at {each['end'][0]:,}",
        ]
        for each in report.slopes(results["rows"])
    ]  # fmt: skip
    return _table(["curve", "of", "slope", "its end"], body)


def targets(results: Row) -> str:
    """Return which targets are met."""
    return "\n".join(
        f"- {'**MISSED**' if verdict == 'MISSED' else verdict}: {what}"
        for verdict, what in report.judge(results["rows"])
    )


README: dict[str, Table] = {"table": short}
WHOLE: dict[str, Table] = {
    "targets": targets,
    "peers": whole,
    "cluster": through_cluster,
    "scale": growth,
}


def _table(heads: list[str], body: list[list[str]]) -> str:
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _beside(rows: list[Row], row: Row) -> list[str]:
    arrays, without = (
        report.find(rows, row["workload"], peer, row["figure"])
        for peer in (peers.ARRAYS, peers.KERAS)
    )
    ratio = report.ratio(rows, row, peers.ARRAYS)
    cells = [f"{row['workload']}, {row['figure']}", _cell(row), _cell(arrays)]
    return [*cells, "" if ratio is None else f"**{ratio:.2f}**", _cell(without)]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return f"fails: {row['failed'].split(':')[0]}"
    return report.seconds(row["minimum"])


def _memory(row: Row | None) -> str:
    if row is None or "failed" in row:
        return ""
    if "answer" in row:
        return f"{row['peer']} {cases.readable(row['answer'])}"
    if "scheduler_bytes" in row:
        held, peak = (
            cases.readable(max(0, row[name]))
            for name in ("scheduler_bytes", "scheduler_peak_bytes")
        )
        return f"{row['peer']}: scheduler grows by {held}, at its peak by {peak}"
    return ""


def _with_ratio(rows: list[Row], row: Row | None) -> str:
    """Write the least time, and how many times as fast as Keras's pickle that is."""
    ratio = None if row is None or "failed" in row else report.ratio(rows, row, peers.KERAS)
    if row is None or ratio is None or row["peer"] == peers.KERAS:
        return _cell(row)
    return (
        f"{_cell(row)} (**{1 / ratio:.3g}x**)"
        if 1 / ratio < 1000
        else (f"{_cell(row)} (**{1 / ratio:,.0f}x**)")
    )


def _measured_on(results: Row) -> str:
    machine, versions = results["head"]["machine"], results["head"]["versions"]
    names = [f"{name} {version}" for name, version in versions.items() if "dask-" not in name]
    return (
        f"{machine['system']} {machine['architecture']}, {machine['cores']} cores, "
        f"{machine['memory-gib']} GiB; {', '.join(names)}."
    )
