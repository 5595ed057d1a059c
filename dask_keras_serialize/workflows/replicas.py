"""Live models for snapshots: of each architecture a process keeps one, and fills it anew.

A :class:`Snapshot` is a model's state at one instant, closed. Whoever wants to run it borrows a
replica, and has it alone until it is given back. The one is lent that holds the snapshot's values
already; else another of the same architecture is given them, which costs the copy of their bytes
and keeps what the backend has traced or compiled; only where there is none is a model rebuilt.

Replicas that were given back are kept for the next who asks: the one used last, whatever its size,
and of the others up to :data:`SPARE_BYTES`.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.packed import Parcel

if TYPE_CHECKING:
    import keras

    from dask_keras_serialize.configs.architecture import Architecture

#: Bytes of variables that idle replicas may hold in a process, beside the one used last.
SPARE_BYTES = 1 << 30
#: Bytes that one takes beside its variables: what was traced or compiled of it, and Python's.
BESIDE = 2 << 20
#: How many idle replicas there may be, whatever their size.
SPARE = 16

#: How snapshots got their replica in this process: "kept" as it was, "filled" anew, "rebuilt".
counts: Counter[str] = Counter()


class Snapshot:
    """A model's state at one instant; whoever wants to run it borrows a replica.

    Parameters
    ----------
    model : keras.Model
        Left as it is, and free to be trained further.

    Raises
    ------
    EncodeError
        If it cannot travel without losing something.

    Notes
    -----
    Copies: as :func:`dask_keras_serialize.pack`, none of large variables on the host. A snapshot is
    immutable; it pickles, and travels through Dask, as its bytes, and no scheduler opens it.

    Examples
    --------
    >>> with Snapshot(model).replica() as model:  # on a worker  # doctest: +SKIP
    ...     model.fit(x, y)
    """

    def __init__(self, model: keras.Model) -> None:
        self._take(Replica(model))

    def _take(self, replica: Replica) -> None:
        from dask_keras_serialize.configs.architecture import architecture_of
        from dask_keras_serialize.protocol import encode_parts

        encoded = encode_parts(replica.model)
        architecture = architecture_of(replica.model, encoded.description)
        replica.describe(architecture)
        #: The model, closed.
        self.parcel = Parcel(encoded.header.to_bytes(), encoded.frames)
        replica.resolve(self.parcel)
        self._digest, self._order, self._metrics, self._left = b"", [], None, {}
        if architecture is not None:
            self._digest, self._order = replica.digest, architecture.order
            self._metrics = architecture.metrics
            self._left = copy.deepcopy(architecture.left)

    #: Of the architecture; empty if it cannot be compared, and each use is a rebuild.
    _digest: bytes
    #: The place in the table of each of the architecture's variables.
    _order: list[int]
    _metrics: list[list[str]] | None
    _left: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of header and values."""
        return self.parcel.nbytes

    def open(self) -> keras.Model:
        """Rebuild the model, for the caller to keep.

        Raises
        ------
        DecodeError
            If it cannot be rebuilt here.
        """
        model: keras.Model = self.parcel.open()
        return model

    @contextmanager
    def replica(
        self, weights: Sequence[Any] | None = None, *, keep_metrics: bool = False
    ) -> Iterator[keras.Model]:
        """Borrow a live model with these values; nobody else has it meanwhile.

        Parameters
        ----------
        weights : sequence of array_like, optional
            In place of the snapshot's own, in the order and shapes of ``model.weights``.
        keep_metrics : bool
            Whether, if the snapshot was taken before Keras chose the metrics that it was compiled
            with, those may stay that it chose for the targets of who borrowed a replica before.

        Yields
        ------
        keras.Model
            To be used until the context ends, and not kept: then the next who asks gets it, with
            other values. Whatever was changed in it is lost then, but for what a new
            ``Snapshot(model)`` or the caller took.

        Raises
        ------
        DecodeError
            If it cannot be rebuilt here.
        ValueError
            If there are more or fewer weights, or of other shapes.

        Notes
        -----
        Copies: one of each variable's bytes, into memory the backend owns.
        """
        from dask_keras_serialize.configs.architecture import architecture_of

        replica = POOL.take(self, weights, keep_metrics)
        try:
            yield replica.model
        finally:
            replica.changed()
            with suppress(EncodeError):  # if a borrower made it so, nobody else gets it
                replica.describe(architecture_of(replica.model))
                POOL.give(replica)

    def __reduce__(self) -> tuple[Any, ...]:
        return _snapshot, (self.parcel, self._digest, self._order, self._metrics, self._left)

    def __sizeof__(self) -> int:
        return self.nbytes

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return self.parcel.__dask_tokenize__()

    def __repr__(self) -> str:
        return repr(self.parcel).replace("Parcel", "Snapshot", 1)


