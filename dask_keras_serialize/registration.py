"""Takes Dask's and pickle's slots for Keras models, and gives them back.

Installed, the package registers by itself: ``dask.sizeof`` is the one group of entry
points that Dask loads in every process on import, client, scheduler, nanny and worker
(``dask/sizeof.py``; there is none for serializers, distributed#3831). Its hook waits
for ``keras``, ``distributed.protocol``, ``distributed.client`` and
``distributed.worker`` to be imported, whichever comes first, and imports none itself.

What is taken, and what of it is private (each has a test that fails when it moves):

- ``dask_serialize``, ``dask_deserialize``: distributed's own lazy "keras" slot, whose
  handler is for Keras 1.2 (``distributed/protocol/keras.py``), and what subclasses of
  Model were cached under while it stood: ``Dispatch._lazy`` and ``Dispatch._lookup``
  (``dask/utils.py``).
- ``sizeof`` and ``normalize_token``, public.
- ``keras.Model.__reduce_ex__``, see :mod:`dask_keras_serialize.pickling`.
- ``Client.map``: a model among its keyword arguments becomes a task of its own, so
  that it goes to each worker once. distributed 2026.8 does that for arguments over
  100 kB, but gives the task no priority, so that the scheduler raises
  AssertionError, and names it after the keyword alone, so that two models would be
  taken for one (``distributed/client.py``, ``_MapExpr._layer``).
- ``DEFAULT_STARTUP_INFORMATION`` of ``distributed.worker``, public: workers tell the
  scheduler that they have this package.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import wrapt

from dask_keras_serialize.header import FORMAT, package_version

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

#: Whether the slots are ours.
_registered = False

#: What stood in each slot, by the slot, for :func:`unregister`.
_before: dict[str, Callable[[], None]] = {}


def on_dask_import(sizeof: Any) -> None:
    """Register, unless the config says not to; the ``dask.sizeof`` entry point.

    Parameters
    ----------
    sizeof : dask.utils.Dispatch
        Dask's, unused: :func:`register` finds it.
    """
    from dask import config

    if config.get(f"{FORMAT}.register", True):
        register()
    elif not _registered:
        # dask imported the package, not the user: let an import by the user still
        # run, and register
        sys.modules.pop("dask_keras_serialize", None)


def imported_by_dask() -> bool:
    """Say whether dask's entry points are what is importing the package right now."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "dask.sizeof":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def register() -> None:
    """Make Keras models first-class Dask values in this process.

    Idempotent, and independent of the order in which dask, distributed, Keras and
    this package are imported. Imports none of them.
    """
    global _registered
    if _registered:
        return
    _registered = True
    for module, take in _TAKERS.items():
        if module in sys.modules:
            take(sys.modules[module])
    _wait_for_imports()


def unregister() -> None:
    """Put back what stood in every slot before :func:`register`."""
    global _registered
    _registered = False
    for restore in _before.values():
        restore()
    _before.clear()


def registered() -> bool:
    """Say whether the slots are ours in this process."""
    return _registered


@functools.cache
def _wait_for_imports() -> None:
    """Take slots as the modules that hold them are imported; once in a process."""
    for module, take in _TAKERS.items():
        wrapt.register_post_import_hook(functools.partial(_take_if_registered, take), module)


def _take_if_registered(take: Callable[[Any], None], module: Any) -> None:
    if _registered:
        take(module)


def _take_keras(keras: Any) -> None:
    from dask_keras_serialize import pickling

    pickling.install()
    _before["pickle"] = pickling.uninstall


def _take_tokens(tokenize: Any) -> None:
    _take("tokenize", tokenize.normalize_token, _tokenize_model)


def _take_sizes(sizeof: Any) -> None:
    _take("sizeof", sizeof.sizeof, _sizeof_model)


def _take_serializers(protocol: Any) -> None:
    _take("serialize", protocol.dask_serialize, serialize_keras_model)
    _take("deserialize", protocol.dask_deserialize, deserialize_keras_model)


def _take(slot: str, dispatch: Any, handler: Callable[..., Any]) -> None:
    """Take the place of keras.Model, and of its subclasses, in a Dispatch."""
    if slot in _before:
        return
    lazy = dispatch._lazy.get("keras")
    had = dispatch._lookup.get(_model_class()) if "keras" in sys.modules else None

    def take() -> None:
        _forget_models(dispatch)
        dispatch.register(_model_class(), handler)

    def restore() -> None:
        dispatch._lazy.pop("keras", None)
        if "keras" in sys.modules:
            _forget_models(dispatch)
            if had is not None:
                dispatch.register(_model_class(), had)
        if lazy is not None:
            dispatch.register_lazy("keras", lazy)

    _before[slot] = restore
    # lazily even if keras is there: dispatch asks the lazy slot before the cache of
    # any class but the very one, so what has been cached has to go as well
    dispatch.register_lazy("keras", take)
    if "keras" in sys.modules:
        _forget_models(dispatch)


