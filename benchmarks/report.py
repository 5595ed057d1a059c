"""Rows -> ratios, tables and the picture. Reads rows only, so it can run on old JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import peers
import scatter

Row = dict[str, Any]

#: What the project set out to reach: workload, direction, field, at least or at most.
TARGETS = (
    ("dense, 1 GiB", "out", "ratio", 300.0),
    ("dense, 1 GiB", "in", "ratio", 100.0),
    ("dense, 1 GiB", "out", "extra", 0.02),
    (cases.RESNET, "out", "ratio", 10.0),
    (cases.RESNET, "in", "ratio", 4.0),
)


def add_ratios(rows: list[Row]) -> None:
    """Add, in place, each row's ratio to its rival of the same run.

    Parameters
    ----------
    rows : list of dict
        Gain ``rival``, and ``ratio`` and ``ratio_of_minima``: the rival's median (or
        minimum) over the row's. Out and in, the rival is Keras's pickle: more is
        better. In a scatter it is the list of arrays: 1 is as fast as arrays are.
    """
    for row in rows:
        scattered = row["direction"] == "scatter"
        name = scatter.ARRAYS if scattered else peers.KERAS
        rival = find(rows, row["workload"], name, row["direction"], row.get("variant"))
        if rival is not None:
            row["rival"] = name
            row["ratio"] = rival["median"] / row["median"]
            row["ratio_of_minima"] = rival["minimum"] / row["minimum"]


def find(
    rows: list[Row], workload: str, peer: str, direction: str, variant: str | None = None
) -> Row | None:
    """Return the one row of a workload, peer, direction and variant, or None."""
    wanted = (workload, peer, direction, variant)
    for row in rows:
        if wanted == (row["workload"], row["peer"], row["direction"], row.get("variant")):
            return row
    return None


def text(rows: list[Row]) -> str:
    """Return every row in aligned columns: medians, minima, ratios, extra memory."""
    heads = ("workload", "peer", "way", "median", "minimum", "reps", "ratio", "extra memory")
    body = [
        (
            row["workload"],
            row["peer"],
            f"{row['direction']} {row.get('variant', '')}".strip(),
            _seconds(row["median"]),
            _seconds(row["minimum"]),
            str(len(row["seconds"])),
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            _extra(row),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    lines = []
    for line in (heads, *body):
        cells = [cell.ljust(w) for cell, w in zip(line[:3], widths[:3], strict=True)]
        cells += [cell.rjust(w) for cell, w in zip(line[3:], widths[3:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """Return the tables for the README: medians, and ratios in bold."""
    ways = ["| model | by | out | in | extra memory, out | in |", "|:--|:--|--:|--:|--:|--:|"]
    scatters = [
        "| `client.scatter` | model | list of arrays | model / arrays |",
        "|:--|--:|--:|--:|",
    ]
    for row in rows:
        if row["direction"] == "out":
            back = find(rows, row["workload"], row["peer"], "in")
            assert back is not None
            times = [_with_ratio(each) for each in (row, back)]
            cells = [row["workload"], row["peer"], *times, _extra(row), _extra(back)]
            ways.append(f"| {' | '.join(cells)} |")
        elif row["peer"] == scatter.MODEL:
            variant = row["variant"]
            arrays = find(rows, row["workload"], scatter.ARRAYS, "scatter", variant)
            assert arrays is not None
            cells = [f"{row['workload']}, {variant}", _seconds(row["median"])]
            cells += [_seconds(arrays["median"]), f"**{row['median'] / arrays['median']:.2f}**"]
            scatters.append(f"| {' | '.join(cells)} |")
    return "\n".join([*ways, "", *scatters])


def fill(page: str, rows: list[Row]) -> str:
    """Return a page with the tables, and what they were measured on, between its marks."""
    begin, end = "<!-- table:begin -->", "<!-- table:end -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n{markdown(rows)}\n\n{_measured_on(rows[0])}\n{end}{after}"


def _measured_on(row: Row) -> str:
    machine, versions = row["machine"], row["versions"]
    names = [f"{name} {version}" for name, version in versions.items() if "dask-" not in name]
    return (
        f"{machine['system']} {machine['architecture']}, {machine['cores']} cores, "
        f"{machine['memory-gib']} GiB; {', '.join(names)}."
    )


def targets(rows: list[Row]) -> str:
    """Say of each target whether this run met it."""
    lines = []
    for workload, direction, field, target in TARGETS:
        row = find(rows, workload, peers.OURS, direction)
        if row is None or (field == "extra" and row["extra_bytes"] is None):
            lines.append(f"not measured: {workload} {direction}, {field}")
        elif field == "extra":
            share = row["extra_bytes"] / row["weights_bytes"]
            met = "met" if share <= target else "MISSED"
            lines.append(
                f"{met}: {workload} {direction}, extra memory {share:.2%}, target {target:.0%}"
            )
        else:
            met = "met" if row["ratio"] >= target else "MISSED"
            lines.append(
                f"{met}: {workload} {direction}, {row['ratio']:.1f}x Keras's pickle, "
                f"target {target:.0f}x"
            )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw the speed-up over Keras's pickle, and the scatter, as an SVG.

    Parameters
    ----------
    rows : list of dict
        With ratios.
    path : Path
        Its folder is made if missing; the same rows give the same bytes.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "serialize"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 2))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    _bars(
        left,
        [f"{workload}\n{way}" for workload in workloads for way in ("out", "in")],
        {
            name: [
                _median(rows, workload, name, way)
                for workload in workloads
                for way in ("out", "in")
            ]
            for name in (peers.OURS, peers.OURS_PICKLE, peers.KERAS)
        },
        ("#0b5394", "#6fa8dc", "#b7b7b7"),
    )
    left.set_title("Serialize (out) and deserialize (in)", fontsize=10, pad=22)
    variants = ("hash=False", "default")
    scattered = [w for w in workloads if find(rows, w, scatter.MODEL, "scatter", "default")]
    _bars(
        right,
        [f"{workload}\n{variant}" for workload in scattered for variant in variants],
        {
            name: [_median(rows, w, name, "scatter", v) for w in scattered for v in variants]
            for name in scatter.VALUES
        },
        ("#0b5394", "#93c47d"),
    )
    right.set_title("client.scatter to another process", fontsize=10, pad=22)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _bars(axes: Any, labels: list[str], groups: dict[str, list[float]], colors: Any) -> None:
    height = 0.8 / len(groups)
    longest = max(max(values) for values in groups.values())
    for i, (name, values) in enumerate(groups.items()):
        places = [k + (i - (len(groups) - 1) / 2) * height for k in range(len(values))]
        axes.barh(places, values, height=height * 0.92, color=colors[i], label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value * 1.12, place, _seconds(value), va="center", fontsize=6.5)
    axes.set_xscale("log")
    axes.set_xlim(right=longest * 6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("median time, seconds (log scale)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(groups)
    )


def _median(rows: list[Row], *wanted: str) -> float:
    row = find(rows, *wanted)
    return float("nan") if row is None else float(row["median"])


def _with_ratio(row: Row) -> str:
    if row["peer"] == peers.KERAS:
        return _seconds(row["median"])
    return f"{_seconds(row['median'])} (**{row['ratio']:.{1 if row['ratio'] < 100 else 0}f}x**)"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.{0 if value >= 0.01 else 1}f} ms"


def _extra(row: Row) -> str:
    if row.get("extra_bytes") is None:
        return ""
    return f"{row['extra_bytes'] / row['weights_bytes']:.1%}"
