"""What a config calls its layers on, and how often Keras would read that.

A layer is called on tensors of its model and on plain data, on nothing else: operations such as
``keras.ops.map`` and ``switch`` run what they are called on, to know its shape
(``keras/src/ops/core.py``). Keras makes the calls in the order of the config, and reads those that
have to wait for another again and again (``functional_from_config`` in
``keras/src/models/functional.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from dask_keras_serialize import private
from dask_keras_serialize.limits.kinds import DATA, NUMBERS

#: Values that Keras may read in calls that have to wait: five seconds; and those in a tensor.
MOST_READ, OF_A_TENSOR = 3 * 10**6, 12

#: Letters of a text that a layer is called on.
MOST_LETTERS = 200

#: Values among the arguments of all calls in a model, each time that Keras walks it; more of each
#: object. Layers that are run for their shapes, in models that are walked for theirs, too.
MOST_VALUES, MOST_VALUES_OF_ONE, MOST_TRACES = 100_000, 50, 100


class Calls:
    """The calls in one config, whose parts are each looked at once, in whatever else they are."""

    def __init__(self) -> None:
        #: By id of a part: whether a tensor is in it, and what in it no layer is called on.
        self._known: dict[int, tuple[bool, str | None]] = {}
        self._read = 0
        #: How many calls there are, of objects that were looked at.
        self.made = 0

    def refusal(self, node: dict[str, Any]) -> str | None:
        """Say why the calls of a layer are not to be made.

        Parameters
        ----------
        node : dict
            Of the config, which has to live as long as this.

        Returns
        -------
        str or None
            That one is on no tensor of the model's, and so would compute: as they are built,
            :func:`budget.counted` sees to it. Or that one is on more than tensors and data.
        """
        name, calls = node["class_name"], node.get("inbound_nodes") or []
        found = [self._look_at(each) for each in _listed(calls)]
        self.made += len(found)
        if not isinstance(calls, list) or not all(has_tensor for has_tensor, _ in found):
            return f"{name!r} is called without a tensor of the model's"
        other = next((each for _, each in found if each), None)
        return f"{name!r} is called on {other}" if other else None

    def read_too_often(self, inner: object) -> str | None:
        """Say that functional models' layers are called in an order that takes Keras too long.

        Those of this one and of all before. Their calls were looked at: no objects are in them.
        """
        layers = inner.get("layers") if isinstance(inner, dict) else None
        if not isinstance(layers, list):
            return None
        nodes = [each for each in layers if isinstance(each, dict) and "class_name" in each]
        place = {str(each.get("name")): i for i, each in enumerate(nodes)}
        waiting = size = 0
        for i, node in enumerate(nodes):
            for call in _listed(node.get("inbound_nodes")):
                size += _size(call)
                waiting += any(place.get(name, 0) > i for name in _tensors_of(call))
        self._read += waiting * size
        return _too_often(self._read)

    def _look_at(self, value: Any) -> tuple[bool, str | None]:
        """Say whether Keras finds a tensor there that it made, and what there is no data."""
        if not isinstance(value, (dict, list)):
            return False, _too_long(value)
        if id(value) not in self._known:
            as_dict = value if isinstance(value, dict) else {}
            name = str(as_dict.get("class_name", ""))
            if name == "__keras_tensor__":
                found: tuple[bool, str | None] = isinstance(as_dict.get("config"), dict), None
            elif name in NUMBERS:
                found = False, None
            else:
                parts = value.values() if isinstance(value, dict) else value
                inside = [self._look_at(each) for each in parts]
                other = next((each for _, each in inside if each), None)
                if "class_name" in as_dict:  # of which Keras makes something else
                    found = False, other if name in DATA else f"{name[:60]!r}, which it may run"
                else:
                    found = any(has_tensor for has_tensor, _ in inside), other
            self._known[id(value)] = found
        return self._known[id(value)]


def lost(model: keras.Model) -> str | None:
    """Say for which calls a receiver of a model's config will refuse it: its sender asks.

    Parameters
    ----------
    model : keras.Model
        Functional and Sequential models at every depth in it are looked at, each once.
    """
    known: dict[int, _Spent] = {}
    for layer in (model, *private.flatten_layers(model)):
        spent = _spent(private.function_of(layer), known)
        if spent.refusal:
            return spent.refusal
        most = most_read(sum(each.calls for each in known.values()))
        # a sender allows for half of what a receiver does
        if any(2 * n > limit for n, limit in zip((spent.values, spent.run), most, strict=True)):
            return (
                f"models in {layer.name!r} are called so often that a rebuild would take too long"
            )
    return _too_often(2 * sum(each.read_anew for each in known.values()))


def _too_long(value: Any) -> str | None:
    """Say that data is a text so long that Keras makes much of it (``Take`` in ``keras.ops``).

    In a list with numbers, NumPy's array has its length for each of them.
    """
    too_long = isinstance(value, str) and len(value) > MOST_LETTERS
    return f"a text of more than {MOST_LETTERS} letters" if too_long else None


def values_in(function: Any) -> int:
    """Return how many values Keras reads to walk a function's calls once: of tensors, one each."""
    calls = (node.arguments for _, node in private.nodes(function))
    return sum(len(keras.tree.flatten((each.args, each.kwargs))) for each in calls)


