"""What of an object's code binds it to one backend, found before it is sent.

Code written with ``keras.ops`` runs on every backend. Code that names TensorFlow, JAX or
torch does not; that shows in the names its functions use, which are looked up and never
called. A function that also asks which ``backend`` it runs on is taken at its word, and so is
a module that imports the package in a ``try`` or an ``if``.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from dask_keras_serialize.backends import COMMON, KERAS_AND_BELOW, NAMES, PACKAGES
from dask_keras_serialize.private import SHELLS, describe, full_name


class Bindings:
    """What of one object on its way out is bound to the backend; each code is asked once.

    Parameters
    ----------
    backend : str
        Such as ``"tensorflow"``.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend
        #: Whose part has which code first: classes of Keras's objects, and what else was named.
        self._classes: dict[Any, Any] = {}
        self._named: dict[Any, Any] = {}

    def note(self, obj: Any, named: list[Any], owner: Any) -> None:
        """Note the code of an object of Keras's.

        Parameters
        ----------
        obj : object
        named : list of type and function
            What pickling its state named; emptied.
        owner : object
            Whose part it is, for errors.
        """
        self._classes.setdefault(type(obj), owner)
        for code in named:
            if not (isinstance(code, type) and issubclass(code, SHELLS)):
                self._named.setdefault(code, owner)
        named.clear()

    def first(self) -> list[list[str]]:
        """Return who has the first code that is bound, as errors name it, and the code; or [].

        Classes are asked first: one that travels by value is pickled, with what it calls, as part
        of whatever refers to its first object.
        """
        for code, owner in itertools.chain(self._classes.items(), self._named.items()):
            part = bound_code(code, self._backend)
            if part is not None:
                return [[describe(owner), part]]
        return []


def bound_code(code: Any, backend: str) -> str | None:
    """Say what in a class or function names a backend.

    Parameters
    ----------
    code : type or function
        Of a class, what Keras calls of it, its bases' too, and what that calls: of the class, and
        of functions, objects, classes and modules of its own package and of those not installed.
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
    cls = code if isinstance(code, type) else None
    # with the class that the function's ``self`` is of
    waiting: list[tuple[Any, type | None]] = [(code, None)]
    if cls is not None:
        waiting = [(vars(base)[name], cls) for base, name in _entries(cls)]
    seen: set[int] = set()
    while waiting:
        value, owner = waiting.pop(0)
        function = _plain(value)
        if id(function) in seen:
            continue
        seen.add(id(function))
        if not isinstance(function, types.FunctionType):
            if _root(function) in PACKAGES[backend]:  # made by its decorator, such as tf.function
                return full_name(owner or function)
            continue
        if function.__globals__.get("__name__", "").partition(".")[0] in KERAS_AND_BELOW:
            function = inspect.unwrap(function)
        used, asks, attributes = _names(function.__code__)
        values = list(_values(function, used))
        if asks or any(isinstance(each, str) and each in NAMES for each in values):
            continue  # so do BACKEND = keras.backend.backend(), and what is called of it
        values += [item for each in values for item in _items(each)]
        if _names_backend(function, values, used, backend):
            return full_name(function)
        for each in values:
            waiting += _reached(each, attributes, _root(code))
        for base in _bases(owner) if owner else ():
            waiting += [(vars(base)[name], owner) for name in attributes if name in vars(base)]
    return None


#: Run where the object is made, not where it arrives.
_AT_HOME = frozenset({"__init__", "__new__", "get_config", "from_config"})


def _bases(cls: type) -> list[type]:
    # Keras's own code asks for the backend where it matters
    return [base for base in cls.__mro__ if _root(base) not in KERAS_AND_BELOW]


def _entries(cls: type) -> Iterator[tuple[type, str]]:
    """Yield what Keras calls of a class: what its own classes have under the same name."""
    keras_own = [base for base in cls.__mro__ if _root(base) in KERAS_AND_BELOW]
    for base in _bases(cls):
        for name in vars(base):
            # of a class that is not Keras's, everything
            calls = not keras_own[:-1] or any(name in vars(own) for own in keras_own)
            if calls and name not in _AT_HOME:
                yield base, name


def _plain(value: Any) -> Any:
    """Return the function of a method, a property or a partial."""
    for name in ("__func__", "fget", "func"):
        value = getattr(value, name, value) if not isinstance(value, types.ModuleType) else value
    return value


def _values(function: types.FunctionType, used: Iterable[str]) -> Iterator[Any]:
    """Yield what a function's globals, closure and imports are."""
    for cell in function.__closure__ or ():
        if cell != types.CellType():
            yield cell.cell_contents
    for name in used:
        value = function.__globals__.get(name, sys.modules.get(name))
        if value is not None:
            yield value


