"""Takes Dask's and pickle's slots for Keras models, and gives them back.

Installed, the package registers by itself: ``dask.sizeof`` is the one group of entry
points that Dask loads in every process on import, client, scheduler, nanny and worker
(``dask/sizeof.py``; there is none for serializers, distributed#3831). Its hook waits
for ``keras``, ``distributed`` and the other modules below to be imported, whichever comes
first, and imports none itself.

What is taken, and what of it is private (each has a test that fails when it moves):

- ``dask_serialize``, ``dask_deserialize``: distributed's own lazy "keras" slot, whose
  handler is for Keras 1.2 (``distributed/protocol/keras.py``), and what subclasses of
  Model were cached under while it stood: ``Dispatch._lazy`` and ``Dispatch._lookup``
  (``dask/utils.py``).
- ``sizeof`` and ``normalize_token``, public.
- ``__reduce_ex__``, ``__copy__`` and ``__deepcopy__`` of Keras's base classes, ``__reduce__``
  of the one that has it, see :mod:`dask_keras_serialize.pickling`; and what scikeras puts on
  them as ``__deepcopy__`` and ``__reduce__``, which is taken off.
- ``serialize`` of ``distributed.protocol.serialize``, which takes collections apart, and
  ``_always_use_pickle_for`` of ``distributed.protocol.pickle``, see
  :mod:`dask_keras_serialize.cluster.tasks`. Where they are not found, what items of a collection
  share is not kept, or a list is refused that Dask could send.
- The default alignment of arrays in joblib's files (``NumpyArrayWrapper`` of
  ``joblib.numpy_pickle``, which writes it beside each array so that it may be changed):
  64 bytes, not 16, so that mapped weights are used where they lie. Else they are copied.
- ``host_array`` of ``distributed.comm.tcp`` and ``distributed.protocol.utils``: makes
  the buffers that comms receive into. Ours are the same, but aligned, so that backends
  use them in place (:func:`dask_keras_serialize.wire.frames.host_array`). Where it is not
  found nothing is taken, and what arrives is copied once. ``read`` of ``distributed.comm.tcp.TCP``
  tells it where a message begins.
- ``from_frames`` and ``to_frames`` of ``distributed.comm.tcp``, ``ws`` and distributed-ucxx:
  messages with Keras's objects in them are taken apart and put together on threads of their
  own, see :mod:`dask_keras_serialize.cluster.offload`. Where they are not found, small ones hold
  the event loop.
- ``Client.map``: a model among its keyword arguments becomes a task of its own, so
  that it goes to each worker once. distributed 2026.8 does that for arguments over
  100 kB, but gives the task no priority, so that the scheduler raises
  AssertionError, and names it after the keyword alone, so that two models would be
  taken for one (``distributed/client.py``, ``_MapExpr._layer``).
- ``Client.scatter``, ``submit``, ``compute``, ``persist`` and ``get``: ask first, if they see a
  model, whether all workers, and but for the first the scheduler, have this package; and raise
  what we say of one that cannot be sent, where Dask says no more than the class of what was sent.
- ``set_error`` of ``distributed.client.FutureState``: says why a scheduler refused a graph, see
  :mod:`dask_keras_serialize.cluster.presence`. Where it is not found, it stays the error's cause.
- ``handshake_info`` of ``distributed.comm.core.Comm``, and ``write`` of distributed-ucxx: processes
  say whether they have a GPU, and those that have none get no models in a GPU's memory. Where
  ``handshake_info`` is not found, nobody says so, and models go by the host.
- ``cuda_serialize``, ``cuda_deserialize``, public: models on a GPU for comms that send a GPU's
  memory, as those of distributed-ucxx.
- the "dask" and "cuda" families of serializers, public: load models by their own header, without
  the class that Dask would unpickle first.
- the "error" family of serializers, public: raises ours as it was, and adds our name to the error
  of a worker that returned a model through distributed's old handler.
- ``Scheduler.update_graph``, ``_from_frames`` of ``distributed.comm.utils``, ``_instances`` of
  ``Worker`` and ``Scheduler``, read alone: who unpickles, where its temporary files may lie; see
  :mod:`dask_keras_serialize.cluster.whereabouts`. Where there are none, models are opened, errors
  raised at once, and files lie where Python puts them.
- ``DEFAULT_STARTUP_INFORMATION`` of ``distributed.worker``, and ``Scheduler.identity``, public:
  workers tell the scheduler, and it tells clients, that they have this package, registered or not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import wrapt

from dask_keras_serialize.cluster import presence
from dask_keras_serialize.cluster.broken import BrokenObject, serialize_broken
from dask_keras_serialize.cluster.handlers import (
    deserialize_keras,
    loads,
    serialize_keras,
    serialize_on_gpu,
    sizeof_keras,
    tokenize_keras,
)
from dask_keras_serialize.cluster.offload import reading, writing
from dask_keras_serialize.cluster.tasks import (
    only_to_gpus,
    or_keras,
    saying_gpu,
    serialize_together,
    wrap_client,
)
from dask_keras_serialize.wire.frames import ALIGNMENT, a_message, host_array
from dask_keras_serialize.wire.header import FORMAT

#: Whether the slots are ours; None until somebody says.
_registered: bool | None = None

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

    wrapt.register_post_import_hook(presence.announce, "distributed.worker")
    wrapt.register_post_import_hook(presence.announce_scheduler, "distributed.scheduler")
    if _registered is not None:  # the user, who imported us first, has said
        return
    if config.get(f"{FORMAT}.register", True):
        register()
    else:
        leave_to_user()


def leave_to_user() -> None:
    """Let an import by the user still run, and register: dask imported us, not the user."""
    if _registered is None:
        sys.modules.pop("dask_keras_serialize", None)


def imported_by_dask() -> bool:
    """Say whether dask's entry points are what is importing the package right now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in ("dask.sizeof", "dask.cli"):
            return True
        frame = frame.f_back
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
    """Put back what stood in every slot, until :func:`register` is called again."""
    global _registered
    _registered = False
    for restore in _before.values():
        restore()
    _before.clear()


