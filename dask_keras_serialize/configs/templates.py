"""Models that arrive by config again and again: cloned, where Keras would build each anew.

A rebuild by config runs every layer's constructor and calls it once. When the same config arrives
a second time in a process, the model that Keras rebuilds of it is described by value as well, and
that description, without a variable's value, is kept: the *template*. From the third time on it is
filled with the values that arrived, in half the time. All of it is this package's own, made in
this process of a model that Keras built here: no code that was sent is run, and neither versions
nor backends can differ.

A template is used only for what is known to come out the same. What it does not know it refuses,
for good: models with assets, those whose config rebuilds to variables outside the table, whatever
cannot travel by value. Its first clone must have the config, the table and the parts of the model
that it was made of. Whatever is refused, and whatever fails, is rebuilt by config.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import keras
from dask import config as dask_config

from dask_keras_serialize.backends import Array
from dask_keras_serialize.configs import by_config
from dask_keras_serialize.limits import vetting
from dask_keras_serialize.parts import Rebuilt
from dask_keras_serialize.rebuilding import garbage
from dask_keras_serialize.rebuilding.aside import aside
from dask_keras_serialize.rebuilding.rebuild import Values, rebuilding
from dask_keras_serialize.values import by_value
from dask_keras_serialize.wire.header import FORMAT, Header

logger = logging.getLogger(__name__)

#: How many architectures a process remembers, and bytes of their templates beside the one used
#: last.
REMEMBERED, TEMPLATE_BYTES = 1000, 64 << 20

#: How often in a row a template may fail of what the config can rebuild: a message may be at fault.
FAILURES = 3

#: How models by config were rebuilt in this process: "config", or "cloned".
counts: Counter[str] = Counter()


class Template(NamedTuple):
    """A model without its values.

    Attributes
    ----------
    body : dict
        As ``by_value`` describes it.
    extras : list of ndarray of uint8
        Its own memory.
    order : list of int
        The row of the table of each variable, in the order by value.
    likeness : tuple
        What the first clone must have alike, see :func:`_likeness`; empty when one had.
    """

    body: dict[str, Any]
    extras: list[Array]
    order: list[int]
    likeness: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(extra.nbytes for extra in self.extras)


class Known:
    """What a process remembers of one config.

    Attributes
    ----------
    arrivals : int
    template : Template or None
    failures : int
        Of the template, since it was last cloned.
    refused : str
        Why there is no template; empty if nothing is against it.
    """

    def __init__(self) -> None:
        self.arrivals = 0
        self.template: Template | None = None
        self.failures = 0
        self.refused = ""

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return self.template.nbytes if self.template else 0

    def refuse(self, owner: str, reason: object) -> None:
        """Rebuild by config from now on."""
        self.template, self.refused = None, str(reason)
        logger.debug("%s is not cloned: %s", owner, reason)


#: By what :func:`_key` says, the one used last at the end. Read and written under the lock.
_known: OrderedDict[bytes, Known] = OrderedDict()


def load(body: dict[str, Any], values: Values, extras: list[Array]) -> Rebuilt:
    """Rebuild a model, or clone it if its config is known here.

    Takes, returns, raises and copies what :func:`by_config.load` does. A template holds no
    variable's bytes.
    """
    with garbage.paused():
        vetted = vetting.read(body.get("config"), values.header)
    config = vetted.config
    key = _key(config, values) if _wanted() and not extras and not vetted.classes else None
    if key is None:
        return by_config.load(vetted, values, extras)
    with rebuilding():
        known = _known.get(key)
        failed: Exception | None = None
        if known is not None and known.template is not None:
            try:
                return _clone(known, config, values)
            except Exception as error:  # the template's, this message's own, or this moment's
                failed = error
        rebuilt = by_config.load(vetted, values, extras)
        counts["config"] += 1
        known = _remember(key)
        if failed is not None:  # so it was not the message's, most likely
            known.failures += 1
            if known.failures == FAILURES:
                known.refuse(values.header.owner, repr(failed))
        if known.arrivals > 1 and known.template is None and not known.refused:
            try:
                known.template = _template_of(rebuilt.root)
            except Exception as error:  # it has arrived, whatever is against a template of it
                known.refuse(values.header.owner, error)
        _forget()
        return rebuilt


def forget() -> None:
    """Forget all templates."""
    _known.clear()


@contextmanager
def forgotten() -> Iterator[None]:
    """Forget all templates, and remember them again afterwards, and no others."""
    known = dict(_known)
    _known.clear()
    try:
        yield
    finally:
        _known.clear()
        _known.update(known)


def _wanted() -> bool:
    """Say whether models may be cloned; that is by value, if from this process alone."""
    return all(dask_config.get(f"{FORMAT}.{name}", True) is True for name in ("clone", "by-value"))


def _key(config: dict[str, Any], values: Values) -> bytes | None:
    """Return what makes two models one architecture, as they arrive; None if not to be cloned."""
    header = values.header
    if header.backend != keras.backend.backend() or keras.distribution.distribution() is not None:
        return None
    try:
        # the table goes by place; seeds' paths count up in each process
        rows = [
            (None if "seed_generator" in v.path else v.path, v.shape, v.dtype, v.trainable)
            for v in header.variables
        ]
        # in the order of the config: Keras builds losses, metrics and outputs in it
        text = json.dumps([_without_values(config), rows, header.class_name, _light()])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None  # malformed: by_config says how
    return hashlib.blake2b(text.encode(), digest_size=20).digest()


def _light() -> list[Any]:
    """Return what else of a process a rebuild takes up, beside the config."""
    remat = sys.modules.get("keras.src.backend.common.remat")
    mode = getattr(remat, "get_current_remat_mode", lambda: None)()
    defaults = (keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format())
    # attention layers ask for it when they are made
    flash = getattr(keras.config, "is_flash_attention_enabled", lambda: None)()
    return [sorted(keras.saving.get_custom_objects()), repr(mode and vars(mode)), defaults, flash]


def _without_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what differs between models of one architecture."""
    compiled = copy.deepcopy(config["compile"])
    by_config.leave_rate_out(compiled)
    seeded = [(i, name) for i, name, _ in config["seeds"]]
    return config | {"history": None, "seeds": seeded, "compile": compiled}


