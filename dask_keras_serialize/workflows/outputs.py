"""What a model's ``predict`` returns, said without running it on data.

The model is called on symbols, aside: on no variable, seed or name of a user's has it any effect.
Where a model's own code cannot be called so, a copy of the model predicts on zeros.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_keras_serialize.errors import one_line


@dataclass(frozen=True)
class Rows:
    """An array without its rows: what goes into a model, or comes out.

    Parameters
    ----------
    shape : tuple of int or None
        Of one row; None where that is not known before data is seen.
    dtype : dtype
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return (
            f"{self.dtype} of shape (rows, {sizes})" if sizes else f"{self.dtype} of shape (rows,)"
        )

    def empty(self) -> Any:
        """Make an array of no rows, for Dask's metadata: unknown sizes are 0."""
        return np.empty((0, *(size or 0 for size in self.shape)), self.dtype)

    def holds(self, array: Any) -> bool:
        """Say whether an array is one of these, whatever its rows."""
        sizes = array.shape[1:]
        return (
            array.ndim == 1 + len(self.shape)
            and array.dtype == self.dtype
            and all(a in (None, b) for a, b in zip(self.shape, sizes, strict=True))
        )


def mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    """Call a function on each leaf of dicts, lists and tuples; return another such structure."""
    if isinstance(structure, dict):
        return {key: mapped(function, value) for key, value in structure.items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(mapped(function, each) for each in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)([mapped(function, each) for each in structure])
    return function(structure)


def leaves(structure: Any) -> list[Any]:
    """List the leaves of dicts, lists and tuples, in one order whatever that of a dict's keys."""
    if isinstance(structure, dict):
        parts = [structure[key] for key in sorted(structure, key=str)]
    elif isinstance(structure, (list, tuple)):
        parts = list(structure)
    else:
        return [structure]
    return [leaf for part in parts for leaf in leaves(part)]


def of(model: Any, inputs: Any) -> Any:
    """Say what ``model.predict`` returns for inputs, without data.

    Parameters
    ----------
    model : keras.Model
        Built; left as it is.
    inputs : Rows
        Or lists, tuples or dicts of such.

    Returns
    -------
    Rows
        Or a structure of such, like what ``predict`` returns. Their dtypes are NumPy's, of this
        process's backend.

    Raises
    ------
    ValueError
        If the model cannot predict on such inputs.
    """
    from dask_keras_serialize.private import describe

    check_built(model)
    try:
        found = _on_zeros(model, inputs) if overrides_predict(model) else _symbolic(model, inputs)
    except Exception:  # the model's own code, which may know no symbols
        try:
            found = _on_zeros(model, inputs)
        except Exception as error:
            given = ", ".join(map(str, leaves(inputs)))
            raise ValueError(
                f"{describe(model)} cannot predict on {given}{_expected(model)}: "
                f"{_last_line(error)}; give it what it was built for, or meta= what it returns"
            ) from error
    for each in leaves(found):
        if not isinstance(each, Rows):
            raise ValueError(
                f"{describe(model)} returns {each!r}, which is no dense tensor of rows"
            )
    return found


def check_built(model: Any) -> None:
    """Raise ValueError for a model whose replicas would differ: not built, or stateful."""
    from dask_keras_serialize.private import describe, flatten_layers

    if not model.built:
        raise ValueError(
            f"{describe(model)} is not built, so it has no weights yet: call it on one batch, or "
            "model.build(input_shape), before predict"
        )
    for layer in flatten_layers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"{describe(model)} has a layer {layer.name!r} that is stateful: what it predicts "
                "would hang on the order of chunks; make it with stateful=False"
            )


def overrides_predict(model: Any) -> bool:
    """Say whether a model's class has a ``predict`` of its own."""
    import keras

    return type(model).predict is not keras.Model.predict


def given(meta: Any) -> Any:
    """Take what a user says a model returns: arrays of no rows, in its structure.

    Raises
    ------
    TypeError
        If it is no array.
    """

    def rows(array: Any) -> Rows:
        if not getattr(array, "ndim", 0) or not hasattr(array, "dtype"):
            raise TypeError(
                f"meta={meta!r} is no array of no rows such as the model returns, for example "
                'np.empty((0, 10), "float32"), nor lists, tuples or dicts of such'
            )
        return Rows(tuple(int(size) or None for size in array.shape[1:]), np.dtype(array.dtype))

    return mapped(rows, meta)


