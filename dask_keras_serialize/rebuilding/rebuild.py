"""Values -> live variables: the lock, values at creation, the order check.

A rebuild holds one process-wide lock, because TensorFlow's graph construction is not
thread-safe (tensorflow#35813) and because the hook that hands out values sits on a
class that other threads use too; it acts for the building thread alone. A rebuild
leaves Python's random state alone: Keras draws a seed from it for every unseeded
initializer, and receiving a model must not change a user's experiment. Python's
garbage collector waits: a rebuild makes some hundred thousand objects, no garbage among
them, and searching them for it takes a tenth of the time.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from dask_keras_serialize import backends, private
from dask_keras_serialize.configs import skew
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits.arguments import SPARE
from dask_keras_serialize.rebuilding import garbage
from dask_keras_serialize.rebuilding.aside import aside
from dask_keras_serialize.rebuilding.hooks import in_this_thread
from dask_keras_serialize.wire import strings
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.frames import LARGE, AnyFrame, Bytes, unpack
from dask_keras_serialize.wire.header import ITEMSIZE, STRING, Header, fits_in_an_array, numpy_dtype

#: What the state of a seed generator is called, which each backend has of a dtype of its own.
SEED = "seed_generator_state"

#: ``id(variable)`` to the index of its value, and the variable, so that the id stays its.
Given = dict[int, tuple[int, keras.Variable]]


class Values:
    """The variables' values of one packed model.

    Parameters
    ----------
    header : Header
        Already checked.
    frames : sequence of memoryview or DeviceFrame
        Already checked against the header.

    Notes
    -----
    Copies: :meth:`array` none; :meth:`tensor` one at most, into memory the backend owns. Of a
    device frame :meth:`array` one, to the host's memory.
    """

    def __init__(self, header: Header, frames: Sequence[AnyFrame]) -> None:
        self.header = header
        #: What :meth:`place` has put into variables, and how long that took.
        self.placed_bytes, self.placed_seconds = 0, 0.0
        self.frames = frames
        self.backend = backends.current()[1]
        try:
            placements = header.body.get("placements", ())
            self._placements = {int(index): list(placement) for index, placement in placements}
            if not self._placements.keys() <= set(range(len(header.variables))):
                raise ValueError(f"placements of {sorted(self._placements)}")
        except (TypeError, ValueError, OverflowError) as error:
            raise DecodeError(
                f"{header.owner}: malformed header: {error!r}; send it again"
            ) from None

    def array(self, index: int) -> backends.Array:
        """Return variable ``index`` as a view of the frames, read-only as they are.

        A copy if it was sent by a machine of the other byte order.
        """
        entry = self.header.variables[index]
        owner = f"{self.header.owner}: variable {entry.path!r}"
        raw = unpack(self.frames, entry.location, owner)
        if entry.dtype == STRING:
            return strings.from_bytes(raw, entry.shape, owner)
        dtype = numpy_dtype(entry.dtype)
        if self.header.byteorder != sys.byteorder:
            raw = _swapped(raw, dtype)
        return raw.view(dtype).reshape(entry.shape)

    def tensor(self, index: int) -> Any:
        """Return variable ``index`` as a tensor of the backend; DecodeError if it has no such."""
        entry = self.header.variables[index]
        if entry.dtype == STRING and not self.backend.STRINGS:
            raise DecodeError(
                f"{self.header.owner}: variable {entry.path!r} holds strings, which only the "
                "backend 'tensorflow' has: set KERAS_BACKEND to it here"
            )
        frame = self.frames[entry.location.frame]
        tensor = None
        as_it_lies = entry.dtype != STRING and self.header.byteorder == sys.byteorder
        if isinstance(frame, DeviceFrame) and as_it_lies:
            tensor = self.backend.device_tensor(frame, numpy_dtype(entry.dtype), entry.shape)
        if tensor is None:
            array = self.array(index)
            tensor = self.backend.tensor(array)
            if entry.dtype != STRING and (lost := self.backend.lost(array)):
                raise DecodeError(
                    f"{self.header.owner}: variable {entry.path!r} holds numbers of {entry.dtype} "
                    f"that this process has not: {lost}"
                )
        placement = self._placements.get(index)
        if placement is None or self.header.backend != keras.backend.backend():
            return tensor
        try:
            placed = self.backend.place(tensor, placement)
            if tuple(placed.shape) != tuple(tensor.shape):
                raise ValueError(f"a value of shape {tuple(placed.shape)}")
            return placed
        except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
            raise DecodeError(
                f"{self.header.owner}: variable {entry.path!r} cannot be placed as "
                f"{str(placement)[:200]} ({error!r}); send it again"
            ) from None

    def place(self, index: int, put: Callable[[Any], Any]) -> None:
        """Hand the tensor of variable ``index`` to what puts it into a variable."""
        start = time.perf_counter()
        put(self.tensor(index))
        self.placed_seconds += time.perf_counter() - start
        self.placed_bytes += self.header.variables[index].location.nbytes


def _swapped(raw: Bytes, dtype: np.dtype[Any]) -> Bytes:
    """Return the bytes of numbers in this machine's order; of a complex one, of its halves."""
    unit = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return raw if unit == 1 else raw.view(f"u{unit}").byteswap().view(np.uint8)


@contextmanager
def rebuilding() -> Iterator[None]:
    """Hold the lock, ``aside.LOCK``, and the garbage collector; use up no seed and no name.

    Variables are made in the backend's scope for that.
    """
    with aside(), garbage.paused(), backends.current()[1].creating():
        yield


