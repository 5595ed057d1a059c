"""What a header says, for people: a line, a page of text, a page of HTML.

Everything shown came with the bytes and may be hostile: control characters are shown as
escapes, so that a name cannot drive a terminal or begin a line of its own, names are
shortened, and HTML is escaped. Loads neither Keras nor a backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dask_keras_serialize.header import Header

#: Characters shown of one name, rows of the table in HTML, names of code in one line.
_NAME, _ROWS, _CODE = 120, 20, 3

_COLUMNS = ("variable", "shape", "dtype", "bytes")


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
    rows = [_COLUMNS, *_rows(header)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    table = [
        "  " + "  ".join((*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])))
        for row in rows
    ]
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


def _line(name: str) -> str:
    """Return a name as one line of printable characters, shortened."""
    if len(name) > _NAME:
        name = f"{name[: _NAME // 2]}...{name[-_NAME // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