def _items(value: Any) -> list[Any]:
    """Return what is in a table of functions."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return list(itertools.islice(value, 100))


def _reached(
    value: Any, attributes: Collection[str], home: str, depth: int = 0
) -> Iterator[tuple[Any, type | None]]:
    """Yield the functions that code may call of a value, if it uses some attributes."""
    if isinstance(value, (types.MethodType, functools.partial)):
        value = _plain(value)
    if not _is_followed(_root(value), home):
        return
    if isinstance(value, types.FunctionType):
        yield value, None
    elif isinstance(value, types.ModuleType) and depth < _DEPTH:
        for name in attributes:
            if name in vars(value):
                yield from _reached(vars(value)[name], attributes, home, depth + 1)
    elif not isinstance(value, types.ModuleType):
        cls = value if isinstance(value, type) else type(value)
        called = {*attributes, "__call__"} | ({"__init__"} if cls is value else set())
        for base in () if issubclass(cls, SHELLS) else _bases(cls):
            yield from ((vars(base)[name], cls) for name in called if name in vars(base))


#: Of modules in modules.
_DEPTH = 3


@functools.lru_cache
def _is_followed(package: str, home: str) -> bool:
    """Say whether the functions of a package are asked too: those of others know themselves."""
    if package in KERAS_AND_BELOW | sys.stdlib_module_names | {"numpy"}:
        return False
    if package in ("__main__", home):
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.intersection(Path(file).parts)


def _names_backend(
    function: types.FunctionType, values: list[Any], used: Iterable[str], backend: str
) -> bool:
    """Say whether a function's globals, closure or imports are of a backend's packages."""
    roots = {name.partition(".")[0] for name in used if name not in function.__globals__}
    found = PACKAGES[backend] & roots.union(map(_root, values))
    # a decorator gives its function another's __module__
    modules = (function.__module__, function.__globals__.get("__name__", ""))
    return bool(found) and not any(_does_without(each, backend) for each in modules)


@functools.cache
def _does_without(module: str, backend: str) -> bool:
    """Say whether a module imports a backend's packages only if they are there, or Keras's."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):  # typed in, or made by a program
        return False
    names: set[str] = set()
    for node in _conditional(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return bool(names & PACKAGES[backend])


def _conditional(tree: ast.AST, reached: bool = False) -> Iterator[ast.AST]:
    """Yield what may run or not when a module is imported, and what that defines."""
    for node in ast.iter_child_nodes(tree):
        if reached:
            yield node
        within = reached or isinstance(node, (ast.Try, ast.If, ast.Match))
        if within or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _conditional(node, within)


@functools.lru_cache(4096)  # half the time of sending a model of many layers, else
def _names(function: types.CodeType) -> tuple[frozenset[str], bool, frozenset[str]]:
    """Say what code names: globals and imports; whether it asks for the backend; attributes."""
    used: set[str] = set()
    attributes: set[str] = set()
    asked = False
    for code in _codes(function):
        steps = [step for step in dis.get_instructions(code) if step.opname not in _FILLING]
        for step, after in itertools.pairwise(steps):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                attributes.add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
                used.add(step.argval)
            # keras.backend.backend(), not keras.backend.epsilon()
            if step.argval == "backend" and after.opname.startswith(("CALL", "PRECALL")):
                asked = True
        if "getattr" in used:
            attributes.update(each for each in code.co_consts if isinstance(each, str))
    return frozenset(used), asked, frozenset(attributes)


_FILLING = frozenset({"CACHE", "PUSH_NULL"})


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
