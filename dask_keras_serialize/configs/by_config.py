"""Models by their config: Keras's own contract, made whole.

The config says what to build; the table of variables says what it holds. Beside
Keras's config travel the few things it forgets and that plain data can carry: whether
the optimizer and the compiled metrics were built, which metrics Keras chose for names
such as ``"accuracy"``, the history of ``fit``, and layers' assets (vocabularies).
Nothing here runs code that came with the bytes.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from dask_keras_serialize import private
from dask_keras_serialize.backends import Array
from dask_keras_serialize.configs import compiled, fidelity, skew
from dask_keras_serialize.configs.defaults import floatx_in_this_thread, policy_in_this_thread
from dask_keras_serialize.configs.sequentials import built_once
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits import arguments, names, operations
from dask_keras_serialize.limits.budget import counted
from dask_keras_serialize.limits.vetting import Vetted
from dask_keras_serialize.parts import Description, Key, Rebuilt
from dask_keras_serialize.rebuilding import assets
from dask_keras_serialize.rebuilding.rebuild import (
    Values,
    assign_rest,
    rebuilding,
    values_at_creation,
)


def dump(model: keras.Model) -> Description | str:
    """Describe a model by its config.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    Description
        Its extras are the bytes of the assets, in the order ``body["assets"]`` names them.
    str
        Instead: what the config would lose; send the model by value.
    """
    try:
        with warnings.catch_warnings():
            # a lambda: it will go by value, which takes lambdas
            warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
            with _uncopied():
                config = keras.saving.serialize_keras_object(model)
    except Exception as error:  # get_config is anybody's code
        return f"it has no config: {str(error).strip().splitlines()[0]}"
    compile_config = config.pop("compile_config", None)
    try:
        # JSON, not msgpack: it keeps lists lists, and every load gets a copy of its
        # own, which deserialize_keras_object is free to empty
        text, no_data = json.dumps(config), ""
        if fidelity.OPERATIONS in text:
            operations.mark_tuples(config)
            text = json.dumps(config)
    except (TypeError, ValueError) as error:
        text, no_data = "", f"its config is not plain data: {error}"
    try:
        lost = fidelity.loss_by_config(model, config, text, compile_config) or no_data
        trainer = compiled.describe(model) if model.compiled and not lost else None
    except AttributeError as error:  # see private.KERAS
        return f"what its config holds is not known of this Keras: {error}"
    except (RuntimeError, TypeError) as error:
        # another thread trains it: what was read of it was given away, or has grown, meanwhile
        return f"its config cannot be read just now: {error!r}"
    if lost:
        return lost
    if isinstance(trainer, str):
        return trainer
    try:
        files, extras = assets.read(model)
    except OSError as error:
        return f"its layers' assets cannot be written to a temporary folder: {error}"
    if any(assets.is_lopsided(name, each) for (_, name), each in zip(files, extras, strict=True)):
        return "one word of a vocabulary in it is too long"
    layers = [model, *private.flatten_layers(model)]
    rest = {
        "policy": keras.dtype_policies.serialize(model.dtype_policy),
        "floatx": keras.config.floatx(),
        "frozen": [i for i, layer in enumerate(layers) if not layer.trainable],
        "seeds": [(i, name, each.seed) for i, name, each in private.unseeded(layers)],
        "paths": [vars(layer).get("_path") for layer in layers],
        "compile": compiled.for_every_backend(compile_config),
        "trainer": trainer,
        "history": fidelity.history_of(model),
        "assets": files,
    }
    variables = variables_of(model)
    shapes = (each.shape for each in variables)
    if arguments.may_be_too_large(text) and (large := arguments.too_large(config, shapes)):
        return large
    try:
        text = f'{{"model": {text}, {json.dumps(rest)[1:]}'
    except (TypeError, ValueError) as error:
        return f"its config is not plain data: {error}"
    if refused := names.refused(text, (each.path for each in variables)):
        return refused
    parts = functools.partial(parts_of, model)
    return Description({"config": text}, variables, extras, parts, [])


class _Copies:
    """Stands in for the module ``copy``: the thread that made it gets its deepcopies uncopied."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(copy, name)

    def deepcopy(self, value: Any, memo: Any = None) -> Any:
        return value if threading.get_ident() == self._thread else copy.deepcopy(value, memo)


