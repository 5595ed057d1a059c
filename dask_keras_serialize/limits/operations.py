"""What operations in a config are given: numbers and a few texts, and tuples that stay tuples.

Of Keras's own operations (``keras.ops``) as steps of a functional model.
"""

from __future__ import annotations

from typing import Any

#: Arguments of operations (``keras.ops``) that are text, that are lists of lists, and what each is
#: of: all others are numbers or lists of such. Operations do not look, and multiply by an axis.
_TEXT = frozenset(
    {
        "name", "dtype", "data_format", "padding", "mode", "interpolation", "fill_mode", "window",
        "strategy", "indexing", "method", "side", "subscripts", "reduction", "ord", "approximation",
    }
)  # fmt: skip
_LISTS = frozenset({"pad_width", "axes"})

#: The key of a dict that stands for a tuple.
_TUPLE = "__tuple__"


def is_operation(node: dict[str, Any]) -> bool:
    """Say whether a config's node names one of ``keras.ops``, if Keras wrote it."""
    return str(node.get("module")).startswith("keras.src.ops.") and isinstance(
        node.get("config"), dict
    )


def mark_tuples(config: Any) -> None:
    """Write operations' arguments in a config so that JSON does not make lists of tuples.

    Keras's operations remember what they are given, and some work with tuples alone.
    """
    waiting = [config]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict) and is_operation(each):
            each["config"] = {key: _marked(value) for key, value in each["config"].items()}
        parts = each.values() if isinstance(each, dict) else each
        waiting += [part for part in parts if isinstance(part, (dict, list, tuple))]


def restore_tuples(node: dict[str, Any]) -> None:
    """Undo that in an operation's node, once it was looked at."""
    if isinstance(node["config"], dict):
        node["config"] = {key: _restored(value) for key, value in node["config"].items()}


def _marked(value: Any) -> Any:
    if isinstance(value, list | tuple):
        marked = [_marked(each) for each in value]
        return {_TUPLE: marked} if isinstance(value, tuple) else marked
    return value


def _restored(value: Any) -> Any:
    inside = _listed(value)
    if inside is None:
        return value
    return list(map(_restored, inside)) if inside is value else tuple(map(_restored, inside))


def not_of_operations(name: str, inner: Any) -> str | None:
    """Say which argument of an operation is neither a number, nor a list of such, nor its text."""
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if key == "kwargs" and isinstance(value, dict):
            if reason := not_of_operations(name, value):
                return reason
            continue
        fits = isinstance(value, str) and key in _TEXT
        inside = _listed(value)
        rows = inside if inside is not None and key in _LISTS else [value]
        if not fits and not all(map(_are_numbers, rows)):
            return f"the argument {key!r} of {name} is not made of numbers"
    return None


def _are_numbers(value: Any) -> bool:
    """Say whether something is a number, a list of such, or an object, looked at by itself."""
    inside = _listed(value)
    if inside is not None:
        return all(each is None or isinstance(each, int | float) for each in inside)
    is_object = isinstance(value, dict) and "class_name" in value and "config" in value
    return value is None or isinstance(value, int | float) or is_object


def _listed(value: Any) -> list[Any] | None:
    """Return what is in a list, or in what stands for a tuple."""
    if isinstance(value, dict) and value.keys() == {_TUPLE}:
        value = value[_TUPLE]
    return value if isinstance(value, list) else None
