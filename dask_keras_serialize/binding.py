"""What of an object's code binds it to one backend, found before it is sent.

Code written with ``keras.ops`` runs on every backend. Code that names TensorFlow, JAX or
torch does not; that shows in the names its functions use, which are looked up and never
called. A function that also asks which ``backend`` it runs on is taken at its word, and so is
a module that imports the package in a ``try``, for it can do without.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from dask_keras_serialize.backends import COMMON, PACKAGES
from dask_keras_serialize.private import SHELLS, describe, full_name


class Bindings:
    """What of one object on its way out is bound to the backend; each code is asked once.

    Parameters
    ----------
    backend : str
        Such as ``"tensorflow"``.
    """

    def __init__(self, backend: str) -> None:
        #: Who holds the code, as errors name it, and the code.
        self.found: list[list[str]] = []
        self._backend = backend
        self._asked: set[Any] = set()

    def note(self, obj: Any, named: list[Any], owner: Any) -> None:
        """Ask the code of an object of Keras's.

        Parameters
        ----------
        obj : object
        named : list of type and function
            What pickling its state named; emptied.
        owner : object
            Whose part it is, for errors.
        """
        for code in (type(obj), *named):
            # a class of Keras objects is asked with the first of them
            keras_class = isinstance(code, type) and issubclass(code, SHELLS)
            if code in self._asked or (keras_class and code is not type(obj)):
                continue
            self._asked.add(code)
            part = bound_code(code, self._backend)
            if part is not None:
                self.found.append([describe(owner), part])
        named.clear()


def bound_code(code: Any, backend: str) -> str | None:
    """Say what in a class or function names a backend.

    Parameters
    ----------
    code : type or function
        Of a class, the bases too.
    backend : str
        Such as ``"tensorflow"``.

    Returns
    -------
    str or None
        The name of the first function that does, or of ``code``, if it is the backend's.
    """
    if _root(code) in PACKAGES[backend]:
        common = (code.__module__, code.__name__) in COMMON
        return None if common else full_name(code)
    functions = _methods(code) if isinstance(code, type) else iter([code])
    return next((full_name(each) for each in functions if _names(each, backend)), None)


def _methods(cls: type) -> Iterator[types.FunctionType]:
    """Yield the functions of a class and its bases, but for those of packages everybody has."""
    for base in cls.__mro__:
        if _root(base) in _TRUSTED:
            continue
        for value in vars(base).values():
            for part in (value, *(getattr(value, name, None) for name in ("__func__", "fget"))):
                if isinstance(part, types.FunctionType):
                    yield part


#: Their own code asks for the backend where it matters.
_TRUSTED = frozenset({"keras", "builtins", "collections"}).union(*PACKAGES.values())


def _names(function: types.FunctionType, backend: str) -> bool:
    codes = list(_codes(function.__code__))
    used = {name for code in codes for name in code.co_names}
    if "backend" in used:
        return False
    cells = function.__closure__ or ()
    values = [cell.cell_contents for cell in cells if cell != types.CellType()]
    values += [function.__globals__[name] for name in used if name in function.__globals__]
    imported = {name.partition(".")[0] for name in used}
    roots = imported.union(map(_root, values))
    return bool(roots & PACKAGES[backend]) and not _does_without(function.__module__, backend)


@functools.cache
def _does_without(module: str, backend: str) -> bool:
    """Say whether a module imports a backend's packages only if they are there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # typed in, or made by a program
        return False
    tried = (node for node in ast.walk(tree) if isinstance(node, ast.Try))
    imports = (node for each in tried for node in ast.walk(each) if isinstance(node, ast.Import))
    names = {alias.name.partition(".")[0] for each in imports for alias in each.names}
    return bool(names & PACKAGES[backend])


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _root(value: Any) -> str:
    """Return the package of a module, a class, a function, or of anything else's class."""
    if isinstance(value, types.ModuleType):
        name = value.__name__
    else:
        code = (type, types.FunctionType, types.BuiltinFunctionType)
        name = (value if isinstance(value, code) else type(value)).__module__
    return str(name).partition(".")[0]