@contextmanager
def _uncopied() -> Iterator[None]:
    """Leave out that Keras copies a functional model's config when it has made it.

    That takes a fifth of the time. It guards what a layer's ``get_config`` returned from whoever
    changes the config; here nobody does, it becomes JSON.
    """
    module: Any = sys.modules.get("keras.src.models.functional")
    if getattr(module, "copy", None) is not copy:  # moved, or another thread is packing
        yield
        return
    try:
        module.copy = _Copies()
        yield
    finally:
        module.copy = copy


def load(vetted: Vetted, values: Values, extras: list[Array]) -> Rebuilt:
    """Rebuild a model from what :func:`dump` described.

    Parameters
    ----------
    vetted : Vetted
        What :func:`vetting.read` made of it; its config is emptied.
    values : Values
    extras : list of ndarray of uint8

    Returns
    -------
    Rebuilt

    Raises
    ------
    DecodeError
        If the config cannot be rebuilt here, or rebuilds to something else.

    Notes
    -----
    Copies: one of each variable's bytes, into memory the backend owns.
    """
    owner, before = values.header.owner, sys.exception()
    with rebuilding():
        try:
            config = vetted.config
            with (
                keras.saving.custom_object_scope(vetted.classes),
                values_at_creation(values) as given,
                built_once(),
                counted(vetted.nodes, owner),
                _defaults(config["policy"], config["floatx"]),
            ):
                model = keras.saving.deserialize_keras_object(config["model"], safe_mode=True)
                _check_class(model, values)
                remember(model, config["seeds"], config["paths"])
                _freeze(model, config["frozen"], values)
                if config["trainer"] is not None:
                    trainer = config["trainer"]
                    if values.header.backend != keras.backend.backend():
                        compiled.adapt(config["compile"], trainer["attributes"])
                    compiled.compile_again(model, config["compile"], trainer)
                    if private.assigns_in_build(model.optimizer):
                        for variable in model.optimizer.variables:
                            given.pop(id(variable), None)
            assets.write(model, config["assets"], extras)
            assign_rest(variables_of(model), given, values)
            finish(model, config["history"])
        except Exception as error:  # from_config is anybody's code
            if refusal := _refusal_in(error, before):
                raise refusal from None
            raise DecodeError(
                f"{owner}: its config cannot be rebuilt here: {skew.in_short(error)}; "
                f"{skew.named(values.header)}"
            ) from error
    return Rebuilt(model, functools.partial(parts_of, model))


def _check_class(model: Any, values: Values) -> None:
    """Raise DecodeError unless a model is what the header says, wherever Keras keeps that now."""
    header = values.header
    if not header.is_of(type(model)):
        raise DecodeError(
            f"{header.owner}: its config cannot be rebuilt here: it is a "
            f"{type(model).__qualname__}'s, and a {header.class_name} was sent; send it again"
        )


def _refusal_in(error: BaseException | None, before: BaseException | None) -> DecodeError | None:
    """Return a refusal of ours, as it was: Keras takes it for a layer's error, and rewrites it."""
    refusal = None
    while error is not None and error is not before:
        refusal = error if isinstance(error, DecodeError) else refusal
        error = error.__context__
    return refusal


def leave_rate_out(compile_config: dict[str, Any] | None) -> None:
    """Leave out of what compiled a model the learning rate, where it is a variable."""
    optimizer = (compile_config or {}).get("optimizer")
    while isinstance(optimizer, dict):
        settings = optimizer["config"]
        if isinstance(settings.get("learning_rate"), float):
            settings["learning_rate"] = "a variable"
        optimizer = settings.get("inner_optimizer")


