"""Rows -> ratios, targets and tables. Reads results only, so it can run on old JSON.

Results are ``{"head": ..., "rows": [...]}``. A row is of one workload, peer, figure and
backend, and of one abscissa if it belongs to a curve; it has seconds, or the reason why
there are none. Ratios are of the least times of one run: noise only ever adds to a time, on a
virtual machine seconds for a GiB of memory that its host has to find first. They hold from
machine to machine, seconds do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import peers
import scale

Row = dict[str, Any]

_DENSE = "dense, 1 GiB"


@dataclass(frozen=True)
class Target:
    """What the project set out to reach, in one figure.

    Attributes
    ----------
    workload, figure : str
    kind : {"times as fast", "times the time", "extra"}
        "times as fast" as the other, at least; "times the time" of the other, at most;
        extra memory over the weights, at most.
    bound : float
    other, peer : str
        Of ``peers``: beside whom, and who; ours may have seen the architecture before.
    backend : str
    """

    workload: str
    figure: str
    kind: str
    bound: float
    other: str = peers.KERAS
    peer: str = peers.OURS
    backend: str = "tensorflow"


#: The last two lines are "at least as good on JAX and torch".
TARGETS = (
    Target(_DENSE, "out", "times as fast", 500),
    Target(_DENSE, "out", "extra", 0.01),
    Target(cases.RESNET, "out", "times as fast", 25),
    *(
        Target(workload, "out", "times the time", 1.5, peers.CONFIG)
        for workload in (cases.RESNET, cases.RESNET_ADAM, cases.EFFICIENTNET)
    ),
    Target(_DENSE, "in", "times as fast", 100),
    Target(_DENSE, "in", "extra", 1.0),
    *(Target(_DENSE, "in", "times as fast", 100, backend=name) for name in ("jax", "torch")),
    *(Target(_DENSE, "in", "extra", 1.0, backend=name) for name in ("jax", "torch")),
    Target(cases.LAYERS, "in", "times the time", 1.3, peers.CONFIG, peers.OURS_FIRST),
    *(
        Target(_DENSE, figure, "times the time", 1.1, peers.ARRAYS)
        for figure in (
            "scatter", "scatter, direct, hash=False", "gather", "broadcast to 4",
        )
    ),
    Target(cases.RESNET, "tokenize", "times the time", 2, peers.ARRAYS),
    Target(_DENSE, "tokenize", "times the time", 2, peers.ARRAYS),
    Target(cases.RESNET, "deepcopy", "times as fast", 5),
    *(
        Target(workload, "in", "times as fast", bound, backend=backend)
        for backend in ("tensorflow", "jax", "torch")
        for workload, bound in (
            (cases.RESNET, 6), (cases.RESNET_ADAM, 8), (cases.EFFICIENTNET, 4),
        )
    ),
    *(
        Target(
            workload, "in", "times as fast", bound, peer=peers.OURS_FIRST, backend=backend
        )
        for backend in ("tensorflow", "jax", "torch")
        for workload, bound in (
            (cases.RESNET, 6), (cases.RESNET_ADAM, 8), (cases.EFFICIENTNET, 4),
        )
    ),
)  # fmt: skip


def limit_of(row: Row) -> str:
    """Name the peer that a row is held against where machines differ.

    Out and in of a model that is mostly layers it is the walk of the config; of one that
    is mostly bytes, memcpy; everywhere else the same bytes as arrays.
    """
    if row["figure"] in ("out", "in") and not row.get("curve"):
        large = (row.get("weights_bytes") or 0) >= 200 << 20 and "dense" in row["workload"]
        return peers.MEMCPY if large else peers.CONFIG
    return peers.ARRAYS


def find(
    rows: list[Row],
    workload: str,
    peer: str,
    figure: str,
    backend: str | None = None,
    x: int | None = None,
) -> Row | None:
    """Return the one row that says so, whether measured or failed, or None."""
    for row in rows:
        if (row["workload"], row["peer"], row["figure"]) == (workload, peer, figure) and (
            backend in (None, row.get("backend")) and x == row.get("x")
        ):
            return row
    return None


def ratio(rows: list[Row], row: Row, other: str) -> float | None:
    """Divide a row's time by that of another peer for the same; None without either."""
    them = find(rows, row["workload"], other, row["figure"], row.get("backend"), row.get("x"))
    if them is None or "minimum" not in row or not them.get("minimum"):
        return None
    return float(row["minimum"] / them["minimum"])