def _forget_models(dispatch: Any) -> None:
    """Drop what a Dispatch has registered or cached for Model and its subclasses."""
    model = _model_class()
    for cls in [cls for cls in dispatch._lookup if isinstance(cls, type) and issubclass(cls, model)]:
        del dispatch._lookup[cls]


def _model_class() -> type:
    import keras

    model: type = keras.Model
    return model


def serialize_keras_model(model: keras.Model) -> tuple[dict[str, Any], list[memoryview]]:
    """Serialize a model for Dask's family of serializers.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    header : dict
        Plain values, safe for msgpack.
    frames : list of memoryview
        Read-only; see :func:`dask_keras_serialize.protocol.encode` for copies.

    Raises
    ------
    EncodeError
        If the model cannot travel without losing something.
    """
    from dask_keras_serialize.protocol import encode

    header, frames = encode(model)
    return header.to_wire() | _FOR_PROCESSES_WITHOUT_US, list(frames)


def deserialize_keras_model(header: dict[str, Any], frames: list[Any]) -> keras.Model:
    """Deserialize what :func:`serialize_keras_model` wrote.

    Parameters
    ----------
    header : dict
    frames : list of objects with the buffer protocol
        Only read; the model keeps none of them.

    Returns
    -------
    keras.Model

    Raises
    ------
    DecodeError
        If header and frames are not whole, or the model cannot be rebuilt here.
    """
    from dask_keras_serialize.header import Header
    from dask_keras_serialize.protocol import decode

    return decode(Header.from_wire(header), frames)


#: Where this package is missing, distributed's own handler for Keras 1.2 reads these
#: two keys, looks the serializer up by its name, and fails with that name.
_FOR_PROCESSES_WITHOUT_US = {
    "headers": [
        {"serializer": f"{FORMAT} is not installed in this process: pip install {FORMAT} there"}
    ],
    "nframes": [0],
}


def _sizeof_model(model: keras.Model) -> int:
    from dask_keras_serialize.protocol import graph_nbytes, nbytes

    return nbytes(model) + graph_nbytes(model)


def _tokenize_model(model: keras.Model) -> Any:
    from dask_keras_serialize.pickling import pack

    return pack(model).__dask_tokenize__()


def _take_client(client: Any) -> None:
    cls = client.Client
    original = cls.map
    if "Client.map" in _before:
        return

    def restore() -> None:
        cls.map = original

    cls.map = _with_models_as_tasks(original)
    _before["Client.map"] = restore


def _with_models_as_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    from dask.base import tokenize

    own = inspect.signature(original).parameters

    @functools.wraps(original)
    def map(self: Any, func: Callable[..., Any], *iterables: Any, **kwargs: Any) -> Any:  # noqa: A001
        placed = {k: kwargs[k] for k in ("workers", "allow_other_workers") if k in kwargs}
        for name, value in kwargs.items():
            if name not in own and _holds_model(value):
                key = f"keras-model-{tokenize(value)}"
                kwargs[name] = self.submit(_identity, value, key=key, **placed)
        return original(self, func, *iterables, **kwargs)

    return map


def _identity(value: Any) -> Any:
    return value


def _holds_model(value: Any, depth: int = 3) -> bool:
    """Say whether a value is a model, or a plain container of one."""
    if "keras" not in sys.modules:
        return False
    if isinstance(value, _model_class()):
        return True
    items: Iterable[Any] = ()
    if type(value) is dict:
        items = value.values()
    elif type(value) in (list, tuple, set):
        items = value
    return depth > 0 and any(_holds_model(item, depth - 1) for item in items)


def _take_worker(worker: Any) -> None:
    information = worker.DEFAULT_STARTUP_INFORMATION
    information[FORMAT] = _say_installed
    _before["worker"] = lambda: information.pop(FORMAT, None)


async def _say_installed(worker: Any) -> str:
    return package_version()


_TAKERS: dict[str, Callable[[Any], None]] = {
    "dask.sizeof": _take_sizes,
    "dask.tokenize": _take_tokens,
    "distributed.protocol": _take_serializers,
    "distributed.client": _take_client,
    "distributed.worker": _take_worker,
    "keras": _take_keras,
}
