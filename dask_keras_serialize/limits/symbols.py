"""What a name in a config stands for here: Keras's own, what is registered, the user's modules.

Nothing is imported to know it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import keras
from dask import config as dask_config

from dask_keras_serialize.configs.likeness import functions_named
from dask_keras_serialize.wire.header import FORMAT


def modules() -> tuple[str, ...]:
    """Return the user's own modules whose classes may travel by config."""
    listed = dask_config.get(f"{FORMAT}.modules", ())
    return (listed,) if isinstance(listed, str) else tuple(listed or ())


def is_listed(module: object) -> bool:
    """Say whether a module is one of those, or in one; no ``__main__``, which is a program."""
    if not isinstance(module, str) or "__" in module:
        return False
    return any(f"{module}.".startswith(f"{m}.") for m in modules())


def of_keras(module: object) -> bool:
    """Say whether a module is Keras's own."""
    return isinstance(module, str) and f"{module}.".startswith("keras.")


def symbol(module: object, name: str) -> Any:
    """Return what Keras has by a name, of what is loaded of it; None if it has no such."""
    if not isinstance(module, str) or not of_keras(module):
        return None
    found: Any = sys.modules.get(module)
    if found is None:  # the public names, such as keras.layers, may be no modules
        found = keras
        for part in module.split(".")[1:]:
            found = _in_module(found, part)
    return _in_module(found, name)


def _in_module(module: object, name: str) -> Any:
    """Return what a module has, itself: some of Keras's stand for others, which they import."""
    return vars(module).get(name) if isinstance(module, ModuleType) else None


def found_by_name(value: object) -> str | None:
    """Say which string in arguments Keras would look up among the classes registered here."""
    registered = keras.saving.get_custom_objects()
    waiting = [value] if registered else []
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and each in registered:
            module = getattr(registered[each], "__module__", None)
            if not of_keras(module) and not is_listed(module):
                return f"{each!r} is what this process registered, not Keras's own"
        elif isinstance(each, list):
            waiting += each
        # a node inside is looked at by itself
        elif isinstance(each, dict) and not {"class_name", "config"} <= each.keys():
            waiting += each.values()
    return None


def registered_in(text: str) -> str | None:
    """Say the same of a config as JSON, wherever in it the string stands."""
    # most names are "package>name", of which a package may register hundreds
    packages = ">" in text
    registered = keras.saving.get_custom_objects()
    return found_by_name(
        [name for name in registered if (packages or ">" not in name) and f'"{name}"' in text]
    )


def finds_function(module: object, name: object) -> bool:
    """Say whether a config's function is an activation, loss or metric of Keras's, by its name."""
    named = functions_named(name) if isinstance(name, str) else ()
    known = (module == "builtins" or symbol(module, str(name)) is each for each in named)
    return any(known)
