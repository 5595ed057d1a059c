"""What models have in common that differ in nothing but what their variables hold.

Two of one architecture are made equal by assigning one's values to the other's variables: neither
is rebuilt, and what a backend has traced or compiled of them stays. Left aside is what a run
leaves behind in a model and begins anew by itself: its history, flags that stop it, the metrics and
counters of losses that Keras builds with the first batch. Part of it are values that the backend
may have read when it traced the model: vocabularies, and what a Normalization was adapted to.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import keras

from dask_keras_serialize import backends, private
from dask_keras_serialize.configs import by_config, fidelity
from dask_keras_serialize.parts import Description
from dask_keras_serialize.values import by_value, states

#: What runs leave on a model (``keras/src/trainers/trainer.py``).
RUN = frozenset({"history", "stop_training", "stop_evaluating", "stop_predicting"})

#: And the first call on a layer (``keras/src/layers/layer.py``).
CALLED = frozenset({"_called"})

#: And on a model that is not compiled (``keras/src/trainers/trainer.py``).
UNCOMPILED = frozenset({"_jit_compile"})


class Architecture(NamedTuple):
    """What :func:`architecture_of` says of a model.

    Attributes
    ----------
    digest : bytes
        Equal, in every process, for models that differ in their variables' values alone.
    variables : list of keras.Variable
        All of them, in an order that is the same for equal digests; metrics' may follow that
        others of the same architecture do not have yet.
    order : list of int
        The place of each in the header's table.
    metrics : list or None
        Which metrics the first batch chose, see :func:`private.resolved_metrics`.
    left : dict
        What runs left on it, see :func:`leave`.
    """

    digest: bytes
    variables: list[keras.Variable]
    order: list[int]
    metrics: list[list[str]] | None
    left: dict[str, Any]


def architecture_of(
    model: keras.Model, described: Description | None = None
) -> Architecture | None:
    """Say what architecture a model has.

    Parameters
    ----------
    model : keras.Model
    described : Description, optional
        It, as it is just being sent: saves doing that again.

    Returns
    -------
    Architecture
        None if there is more to it than this package can compare: a history that is no plain data.

    Raises
    ------
    EncodeError
        If it cannot travel.

    Notes
    -----
    Copies: none of variables' bytes.
    """
    try:
        history = fidelity.history_of(model)
    except ValueError:
        return None
    places = {id(v): i for i, v in enumerate(described.variables)} if described else {}
    if described is None:
        by_its_config = by_config.dump(model)
        described = None if isinstance(by_its_config, str) else by_its_config
    name, backend = backends.current()
    if described is not None and "config" in described.body:
        body = _without_run(described.body["config"])
    else:
        apart = {id(part): (None, None) for part in private.built_by_runs(model)}
        run = RUN if model.compiled else RUN | UNCOMPILED
        without = {keras.Model: run, keras.Layer: CALLED | backends.SET_BY_RUNS[name]}
        # for a token: in the order of names, in which every process finds them
        described = by_value.dump(model, for_token=True, without=without, links=apart)
        body = repr(described.body)
    metrics = {id(variable): variable for variable in model.metrics_variables}
    variables = [v for v in described.variables if id(v) not in metrics]
    rows = [
        [v.path, list(v.shape), v.dtype, bool(v.trainable), backend.placement(v)] for v in variables
    ]
    read_once = [
        states.views(layer.variables, backend, layer.name)
        for layer in private.flatten_layers(model)
        if isinstance(layer, keras.layers.Normalization) and layer.built
    ]
    digest = hashlib.blake2b(f"{name} {type(model)} {body} {rows}".encode(), digest_size=20)
    for array in [*described.extras, *itertools.chain.from_iterable(read_once)]:
        digest.update(array.tobytes())
    variables += metrics.values()
    order = [places[id(v)] for v in variables] if places else []
    chosen = private.resolved_metrics(model) if model.compiled else None
    flags = {name: value for name, value in vars(model).items() if name in RUN - {"history"}}
    return Architecture(digest.digest(), variables, order, chosen, flags | {"history": history})


def leave(model: keras.Model, left: dict[str, Any]) -> None:
    """Leave on a model what runs left on another: its history, and flags that stop one."""
    state = vars(model)
    state.pop("history", None)
    by_config.restore_history(model, copy.deepcopy(left["history"]))
    state.update({name: left.get(name, False) for name in RUN - {"history"} if name in state})


def forget_traces(model: keras.Model) -> None:
    """Let the backend trace anew what it may have traced of another architecture."""
    model.train_function = model.test_function = model.predict_function = None


def _without_run(config: str) -> str:
    """Leave out of a config what runs change, and what is a variable's value besides."""
    body = json.loads(config)
    body["history"] = None
    if body["trainer"] is not None:
        attributes = body["trainer"]["attributes"]
        body["trainer"] |= {
            "metrics": None,
            "losses": None,
            "attributes": {k: v for k, v in attributes.items() if k not in RUN},
        }
        by_config.leave_rate_out(body["compile"])
    return json.dumps(body)