@contextmanager
def values_at_creation(values: Values) -> Iterator[Given]:
    """Give variables their received value as they are created.

    While the context lasts, a variable that this thread creates from an initializer
    gets the first value not yet handed out whose name, owner's name, shape and dtype
    are its own, and the path that goes with it; the initializer is not run. Call it
    inside :func:`rebuilding`.

    Parameters
    ----------
    values : Values

    Yields
    ------
    Given
        Which value each variable was given, for :func:`assign_rest`; the names are
        only a hint, that check decides.
    """
    given: Given = {}
    if not private.feeds_at_creation():
        yield given
        return
    waiting: dict[tuple[Any, ...], deque[int]] = defaultdict(deque)
    for index, entry in enumerate(values.header.variables):
        waiting[_hint(entry.path), entry.shape, entry.dtype].append(index)
    # for what finds no value until all are built
    spare, unmatched = max(values.header.nbytes, LARGE), len(values.header.variables) + SPARE

    def initialize(original: Any, variable: keras.Variable, initializer: Any) -> None:
        nonlocal spare, unmatched
        queue = waiting.get((_hint(variable.path), tuple(variable._shape), variable.dtype))
        if queue:  # its bytes were sent: header.py sees to that
            index = queue.popleft()
            # optimizers name their slots after it
            variable._path = values.header.variables[index].path
            values.place(index, functools.partial(values.backend.initialize, variable))
            given[id(variable)] = index, variable
            return
        spare -= _afford(variable, initializer, values.header, spare)
        unmatched -= 1
        if unmatched < 0:
            raise DecodeError(
                f"{values.header.owner}: its config asks for more variables than the "
                f"{len(values.header.variables)} that were sent; {skew.named(values.header)}"
            )
        # LAPACK ends the process where there is nothing to make orthogonal
        original(variable, keras.initializers.Zeros() if 0 in variable._shape else initializer)

    with in_this_thread(keras.Variable, "_initialize_with_initializer", initialize):
        yield given


def assign_rest(variables: Sequence[keras.Variable], given: Given, values: Values) -> None:
    """Check, place by place, that variable i holds value i, and assign where not.

    Parameters
    ----------
    variables : sequence of keras.Variable
        The rebuilt model's, in the order of the table.
    given : Given
        From :func:`values_at_creation`.
    values : Values

    Raises
    ------
    DecodeError
        If the rebuilt variables are not those of the table.
    """
    table = values.header.variables
    owner = values.header.owner
    if len(variables) != len(table):
        raise DecodeError(
            f"{owner}: its config rebuilds {len(variables)} variables here where "
            f"{len(table)} were sent; {skew.named(values.header)}"
        )
    for index, (variable, entry) in enumerate(zip(variables, table, strict=True)):
        check_fits(variable, index, values.header)
        if given.get(id(variable), (None, None))[0] != index:
            if variable.dtype != entry.dtype and variable.name != SEED:
                check_range(variable, values.array(index), values.header)
            values.place(index, variable.assign)
            variable._path = entry.path
        if variable.trainable != entry.trainable:
            variable.trainable = entry.trainable


def _afford(variable: keras.Variable, initializer: Any, header: Header, most: int) -> int:
    """Return a new variable's bytes; refuse to create more than all that was sent: a config lies.

    Raises
    ------
    DecodeError
        If they are more than ``most``; if no array has such a shape, or the initializer's value
        has another.
    """
    shape = tuple(variable._shape)
    asked = f"{header.owner}: its config asks for a variable {variable.path!r} of "
    if not fits_in_an_array(shape):
        raise DecodeError(f"{asked}{len(shape)} axes that no array has; send it again")
    nbytes: int = math.prod(shape) * ITEMSIZE.get(variable.dtype, 1)
    # initializers take axes one by one, of what has no bytes too
    nbytes = max(nbytes, math.prod(filter(None, shape)))
    if nbytes > most:
        raise DecodeError(
            f"{asked}shape {shape}, "
            "larger than all the bytes that were sent, or than what was left of them; send it again"
        )
    if isinstance(initializer, keras.initializers.Constant):  # each broadcasts over the other
        of_value = np.shape(initializer.value)
        try:
            fits = np.broadcast_shapes(of_value, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise DecodeError(f"{asked}shape {shape}, and gives it a value of {of_value}")
    return nbytes


def check_range(variable: keras.Variable, value: backends.Array, header: Header) -> None:
    """Raise DecodeError unless a variable of whole numbers, of another dtype, can have a value."""
    limits = np.iinfo(variable.dtype)
    if value.size and not limits.min <= value.min() <= value.max() <= limits.max:
        raise DecodeError(
            f"{header.owner}: variable {variable.path!r} was sent as {value.dtype} with numbers "
            f"that {variable.dtype} has not, which it is of on {keras.backend.backend()!r}: open "
            f"it on {header.backend!r}"
        )


def _hint(path: str) -> tuple[str, ...]:
    # a Sequential's layers lose its name from their paths in a rebuild by Keras, and seed
    # generators are numbered as they are made
    owner, _, name = path.rpartition("/")
    return (name,) if name == SEED else (owner.rpartition("/")[2], name)


def check_fits(variable: keras.Variable, index: int, header: Header) -> None:
    """Raise DecodeError unless a rebuilt variable is the one of a row of the table."""
    entry = header.variables[index]
    # seeds and counts are of another dtype in each backend
    whole = all(dtype.startswith(("int", "uint")) for dtype in (variable.dtype, entry.dtype))
    as_sent = variable.dtype == entry.dtype or (whole and header.backend != keras.backend.backend())
    if tuple(variable.shape) != entry.shape or not as_sent:
        raise DecodeError(
            f"{header.owner}: variable {index} was sent as {entry.path!r} {entry.shape} "
            f"{entry.dtype} but is rebuilt here as {variable.path!r} "
            f"{tuple(variable.shape)} {variable.dtype}; {skew.named(header)}"
        )
