"""What of an object's code binds it to one backend, found before it is sent.

Code written with ``keras.ops`` runs on every backend. Code that names TensorFlow, JAX or
torch does not; that shows in the names its functions use, which are looked up and never
called. A function that also asks which ``backend`` it runs on is taken at its word, and so is
a module that imports the package in a ``try``, for it can do without.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

from dask_keras_serialize.backends import COMMON, KERAS_AND_BELOW, PACKAGES
from dask_keras_serialize.private import SHELLS, describe, full_name

#: Errors name the first; a function of JAX's own leads to a score of others.
_MOST = 5


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
            if part is not None and len(self.found) < _MOST:
                self.found.append([describe(owner), part])
        named.clear()


def bound_code(code: Any, backend: str) -> str | None:
    """Say what in a class or function names a backend.

    Parameters
    ----------
    code : type or function
        Of a class, what Keras calls of it, its bases' too, and what that calls of the class and
        of other modules that are not Keras's.
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
    waiting = [code] if cls is None else [vars(base)[n] for base, n in _entries(cls)]
    seen: set[int] = set()
    while waiting:
        function = _plain(waiting.pop(0))
        if id(function) in seen:
            continue
        seen.add(id(function))
        if not isinstance(function, types.FunctionType):
            if _root(function) in PACKAGES[backend]:  # made by its decorator, such as tf.function
                return full_name(cls or function)
            continue
        if function.__globals__.get("__name__", "").partition(".")[0] in KERAS_AND_BELOW:
            function = inspect.unwrap(function)
        used, asked, attributes = _names(function.__code__)
        if _names_backend(function, used, backend) and not asked:
            return full_name(function)
        waiting += [v for n in used if (v := function.__globals__.get(n)) is not None and _ours(v)]
        for base in _bases(cls) if cls else ():
            waiting += [vars(base)[name] for name in attributes if name in vars(base)]
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


def _ours(value: Any) -> bool:
    """Say whether a global is a function that is not of a package everybody has."""
    return isinstance(value, types.FunctionType) and _root(value) not in (
        KERAS_AND_BELOW | sys.stdlib_module_names | {"numpy"}
    )


def _names_backend(function: types.FunctionType, used: frozenset[str], backend: str) -> bool:
    """Say whether a function's globals, closure or imports are of a backend's packages."""
    cells = function.__closure__ or ()
    values = [cell.cell_contents for cell in cells if cell != types.CellType()]
    values += [function.__globals__[name] for name in used if name in function.__globals__]
    roots = {name.partition(".")[0] for name in used if name not in function.__globals__}
    found = PACKAGES[backend] & roots.union(map(_root, values))
    # a decorator gives its function another's __module__
    modules = (function.__module__, function.__globals__.get("__name__", ""))
    return bool(found) and not any(_does_without(each, backend) for each in modules)


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


@functools.lru_cache(4096)  # half the time of sending a model of many layers, else
def _names(function: types.CodeType) -> tuple[frozenset[str], bool, frozenset[str]]:
    """Return the globals and imports of a function, whether it asks for the backend, attributes."""
    used: set[str] = set()
    attributes: set[str] = set()
    asked = False
    for code in _codes(function):
        steps = [step for step in dis.get_instructions(code) if step.opname not in _FILLING]
        for step, after in itertools.pairwise(steps):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                attributes.add(step.argval)
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
                used.add(step.argval)
            # keras.backend.backend(), not keras.backend.epsilon()
            if step.argval == "backend" and after.opname.startswith(("CALL", "PRECALL")):
                asked = True
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