class Replica:
    """A live model, with what it takes to fill it with a snapshot's values."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.digest = b""
        self._code: list[tuple[str, Any]] = []
        self._known_as: dict[bytes, bytes] = {}
        self._variables: Sequence[Any] = ()
        self._metrics: list[list[str]] | None = None
        self._holds: ReferenceType[Snapshot] | None = None

    def describe(self, architecture: Architecture | None) -> None:
        """Note the architecture that it has now."""
        from dask_keras_serialize.configs.architecture import forget_traces

        before, self.digest = self.digest, architecture.digest if architecture else b""
        self.digest = self._known_as.get(self.digest, self.digest)
        if before not in (b"", self.digest):
            forget_traces(self.model)
        self._variables = architecture.variables if architecture else ()
        self._metrics = architecture.metrics if architecture else None

    @classmethod
    def rebuilt(cls, snapshot: Snapshot) -> Replica:
        """Open a snapshot, which the replica holds then."""
        from dask_keras_serialize.configs.architecture import architecture_of

        replica = cls(snapshot.open())
        replica._holds = ref(snapshot)
        found = architecture_of(replica.model)
        table = snapshot.parcel.variables
        sent = [table[i].path for i in snapshot._order]
        # what was pickled by value may not pickle to the same bytes again, and is the same still
        if found and snapshot._digest and [v.path for v in found.variables][: len(sent)] == sent:
            replica._known_as[found.digest] = snapshot._digest
        replica.describe(found)
        replica.resolve(snapshot.parcel)
        return replica

    @property
    def nbytes(self) -> int:
        """Bytes of its variables."""
        from dask_keras_serialize.protocol import nbytes

        return nbytes(self.model)

    @property
    def comparable(self) -> bool:
        """Whether other snapshots can be told to fit it."""
        return bool(self.digest)

    def holds(self) -> Snapshot | None:
        """Return the snapshot whose values it holds, if that lives."""
        return None if self._holds is None else self._holds()

    def snapshot(self) -> Snapshot:
        """Take a snapshot, which this replica holds from now on."""
        snapshot = Snapshot.__new__(Snapshot)
        snapshot._take(self)
        self._holds = ref(snapshot)
        return snapshot

    def resolve(self, parcel: Parcel) -> None:
        """Note what code it runs, for modules may be loaded anew."""
        self._code = [(name, _resolved(name)) for name, how in parcel.code if how == "reference"]

    def fits(self, snapshot: Snapshot, keep_metrics: bool) -> bool:
        """Say whether it can be filled with a snapshot's values."""
        return (
            self.comparable
            and self.digest == snapshot._digest
            and snapshot._metrics in ((None, self._metrics) if keep_metrics else (self._metrics,))
            and all(_resolved(name) is code for name, code in self._code)
        )

    def fill(self, snapshot: Snapshot, weights: Sequence[Any] | None = None) -> None:
        """Assign a snapshot's values, or ``weights`` to those variables that are weights."""
        from dask_keras_serialize.configs.architecture import leave
        from dask_keras_serialize.protocol import values_of
        from dask_keras_serialize.rebuilding.rebuild import check_fits

        self._holds = None
        values = values_of(snapshot.parcel.header, snapshot.parcel.frames)
        apart = {id(v) for v in self.model.weights} if weights is not None else set()
        # whether built or not, they begin anew, unless the snapshot has their values
        self.model.reset_metrics()
        for variable, index in zip(self._variables, snapshot._order, strict=False):
            check_fits(variable, index, values.header)
            if id(variable) not in apart:
                values.place(index, variable.assign)
        leave(self.model, snapshot._left)
        if weights is None:
            self._holds = ref(snapshot)

    def changed(self) -> None:
        """Note that its variables may have other values."""
        self._holds = None


class _Pool:
    """The replicas of this process that nobody uses just now, the one used last at the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Replica] = []

    def take(
        self,
        snapshot: Snapshot,
        weights: Sequence[Any] | None = None,
        keep_metrics: bool = False,
    ) -> Replica:
        """Return a replica with a snapshot's values; it is the caller's until it is given back."""
        replica = self._find(snapshot, keep_metrics)
        if replica is None:
            replica = Replica.rebuilt(snapshot)
            counts["rebuilt"] += 1
        elif replica.holds() is snapshot:
            counts["kept"] += 1
        else:
            replica.fill(snapshot, weights)
            counts["filled"] += 1
        if weights is not None:
            replica.changed()
            replica.model.set_weights(list(weights))
        return replica

    def give(self, replica: Replica) -> None:
        """Take a replica back, which has been described as it is now."""
        if not replica.comparable:
            return
        with self._lock:
            self._idle.append(replica)
            spare = 0
            for number, other in enumerate(self._idle[-2::-1], 2):
                spare += other.nbytes + BESIDE
                if spare > SPARE_BYTES or number > SPARE:
                    self._idle.remove(other)

    def __len__(self) -> int:
        """Count the replicas that wait."""
        return len(self._idle)

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._idle.clear()

    def _find(self, snapshot: Snapshot, keep_metrics: bool) -> Replica | None:
        """Take out the replica that is filled most cheaply, if any fits."""

        def cost(replica: Replica) -> int:
            held = replica.holds()
            return 0 if held is snapshot else 1 if held is None else 2

        with self._lock:
            fitting = [each for each in self._idle if each.fits(snapshot, keep_metrics)]
            best = min(fitting, key=cost, default=None)
            if best is not None:
                self._idle.remove(best)
            return best


POOL = _Pool()


def _resolved(name: str) -> Any:
    """Return what a full name means in this process now; None if it means nothing."""
    module = name
    while module and module not in sys.modules:
        module = module.rpartition(".")[0]
    found: Any = sys.modules.get(module)
    for part in name[len(module) + 1 :].split("."):
        found = getattr(found, part, None)
    return found


def _snapshot(parcel: Parcel | BrokenObject, *state: Any) -> Snapshot | BrokenObject:
    """Unpickle a snapshot; what stands for a parcel that cannot be read stands for it too."""
    if isinstance(parcel, BrokenObject):
        return parcel
    snapshot = Snapshot.__new__(Snapshot)
    snapshot.parcel = parcel
    snapshot._digest, snapshot._order, snapshot._metrics, snapshot._left = state
    return snapshot
