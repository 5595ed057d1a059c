"""Results -> three SVGs: beside what people use, through a cluster, and how costs grow.

Times are the least ones on logarithmic axes. The same rows give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import cluster
import peers
import report

Row = dict[str, Any]

COLORS = {
    peers.OURS: "#0b5394",
    peers.OURS_FIRST: "#3d85c6",
    peers.OURS_PICKLE: "#9fc5e8",
    peers.KERAS: "#a61c00",
    peers.SCIKERAS: "#e69138",
    peers.OLD: "#f1c232",
    peers.SAFETENSORS: "#8e7cc3",
    peers.TORCH: "#c27ba0",
    peers.RAY: "#76a5af",
    peers.RAY_KERAS: "#b45f06",
    peers.CONFIG: "#999999",
    peers.ARRAYS: "#6aa84f",
    peers.MEMCPY: "#cccccc",
}


def draw(results: Row, folder: Path) -> list[Path]:
    """Draw what the rows have; a picture without any row of its own is left out.

    Parameters
    ----------
    results : dict
    folder : Path
        Made if missing.

    Returns
    -------
    list of Path
        What was written: ``serialize.svg``, ``cluster.svg``, ``scale.svg``.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "bench"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if "minimum" in row]
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, list[Row]], Any]] = {
        "serialize": _side_by_side,
        "cluster": _cluster,
        "scale": _scale,
    }
    written = []
    for name, picture in pictures.items():
        figure = picture(plt, rows)
        if figure is None:
            continue
        written.append(folder / f"{name}.svg")
        figure.savefig(written[-1], format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return written


def _side_by_side(plt: Any, rows: list[Row]) -> Any:
    rows = [row for row in rows if row["figure"] in ("out", "in") and not row.get("curve")]
    if not rows:
        return None
    rows = [row for row in rows if row["backend"] == rows[0]["backend"]]
    large = sorted(row["workload"] for row in rows if row["workload"].startswith("dense, "))
    wanted = (cases.RESNET, cases.RESNET_ADAM, cases.BERT, *large[:1])
    workloads = [name for name in wanted if any(row["workload"] == name for row in rows)]
    workloads = workloads or [rows[0]["workload"]]
    names = [name for name in COLORS if any(row["peer"] == name for row in rows)]
    figure, axes = plt.subplots(
        2, len(workloads), figsize=(2.9 * len(workloads) + 1.6, 5.4), squeeze=False, sharey=True
    )
    for line, way in zip(axes, ("out", "in"), strict=True):
        for place, workload in zip(line, workloads, strict=True):
            times = [_least(rows, workload, name, way) for name in names]
            _bars(place, names, times)
            place.set_title(f"{workload}, {way}", fontsize=9)
    figure.suptitle(
        "A model to bytes (out) and back (in): least time, seconds, log scale", fontsize=10
    )
    figure.tight_layout()
    return figure


def _cluster(plt: Any, rows: list[Row]) -> Any:
    figures = [*cluster.SCATTERS, "gather", "spill to disk", "back from disk"]
    rows = [row for row in rows if not row.get("curve")]
    workloads = dict.fromkeys(row["workload"] for row in rows if row["figure"] in figures)
    panels = [
        (workload, [name for name in figures if report.find(rows, workload, peers.OURS, name)])
        for workload in workloads
    ]
    tasks = [
        (row["workload"], row["figure"])
        for row in rows
        if row["peer"] == peers.OURS and row["figure"].endswith(" tasks")
    ]
    if not panels and not tasks:
        return None
    count = len(panels) + bool(tasks)
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 3.8), squeeze=False)
    for place, (workload, names) in zip(axes[0], panels, strict=False):
        _groups(place, names, [(workload, name) for name in names], rows)
        place.set_title(workload, fontsize=9)
    if tasks:
        _groups(axes[0][-1], [f"{work}\n{name}" for work, name in tasks], tasks, rows)
        axes[0][-1].set_title("client.map(..., model=model)", fontsize=9)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLORS[name], label=name)
        for name in (peers.OURS, peers.ARRAYS, peers.TORCH, peers.KERAS)
    ]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle("Through a cluster: least time, seconds, log scale", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _scale(plt: Any, rows: list[Row]) -> Any:
    rows = [row for row in rows if row.get("curve")]
    if not rows:
        return None
    panels = list(dict.fromkeys((row["curve"], row["figure"]) for row in rows))
    fits = {(e["curve"], e["figure"], e["peer"]): e for e in report.slopes(rows)}
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.3 * across, 2.9 * down + 0.4), squeeze=False
    )
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (curve, what) in zip(axes.flat, panels, strict=False):
        for name in COLORS:
            points = sorted(
                (row["x"], row["minimum"])
                for row in rows
                if (row["curve"], row["figure"], row["peer"]) == (curve, what, name)
            )
            if points:
                fit = fits.get((curve, what, name))
                label = name if fit is None else f"{name}: {fit['slope']:.2f}"
                place.plot(*zip(*points, strict=True), "o-", ms=3, color=COLORS[name], label=label)
        place.set_xscale("log")
        place.set_yscale("log")
        place.set_title(f"{what}, seconds against {curve}", fontsize=9)
        place.legend(fontsize=6, frameon=False)
        place.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "How costs grow; beside each name the slope of the upper part, 1 is linear", fontsize=10
    )
    figure.tight_layout()
    return figure


def _bars(place: Any, names: list[str], times: list[float | None]) -> None:
    known = [time for time in times if time]
    if not known:
        place.axis("off")
        return
    for i, (name, time) in enumerate(zip(names, times, strict=True)):
        if time:
            place.barh(i, time, color=COLORS[name], height=0.8)
        said = report.seconds(time) if time else "cannot"
        place.text((time or min(known)) * 1.15, i, said, va="center", fontsize=6.5)
    place.set_xscale("log")
    place.set_xlim(min(known) / 3, max(known) * 12)
    place.set_yticks(range(len(names)), names, fontsize=7.5)
    if not place.yaxis_inverted():
        place.invert_yaxis()
    place.tick_params(axis="x", labelsize=7)
    place.spines[["top", "right"]].set_visible(False)


def _groups(place: Any, labels: list[str], keys: list[tuple[str, str]], rows: list[Row]) -> None:
    kinds = [peers.OURS, peers.ARRAYS, peers.TORCH, peers.KERAS]
    kinds = [k for k in kinds if any(report.find(rows, w, k, figure) for w, figure in keys)]
    height = 0.84 / len(kinds)
    longest = 0.0
    for i, kind in enumerate(kinds):
        for j, (workload, figure) in enumerate(keys):
            time = _least(rows, workload, kind, figure)
            if time:
                y = j + (i - (len(kinds) - 1) / 2) * height
                place.barh(y, time, height=height * 0.92, color=COLORS[kind])
                place.text(time * 1.1, y, report.seconds(time), va="center", fontsize=6)
                longest = max(longest, time)
    place.set_xscale("log")
    place.set_xlim(right=longest * 6)
    place.set_yticks(range(len(labels)), labels, fontsize=7)
    place.invert_yaxis()
    place.tick_params(axis="x", labelsize=7)
    place.spines[["top", "right"]].set_visible(False)


def _least(rows: list[Row], workload: str, peer: str, figure: str) -> float | None:
    row = report.find(rows, workload, peer, figure)
    return None if row is None else row.get("minimum")
