"""Look at packed objects in a pickle or joblib file, and run nothing that is in it.

A pickle is a program for a small machine with a stack. Here the machine keeps its stack and
calls nothing: what :mod:`pickletools` reads is followed opcode by opcode, a global stays its
name, and whatever a call would make stays a :class:`_Made` that says what was to be called.
There is no unpickler, so there is nothing to trick into an import or a call. The one call
that is understood, of :func:`dask_keras_serialize.packed.receive`, has plain bytes, or arrays
of them, for arguments.

joblib's files are pickles with the bytes of arrays between the opcodes
(``joblib/numpy_pickle.py``, ``NumpyArrayWrapper.read_array``). Needs neither it nor Keras.
"""

from __future__ import annotations

import os
import pickletools
from dataclasses import dataclass
from typing import IO, Any

from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.packed import Parcel, is_link, receive
from dask_keras_serialize.wire import mapped
from dask_keras_serialize.wire.frames import Frame
from dask_keras_serialize.wire.header import FORMAT


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of code."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class _Made:
    """What code would make, never made: what was to be called, with what, and set to what."""

    maker: Any = None
    args: Any = None
    state: Any = None


_RECEIVE = _Global(receive.__module__, receive.__name__)

_WRAPPER = _Global("joblib.numpy_pickle", "NumpyArrayWrapper")

#: How pickles of protocol 2 and above begin: what follows a pickle is another one.
_PROTO = b"\x80"

#: What a frame costs to keep, counted as if it were so many bytes read.
_FRAME = 256

#: Bytes that may be read again beyond the file's size: objects may share a header.
_SLACK = 1 << 26

#: NumPy's most dimensions, and its flag for dtypes that hold Python objects.
_NDIM, _HASOBJECT = 64, 1


