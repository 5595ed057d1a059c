"""What arrives as it left, object by object and route by route, beside Keras's own pickle.

Writes docs/fidelity.md. Run it by ``make fidelity``; it takes ten minutes. Every public
class of Keras in the tests' catalogue is made and used, sent, and used again beside the
original: each result must be equal to the bit. The models of the tests' zoo are compared
variable by variable, and those that were trained are trained on.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

import dask_keras_serialize
from tests import zoo
from tests.catalogue import CITIZENS
from tests.routes import ROUTES, make, use

DOCUMENT = Path(__file__).parent.parent / "docs" / "fidelity.md"
KERAS = "Keras's pickle"

LIMITS = """## What to know

- A Keras object is pickled as a parcel of its own. What parcels of one pickle share of Keras's
  objects arrives shared; a plain Python object (a list, an array, an instance of your class) that
  a Keras object shares with something outside of it arrives twice, in the parcel and beside it: so
  does an object of your own that its model or callback holds again. `copy.deepcopy` keeps one.
  A parcel has to be closed, or a scheduler would need the code of what is in it, and a reader
  that forbids code would run it before it can refuse.
- A class that the other side cannot import travels by value, and is there a class of its own:
  `isinstance` with another definition of it is false.
- A layer arrives without the calls that were made of it outside of what travels: a lone layer
  has no `output`.
- Keras's plain helpers (scopes, `InputSpec`, `DeviceMesh` and its like) pickle as they do without
  this package, which imports Keras where they are opened.
"""

Outcome = str | None  # what went wrong


def by_keras(obj: Any) -> Any:
    """Pickle as without this package."""
    dask_keras_serialize.unregister()
    try:
        return pickle.loads(pickle.dumps(obj))
    finally:
        dask_keras_serialize.register()


def wrong_with(check: Callable[[Any], Outcome], route: Callable[[Any], Any]) -> Outcome:
    """Say what is wrong with what arrives, in a few words; None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(route)
    except AssertionError:
        return "arrives different"
    except Exception as error:
        words = " ".join(str(error).split())
        return f"{type(error).__name__}: {words[:90]}{'...' if len(words) > 90 else ''}"


def check_citizen(name: str) -> Callable[[Any], Outcome]:
    def check(route: Callable[[Any], Any]) -> Outcome:
        citizen = CITIZENS[name]
        original = make(citizen)
        replica = route(original)
        if type(replica) is not type(original):
            return f"arrives as a {type(replica).__name__}"
        ours, theirs = use(citizen, original), use(citizen, replica)
        lost = [path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)]
        return f"arrives different in {len(lost)} of {len(ours)} results" if lost else None

    return check


def check_model(name: str) -> Callable[[Any], Outcome]:
    def check(route: Callable[[Any], Any]) -> Outcome:
        model = zoo.build(name)
        replica = route(model)
        ours, theirs = (zoo.variables_of(each) for each in (model, replica))
        if len(ours) != len(theirs):
            return f"arrives with {len(theirs)} of {len(ours)} variables"
        pairs = list(zip(ours, theirs, strict=True))
        lost = [a.path for a, b in pairs if zoo.to_bytes(a) != zoo.to_bytes(b)]
        if lost:
            return f"loses the value of {len(lost)} of {len(ours)} variables, first {lost[0]}"
        lost = [a.path for a, b in pairs if a.trainable != b.trainable or a.dtype != b.dtype]
        if lost:
            return f"changes dtype or trainable of {len(lost)} variables, first {lost[0]}"
        lost = [a.path for a, b in pairs if a.path != b.path]
        if lost:
            return f"changes the path of {len(lost)} variables, first {lost[0]}"
        if zoo.flags(model) != zoo.flags(replica):
            return "loses trainable flags"
        if model.dtype_policy != replica.dtype_policy:
            return f"changes its dtype policy from {model.dtype_policy.name}"
        if model.built:
            batch = zoo.inputs_for(model)
            found = [zoo.predictions(each, batch) for each in (model, replica)]
            if [p.tobytes() for p in found[0]] != [p.tobytes() for p in found[1]]:
                return "predicts something else"
        for attribute in ("run_eagerly", "jit_compile", "steps_per_execution"):
            if getattr(model, attribute) != getattr(replica, attribute):
                return f"loses {attribute}"
        if hasattr(model, "history") and not hasattr(replica, "history"):
            return "loses model.history"
        zoo.assert_same(model, replica)
        if "trained" in name:
            return _train_on(name, model, replica)
        return None

    return check


