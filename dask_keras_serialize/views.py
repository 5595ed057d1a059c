"""For people: what a header says, as a line, a page of text, a page of HTML; what a doctor found.

Everything shown came from elsewhere and may be hostile: control characters are shown as
escapes, so that a name cannot drive a terminal or begin a line of its own, names are
shortened, and HTML is escaped. Loads neither Keras nor a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dask_keras_serialize.cluster.verdict import Finding, Process
from dask_keras_serialize.wire.header import Header

#: Characters shown of one name, rows of the table in HTML, names of code in one line; processes
#: named in one line, and characters of what is wrong with them.
_NAME, _ROWS, _CODE, _WHO, _WHAT = 120, 20, 3, 3, 1000

_COLUMNS = ("variable", "shape", "dtype", "bytes")

#: Of an examination: the facts, and the column of each.
_FACTS = {
    "who": "process",
    "python": "python",
    "keras": "keras",
    "backend": "backend",
    "dask": "dask",
    "distributed": "distributed",
    "package": "this package",
    "handler": "handler",
    "devices": "devices",
    "round-trip": "round trip",
}

#: What stands behind a value that is wrong, and before the line that says why.
_MARKS = {"failure": "!", "note": "~"}


def summary(header: Header) -> str:
    """Say in one line what is packed.

    Parameters
    ----------
    header : Header

    Returns
    -------
    str
        Such as ``"model 'net' (keras.src....Sequential), by config, tensorflow, 2 variables,
        108 B"``.
    """
    parts = [_line(header.owner), f"by {header.encoding}", _line(header.backend), _total(header)]
    if header.code:
        names = [".".join(name.rsplit(".", 2)[-2:]) for name, _ in header.code]
        parts.append(f"code: {_few(names, _CODE)}")
    return ", ".join(parts)


def text(header: Header) -> str:
    """Say what is packed, with the whole table of variables.

    Parameters
    ----------
    header : Header

    Returns
    -------
    str
        Lines, the columns of the table aligned.
    """
    facts = [f"  {name:<9} {value}" for name, value in _facts(header)]
    table = [f"  {line}" for line in _aligned([_COLUMNS, *_rows(header)])]
    return "\n".join([_line(header.owner), *facts, "", *table, "", f"  {_total(header)}"])


def html(header: Header) -> str:
    """Say what is packed, for a notebook.

    Parameters
    ----------
    header : Header

    Returns
    -------
    str
        HTML, all that came with the bytes escaped; of the table its first 20 rows.
    """
    facts = [_cells("th", [name]) + _cells("td", [value]) for name, value in _facts(header, _ROWS)]
    rows = [_cells("td", row) for row in _rows(header, _ROWS)]
    more = len(header.variables) - len(rows)
    return (
        f"<div><b>{escape(_line(header.owner))}</b>{_table(facts)}"
        f"{_table([_cells('th', _COLUMNS), *rows])}"
        f"{f'<p>... {more} more</p>' if more else ''}<p>{_total(header)}</p></div>"
    )


def examination(processes: Sequence[Process], findings: Sequence[Finding]) -> str:
    """Show a cluster that was examined: a table of its processes, and what is wrong.

    Parameters
    ----------
    processes : sequence of dict
        See :mod:`dask_keras_serialize.cluster.doctor`.
    findings : sequence of Finding

    Returns
    -------
    str
        Lines; what is the same of many processes in one.
    """
    marks = {
        (finding.who, finding.fact): _MARKS[finding.level]
        for finding in sorted(findings, key=lambda finding: finding.level == "failure")
    }
    rows = [tuple(_FACTS.values())]
    for process in processes:
        cells = [
            (_line(_cell(process, fact)), marks.get((process["who"], fact))) for fact in _FACTS
        ]
        rows.append(tuple(f"{cell} {mark}" if mark else cell for cell, mark in cells))
    who: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        who.setdefault((finding.level, finding.what, finding.way_out), []).append(finding.who)
    lines = [
        f"{_MARKS[level]} {_few(names, _WHO)}: {_line(what, _WHAT)} -> {_line(way_out, _WHAT)}"
        for (level, what, way_out), names in who.items()
    ]
    counts = [
        f"{n} {level}{'' if n == 1 else 's'}"
        for level in _MARKS
        if (n := sum(finding.level == level for finding in findings))
    ]
    return "\n".join([*_aligned(rows), "", *lines, ", ".join(counts) or "all is well"])


def _cell(process: Process, fact: str) -> str:
    value: Any = process.get(fact)
    match fact:
        case "keras" if process["role"] == "scheduler" and process.get("keras-loaded"):
            return f"{value} (loaded)"
        case "backend" if value:
            return f"{value} {process.get('backend-version', '')}"
        case "handler" if process.get("handlers"):
            return " ".join(sorted({name.split(".")[0] for name in process["handlers"].values()}))
        case "handler" if process.get("registered") is not None:
            return "ours" if process["registered"] else "none"
        case "round-trip" if value is not None:
            return f"{1000 * value:.0f} ms"
        case "round-trip" if "round-trip-error" in process:
            return "failed"
    return str(value or "-")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, the last column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join((*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1]))) for row in rows
    ]


def _facts(header: Header, most: int | None = None) -> list[tuple[str, str]]:
    """Return what there is to say beside the table, each under its name."""
    versions = [f"{name} {version}" for name, version in header.versions.items()]
    code = [f"{name} (by {how})" for name, how in header.code]
    return [
        ("encoding", header.encoding),
        ("backend", _line(header.backend)),
        ("versions", _few(versions, most)),
        ("code", _few(code, most) or "none but Keras's own"),
    ]


def _rows(header: Header, most: int | None = None) -> list[tuple[str, str, str, str]]:
    """Return the cells of the table of variables."""
    return [
        (_line(v.path), _line(str(v.shape)), v.dtype, str(v.location.nbytes))
        for v in header.variables[:most]
    ]


def _total(header: Header) -> str:
    # not above: what is imported as dask is must not import dask
    from dask.utils import format_bytes

    n = len(header.variables)
    nbytes = format_bytes(sum(v.location.nbytes for v in header.variables))
    return f"{n} variable{'' if n == 1 else 's'}, {nbytes}"


def _few(names: Sequence[str], most: int | None) -> str:
    shown = [_line(name) for name in names[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(each)}</{tag}>" for each in texts)


def _table(rows: Sequence[str]) -> str:
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _line(name: str, most: int = _NAME) -> str:
    """Return a name as one line of printable characters, shortened."""
    if len(name) > most:
        name = f"{name[: most // 2]}...{name[-most // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