def variables_of(model: keras.Model) -> list[keras.Variable]:
    """List all of a model's variables, each once, in an order a rebuild repeats.

    Layers' variables first, seeds among them, then the optimizer's, then metrics'.
    """
    optimizer = getattr(model, "optimizer", None)
    everything = [
        *model.variables,
        *(optimizer.variables if optimizer is not None else ()),
        *model.metrics_variables,
    ]
    return list({id(variable): variable for variable in everything}.values())


def parts_of(model: keras.Model) -> dict[Key, Any]:
    """Name all that something else may share with a model, alike before and after.

    Not what a layer is configured with (initializers, policies), which is never changed.
    """
    layers = [model, *private.flatten_layers(model)]
    parts: dict[Key, Any] = {}
    parts |= {("layer", i): layer for i, layer in enumerate(layers)}
    parts |= {("variable", i): v for i, v in enumerate(variables_of(model))}
    parts |= {("metric", i): metric for i, metric in enumerate(model.metrics)}
    for i, layer in enumerate(layers):
        parts |= {("seed", i, j): seed for j, seed in enumerate(layer._seed_generators)}
        function = private.function_of(layer)
        if function is not None:
            parts["function", i] = function
        for call, node in private.nodes(function):
            parts["node", i, *call] = node
            parts |= {("tensor", i, *call, j): each for j, each in enumerate(node.outputs)}
            parts["operation", i, call[0]] = node.operation
    if model.compiled:
        parts[("optimizer",)] = model.optimizer
        arguments = private.compile_arguments(model)
        for name in ("optimizer", "loss", "metrics", "weighted_metrics"):
            for i, value in enumerate(fidelity.leaves(arguments[name])):
                if not isinstance(value, str):
                    parts["compile", name, i] = value
    parts[("history",)] = vars(model).get("history")
    return parts


@contextmanager
def _defaults(policy: dict[str, Any], floatx: str) -> Iterator[None]:
    """Rebuild under the sender's dtype policy, which models take and no config holds."""
    with (
        floatx_in_this_thread(floatx),
        # read under that floatx, which it may depend on
        policy_in_this_thread(keras.dtype_policies.deserialize(policy)),
    ):
        yield


def remember(model: keras.Model, seeds: list[tuple[int, str, int]], paths: list[Any]) -> None:
    """Give layers what they drew, and were named, when they were made."""
    layers = [model, *private.flatten_layers(model)]
    for i, name, seed in seeds:
        initializer = vars(layers[i]).get(name)
        if not isinstance(initializer, keras.Initializer):
            raise DecodeError(
                f"model {model.name!r}: a seed was sent for {name!r}, which draws none"
            )
        initializer.seed = seed
    if len(paths) != len(layers):
        raise DecodeError(
            f"model {model.name!r}: its config cannot be rebuilt here: it makes {len(layers)} "
            f"layers, paths of {len(paths)} were sent; send it again"
        )
    for layer, path in zip(layers, paths, strict=True):
        layer.__dict__["_path"] = path


def _freeze(model: keras.Model, frozen: list[int], values: Values) -> None:
    """Set every trainable flag: a layer's own after those above it, variables' last."""
    places, layers = frozenset(frozen), [model, *private.flatten_layers(model)]
    if not places <= set(range(len(layers))):
        raise DecodeError(f"model {model.name!r}: layers were sent as frozen that it has not got")
    for i, layer in enumerate(layers):
        # even if it is so already: setting it on a model sets it on all its layers
        if places or not layer.trainable:
            layer.trainable = i not in places
    for variable, entry in zip(model.variables, values.header.variables, strict=False):
        if variable.trainable != entry.trainable:
            variable.trainable = entry.trainable


def finish(model: keras.Model, history: dict[str, Any] | None) -> None:
    """Let layers derive what they cache from their variables; restore the history of ``fit``."""
    for layer in private.flatten_layers(model):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()
    restore_history(model, history)


def restore_history(model: keras.Model, state: dict[str, Any] | None) -> None:
    """Give a model the history that :func:`fidelity.history_of` returned of another."""
    if state is None:
        return
    history = keras.callbacks.History()
    vars(history).update(state)
    history.set_model(model)
    model.history = history
