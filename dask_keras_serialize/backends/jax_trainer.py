"""Who has taken the values out of JAX's variables, and whose turn it is to run a model.

For as long as it fits, evaluates or predicts, Keras's trainer takes the values out of their
variables, so that they are in memory once, and gives them away to each step, which returns new
ones (``keras/src/backend/jax/trainer.py``). Meanwhile another thread finds variables without a
value: a task that predicts with the same model fails. So we remember who took them, and threads
that evaluate or predict with one model take turns.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import keras

from dask_keras_serialize.rebuilding.turns import Turn

logger = logging.getLogger(__name__)

#: What tasks of one worker call of one model. Not ``fit``: its callbacks and its data may wait for
#: threads that run the model.
_RUNS = ("evaluate", "predict", "test_on_batch", "predict_on_batch")
_TRAINING = ("fit", "train_on_batch")
_PURGE = "_purge_model_variables"

#: By the model: one thread at a time runs it.
TURNS: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()

#: Seconds that a thread waits for its turn. Longer ones wait for each other: one goes on, as it
#: would by Keras alone.
_PATIENCE = 60.0


def slots_of_trainers() -> Iterator[tuple[Any, str, Any]]:
    """Yield what of Keras's takes values out of variables, or must take turns, and its wrapper."""
    yield from ((keras.Model, name, _in_turn) for name in _RUNS)
    yield from ((keras.Model, name, _forgetting) for name in _TRAINING)
    yield keras.Model, _PURGE, _remembering


def _in_turn(original: Any) -> Any:
    run = _forgetting(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with TURNS.setdefault(self, Turn()).held(_PATIENCE) as mine:
            if not mine:
                logger.warning("%s runs in two threads, each for over %.0f s", self.name, _PATIENCE)
            return run(self, *args, **kwargs)

    return method


def _forgetting(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            _forget(self)

    return method


class _Held(NamedTuple):
    """A value that a trainer has taken out of a variable."""

    variable: ref[Any]
    trainer: ref[Any]
    kind: str
    place: int
    #: Given away at the first step; else it goes then.
    first: ref[Any]


#: By the variable's ``id()``.
HELD: dict[int, _Held] = {}


def _remembering(original: Any) -> Any:
    """Wrap ``_purge_model_variables``."""

    @functools.wraps(original)
    def purge(self: Any, **kinds: bool) -> None:
        for kind in (kind for kind, purged in kinds.items() if purged):
            owner = self.optimizer if kind.startswith("optimizer") else self
            name = "variables" if owner is not self else kind
            for place, variable in enumerate(getattr(owner, name)):
                if variable._value is not None:
                    held = _Held(ref(variable), ref(self), kind, place, ref(variable._value))
                    HELD[id(variable)] = held
        original(self, **kinds)

    return purge


def _forget(trainer: Any) -> None:
    """Forget what is back in its variable; what is not, after an interrupt, can still be read."""
    for key, held in list(HELD.items()):
        variable = held.variable()
        back = variable is not None and variable._value is not None
        if variable is None or (back and held.trainer() is trainer):
            HELD.pop(key, None)


def held_value(variable: Any) -> Any:
    """Return the array that a trainer has taken out of a variable, or None."""
    held = HELD.get(id(variable))
    if held is None or held.variable() is not variable:
        return None
    state = getattr(held.trainer(), "_jax_state", None) or {}
    return state[held.kind][held.place] if held.kind in state else held.first()