def _remember(key: bytes) -> Known:
    known = _known.setdefault(key, Known())
    known.arrivals += 1
    _known.move_to_end(key)
    return known


def _forget() -> None:
    """Forget what was used longest ago, beyond what a process may hold."""
    held = sum(known.nbytes for known in _known.values())
    while len(_known) > REMEMBERED or (held > TEMPLATE_BYTES and len(_known) > 1):
        held -= _known.popitem(last=False)[1].nbytes


def _template_of(model: keras.Model) -> Template:
    """Describe a model that was just rebuilt by its config.

    Raises
    ------
    EncodeError
        If it cannot travel by value.
    LookupError
        If there is more to it than a template can carry.
    """
    described = by_value.dump(model, without={keras.Model: {"history"}})
    if described.body["code"] or described.body["bound"]:
        raise LookupError("it holds code of its own")
    rows = {id(v): row for row, v in enumerate(by_config.variables_of(model))}
    if sorted(rows) != sorted(map(id, described.variables)):
        raise LookupError("it holds variables that are not in its table")
    order = [rows[id(variable)] for variable in described.variables]
    extras = [extra.copy() for extra in described.extras]
    return Template(described.body, extras, order, _likeness(model))


def _clone(known: Known, config: dict[str, Any], values: Values) -> Rebuilt:
    template = known.template
    assert template is not None
    inner = Values(_reordered(values.header, template.order), values.frames)
    extras = [extra.copy() for extra in template.extras[1:]]
    rebuilt = by_value.load(template.body, inner, [template.extras[0], *extras])
    model = rebuilt.root
    by_config.remember(model, config["seeds"], config["paths"])
    for variable, entry in zip(by_config.variables_of(model), values.header.variables, strict=True):
        variable._path = entry.path
    by_config.finish(model, config["history"])
    if template.likeness:
        if _likeness(model) != template.likeness:
            known.refuse(values.header.owner, "its clone is not like it")
            raise LookupError(known.refused)
        known.template = template._replace(likeness=())
    known.failures = 0
    values.placed_bytes += inner.placed_bytes
    values.placed_seconds += inner.placed_seconds
    counts["cloned"] += 1
    return Rebuilt(model, functools.partial(by_config.parts_of, model))


def _reordered(header: Header, order: Sequence[int]) -> Header:
    """Return the header of the same frames as if it had been sent by value."""
    place = {row: i for i, row in enumerate(order)}
    placements = [(place[int(row)], how) for row, how in header.body.get("placements", ())]
    variables = tuple(header.variables[row] for row in order)
    return replace(header, body={"placements": placements}, variables=variables)


def _likeness(model: keras.Model) -> tuple[Any, ...]:
    """Return what a clone of a model has to have alike: config, table, names of its parts."""
    with aside():
        described = by_config.dump(model)
    if isinstance(described, str):
        raise LookupError(described)
    config = _without_values(json.loads(described.body["config"]))
    rows = [(tuple(v.shape), v.dtype, v.trainable) for v in described.variables]
    text = json.dumps(config)  # equal dicts may be in another order
    kinds = {key: type(part).__qualname__ for key, part in described.parts().items()}
    kinds.pop(("history",), None)
    return text, rows, kinds
