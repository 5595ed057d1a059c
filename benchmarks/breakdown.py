"""Where the time of ResNet50 goes, out and in: python benchmarks/breakdown.py.

A few functions of Keras, the backend and the package are wrapped by a clock that
counts for the innermost one alone, so the parts add up to the whole. That is some
thousand calls, unlike a profiler's million, which would double what is measured. The
wrapped functions are not all public: this is a magnifying glass, not a test.
"""

from __future__ import annotations

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

OUT = "out: the rest: variable table, JSON, header"
IN = "in: the rest: header, order check"


class Clock:
    """Counts wall time for the innermost of the parts that are running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
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
            with self.part(name):
                return function(*arguments, **keywords)

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Run the command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import cases

    from dask_keras_serialize.protocol import decode, encode

    model = cases.build(cases.RESNET, cases.Settings())
    clock = Clock()
    _wrap(clock)
    runs = []
    whole: dict[str, list[float]] = {"out": [], "in": []}
    for _ in range(1 + REPETITIONS):
        clock.seconds.clear()
        gc.collect()
        began = time.perf_counter()
        with clock.part(OUT):
            header, frames = encode(model)
        whole["out"].append(time.perf_counter() - began)
        buffers = [bytearray(frame) for frame in frames]
        gc.collect()
        began = time.perf_counter()
        with clock.part(IN):
            copy = decode(header, buffers)
        whole["in"].append(time.perf_counter() - began)
        runs.append(dict(clock.seconds))
    if cases.digest(copy) != cases.digest(model):
        raise RuntimeError("what came back is not what was sent")
    for way, times in whole.items():
        total = statistics.median(times[1:])
        print(f"{way + ', whole':58} {total * 1000:6.1f} ms")
        parts = {
            name: statistics.median(run.get(name, 0.0) for run in runs[1:])
            for name in runs[-1]
            if name.startswith(way)
        }
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {name:56} {seconds * 1000:6.1f} ms {seconds / total:5.0%}")


def _wrap(clock: Clock) -> None:
    import keras

    from dask_keras_serialize import backends, fidelity
    from dask_keras_serialize import frames as packing

    backend: Any = backends.current()[1]
    functions: list[tuple[str, Any, str]] = [
        ("out: Keras's walk of the config", keras.saving, "serialize_keras_object"),
        ("out: what the config would lose", fidelity, "loss_by_config"),
        ("out: views of the variables", backend, "view"),
        ("out: the arena", packing, "pack"),
        ("in: copies into the backend's memory", backend, "tensor"),
        ("in: creation of the backend's variables", keras.Variable, "_initialize"),
        ("in: the rest of keras.Variable", keras.Variable, "__init__"),
        ("in: construction of layers", keras.Operation, "from_config"),
        ("in: the rest of building layers", keras.Layer, "build_from_config"),
        ("in: symbolic calls of layers", keras.Layer, "__call__"),
        (
            "in: Keras's walk of the config and calls",
            keras.saving,
            "deserialize_keras_object",
        ),
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