def _symbolic(model: Any, inputs: Any) -> Any:
    import keras

    from dask_keras_serialize.rebuilding.aside import aside

    class Prediction(keras.Operation):  # type: ignore[misc]
        """What ``predict`` does with a batch; of it Keras can say what it returns."""

        def call(self, x: Any) -> Any:
            if keras.backend.backend() != "jax":
                return model.predict_step((x,))
            sides = model.trainable_variables, model.non_trainable_variables
            state = tuple([variable.value for variable in side] for side in sides)
            return model.predict_step(state, (x,))[0]

    batch = _batch_size(model)

    def symbol(rows: Rows) -> Any:
        dtype = "string" if rows.dtype == object else str(floats_as_keras(rows.dtype))
        return keras.KerasTensor((batch, *rows.shape), dtype)

    def rows(tensor: Any) -> Any:
        usable = isinstance(tensor, keras.KerasTensor) and not getattr(tensor, "sparse", False)
        if not usable or not tensor.shape or tensor.shape[0] != batch:
            return tensor
        return Rows(tuple(tensor.shape[1:]), _returned(tensor.dtype))

    with aside(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX, of 64 bits; a run will say it again
        prediction = Prediction(name="prediction")
        if keras.backend.backend() == "torch":
            return _stateless(prediction.call, inputs, batch or 2)
        return mapped(rows, prediction.compute_output_spec(mapped(symbol, inputs)))


def _stateless(call: Callable[[Any], Any], inputs: Any, batch: int) -> Any:
    """Call on zeros where no variable can change.

    For PyTorch, whose symbols have another dtype than its tensors under a mixed policy: they leave
    out that variables are cast (``Variable.value`` in ``keras/src/backend/torch/core.py``).
    """
    import keras

    def returned(unknown: int) -> Any:
        def zeros(rows: Rows) -> Any:
            shape = (batch, *(unknown if size is None else size for size in rows.shape))
            return keras.ops.zeros(shape, str(floats_as_keras(rows.dtype)))

        with keras.StatelessScope():
            return mapped(keras.ops.convert_to_numpy, call(mapped(zeros, inputs)))

    found = returned(32)
    if not any(None in each.shape for each in leaves(inputs)):
        return mapped(lambda array: _rows_of(array, batch), found)
    others: list[Any] = []
    mapped(others.append, returned(33))
    alike = iter(others)

    def rows(array: Any) -> Any:
        known = _rows_of(array, batch)
        if not isinstance(known, Rows):
            return known
        sizes = zip(known.shape, next(alike).shape[1:], strict=True)
        return Rows(tuple(a if a == b else None for a, b in sizes), known.dtype)

    return mapped(rows, found)


def _rows_of(array: Any, batch: int) -> Any:
    """Leave out the rows of what a batch of so many gave; an array of others is returned itself."""
    if not isinstance(array, np.ndarray) or not array.ndim or len(array) != batch:
        return array
    return Rows(array.shape[1:], array.dtype)


def _on_zeros(model: Any, inputs: Any) -> Any:
    """Predict on zeros; by a copy, so that no state of the user's changes."""
    batch = _batch_size(model) or 2

    def zeros(rows: Rows) -> Any:
        if None in rows.shape:
            raise ValueError("sizes that are not known cannot be made up")
        fill: Any = "" if rows.dtype == object else 0
        shape = (batch, *(size or 0 for size in rows.shape))
        return np.full(shape, fill, rows.dtype)

    returned = copy.deepcopy(model).predict(mapped(zeros, inputs), batch_size=batch, verbose=0)
    return mapped(lambda array: _rows_of(array, batch), returned)


def _batch_size(model: Any) -> int | None:
    """Return the batch size that a model is bound to."""
    inputs = getattr(model, "inputs", None) or []
    return next((each.shape[0] for each in inputs if len(each.shape)), None)


def _expected(model: Any) -> str:
    inputs = getattr(model, "inputs", None) or []
    shapes = ", ".join(str(each.shape).replace("None", "rows", 1) for each in inputs)
    return f", it takes {shapes}" if shapes else ""


def _last_line(error: BaseException) -> str:
    """Leave out what Keras adds of the arguments of the call, and of where it was."""
    said = str(error).split("\n\nArguments received")[0]
    said = said.rpartition("\x1b[1m")[2].replace("\x1b[0m", "") if "\x1b[1m" in said else said
    return (
        one_line(type(error)(said)) if type(error) in (ValueError, TypeError) else one_line(error)
    )


def floats_as_keras(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that ``predict`` turns an array's into before anything else: floatx.

    Of ``keras/src/trainers/data_adapters/array_slicing.py``.
    """
    import keras

    floats = dtype.name.startswith(("float", "bfloat"))
    return _numpy(keras.config.floatx()) if floats else dtype


def _returned(dtype: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a tensor, as the backend gives it back: JAX has 32 bits for 64."""
    import keras

    if dtype == "string":
        return np.dtype(object)
    try:
        one = keras.ops.zeros((1,), dtype)
        found: np.dtype[Any] = keras.ops.convert_to_numpy(one).dtype
    except Exception:  # an exotic one, without zeros
        found = _numpy(dtype)
    return found


def _numpy(dtype: str) -> np.dtype[Any]:
    from dask_keras_serialize.wire.header import numpy_dtype

    found: np.dtype[Any] = numpy_dtype(dtype)
    return found
