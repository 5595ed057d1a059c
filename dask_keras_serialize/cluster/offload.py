"""Messages with Keras's objects in them are packed and rebuilt off the event loop.

distributed does so for messages over 10 MB (``distributed/comm/utils.py``). Smaller ones it takes
apart in the event loop, which a model of a few bytes and a thousand layers would hold for
seconds: no heartbeat is sent meanwhile. And two threads never rebuild at the same time
(:mod:`dask_keras_serialize.rebuilding.aside`): were the event loop one of those that wait, the
one that it waits for could not use it.

So these messages go to threads of their own. Not to distributed's, of which there is one: what is
rebuilt is anybody's code, and may ask for a large message itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dask_keras_serialize.cluster.tasks import holds_keras, values_in
from dask_keras_serialize.wire.cuda import on_device

#: What every parcel's pickle has in it, and early, the header of every value of Dask's family.
_IN_PICKLES, _IN_HEADERS = b"dask_keras_serialize", b"dask-keras-serialize"

#: Bytes that are looked through.
_PICKLE, _HEADER = 10 << 20, 4096

#: How a pickle begins, of every protocol that has a beginning.
_PICKLES = {b"\x80" + bytes([protocol]) for protocol in range(2, 6)}

_Comm = Callable[..., Coroutine[Any, Any, Any]]

_threads = ThreadPoolExecutor(4, thread_name_prefix="Dask-Keras")


def reading(original: _Comm) -> _Comm:
    """Wrap ``from_frames`` of a comm."""

    @functools.wraps(original)
    async def from_frames(frames: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("deserialize", True) and kwargs.get("allow_offload", True) and _ours(frames):
            return await _in_thread(original, frames, *args, **kwargs)
        return await original(frames, *args, **kwargs)

    return from_frames


def writing(original: _Comm) -> _Comm:
    """Wrap ``to_frames`` of a comm."""

    @functools.wraps(original)
    async def to_frames(msg: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("allow_offload", True) and any(map(holds_keras, values_in(msg))):
            return await _in_thread(original, msg, *args, **kwargs)
        return await original(msg, *args, **kwargs)

    return to_frames


async def _in_thread(original: _Comm, *args: Any, **kwargs: Any) -> Any:
    coroutine = functools.partial(original, *args, **kwargs | {"allow_offload": False})
    # with the context, as distributed's: it meters by it
    run = functools.partial(contextvars.copy_context().run, _finish, coroutine)
    done, result = await asyncio.get_running_loop().run_in_executor(_threads, run)
    return result if done else await coroutine()


def _finish(coroutine: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[bool, Any]:
    """Run a coroutine that waits for nothing; False if it does, against expectation."""
    running = coroutine()
    try:
        running.send(None)
    except StopIteration as finished:
        return True, finished.value
    running.close()
    return False, None


def _ours(frames: Sequence[Any]) -> bool:
    """Say whether a message has one of Keras's objects in it."""
    return any(map(_marked, frames))


def _marked(frame: Any) -> bool:
    if on_device(frame):
        return False
    try:
        view = memoryview(frame).cast("B")
    except (TypeError, ValueError):  # no run of bytes, which ours are
        return False
    if view[:2].tobytes() in _PICKLES:
        return _IN_PICKLES in bytes(view[:_PICKLE])
    return _IN_HEADERS in bytes(view[:_HEADER])  # else it is numbers