def inspect(file: str | os.PathLike[str] | IO[bytes]) -> list[Parcel]:
    """Find Keras's objects in a pickle or joblib file without opening them.

    Parameters
    ----------
    file : path, or file open for reading
        Written by pickle, cloudpickle or joblib, plain or compressed by zlib, gzip, bz2, xz
        or lzma. The objects may lie anywhere in what was pickled.

    Returns
    -------
    list of Parcel
        In the order of the file, with those that others refer to.

    Raises
    ------
    DecodeError
        If no Keras object that this package packed is in it, its buffers are kept elsewhere,
        or its bytes are not whole; names the file.
    OSError
        If there is no such file, or it may not be read.

    Notes
    -----
    No code that is in the file runs, and neither Keras nor joblib is imported, until
    :meth:`Parcel.open` is called on what is returned. Copies: none of large arrays' bytes
    in plain files, which stay mapped; under protocols 0 to 2, one.
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "the file")
    try:
        found = _Machine(mapped.content(file)).run()
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # bytes that lie break a machine in every way there is
        raise DecodeError(f"{name}: not a whole pickle or joblib file: {error!r}") from error
    if not found:
        raise DecodeError(f"no Keras object packed by {FORMAT} in {name}")
    return found


class _Machine:
    """Follows the pickles of a file, and collects its parcels.

    On the stack are plain values, tuples, dicts of their string keys, globals, parcels and
    for all else :class:`_Made`. Nothing else is hashed or compared: tuples can be nested
    such that either never ends.
    """

    def __init__(self, content: mapped.Content) -> None:
        self.content = content
        self.found: list[Parcel] = []
        # calls are made again from what is memoised: few opcodes could ask for much
        self.budget = content.nbytes + _SLACK

    def run(self) -> list[Parcel]:
        """Follow all pickles of the file."""
        if _RECEIVE.module.encode() in self.content:
            self.follow()
            while self.content.startswith(_PROTO):
                self.follow()
        return self.found

    def follow(self) -> None:
        """Follow one pickle from its first opcode to its last."""
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(self.content):  # type: ignore[arg-type]
            self.step(opcode, arg)

    def step(self, opcode: pickletools.OpcodeInfo, arg: Any) -> None:
        """Do to the stack what an opcode does."""
        match opcode.name:
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.push(self.memo[arg])
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "NONE":
                self.push(None)
            case "DUP":
                self.push(self.stack[-1])
            case "POP" if not self.stack:
                self.pop_mark()
            case "GLOBAL":
                self.push(_Global(*arg.rsplit(" ", 1)))
            case "STACK_GLOBAL":
                self.push(_Global(*self.pop(2)))
            case "EMPTY_TUPLE":
                self.push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push(tuple(self.pop(int(opcode.name[-1]))))
            case "TUPLE":
                self.push(tuple(self.pop_mark()))
            case "EMPTY_DICT":
                self.push({})
            case "DICT":
                items = self.pop_mark()
                self.push({})
                self.set_items(items)
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "REDUCE":
                function, args = self.pop(2)
                known = function == _RECEIVE
                self.push(self.receive(*args) if known else _Made(function, args))
            case "NEWOBJ":
                self.push(_Made(*self.pop(2)))
            case "BUILD":
                (state,) = self.pop(1)
                self.build(state)
            case "NEXT_BUFFER":
                raise DecodeError(
                    "its buffers were pickled out of band and are kept elsewhere: unpickle it "
                    "with them, and look at the model"
                )
            case "READONLY_BUFFER":
                pass
            case _:
                self.replace(opcode, arg)

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, n: int) -> list[Any]:
        """Take so many values off the stack."""
        if len(self.stack) < n:
            raise DecodeError("not a whole pickle: its stack is empty too early")
        taken = self.stack[-n:]
        del self.stack[-n:]
        return taken

    def pop_mark(self) -> list[Any]:
        """Take what is above the last mark off the stack, with the mark."""
        taken = self.stack
        self.stack = self.marks.pop()
        return taken

    def set_items(self, items: list[Any]) -> None:
        """Set items of the dict, or what stands for one, on the stack."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target |= {k: v for k, v in zip(items[::2], items[1::2], strict=True) if type(k) is str}

    def replace(self, opcode: pickletools.OpcodeInfo, arg: Any) -> None:
        """Put what an opcode reads, or what stands for what it makes, for what it takes."""
        takes = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            self.pop_mark()
            takes = opcode.stack_before.index(pickletools.markobject)
        if takes:
            self.pop(takes)
        for _ in opcode.stack_after:
            self.push(_Made() if opcode.arg is None else arg)

    def build(self, state: Any) -> None:
        """Note the state of what is on the stack; for joblib's arrays, it is their bytes."""
        made = self.stack[-1]
        if not isinstance(made, _Made):
            return
        if _class_of(made) == _WRAPPER:
            self.stack[-1] = self.array(state)
        else:
            made.state = state

    def array(self, wrapper: dict[str, Any]) -> Frame | _Made:
        """Read what joblib writes after an array's wrapper."""
        nbytes = _itemsize(wrapper["dtype"])
        if nbytes is None:
            outer = self.stack, self.marks, self.memo
            self.follow()  # a pickle of its own
            self.stack, self.marks, self.memo = outer
            return _Made()
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            (padding,) = self.content.take(1)
            self.content.take(padding)
        for n in wrapper["shape"][:_NDIM]:
            nbytes *= min(n, self.content.nbytes + 1)  # as much too many as any number above
        return self.content.take(nbytes)

    def receive(self, header: Any, links: Any, *buffers: Any) -> Parcel:
        """Do what ``packed.receive`` does, of bytes and stand-ins for arrays."""
        packed = bytes(self.bytes_of(header))
        self.spend(len(packed) + _FRAME * (len(links) + len(buffers)))
        if not all(isinstance(link, Parcel) and is_link(link) for link in links):
            raise DecodeError("an object refers to what is no object of Keras's, or too deep")
        parcel = Parcel(packed, [self.bytes_of(buffer) for buffer in buffers], links)
        sizes = tuple(frame.nbytes for frame in parcel.frames)
        if sizes != parcel.header.frame_sizes:
            raise DecodeError(f"{parcel.header.owner}: its frames are not of the sizes it says")
        self.found.append(parcel)
        return parcel

    def bytes_of(self, value: Any) -> bytes | bytearray | Frame:
        """Return the bytes of a value, or of what would make a NumPy array or bytes of them."""
        match value:
            case bytes() | bytearray() | memoryview():
                return value
            case _Made(_Global(name="_frombuffer"), (raw, *_)):  # protocol 5
                return self.bytes_of(raw)
            case _Made(_Global(name="_reconstruct"), state=(_, _, _, _, raw)):
                return self.bytes_of(raw)
            case _Made(_Global("_codecs", "encode"), (str(text), *_)):  # protocols 0 to 2
                self.spend(len(text))
                return text.encode("latin-1")
        raise DecodeError("an object's bytes are neither bytes nor an array")

    def spend(self, nbytes: int) -> None:
        """Count bytes that are copied or parsed."""
        self.budget -= nbytes
        if self.budget < 0:
            raise DecodeError("it has the same bytes read over and over")


def _class_of(made: _Made) -> Any:
    match made:
        case _Made(_Global(name="_reconstructor"), (cls, _, _)):  # of copyreg, protocols 0 and 1
            return cls
    return made.maker


def _itemsize(dtype: _Made) -> int | None:
    """Return the bytes of an element of a pickled dtype; None if it holds Python objects."""
    state = dtype.state if isinstance(dtype.state, tuple) else ()
    match dtype, state:
        case _Made(_Global("numpy", "dtype")), (_, _, _, _, _, int(size), _, int(flags), *_) if (
            flags & _HASOBJECT
        ):
            return None
        case _Made(_Global("numpy", "dtype")), (_, _, _, _, _, int(size), *_) if size > 0:
            return size
        case _Made(_Global("numpy", "dtype"), (str(code), *_)), _:  # such as "f4", "U10"
            return int(code[1:]) * (4 if code[0] == "U" else 1)
    raise DecodeError("an array of a dtype that is not known here is in the way")
