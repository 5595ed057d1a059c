"""``copy.copy`` of Keras's objects: another object, the same parts.

As Python's own, it shares what the object holds: layers, variables, an optimizer. So
training the copy of a model trains the model. What Keras itself keeps in lists on the
object is listed anew, so that adding a layer to one adds none to the other. For a
replica that shares nothing there is ``copy.deepcopy``.
"""

from __future__ import annotations

import copy
from typing import Any

from dask_keras_serialize import mending, private
from dask_keras_serialize.shells import new_shell, reduces_itself


def shallow(obj: Any) -> Any:
    """Return another object with the same parts; stands on base classes as ``__copy__``.

    Parameters
    ----------
    obj : object
        One of Keras's; a class of the user's that defines ``__reduce__`` is copied by that.

    Returns
    -------
    object
        Of the same class. Traced functions are its own, as they hold the model.
    """
    if reduces_itself(obj.__class__):
        reconstruct = copy._reconstruct  # type: ignore[attr-defined]
        return reconstruct(obj, None, *obj.__reduce__())
    state = dict(vars(obj))
    mending.forget(obj, state)
    own: dict[int, Any] = {}
    tracker = state.get("_tracker")
    if isinstance(tracker, private.Tracker):
        twin = own[id(tracker)] = copy.copy(tracker)
        twin.stored_ids = {name: set(ids) for name, ids in tracker.stored_ids.items()}
        own |= {id(store): list(store) for _, store in tracker.config.values()}
        twin.config = {name: (test, own[id(s)]) for name, (test, s) in tracker.config.items()}
    for name, value in state.items():
        if name.startswith("_") and id(value) not in own:
            if isinstance(value, private.TRACKED):
                own[id(value)] = type(value)(value, own.get(id(value.tracker), value.tracker))
            elif type(value) in (list, dict, set):
                own[id(value)] = copy.copy(value)
    shell = new_shell(type(obj))
    for name, value in state.items():
        shell.__dict__[name] = own.get(id(value), value)
    return shell