def registered() -> bool:
    """Say whether the slots are ours in this process."""
    return bool(_registered)


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


def _take_scikeras(scikeras: Any) -> None:
    from dask_keras_serialize import pickling

    if "scikeras" not in _before and (restore := pickling.take_off_scikeras()):
        _before["scikeras"] = restore


def _take_alignment(numpy_pickle: Any) -> None:
    wrapper = getattr(numpy_pickle, "NumpyArrayWrapper", None)
    defaults = getattr(getattr(wrapper, "__init__", None), "__defaults__", None)
    if "alignment" in _before or wrapper is None or not defaults or type(defaults[-1]) is not int:
        return
    _before["alignment"] = functools.partial(setattr, wrapper.__init__, "__defaults__", defaults)
    wrapper.__init__.__defaults__ = (*defaults[:-1], ALIGNMENT)


def _take_pickler(pickle: Any) -> None:
    _wrap("pickler", pickle, "_always_use_pickle_for", or_keras)


def _take_collections(serialize: Any) -> None:
    _wrap("collections", serialize, "serialize", serialize_together)


def _wrap(slot: str, module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Wrap a function of a module or class, if it is there."""
    if slot in _before or not hasattr(module, name):
        return
    original = getattr(module, name)
    _before[slot] = functools.partial(setattr, module, name, original)
    setattr(module, name, wrapper(original))


def _take_tokens(tokenize: Any) -> None:
    _take("tokenize", tokenize.normalize_token, tokenize_keras)


def _take_sizes(sizeof: Any) -> None:
    _take("sizeof", sizeof.sizeof, sizeof_keras)


def _take_serializers(protocol: Any) -> None:
    _take("serialize", protocol.dask_serialize, serialize_keras)
    _take("deserialize", protocol.dask_deserialize, deserialize_keras)
    _take("cuda serialize", protocol.cuda_serialize, serialize_on_gpu)
    _take("cuda deserialize", protocol.cuda_deserialize, deserialize_keras)
    protocol.dask_serialize.register(BrokenObject, serialize_broken)
    # not protocol.serialize, which is the function of that name
    families = sys.modules["distributed.protocol.serialize"].families
    for name, ours in (("dask", loads), ("cuda", loads), ("error", presence.explain_error)):
        if name not in _before:
            dumps, original, _ = families[name]
            family = functools.partial(protocol.register_serialization_family, name, dumps)
            family(functools.partial(ours, original))
            _before[name] = functools.partial(family, original)


def _take_tcp(tcp: Any) -> None:
    _take_buffers(tcp)
    _take_messages(tcp)


def _take_messages(comm: Any) -> None:
    _wrap(f"{comm.__name__} in", comm, "from_frames", reading)
    _wrap(f"{comm.__name__} out", comm, "to_frames", writing)


def _take_handshake(core: Any) -> None:
    _wrap("handshake", core.Comm, "handshake_info", saying_gpu)


def _take_ucxx(comm: Any) -> None:
    _take_messages(comm)
    if hasattr(comm, "UCXX"):
        _wrap("cuda out", comm.UCXX, "write", only_to_gpus)


def _take_buffers(tcp: Any) -> None:
    if "buffers" in _before:
        return
    modules = [tcp, sys.modules["distributed.protocol.utils"]]
    originals = [(m, m.host_array) for m in modules if hasattr(m, "host_array")]

    def restore() -> None:
        for module, original in originals:
            module.host_array = original

    _before["buffers"] = restore
    for module, _ in originals:
        module.host_array = host_array
    if hasattr(tcp, "TCP"):
        _wrap("messages", tcp.TCP, "read", _reading_a_message)


def _reading_a_message(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    async def wrapped(*arguments: Any, **keywords: Any) -> Any:
        with a_message():
            return await read(*arguments, **keywords)

    return wrapped


def _take_client(client: Any) -> None:
    if "client" not in _before:
        _before["client"] = wrap_client(client.Client)
    _wrap("refusals", getattr(client, "FutureState", None), "set_error", presence.explain_refusal)


def _take(slot: str, dispatch: Any, handler: Callable[..., Any]) -> None:
    """Take the place of Keras's classes, and of their subclasses, in a Dispatch."""
    if slot in _before:
        return
    lazy = dispatch._lazy.get("keras")
    had = {cls: dispatch._lookup.get(cls) for cls in _classes()} if "keras" in sys.modules else {}

    def take() -> None:
        _forget(dispatch)
        dispatch.register(_classes(), handler)

    def restore() -> None:
        dispatch._lazy.pop("keras", None)
        if "keras" in sys.modules:
            _forget(dispatch)
            for cls, original in had.items():
                if original is not None:
                    dispatch.register(cls, original)
        if lazy is not None:
            dispatch.register_lazy("keras", lazy)

    _before[slot] = restore
    # lazily even if keras is there: dispatch asks the lazy slot before the cache of
    # any class but the very one, so what has been cached has to go as well
    dispatch.register_lazy("keras", take)
    if "keras" in sys.modules:
        _forget(dispatch)


def _forget(dispatch: Any) -> None:
    """Drop what a Dispatch has registered or cached for Keras's classes and subclasses."""
    ours = _classes()
    for cls in [cls for cls in dispatch._lookup if isinstance(cls, type) and issubclass(cls, ours)]:
        del dispatch._lookup[cls]


def _classes() -> tuple[type, ...]:
    from dask_keras_serialize.private import CITIZENS

    return tuple(CITIZENS)


_TAKERS: dict[str, Callable[[Any], None]] = {
    "dask.sizeof": _take_sizes,
    "dask.tokenize": _take_tokens,
    "distributed.protocol": _take_serializers,
    "distributed.protocol.serialize": _take_collections,
    "distributed.protocol.pickle": _take_pickler,
    "distributed.comm.tcp": _take_tcp,
    "distributed.comm.ws": _take_messages,
    "distributed.comm.core": _take_handshake,
    "distributed_ucxx.ucxx": _take_ucxx,
    "distributed.client": _take_client,
    "keras": _take_keras,
    "scikeras": _take_scikeras,
    "joblib.numpy_pickle": _take_alignment,
}
