"""What ``compile`` did to a model, described, and done again.

Beside what Keras keeps of the arguments: whether optimizer and metrics were built, and the
metrics that Keras chose for names such as ``"accuracy"``. How a model is executed is left to
the receiver where it runs on another backend.
"""

from __future__ import annotations

from typing import Any

import keras

from dask_keras_serialize import backends, private
from dask_keras_serialize.errors import DecodeError

#: What the trainer lets a user change after ``compile``.
_TRAINER_ATTRIBUTES = (
    "run_eagerly",
    "jit_compile",
    "steps_per_execution",
    "stop_training",
    "stop_evaluating",
    "stop_predicting",
)


def describe(model: keras.Model) -> dict[str, Any] | str:
    """Say what of a compiled model no config holds; in words, if it cannot be rebuilt."""
    metrics = private.resolved_metrics(model)
    trainer = {
        "optimizer-built": model.optimizer.built,
        "scaled": model.optimizer is not private.compile_arguments(model)["optimizer"],
        "metrics": metrics,
        "losses": private.counts_losses(model),
        "attributes": {
            name: getattr(model, name) for name in _TRAINER_ATTRIBUTES if hasattr(model, name)
        },
    }
    if (metrics is not None or trainer["losses"]) and _outputs(model) is None:
        return "its compiled metrics are built but its outputs are not known"
    return trainer


def adapt(config: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Leave to this backend how it executes a model of another one."""
    config["jit_compile"] = "auto"
    attributes.pop("jit_compile", None)
    if backends.current()[1].ONE_STEP:
        config["steps_per_execution"] = 1
        attributes.pop("steps_per_execution", None)


def compile_again(model: keras.Model, config: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Compile a rebuilt model, with what :func:`describe` said.

    Raises
    ------
    DecodeError
        If Keras chooses other metrics here.
    """
    arguments = keras.saving.deserialize_keras_object(config, safe_mode=True)
    model.compile(**arguments, auto_scale_loss=trainer["scaled"])
    _forget_first(model.optimizer)
    for name, value in trainer["attributes"].items():
        if name in _TRAINER_ATTRIBUTES:
            setattr(model, name, value)
    if trainer["optimizer-built"]:
        model.optimizer.build(model.trainable_variables)
    metrics = trainer["metrics"]
    if metrics is not None or trainer["losses"]:
        y_pred = _outputs(model)
        y_true = _targets(y_pred, metrics)
        if trainer["losses"]:
            private.build_losses(model, y_true, y_pred)
        if metrics is not None:
            private.build_metrics(model, y_true, y_pred)
            rebuilt = private.resolved_metrics(model) or []
            # which Kerases make an empty list for an output that has none differs
            if list(filter(None, rebuilt)) != list(filter(None, metrics)):
                raise DecodeError(
                    f"model {model.name!r}: its metrics were {metrics} but are rebuilt as "
                    f"{rebuilt} by keras {keras.version()} here: use the sender's"
                )


def _forget_first(optimizer: Any) -> None:
    """Let go of the variables that an optimizer made and lost, while it was being made.

    Some Kerases call ``__init__`` twice where they make PyTorch's own of an optimizer
    (``keras/src/backend/torch/optimizers/torch_optimizer.py``); its lists keep the first ones.
    """
    while optimizer is not None:
        tracker = vars(optimizer).get("_tracker")
        for value in vars(optimizer).values():
            if isinstance(value, private.TRACKED) and value.tracker is not tracker:
                value.tracker = None
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _outputs(model: keras.Model) -> Any:
    """Return the model's outputs as it returns them, symbolically; None if unknown."""
    try:
        outputs = model.outputs
        if isinstance(model, keras.Sequential):
            return outputs[0]
        return keras.tree.pack_sequence_as(model._outputs_struct, outputs)
    except (AttributeError, TypeError, ValueError):
        return None


def _targets(y_pred: Any, metrics: list[list[str]] | None) -> Any:
    """Make targets of such shapes that Keras chooses the same metrics again.

    Keras chooses by shape alone (``keras/src/trainers/compile_utils.py``,
    ``is_binary_or_sparse_categorical``): sparse where the targets lack the last axis.
    """
    flat = keras.tree.flatten(y_pred)
    rows = metrics or []
    targets = []
    for i, output in enumerate(flat):
        names = [name for row in rows[i :: len(flat)] for name in row]
        sparse = any(name.startswith("Sparse") for name in names)
        shape = output.shape[:-1] if sparse else output.shape
        targets.append(keras.KerasTensor(shape, dtype=output.dtype))
    return keras.tree.pack_sequence_as(y_pred, targets)


def for_every_backend(config: Any) -> Any:
    """Name optimizers as all backends do, where Keras makes the backend's own of them."""
    if isinstance(config, list):
        return [for_every_backend(each) for each in config]
    if not isinstance(config, dict):
        return config
    config = {name: for_every_backend(each) for name, each in config.items()}
    if str(config.get("module")).startswith(backends.OWN_OPTIMIZERS):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config
