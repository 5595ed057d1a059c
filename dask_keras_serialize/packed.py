"""The closed parcel: a packed object that nobody has to open.

Loads neither Keras nor a backend. It pickles again to the bytes it came from,
untouched, so a scheduler passes it on without knowing what is in it; whoever needs
the object opens it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_keras_serialize import views
from dask_keras_serialize.cluster.broken import BrokenObject, broken
from dask_keras_serialize.cluster.whereabouts import caller
from dask_keras_serialize.errors import DecodeError, FormatError, MissingPackageError
from dask_keras_serialize.wire.frames import Frame, as_frames, own_mapping
from dask_keras_serialize.wire.header import FORMAT, MOST_LINKS, Header, VariableEntry
from dask_keras_serialize.wire.sides import importing_keras

if TYPE_CHECKING:
    from dask_keras_serialize.parts import Key, Rebuilt


class Parcel:
    """An object as its header and frames.

    Parameters
    ----------
    header : bytes
        As :meth:`Header.to_bytes` writes it.
    buffers : sequence of objects with the buffer protocol
        The frames; kept alive, never written to, not copied. A ``np.memmap`` is mapped
        anew, privately, so that the opened object may use it in place.
    links : sequence of Parcel
        Others of the same pickle, whose parts it refers to.

    Raises
    ------
    DecodeError
        If the header is not one this version reads.
    """

    def __init__(
        self, header: bytes, buffers: Sequence[object], links: Sequence[Parcel] = ()
    ) -> None:
        self.frames: list[Frame] = as_frames(buffers, self._read(header))
        self._buffers = tuple(buffers)
        self.links = tuple(links)
        self.depth: int = 1 + max((link.depth for link in links), default=0)
        self._packed_header = header
        self._rebuilt: Rebuilt | None = None
        self._token = ""

    def _read(self, header: bytes) -> str:
        """Read the header; return what errors call the object."""
        self._header = Header.from_bytes(header)
        return self._header.owner

    @property
    def header(self) -> Header:
        """What it says of itself."""
        return self._header

    @property
    def nbytes(self) -> int:
        """Bytes of header and frames."""
        return len(self._packed_header) + sum(frame.nbytes for frame in self.frames)

    @property
    def config(self) -> dict[str, Any] | None:
        """What the object is made from, a new dict at each call; None if it went by value.

        Raises
        ------
        DecodeError
            If it is not JSON.
        """
        if self.header.encoding != "config":
            return None
        try:
            return dict(json.loads(self.header.body["config"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DecodeError(f"{self.header.owner}: its config is no JSON: {error!r}") from None

    @property
    def variables(self) -> tuple[VariableEntry, ...]:
        """The table of variables."""
        return self.header.variables

    @property
    def versions(self) -> dict[str, str]:
        """Versions of python, keras, the backend and this package, at the sender."""
        return dict(self.header.versions)

    @property
    def code(self) -> tuple[tuple[str, str], ...]:
        """Names of code that is not Keras's own, each with "reference" or "value"."""
        return self.header.code

    def open(self) -> Any:
        """Rebuild the object; imports Keras. Each call makes a new one.

        Raises
        ------
        DecodeError
            If it cannot be rebuilt here.
        """
        return self.rebuild({}).root

    def rebuild(self, memo: dict[int, Rebuilt]) -> Rebuilt:
        """Rebuild the object and what it refers to, each once for a memo."""
        if id(self) not in memo:
            with importing_keras(self.header):
                from dask_keras_serialize.protocol import decode_parts

            links = [link.rebuild(memo) for link in self.links]
            memo[id(self)] = decode_parts(self.header, self._frames_to_give(), links)
        return memo[id(self)]

    def _frames_to_give(self) -> list[Frame]:
        """Return frames for one object: mapped files mapped anew, which it may write to."""
        frames: list[Frame] = []
        for buffer, frame in zip(self._buffers, self.frames, strict=True):
            own = own_mapping(buffer)
            mapped = own is not buffer
            frames += as_frames([own], self.header.owner, keep=True) if mapped else [frame]
        return frames

    def part(self, key: Key | None) -> Any:
        """Return the object (None) or one of its parts; all of a pickle share them."""
        rebuilt, part = self.shared(), None
        with suppress(TypeError):  # a key that no dict takes
            part = rebuilt.part(key)
        if part is None:
            raise DecodeError(f"{self.header.owner}: it has no part {key} here")
        return part

    def shared(self) -> Rebuilt:
        """Rebuild the object once for all that are pickled with it."""
        if self._rebuilt is None:
            self._rebuilt = self.rebuild({id(link): link.shared() for link in self.links})
        return self._rebuilt

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # arrays, not bytes: pickle 5 takes them out of band, joblib maps them
        arrays = [np.frombuffer(frame, np.uint8) for frame in self.frames]
        return receive, (self._packed_header, self.links, *arrays)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        from dask.tokenize import normalize_token

        # normalised here: Dask takes what it is given by its str(), which numpy shortens
        arrays = [np.frombuffer(frame, np.uint8) for frame in self.frames]
        links = (link.token() for link in self.links)
        return FORMAT, normalize_token([self._packed_header, *arrays, *links])

    def token(self) -> str:
        """Return Dask's token of it, made once: many may link to it, each by several ways."""
        from dask.tokenize import tokenize

        self._token = self._token or tokenize(self)
        return self._token

    def __repr__(self) -> str:
        return f"<Parcel of {self._summary()}>"

    def _repr_html_(self) -> str:
        return views.html(self.header)

    def _summary(self) -> str:
        return views.summary(self.header)


