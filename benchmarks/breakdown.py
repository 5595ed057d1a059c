"""Where the time of ResNet50 goes: out, in, and in again: python benchmarks/breakdown.py [--adam].

Run it once for each backend (``KERAS_BACKEND``). *In* is a rebuild by config, as where an
architecture arrives first, *again* a clone (``templates.py``).

A few functions of Keras, the backend and the package are wrapped by a clock that
counts for the innermost one alone, so the parts add up to the whole. That is some
thousand calls, unlike a profiler's million, which would double what is measured. The
wrapped functions are not all public: this is a magnifying glass, not a test.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REPETITIONS = 9

OUT = "out: the rest: table of variables, JSON, header"
IN = "in: the rest: header, order check"
AGAIN = "again: the rest: header, key of the architecture"


class Clock:
    """Counts wall time for the innermost of the parts that are running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        #: Put before the names of parts that belong to more than one way.
        self.way = ""
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count for a part until the context ends."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls count for a part."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if not self._running:
                return function(*arguments, **keywords)
            with self.part(name if ": " in name else f"{self.way}: {name}"):
                return function(*arguments, **keywords)

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adam", action="store_true", help="compiled, its optimizer built")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import cases
    import keras
    import values

    from dask_keras_serialize.configs import templates
    from dask_keras_serialize.protocol import decode, encode
    from dask_keras_serialize.wire import frames

    workload = cases.RESNET_ADAM if options.adam else cases.RESNET
    print(f"{workload} on {keras.backend.backend()}, median of {REPETITIONS}")
    model = cases.build(workload, cases.Settings())
    header, parts = encode(model)
    clock = Clock()
    _wrap(clock)
    runs = []
    whole: dict[str, list[float]] = {"out": [], "in": [], "again": []}

    def take(way: str, rest: str, act: Callable[[], Any]) -> Any:
        gc.collect()
        began = time.perf_counter()
        with clock.part(rest):
            result = act()
        whole[way].append(time.perf_counter() - began)
        if way != "out" and values.digest(result) != values.digest(model):
            raise RuntimeError("what came back is not what was sent")
        return result

    def arrived() -> list[Any]:
        buffers = [frames.allocate(part.nbytes) for part in parts]
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[:] = part
        return buffers

    for _ in range(3):  # from the third time on it is cloned
        decode(header, arrived(), keep=True)
    for _ in range(1 + REPETITIONS):
        clock.seconds.clear()
        take("out", OUT, lambda: encode(model))
        buffers = arrived()
        clock.way = "in"
        with templates.forgotten():
            take("in", IN, lambda given=buffers: decode(header, given, keep=True))
        buffers = arrived()
        clock.way = "again"
        take("again", AGAIN, lambda given=buffers: decode(header, given, keep=True))
        runs.append(dict(clock.seconds))
    for way, times in whole.items():
        total = statistics.median(times[1:])
        print(f"{way + ', whole':58} {total * 1000:6.1f} ms")
        parts = {
            name: statistics.median(run.get(name, 0.0) for run in runs[1:])
            for name in runs[-1]
            if name.startswith(f"{way}: ")
        }
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {name:56} {seconds * 1000:6.1f} ms {seconds / total:5.0%}")


def _wrap(clock: Clock) -> None:
    import keras

    from dask_keras_serialize import backends
    from dask_keras_serialize.configs import compiled, fidelity
    from dask_keras_serialize.values import by_value, shells
    from dask_keras_serialize.wire import frames as packing

    backend: Any = backends.current()[1]
    functions: list[tuple[str, Any, str]] = [
        ("out: Keras's walk of the config", keras.saving, "serialize_keras_object"),
        ("out: what the config would lose", fidelity, "loss_by_config"),
        ("out: views of the variables", backend, "views"),
        ("out: the arena", packing, "pack"),
        ("copies into the backend's memory, or adoption", backend, "tensor"),
        ("creation of the backend's variables", keras.Variable, "_initialize"),
        ("in: the rest of keras.Variable", keras.Variable, "__init__"),
        ("in: construction of layers", keras.Operation, "from_config"),
        ("in: the rest of building layers", keras.Layer, "build_from_config"),
        ("in: symbolic calls of layers", keras.Layer, "__call__"),
        ("in: Keras's walk of the config and calls", keras.saving, "deserialize_keras_object"),
        ("in: compile, and building the optimizer", compiled, "compile_again"),
        ("again: empty layers", shells, "new_shell"),
        ("again: filling objects", by_value, "fill"),
        ("again: what ids key, derived anew", by_value, "complete"),
        ("again: unpickling", by_value, "load"),
    ]
    for name, where, attribute in functions:
        owner = next(each for each in _owners(where) if attribute in vars(each))
        function = vars(owner)[attribute]
        if isinstance(function, classmethod):
            setattr(owner, attribute, classmethod(clock.wrap(name, function.__func__)))
        else:
            setattr(owner, attribute, clock.wrap(name, function))


def _owners(where: Any) -> tuple[Any, ...]:
    return where.__mro__ if isinstance(where, type) else (where,)


if __name__ == "__main__":
    main()
