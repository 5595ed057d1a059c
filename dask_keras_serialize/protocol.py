"""The one encoder: a Keras object <-> (header, frames).

Every route takes it: Dask's own family of serializers, pickle, and what is built on
either. Here it is decided how an object travels: a model by its config where that is
known to carry it whole (``fidelity``), everything else by value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import keras

from dask_keras_serialize import backends, private
from dask_keras_serialize.cluster import meters
from dask_keras_serialize.configs import by_config, skew, templates
from dask_keras_serialize.errors import DecodeError, EncodeError, one_line
from dask_keras_serialize.limits import names
from dask_keras_serialize.parts import Description, Key, Rebuilt
from dask_keras_serialize.rebuilding import garbage
from dask_keras_serialize.rebuilding.rebuild import Values
from dask_keras_serialize.values import by_value, states
from dask_keras_serialize.wire import cuda, environment, fingerprints, frames, strings
from dask_keras_serialize.wire.cuda import DeviceFrame
from dask_keras_serialize.wire.frames import AnyFrame
from dask_keras_serialize.wire.header import (
    FORMAT,
    ITEMSIZE,
    Encoding,
    Header,
    VariableEntry,
)

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """An object on its way out: header, frames, and what they were made of."""

    header: Header
    frames: list[AnyFrame]
    description: Description


def encode(
    obj: Any, *, for_token: bool = False, on_device: bool = False
) -> tuple[Header, list[AnyFrame]]:
    """Turn an object into a header and frames.

    Parameters
    ----------
    obj : object
        A model or another of Keras's objects, see ``private.CITIZENS``, or a tensor of
        the backend. Left as it is.
    for_token : bool
        Make the bytes the same in every process, at the price that nobody can decode
        them; see :func:`dask_keras_serialize.values.by_value.dump`.
    on_device : bool
        Leave large variables that lie on a GPU there.

    Returns
    -------
    header : Header
    frames : list of memoryview, and DeviceFrame if ``on_device``
        Read-only. Those of large variables are views of the backend's own memory,
        and keep it alive; they do not show later training.

    Raises
    ------
    EncodeError
        If it cannot travel without losing something; names the object and the part.

    Notes
    -----
    Copies: each variable under 64 KiB once, into the arena; of the others none that the backend
    can show where it lies (docs/backends.md).
    """
    encoded = encode_parts(obj, for_token=for_token, on_device=on_device)
    return encoded.header, encoded.frames


@meters.meter(meters.PACK)
@garbage.paused()
def encode_parts(
    obj: Any,
    links: Mapping[int, tuple[Any, Key | None]] = MappingProxyType({}),
    *,
    seen: Sequence[Any] = (),
    for_token: bool = False,
    on_device: bool = False,
) -> Encoded:
    """Do as :func:`encode`, for an object that is pickled together with others.

    Parameters
    ----------
    obj : object
    links : dict of int to (parcel, Key)
        What other parcels of the same pickle hold: which, and the key there, by ``id()``.
        Parts found there are referred to, not sent again.
    seen : sequence of object
        The parts of an earlier description by value, in order: they keep their numbers.
    for_token : bool
    on_device : bool

    Returns
    -------
    Encoded
    """
    owner = private.describe(obj)
    name, backend = backends.current()
    encoding: Encoding = "value"
    described: Description | None = None
    if links or seen:
        described = by_value.dump(obj, links=links, seen=seen)
    if isinstance(obj, keras.Model) and not seen and not (described and described.links):
        by_its_config = by_config.dump(obj)
        if isinstance(by_its_config, str):
            logger.debug("%s goes by value: %s", owner, by_its_config)
        else:
            encoding, described = "config", by_its_config
    described = described or by_value.dump(obj, for_token=for_token)
    body, variables, extras, *_ = described
    for variable in variables:
        if variable.dtype not in ITEMSIZE:
            raise EncodeError(
                f"{owner}: variable {variable.path!r} has dtype {variable.dtype}, which cannot "
                "travel yet: cast it, or keep it out"
            )
    if not names.are_text("".join((owner, *(variable.path for variable in variables)))):
        raise EncodeError(
            f"{owner}: its name, or one in it, is no text: it has half of a surrogate pair; "
            "give it another"
        )
    take = states.views_or_frames if on_device else states.views
    arrays = [
        each if isinstance(each, DeviceFrame) or each.dtype != object else strings.to_bytes(each)
        for each in take(variables, backend, owner)
    ]
    locations, packed = frames.pack([*arrays, *extras])
    entries = tuple(
        VariableEntry(v.path, states.shape_of(v), v.dtype, bool(v.trainable), location)
        for v, location in zip(variables, locations[: len(variables)], strict=True)
    )
    placed = [(i, backend.placement(variable)) for i, variable in enumerate(variables)]
    if any(placement for _, placement in placed):
        body["placements"] = [[i, placement] for i, placement in placed if placement]
    body["extras"] = [list(location) for location in locations[len(variables) :]]
    header = Header(
        encoding=encoding,
        owner=owner,
        name=private.name_of(obj),
        class_name=private.full_name(type(obj)),
        backend=name,
        versions=skew.versions(),
        body=body,
        variables=entries,
    )
    if not for_token:
        meters.count(meters.PACK, sum(frame.nbytes for frame in packed), "bytes")
    return Encoded(header.with_frames(packed), packed, described)


def decode(header: Header, buffers: Sequence[object], *, keep: bool = False) -> Any:
    """Turn a header and frames back into an object.

    Parameters
    ----------
    header : Header
        Already checked by :meth:`Header.from_wire`.
    buffers : sequence of objects with the buffer protocol, or ``__cuda_array_interface__``
        The frames, in order. Never written to.
    keep : bool
        Whether the object may use them in place, see :func:`frames.as_frames`: they are
        its own from now on, and nobody else writes to them. Else it keeps none.

    Returns
    -------
    object
        As it was given to :func:`encode`.

    Raises
    ------
    DecodeError
        If the frames are not those the header describes, or the object cannot be
        rebuilt here: another backend or version, a missing class.

    Notes
    -----
    Copies: at most one of each variable's bytes, into memory the backend owns; none of
    a large variable that ``keep`` allows and the backend can use where it lies.
    """
    owner = header.owner
    parts: list[AnyFrame] = []
    if not isinstance(buffers, list | tuple):
        raise DecodeError(f"{owner}: its frames came as {type(buffers).__name__}; send it again")
    for buffer in buffers:
        if cuda.on_device(buffer):
            parts.append(cuda.received(buffer, owner, keep=keep))
        else:
            parts += frames.as_frames([buffer], owner, keep=keep)
    return decode_parts(header, parts).root


@meters.meter(meters.REBUILD)
def decode_parts(
    header: Header, parts: Sequence[AnyFrame], links: Sequence[Rebuilt] = ()
) -> Rebuilt:
    """Do as :func:`decode`, for an object that was pickled together with others.

    Parameters
    ----------
    header : Header
    parts : sequence of memoryview or DeviceFrame
        Those that are writeable are the object's to keep.
    links : sequence of Rebuilt
        The other parcels it refers to.

    Returns
    -------
    Rebuilt

    Raises
    ------
    DecodeError
        Whatever is wrong: a worker that reads anything else leaves its task waiting for ever.
    """
    try:
        return _decode(header, parts, links)
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(
            f"{header.owner}: {one_line(error)}, which {FORMAT} did not expect: {REPORT}; "
            f"{skew.named(header)}"
        ) from error


#: Ends an error that nobody should see.
REPORT = "please report it"


def _decode(header: Header, parts: Sequence[AnyFrame], links: Sequence[Rebuilt]) -> Rebuilt:
    values = values_of(header, parts)
    garbage.make_room(header.nbytes)  # no more than came
    try:
        locations = [frames.Location(*map(int, row)) for row in header.body["extras"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DecodeError(f"{header.owner}: malformed header: {error!r}; send it again") from None
    described = [*(variable.location for variable in header.variables), *locations]
    if described != frames.layout([location.nbytes for location in described]):
        raise DecodeError(
            f"{header.owner}: malformed header: its variables do not lie where their sizes "
            "put them; send it again"
        )
    extras: list[backends.Array] = [
        frames.unpack(parts, location, header.owner) for location in locations
    ]
    meters.count(meters.REBUILD, sum(header.frame_sizes), "bytes")
    if header.encoding == "config":
        rebuilt = templates.load(header.body, values, extras)
    else:
        rebuilt = by_value.load(header.body, values, extras, links)
    garbage.watch(rebuilt.root, header.nbytes)
    meters.count(meters.PLACE, values.placed_seconds, "seconds")
    meters.count(meters.PLACE, values.placed_bytes, "bytes")
    return rebuilt


def values_of(header: Header, parts: Sequence[AnyFrame]) -> Values:
    """Check frames against their header; return the variables' values in them.

    Raises
    ------
    DecodeError
        If they are not those the header describes, or nothing can be made of them here.
    """
    environment.check(header)
    sizes, marks = header.frame_sizes, header.fingerprints
    fingerprints.check(parts, sizes, marks, header.whole, header.owner, header.unread)
    return Values(header, parts)


def nbytes(obj: Any) -> int:
    """Count the bytes of all variables, without reading them."""
    return sum(map(states.nbytes, _variables(obj)))


def lies_on_gpu(obj: Any) -> bool:
    """Say whether ``on_device`` would leave any of an object's variables where they are."""
    _, backend = backends.current()
    return any(states.stays_on_device(variable, backend) for variable in _variables(obj))


#: Bytes of the Python objects around a model, one of its layers and one of its
#: variables, as tracemalloc counts them (``benchmarks/python_graph.py``).
GRAPH_BYTES = (60_000, 4_000, 9_000)


def graph_nbytes(obj: Any) -> int:
    """Estimate the bytes of the Python objects around the variables."""
    base, per_layer, per_variable = GRAPH_BYTES
    model = isinstance(obj, keras.Model)
    layers = 1 + sum(1 for _ in private.flatten_layers(obj)) if isinstance(obj, keras.Layer) else 0
    return base * model + per_layer * layers + per_variable * len(_variables(obj))


def _variables(obj: Any) -> list[keras.Variable]:
    if isinstance(obj, keras.Model):
        return by_config.variables_of(obj)
    return [obj] if isinstance(obj, keras.Variable) else list(getattr(obj, "variables", ()))
