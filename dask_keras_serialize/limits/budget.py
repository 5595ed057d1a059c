"""How many symbolic tensors a config may have Keras make, how many calls, and how many constants.

Each tensor is a call of a layer that Keras traces, for some tenth of a millisecond. A config says
with few bytes that a model is called often, and calls another often: three of 40 layers and 40
calls, one in the other, are 18 kB and 64,000 calls. Where Keras runs a layer to know its shapes,
it traces it for some ten milliseconds, and what that calls makes no symbolic tensors. It reads what
else a layer is called on anew each time. And a layer that is called on no tensor of the model's
runs at once, on whatever a config holds, for as long as that takes.

On torch Keras runs what has no shapes of its own without data first, and where that fails on ones
of its inputs' shapes (``compute_output_spec`` in ``keras/src/backend/torch/core.py``), which is
refused.

A Normalization that is told its mean keeps it, no variable, as wide as its inputs, which a config
makes as wide as it likes (``keras/src/layers/preprocessing/normalization.py``).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras

from dask_keras_serialize import private
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits.arguments import MOST_FEATURES
from dask_keras_serialize.limits.calls import most_read, values_in
from dask_keras_serialize.rebuilding.hooks import in_this_thread
from dask_keras_serialize.wire.header import MOST_AXES

#: Of a config; more of each object that is named in it. Honest models take two or three each.
MOST, MOST_OF_ONE = 20_000, 20

#: Calls that layers make as they are run for their shapes; more of each object.
MOST_CALLS, MOST_CALLS_OF_ONE = 1000, 5

#: Seconds of the processor for whatever else takes long: honest ones take some hundredth of it.
#: More of each object.
MOST_SECONDS, MOST_SECONDS_OF_ONE = 60, 0.1


def have_a_size(axes: Sequence[object]) -> bool:
    """Say whether a tensor may have such axes: an operation on others multiplies huge integers."""
    whole = (each for each in axes if isinstance(each, int))
    return len(axes) <= MOST_AXES and all(abs(each) <= sys.maxsize for each in whole)


@contextmanager
def counted(objects: int, owner: str) -> Iterator[None]:
    """Let this thread make no more than a config that names so many objects may ask for.

    Call it inside :func:`rebuild.rebuilding`, which holds the lock.

    Parameters
    ----------
    objects : int
    owner : str
        Whose config it is, for errors.

    Raises
    ------
    DecodeError
        In the midst of what would make more.
    """
    most, most_calls = MOST + MOST_OF_ONE * objects, MOST_CALLS + MOST_CALLS_OF_ONE * objects
    most_values, most_traces = most_read(objects)
    made = features = calls = traces = values = depth = 0
    walked: dict[int, tuple[int, Any]] = {}  # by id, for as long as the function lives, and here

    ends = time.thread_time() + MOST_SECONDS + MOST_SECONDS_OF_ONE * objects

    def look_at_the_clock() -> None:
        if time.thread_time() > ends:
            raise DecodeError(
                f"{owner}: its config takes longer to build than {MOST_SECONDS} seconds of a "
                f"processor, and {MOST_SECONDS_OF_ONE} for each object in it; send it by value"
            )

    def count(original: Any, tensor: Any, shape: Any, *arguments: Any, **keywords: Any) -> None:
        nonlocal made
        made += 1
        look_at_the_clock()
        if isinstance(shape, list | tuple) and not have_a_size(shape):
            raise DecodeError(
                f"{owner}: its config has a tensor of {len(shape)} axes as no array has: not more "
                f"than {MOST_AXES}, each of which a machine can count; send it again"
            )
        if made > most:
            raise DecodeError(
                f"{owner}: its config asks for more than {most} symbolic tensors, for more "
                "than it names; send it by value, or in parts"
            )
        original(tensor, shape, *arguments, **keywords)

    def call(original: Any, operation: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls, depth
        if depth:
            calls += 1
        elif not any(
            isinstance(each, keras.KerasTensor)
            for each in keras.tree.flatten((arguments, keywords))
        ):
            raise DecodeError(
                f"{owner}: its config calls {operation.name!r} without a tensor of the model's, "
                "which would run it; send it again"
            )
        if calls > most_calls:
            raise DecodeError(
                f"{owner}: its config asks for more than {most_calls} calls of layers in layers, "
                "for more than it names; send it by value, or in parts"
            )
        depth += 1
        try:
            return original(operation, *arguments, **keywords)
        except IndexError as error:
            if depth > 1:
                raise
            # Keras would take it for a call that waits for another, and try again
            raise DecodeError(
                f"{owner}: its config calls {operation.name!r} on what it does not take: {error}; "
                "send it again"
            ) from error
        finally:
            depth -= 1

    def trace(original: Any, operation: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal traces
        traces += 1
        look_at_the_clock()
        if traces > most_traces:
            raise DecodeError(
                f"{owner}: its config has Keras run layers for their shapes more than "
                f"{most_traces} times, for more than it names; send it by value, or in parts"
            )
        return original(operation, *arguments, **keywords)

    def walk(original: Any, function: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal values
        if id(function) not in walked:
            walked[id(function)] = values_in(function), function
        values += walked[id(function)][0]
        if values > most_values:
            raise DecodeError(
                f"{owner}: its config has Keras read more than {most_values} arguments of calls, "
                "for more than it names; send it by value, or in parts"
            )
        return original(function, *arguments, **keywords)

    def keep(original: Any, layer: Any, input_shape: Any, **keywords: Any) -> None:
        nonlocal features
        if layer.input_mean is not None and layer.axis:
            features += math.prod(input_shape[axis] or 0 for axis in layer.axis)
        if features > MOST_FEATURES:
            raise DecodeError(
                f"{owner}: its config has a mean for each of {features} features, "
                f"not more than {MOST_FEATURES} of which are made of one number; send it by value"
            )
        original(layer, input_shape, **keywords)

    with (
        in_this_thread(keras.KerasTensor, "__init__", count),
        in_this_thread(keras.Operation, "__call__", call),
        in_this_thread(keras.Operation, "compute_output_spec", trace),
        in_this_thread(private.Function, "_run_through_graph", walk)
        if hasattr(private.Function, "_run_through_graph")
        else nullcontext(),
        in_this_thread(keras.layers.Normalization, "build", keep),
        _without_data(owner),
    ):
        yield


def _without_data(owner: str) -> AbstractContextManager[None]:
    """Have this thread run nothing on torch but without data, to know its shape."""
    torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
    if torch is None:
        return nullcontext()

    def ones(original: Any, *sizes: Any, **keywords: Any) -> Any:
        if private.in_symbolic_scope() and str(keywords.get("device")) != "meta":
            raise DecodeError(
                f"{owner}: its config has a layer whose shape is not known without running it on "
                f"data of {keywords.get('size', sizes)}; send it by value"
            )
        return original(*sizes, **keywords)

    return in_this_thread(torch, "ones", ones)