class ForeignParcel(Parcel):
    """One in another version's format: passed on unread, as a scheduler does.

    Raises FormatError when asked for anything that stands in its header.
    """

    def _read(self, header: bytes) -> str:
        try:
            Header.from_bytes(header)
        except FormatError as error:
            self._why = str(error)  # its words alone: see BrokenObject
        return "an object of another format"

    @property
    def header(self) -> Header:
        """What nobody can read here."""
        raise FormatError(self._why)

    def _repr_html_(self) -> str:
        return f"<div>{escape(repr(self))}</div>"

    def _summary(self) -> str:
        return self._why


class PackedObject:
    """An object that stays closed in its parcel, as a scheduler holds it.

    Parameters
    ----------
    parcel : Parcel
    key : Key or None
        Which of its parts; None for the object itself.
    """

    def __init__(self, parcel: Parcel, key: Key | None = None) -> None:
        self.parcel = parcel
        self.key = key

    def open(self) -> Any:
        """Rebuild the object; imports Keras. Each call makes a new one."""
        return self.parcel.rebuild({}).part(self.key)

    def __getattr__(self, name: str) -> PackedAttribute:
        # what Python, Dask and notebooks ask of any object
        if name.startswith(("__", "_repr_", "_ipython_")):
            raise AttributeError(name)
        return PackedAttribute(self, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return take, (self.parcel, self.key)

    def __sizeof__(self) -> int:
        return self.parcel.nbytes

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return *self.parcel.__dask_tokenize__(), self.key

    def __repr__(self) -> str:
        part = "" if self.key is None else f" {self.key}"
        return f"<PackedObject{part} of {self.parcel._summary()}>"

    def _repr_html_(self) -> str:
        return self.parcel._repr_html_()


class PackedAttribute:
    """An attribute of a closed object, such as a model's method ``predict``; as closed.

    A bound method pickles as ``getattr(model, name)``, which a scheduler runs when it
    unpickles a graph.
    """

    def __init__(self, packed: PackedObject, name: str) -> None:
        self._packed, self._name = packed, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Open the model and call its method."""
        return getattr(self._packed.open(), self._name)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._packed, self._name)

    def __repr__(self) -> str:
        return f"<{self._name} of {self._packed!r}>"


def receive(
    header: bytes, links: Sequence[Parcel | BrokenObject], *buffers: object
) -> Parcel | BrokenObject:
    """Unpickle a parcel.

    Parameters
    ----------
    header : bytes
    links : sequence of Parcel
        Others of the same pickle, whose parts it refers to.
    *buffers : objects with the buffer protocol

    Returns
    -------
    Parcel
        ForeignParcel if it is in another version's format; or, on a worker where its header
        cannot be read, BrokenObject.

    Raises
    ------
    DecodeError
        If its header cannot be read, in whatever format.
    """
    try:
        if not isinstance(links, list | tuple) or not all(map(is_link, links)):
            raise DecodeError("malformed parcel: links are none, or too deep; send it again")
        for link in links:
            if isinstance(link, BrokenObject):
                return link
        try:
            return Parcel(header, buffers, links)
        except FormatError:
            return ForeignParcel(header, buffers, links)
    except DecodeError as error:
        return broken(error)


def is_link(value: object) -> bool:
    """Say whether a parcel may refer to an object, which has not too many in turn below it."""
    if isinstance(value, Parcel):
        return value.depth < MOST_LINKS
    return isinstance(value, BrokenObject)


def take(parcel: Parcel | BrokenObject, key: Key | None) -> Any:
    """Unpickle an object; on a scheduler that receives a graph, keep it closed.

    Parameters
    ----------
    parcel : Parcel
    key : Key or None
        Which of its parts; None for the object itself.

    Returns
    -------
    object
        Or, on a scheduler, PackedObject; or, on a worker where it cannot be opened,
        BrokenObject.

    Raises
    ------
    DecodeError
        If it cannot be rebuilt here.
    MissingPackageError
        On a scheduler, if a worker lacks this package.
    """
    if isinstance(parcel, BrokenObject):
        return parcel
    scheduler = (caller("distributed.scheduler", "update_graph") or {}).get("self")
    # threads of one process hand tasks on as they are: nobody unpickles them again
    if scheduler is not None and not scheduler.address.startswith("inproc://"):
        _require_package(scheduler)
        return PackedObject(parcel, key)
    try:
        return parcel.part(key)
    except DecodeError as error:
        return broken(error)


def _require_package(scheduler: Any) -> None:
    """Refuse a graph that workers could not unpickle: they would drop the connection."""
    without = [ws.address for ws in scheduler.workers.values() if FORMAT not in ws.extra]
    if without:
        raise MissingPackageError.on_workers(without, len(scheduler.workers))