def judge(rows: list[Row]) -> list[tuple[str, str]]:
    """Say of each target whether these rows meet it.

    Parameters
    ----------
    rows : list of dict

    Returns
    -------
    list of tuple of str
        "met", "MISSED" or "not measured", and the figure beside the target.
    """
    verdicts = []
    for target in TARGETS:
        where = f"{target.workload}, {target.figure}"
        if target.backend != "tensorflow":
            where += f", {target.backend}"
        if target.peer != peers.OURS:
            where += f", {target.peer.removeprefix(peers.OURS + ', ')}"
        row = find(rows, target.workload, target.peer, target.figure, target.backend)
        got = None if row is None else _reached(rows, row, target)
        if got is None:
            verdicts.append(("not measured", where))
            continue
        if target.kind == "extra":
            met, text = got <= target.bound, f"extra memory {got:.2%}, at most {target.bound:.0%}"
        elif target.kind == "times as fast":
            met = got >= target.bound
            text = f"{got:.3g} times as fast as {target.other}, at least {target.bound:g}"
        else:
            met = got <= target.bound
            text = f"{got:.3g} times the time of {target.other}, at most {target.bound:g}"
        verdicts.append(("met" if met else "MISSED", f"{where}: {text}"))
    return verdicts


def _reached(rows: list[Row], row: Row, target: Target) -> float | None:
    if target.kind == "extra":
        extra = row.get("extra_bytes")
        return None if extra is None else extra / row["weights_bytes"]
    got = ratio(rows, row, target.other)
    if got is None:
        return None
    return 1 / got if target.kind == "times as fast" else got


def slopes(rows: list[Row]) -> list[Row]:
    """Fit a slope to each curve; see ``scale.slope``."""
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("curve") and "minimum" in row:
            key = (row["curve"], row["figure"], row["peer"])
            curves.setdefault(key, []).append((row["x"], row["minimum"]))
    found = []
    for (curve, figure, peer), points in curves.items():
        value = scale.slope(points)
        if value is not None:
            found.append(
                {"curve": curve, "figure": figure, "peer": peer, "slope": value}
                | {"steep": value > scale.STEEP, "end": max(points)}
            )
    return found


def text(results: Row) -> str:
    """Return every row in aligned columns, slopes, and the targets."""
    rows = results["rows"]
    heads = ("workload", "peer", "figure", "backend", "median", "minimum", "reps", "of limit", "")
    body = []
    for row in rows:
        x = f", {row['x']:,}" if row.get("curve") else ""
        start = (row["workload"] + x, row["peer"], row["figure"], row.get("backend") or "")
        if "failed" in row:
            body.append((*start, "", "", "", "", f"failed: {row['failed']}"))
            continue
        of_limit = ratio(rows, row, limit_of(row))
        body.append(
            (
                *start, seconds(row["median"]), seconds(row["minimum"]),
                str(len(row["seconds"])), "" if of_limit is None else f"{of_limit:.3g}",
                _details(row),
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if 4 <= i < 8 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, *body)
    ]
    lines += ["", *(_slope_line(each) for each in slopes(rows))]
    lines += ["", *(f"{verdict}: {what}" for verdict, what in judge(rows))]
    return "\n".join(lines)


def _slope_line(each: Row) -> str:
    steep = ", steeper than linear" if each["steep"] else ""
    what = f"{each['figure']} against {each['curve']}, {each['peer']}"
    return f"slope {each['slope']:5.2f}  {what}{steep}"


def _details(row: Row) -> str:
    said = [
        f"{name.removesuffix('_bytes')} {share(row, name)}"
        for name in ("extra_bytes", "copied_bytes", "wire_bytes")
        if row.get(name) is not None
    ]
    for name in ("scheduler_bytes", "scheduler_peak_bytes", "answer"):
        if name in row:
            said.append(f"{name.removesuffix('_bytes')} {cases.readable(row[name])}")
    return ", ".join([*said, *([row["equal"]] if "equal" in row else [])])


def share(row: Row, field: str) -> str:
    """Write bytes as a part of the weights; of small ones as they are."""
    if row.get(field) is None:
        return ""
    if row["weights_bytes"] < 1 << 20:
        return cases.readable(max(0, row[field]))
    return f"{max(0, row[field]) / row['weights_bytes']:.1%}"


def seconds(value: float) -> str:
    """Write seconds for people."""
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 0.001:
        return f"{value * 1000:.{0 if value >= 0.01 else 1}f} ms"
    return f"{value * 1e6:.{0 if value >= 1e-5 else 1}f} us"
