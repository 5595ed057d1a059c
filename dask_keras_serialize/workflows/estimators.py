"""scikeras's estimators, whose copies go on with the model that is there already.

A search such as dask-ml's copies an estimator before every ``partial_fit``. Copied so, a model is
rebuilt each time, and its training traced or compiled again. Here the copy takes over the live
model and leaves a snapshot behind, which is opened only if somebody runs the original again; see
:mod:`dask_keras_serialize.workflows.holding`. What is trained, predicted and stored is the same.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scikeras.wrappers import KerasClassifier, KerasRegressor

from dask_keras_serialize.cluster.tasks import holds_keras
from dask_keras_serialize.workflows.holding import Held

if TYPE_CHECKING:
    import keras


class Warm:
    """Mixin for scikeras's wrappers, before them among the bases.

    ``class MyClassifier(Warm, KerasClassifier)`` does for a wrapper of one's own, such as one for
    several inputs, what :class:`WarmClassifier` does for scikeras's.

    Attributes
    ----------
    model_ : keras.Model
        The live model. Whoever asks for it may keep it: from then on this estimator's copies
        are rebuilt, as any model's.

    Notes
    -----
    Copies: a copy of the estimator shares the bytes of the weights with the original, until one of
    them is trained further.
    """

    @property
    def _holder(self) -> Held:
        if "_holds" not in vars(self):
            self._hold_anew()
        held: Held = vars(self)["_holds"]
        return held

    def _hold_anew(self) -> None:
        vars(self)["_holds"] = Held()

    @property
    def model_(self) -> keras.Model:  # noqa: D102  above
        return self._holder.model()

    @model_.setter
    def model_(self, model: keras.Model) -> None:
        if not self._holder.in_use:  # else `_fit` has seen to it
            self._hold_anew()
        self._holder.put(model, exposed=self._is_the_users())

    @model_.deleter
    def model_(self) -> None:
        self._hold_anew()

    def _is_the_users(self) -> bool:
        """Say whether what was built may be, or hold, what the user keeps: scikeras trains that."""
        given: dict[str, Any] = self.get_params()  # type: ignore[attr-defined]
        build = given.get("model") or getattr(self, "_keras_build_fn", None)
        kept = [value for name, value in given.items() if "callbacks" not in name]
        return any(map(holds_keras, kept)) or _keeps_keras(build, set())

    @property
    def initialized_(self) -> bool:
        """Whether there is a model."""
        return bool(self._holder)

    def _fit(self, *args: Any, **kwargs: Any) -> None:
        warm = getattr(self, "warm_start", False) or kwargs.get("warm_start")
        before = self._holder
        if not (warm and self.initialized_):
            self._hold_anew()  # the old one may be another's, by copy.copy
        try:
            with self._holder.using("trains"):
                super()._fit(*args, **kwargs)  # type: ignore[misc]
                self._let_go("_fit_callbacks")
        except BaseException:
            if not self.initialized_:  # the data were refused: as scikeras, go on with the old one
                vars(self)["_holds"] = before
            raise

    def _predict_raw(self, *args: Any, **kwargs: Any) -> Any:
        if not self.initialized_:
            return super()._predict_raw(*args, **kwargs)  # type: ignore[misc]
        with self._holder.using("reads"):
            predicted = super()._predict_raw(*args, **kwargs)  # type: ignore[misc]
            self._let_go("_predict_callbacks")
        return predicted

    def _let_go(self, name: str) -> None:
        """Take the model from callbacks, which are copied with it; each run gives it to them."""
        import keras

        for callback in keras.tree.flatten(getattr(self, name, [])):
            # past what a class of its own, such as TensorBoard's, does beside
            keras.callbacks.Callback.set_model(callback, None)
            own = dict(vars(callback))
            for cls in type(callback).__mro__:
                if not cls.__module__.startswith("keras."):
                    own |= vars(cls)
            functions = any(map(inspect.isroutine, vars(callback).values()))
            if functions or not type(callback).__module__.startswith("keras."):
                self._holder.handed_out(kept=_reach_keras(own.values(), set()))

    def __sizeof__(self) -> int:
        return super().__sizeof__() + self._holder.nbytes


class WarmClassifier(Warm, KerasClassifier):  # type: ignore[misc]
    """``scikeras.wrappers.KerasClassifier``, and cheap to copy; see :class:`Warm`."""


class WarmRegressor(Warm, KerasRegressor):  # type: ignore[misc]
    """``scikeras.wrappers.KerasRegressor``, and cheap to copy; see :class:`Warm`."""


def _keeps_keras(function: Any, seen: set[int]) -> bool:
    """Say whether a function that builds models can reach one, or a part, that it did not build."""
    if isinstance(function, functools.partial):
        arguments = [*function.args, *function.keywords.values()]
        return any(map(holds_keras, arguments)) or _keeps_keras(function.func, seen)
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (type, types.ModuleType)):
        own = {**getattr(owner, "__dict__", {}), "_holds": None}
        if any(holds_keras(value) for name, value in own.items() if "callbacks" not in name):
            return True
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return False
    seen.add(id(function))
    reached = inspect.getclosurevars(function)
    values = [*reached.nonlocals.values(), *reached.globals.values()]
    values += function.__defaults__ or ()
    return _reach_keras(values, seen)


def _reach_keras(values: Iterable[Any], seen: set[int]) -> bool:
    """Say whether one of Keras's objects is among values, in them, or reached by functions."""
    for value in values:
        own = {} if isinstance(value, (type, types.ModuleType)) else getattr(value, "__dict__", {})
        if holds_keras(value) or any(map(holds_keras, own.values())) or _keeps_keras(value, seen):
            return True
    return False
