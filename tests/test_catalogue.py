"""Every public class of Keras, by every route, to the bit."""

import inspect
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import keras
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from tests import zoo
from tests.catalogue import (
    APPLICATIONS,
    CITIZENS,
    ELSEWHERE,
    FACTORIES,
    FAMILIES,
    LAYERS,
    around,
    copied,
    one_of_each,
    plain,
    public_classes,
)
from tests.routes import ROUTES, flat, make, use

#: A part of the catalogue for the routes that the short suite does not try it all on.
SOME = sorted(CITIZENS)[::9]


def test_the_catalogue_is_complete():
    """Fails when Keras gains a class that is not here."""
    public = public_classes()
    assert public.keys() == CITIZENS.keys() | ELSEWHERE.keys()
    assert not CITIZENS.keys() & ELSEWHERE.keys()
    functions = dict(inspect.getmembers(keras.applications, inspect.isfunction))
    assert APPLICATIONS.keys() == functions.keys()
    families = {functions[name].__module__ for name in FAMILIES}
    assert families == {function.__module__ for function in functions.values()}


def assert_arrives(name, route):
    citizen = CITIZENS[name]
    original = make(citizen)
    if name not in FACTORIES:
        public = public_classes()[name]
        # torch makes a subclass of each optimizer
        torchs = keras.backend.backend() == "torch" and isinstance(original, keras.Optimizer)
        assert issubclass(type(original), public) if torchs else type(original) is public
    replica = ROUTES[route](original)
    assert type(replica) is type(original)
    assert replica is not original
    assert use(citizen, original) == use(citizen, replica)


@pytest.mark.more
@pytest.mark.once
@pytest.mark.parametrize("name", CITIZENS)
def test_pickle(name):
    assert_arrives(name, "pickle 5")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SOME)
def test_some_by_every_route(name, route):
    assert_arrives(name, route)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CITIZENS)
def test_all_by_every_route(name, route):
    assert_arrives(name, route)


@pytest.mark.more
def test_layers_in_models():
    """By themselves they go by value; in a model most go by its config."""
    encodings = Counter()
    for layer, (data, *_) in one_of_each("layers", LAYERS):
        try:
            model = around(layer, data)
        except (TypeError, ValueError):  # cells, layers of more arguments, of shapes all known
            continue
        header, frames = serialize_keras(model)
        encodings[header["encoding"]] += 1
        replica = deserialize_keras(header, list(map(bytes, frames)))
        outputs = []
        for each in (model, replica):
            keras.utils.set_random_seed(1)  # AugMix draws from Python's, besides its own seed
            outputs.append(list(flat(plain(each(copied(data), training=True)), "")))
        assert outputs[0] == outputs[1], layer.name
        values = [list(flat(plain(each.variables), "")) for each in (model, replica)]
        assert values[0] == values[1], layer.name
    assert encodings["config"] > 60 + 20 * (keras.backend.backend() == "tensorflow")


@pytest.mark.programs
def test_in_a_fresh_interpreter(tmp_path):
    """All that this process knows of an object is gone there but its pickle."""
    sent = {}
    for name, citizen in CITIZENS.items():
        original = make(citizen)
        stream = pickle.dumps(original)
        sent[name] = stream, use(citizen, original)
    (tmp_path / "sent").write_bytes(pickle.dumps(sent))
    code = "from tests.test_catalogue import compare; compare(__import__('sys').argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "sent")]
    result = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=280,
        # not what distributed/nanny.py left: PyTorch's sums differ with its threads
        env={k: v for k, v in os.environ.items() if "_NUM_THREADS" not in k} | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[-1] == f"{len(CITIZENS)} compared, different: []"


def compare(path):
    sent = pickle.loads(Path(path).read_bytes())
    assert sent
    different = []
    for name, (stream, expected) in sent.items():
        if use(CITIZENS[name], pickle.loads(stream)) != expected:
            different.append(name)
    print()  # Keras's progress bars end without a new line
    print(f"{len(sent)} compared, different: {different}")


def assert_application_arrives(name, route):
    keras.utils.set_random_seed(0)
    model = APPLICATIONS[name]()
    replica = ROUTES[route](model)
    assert type(replica) is type(model)
    batch = zoo.inputs_for(model)[:1]
    assert dict(flat(replica.get_config(), "")) == dict(flat(model.get_config(), ""))
    for ours, theirs in zip(model.variables, replica.variables, strict=True):
        assert zoo.describe(ours) == zoo.describe(theirs)
        assert zoo.to_bytes(ours) == zoo.to_bytes(theirs)
    expected, found = (each(batch, training=False) for each in (model, replica))
    arrays = map(keras.ops.convert_to_numpy, (expected, found))
    assert len({array.tobytes() for array in arrays}) == 1


@pytest.mark.once
@pytest.mark.parametrize("name", ["MobileNetV3Small"])
def test_an_application(name):
    assert_application_arrives(name, "dask")


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_applications_by_every_route(name, route):
    assert_application_arrives(name, route)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in APPLICATIONS if name not in FAMILIES])
def test_every_application(name):
    assert_application_arrives(name, "dask")