def most_read(objects: int) -> tuple[int, int]:
    """Return what a rebuild may take: values read in walks of models' calls, and layers run.

    Parameters
    ----------
    objects : int
        That the config names, and calls.
    """
    return MOST_VALUES + MOST_VALUES_OF_ONE * objects, MOST_TRACES + objects


class _Spent(NamedTuple):
    """What a function's calls, and those in models that it calls, cost who rebuilds it."""

    #: Calls of its own, and values that Keras reads anew for those of them that wait for others.
    calls: int = 0
    read_anew: int = 0
    #: Values that one walk reads, and layers that it runs, those of models that it calls too.
    values: int = 0
    run: int = 0
    #: What it is called on that is neither a tensor nor data.
    refusal: str | None = None


def _spent(function: Any, known: dict[int, _Spent]) -> _Spent:
    """Return what a function costs; ``known`` collects the same of each that it calls, by id."""
    if function is None or id(function) in known:
        return known.get(id(function), _Spent())
    place = {id(each): i for i, each in enumerate(function._operations)}
    calls = waiting = size = values = run = 0
    refusal = None
    for _, node in private.nodes(function):
        calls += 1
        for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs)):
            values += 1
            if isinstance(value, keras.KerasTensor):
                size += OF_A_TENSOR
            elif callable(value) or hasattr(value, "get_config"):
                refusal = refusal or (
                    f"{node.operation.name!r} is called on {type(value).__name__}, and may run it"
                )
            elif too_long := _too_long(value):
                refusal = refusal or f"{node.operation.name!r} is called on {too_long}"
            else:
                size += math.prod(getattr(value, "shape", ()))  # size is torch's method
        here = place[id(node.operation)]
        sources = (each._keras_history.operation for each in node.input_tensors)
        waiting += any(place.get(id(each), 0) > here for each in sources)
        inner = private.function_of(node.operation)
        if inner is not None and inner is not function:
            in_it = _spent(inner, known)
            values, run, refusal = values + in_it.values, run + in_it.run, refusal or in_it.refusal
        elif isinstance(node.operation, keras.Layer):
            run += _is_run(type(node.operation))
    known[id(function)] = _Spent(calls, waiting * size, values, run, refusal)
    return known[id(function)]


def _is_run(cls: Any) -> bool:
    """Say whether Keras runs a layer to know its shapes, for it does not say them."""
    return not issubclass(cls, keras.layers.InputLayer) and all(
        getattr(cls, name) is getattr(keras.Layer, name)
        for name in ("compute_output_shape", "compute_output_spec")
    )


def _too_often(values: int) -> str | None:
    """Refuse to have values read so often.

    Each pass over a model's config makes all calls but those that wait for one that is listed
    behind them, and what waits for these in turn: so many passes, each over all values, at most.
    """
    if values <= MOST_READ:
        return None
    return f"calls in it wait for others, and Keras would read {values} values anew"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tensors_of(call: Any) -> Iterator[str]:
    """Yield the names of the layers that made the tensors of a call."""
    waiting = [call]
    while waiting:
        each = waiting.pop()
        inner = each.get("config") if isinstance(each, dict) else None
        history = inner.get("keras_history") if isinstance(inner, dict) else None
        if isinstance(history, list) and history:
            yield str(history[0])
        parts = each.values() if isinstance(each, dict) else each
        waiting += [part for part in parts if isinstance(part, (dict, list))]


def _size(value: Any) -> int:
    """Count the values in a part of a config."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            size += len(each)
            parts = each.values() if isinstance(each, dict) else each
            waiting += [inner for inner in parts if isinstance(inner, (dict, list))]
    return size
