"""A model that an object holds, whose copies share one replica.

Searches copy an estimator before each call that trains it. A copy that is a model of its own has to
be rebuilt, and traced and compiled again by its first run: most of what such a call costs. Here the
copy is handed the snapshot, and the replica is left to whoever runs first, which is the copy; the
original is filled again, from the snapshot, if anybody asks it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from dask_keras_serialize.cluster.broken import BrokenObject
from dask_keras_serialize.errors import EncodeError
from dask_keras_serialize.workflows.replicas import POOL, Replica, Snapshot

if TYPE_CHECKING:
    import keras

Use = Literal["trains", "reads"]


class Held:
    """A model, live or as a snapshot, for an object that copies and pickles it as the latter.

    Notes
    -----
    A replica is handed on only if no method is running it, and if nobody outside was given the
    model itself, by :meth:`model` apart from :meth:`using`: that one stays where it is, and is
    copied as any model.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turn = threading.RLock()
        self._replica: Replica | None = None
        #: Of what the replica holds, or of what it is to hold; None if it was changed.
        self._snapshot: Snapshot | None = None
        #: The thread that runs it, and what for, from the outermost call inwards.
        self._user: int | None = None
        self._uses: list[Use] = []
        self._exposed = False

    def __bool__(self) -> bool:
        """Say whether there is a model."""
        return self._replica is not None or self._snapshot is not None

    @property
    def in_use(self) -> bool:
        """Whether this thread runs it."""
        return self._user == threading.get_ident()

    @property
    def nbytes(self) -> int:
        """Bytes of the model's variables."""
        if self._replica is not None:
            return self._replica.nbytes
        return 0 if self._snapshot is None else self._snapshot.nbytes

    def put(self, model: keras.Model, *, exposed: bool = False) -> None:
        """Hold a model; ``exposed`` if somebody else holds it too."""
        with self._lock:
            self._replica, self._snapshot, self._exposed = Replica(model), None, exposed

    def model(self) -> keras.Model:
        """Return the live model; outside of :meth:`using`, for the caller to keep."""
        with self._lock:
            if self._replica is None:
                if self._snapshot is None:
                    raise AttributeError("it holds no model yet")
                self._replica = POOL.take(self._snapshot)
            if not self.in_use:
                self._exposed = True
            elif "trains" in self._uses:
                self._changed()
            return self._replica.model

    def handed_out(self, *, kept: bool) -> None:
        """Note that code of the user's had the model while it ran, and whether it kept it."""
        from dask_keras_serialize.configs.architecture import forget_traces

        with self._lock:
            self._exposed = self._exposed or kept
            # it may have changed what was traced before; later that shows, by comparison
            if self._replica is not None and not self._replica.comparable:
                forget_traces(self._replica.model)

    @contextmanager
    def using(self, use: Use) -> Iterator[None]:
        """Keep the replica while this thread trains or reads it; one thread at a time."""
        # JAX's trainer takes the values out of the variables while it runs
        with self._turn:
            with self._lock:
                self._user = threading.get_ident()
                self._uses.append(use)
            same, before = False, None
            try:
                if use == "reads":
                    model = self.model()
                    before = self._look()
                yield
                same = before is not None and before == _values(model)
            finally:
                with self._lock:
                    self._uses.pop()
                    self._user = self._user if self._uses else None
                    if not same:
                        self._changed()

    def _changed(self) -> None:
        if self._replica is not None:
            self._snapshot = None
            self._replica.changed()

    def _look(self) -> list[bytes] | None:
        """Take a snapshot now, for a copy that is asked for meanwhile: JAX takes values away.

        Returns
        -------
        list of bytes
            What a prediction may change; None if nobody knows.
        """
        with self._lock:
            if self._replica is None or self._exposed or "trains" in self._uses:
                return None
            with suppress(EncodeError):
                self._snapshot = self._snapshot or self._replica.snapshot()
                # code of the user's may change what it likes
                if self._snapshot.parcel.header.encoding == "config":
                    return _values(self._replica.model)
            return None

    def snapshot(self) -> Snapshot:
        """Return a snapshot, and hand on the replica if nobody runs it."""
        with self._lock:
            snapshot = None if self._exposed or "trains" in self._uses else self._snapshot
            if snapshot is None:
                if self._replica is None:
                    raise AttributeError("it holds no model yet")
                snapshot = self._replica.snapshot()
            if self._exposed or self._uses:
                return snapshot
            self._snapshot = snapshot
            if self._replica is not None and self._replica.comparable:
                POOL.give(self._replica)
                self._replica = None
            return snapshot

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        twin = Held()
        if self:
            try:
                twin._snapshot = self.snapshot()
            except EncodeError:  # what cannot travel may still be copied
                if self._replica is None:
                    raise
                twin.put(copy.deepcopy(self._replica.model, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _held, (self.snapshot() if self else None,)


def _held(snapshot: Snapshot | BrokenObject | None) -> Held | BrokenObject:
    if isinstance(snapshot, BrokenObject):
        return snapshot
    held = Held()
    held._snapshot = snapshot
    return held


def _values(model: keras.Model) -> list[bytes]:
    """Return the bytes of those variables that a prediction may change: seeds, states, counters."""
    from dask_keras_serialize import backends, private
    from dask_keras_serialize.values import states
    from dask_keras_serialize.wire.frames import LARGE

    stateful = any(getattr(layer, "stateful", False) for layer in private.flatten_layers(model))
    variables = [v for v in model.non_trainable_variables if stateful or states.nbytes(v) < LARGE]
    backend = backends.current()[1]
    return [array.tobytes() for array in states.views(variables, backend, private.describe(model))]