def _train_on(name: str, model: keras.Model, replica: keras.Model) -> Outcome:
    model.make_train_function(force=True)
    for each in (model, replica):
        target = zoo.TARGET.get(name, "sparse")
        each.fit(zoo.X, zoo.TARGETS[target], epochs=2, shuffle=False, verbose=0)
    try:
        zoo.assert_same(model, replica)
    except AssertionError:
        return "trains on differently"
    return None


def main() -> None:
    """Measure all and write the document."""
    routes = {**ROUTES, KERAS: by_keras}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    faults: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    checks = {name: (name.rpartition(".")[0] or "keras", check_citizen(name)) for name in CITIZENS}
    checks |= {f"model: {name}": ("models of the tests", check_model(name)) for name in zoo.ALL}
    for number, (name, (group, check)) in enumerate(checks.items()):
        print(f"\r{number + 1} of {len(checks)} {name:60.60}", end="", flush=True)
        counts[group]["objects"] += 1
        for route, send in routes.items():
            fault = wrong_with(check, send)
            counts[group][route] += fault is None
            if fault is not None:
                faults[route].append((group, name, fault))
    print()
    DOCUMENT.write_text(document(list(routes), counts, faults))
    for route in ROUTES:
        for fault in faults[route]:
            print(f"{route}: {fault}")


def document(
    routes: list[str],
    counts: dict[str, dict[str, int]],
    faults: dict[str, list[tuple[str, str, str]]],
) -> str:
    """Return the document's text."""
    lines = [
        "# What arrives as it left",
        "",
        "Made by `make fidelity`: every public class of Keras, made and used, is sent by every",
        "route and used again beside the original. An object counts if all it then does is equal",
        "to the bit. Trained models are also trained on. The last column is Keras's own pickle,",
        "as without this package.",
        "",
        f"keras {keras.version()} on {keras.backend.backend()}.",
        "",
        f"| | objects | {' | '.join(routes)} |",
        f"|:--|{'--:|' * (len(routes) + 1)}",
    ]
    total: dict[str, int] = defaultdict(int)
    for group, row in counts.items():
        cells = [row["objects"], *(row[route] for route in routes)]
        lines.append(f"| {group} | {' | '.join(map(str, cells))} |")
        for key, count in row.items():
            total[key] += count
    cells = [total["objects"], *(total[route] for route in routes)]
    lines.append(f"| **all** | {' | '.join(f'**{cell}**' for cell in cells)} |")
    lines += ["", LIMITS, "## What Keras's own pickle loses or breaks", ""]
    lines += ["Each of these arrives as it left by every route of this package."]
    group = ""
    for each, name, fault in sorted(faults[KERAS], key=lambda fault: _order(list(counts), fault)):
        if any(name == other for route in ROUTES for _, other, _ in faults[route]):
            continue
        if each != group:
            group = each
            lines += ["", f"### {group}", ""]
        lines.append(f"- {name.removeprefix('model: ')}: {fault}")
    ours = [(route, *fault) for route in ROUTES for fault in faults[route]]
    if ours:
        lines += ["", "## What this package loses or breaks", ""]
        lines += [f"- {name} by {route}: {fault}" for route, _, name, fault in ours]
    return "\n".join(lines) + "\n"


def _order(groups: list[str], fault: tuple[str, str, str]) -> tuple[int, str]:
    return groups.index(fault[0]), fault[1]


if __name__ == "__main__":
    main()
