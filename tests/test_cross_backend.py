"""What binds code to a backend: it is named, and refused on another.

``test_skew.py`` reads golden files of every backend; ``test_together.py`` sends from each to each,
where all are installed.
"""

import ast
import functools
import importlib
import sys

import keras
import pytest
import scipy.special

from dask_keras_serialize import backends
from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.values import binding
from dask_keras_serialize.values.translation import Translation
from tests import zoo
from tests.test_custom_code import run


class InTensorFlow(keras.layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.square(x)


class InJax(keras.layers.Layer):
    def call(self, x):
        import jax.numpy as jnp

        return jnp.square(x)


class InTorch(keras.layers.Layer):
    def call(self, x):
        import torch

        return torch.square(x)


class Asks(keras.layers.Layer):
    """Knows every backend's way."""

    def call(self, x):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.square(x)
        if keras.backend.backend() == "torch":
            import torch

            return torch.square(x)
        import jax.numpy as jnp

        return jnp.square(x)


HERE = keras.backend.backend()
BOUND = {"tensorflow": InTensorFlow, "jax": InJax, "torch": InTorch}[HERE]
ELSEWHERE = next(name for name in backends.NAMES if name != HERE)


def relabelled(obj):
    """Serialize as if this were another backend."""
    header, frames = serialize_keras(obj)
    header["backend"] = ELSEWHERE
    return header, frames


def test_a_layer_that_is_bound_to_its_backend_is_named():
    model = keras.Sequential([keras.Input((4,)), BOUND(name="squared")], name="net")
    header, frames = serialize_keras(model)
    assert [code.rpartition(".")[2] for _, code in header["body"]["bound"]] == ["call"]
    header["backend"] = ELSEWHERE
    said = rf"model 'net' .*layer 'squared' .*bound to the backend '{ELSEWHERE}' by .*call"
    with pytest.raises(DecodeError, match=said) as info:
        deserialize_keras(header, frames)
    assert "\n" not in str(info.value)


def test_a_function_that_is_bound_is_named_with_its_layer():
    layer = keras.layers.Lambda(lambda x: square(x), name="by hand")
    header, frames = relabelled(keras.Sequential([keras.Input((4,)), layer]))
    with pytest.raises(DecodeError, match=r"layer 'by hand' .*bound to"):
        deserialize_keras(header, frames)


def square(x):
    return keras.ops.abs(x) if x is None else module.square(x)


module = importlib.import_module({"tensorflow": "tensorflow", "jax": "jax.numpy"}.get(HERE, HERE))


class Helper:
    def __init__(self):
        self.by = 2

    def __call__(self, x):
        return module.square(x)

    def help(self, x):
        return module.square(x)


HELPER = Helper()
TABLE = {"sq": square}


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def calling(name, call):
    """Make a layer of a class of its own, whose call is a function of this module."""
    members = {"call": call, "by_method": lambda self, x: square(x), "__module__": __name__}
    return type(name, (keras.layers.Layer,), members)


def imported(self, x):
    from tests.test_cross_backend import square as squared

    return squared(x)


@decorated
def wrapped(self, x):
    return module.square(x)


WAYS = {
    "function": lambda self, x: square(x),
    "method": lambda self, x: self.by_method(x),
    # B009 would have what this asks written as the way above it
    "getattr": lambda self, x: getattr(self, "by_method")(x),  # noqa: B009
    "module": lambda self, x: this.square(x),
    "instance": lambda self, x: HELPER(x),
    "its method": lambda self, x: HELPER.help(x),
    "class": lambda self, x: Helper()(x),
    "table": lambda self, x: TABLE["sq"](x),
    "import": imported,
    "decorator": wrapped,
    "beside epsilon": lambda self, x: module.square(x) * (1 + keras.backend.epsilon()),
}
this = importlib.import_module(__name__)


class Unused(keras.layers.Layer):
    """Binds nothing: attributes of that name, and a method that Keras never calls."""

    def __init__(self):
        super().__init__()
        self.torch = self.jax = self.tensorflow = 1.0

    def call(self, x):
        return x * self.torch

    def by_hand(self, x):
        return module.square(x)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_layer_calls_binds_it(way):
    layer = calling("Calls", WAYS[way])(name="caller")
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), layer]))
    ((owner, _),) = header["body"]["bound"]
    assert owner.startswith("layer 'caller'")


class AsksFirst(keras.layers.Layer):
    """What it calls is of the backend that it asked for."""

    def call(self, x):
        return self.here(x) if keras.config.backend() == HERE else keras.ops.square(x)

    def here(self, x):
        return module.square(x)


class AskedBefore(AsksFirst):
    def call(self, x):
        return module.square(x) if HERE == "nowhere" else keras.ops.square(x)


class UsesScipy(keras.layers.Layer):
    """Its package has functions for every backend's arrays."""

    def call(self, x):
        return x * scipy.special.logsumexp([1.0])


AGNOSTIC = [Asks(), AsksFirst(), AskedBefore(), Unused(), UsesScipy(), zoo.Scale(abs)]


@pytest.mark.parametrize("layer", AGNOSTIC, ids=lambda x: x.name)
def test_code_for_every_backend_is_not_bound(layer):
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), layer]))
    assert header["body"]["bound"] == []


@pytest.mark.parametrize(
    "head",
    [
        "try:\n    import {0}\nexcept ImportError:\n    {0} = None\n",
        "{0} = None\nif keras.backend.backend() == '{1}':\n    from {0} import __version__\n",
        "if keras.backend.backend() == '{1}':\n    def {0}(): import {0}\nelse:\n    {0} = None\n",
    ],
)
def test_a_module_that_can_do_without_is_not_bound(head, tmp_path, monkeypatch):
    package = BOUND.call.__code__.co_names[0].partition(".")[0]
    (tmp_path / "does_without.py").write_text(
        f"import keras\n{head.format(package, HERE)}"
        f"class Layer(keras.layers.Layer):\n    def call(self, x):\n"
        f"        return x if {package} is None else keras.ops.abs(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "does_without", raising=False)
    binding._does_without.cache_clear()
    layer = importlib.import_module("does_without").Layer()
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), layer]))
    assert header["body"]["bound"] == []


def test_shapes_and_dtypes_bind_nothing():
    header, _ = serialize_keras(zoo.build("shapes and dtypes"))
    assert header["body"]["bound"] == []


IN_MAIN = """
import importlib, sys
import keras
from dask_keras_serialize.protocol import encode
module = importlib.import_module(sys.argv[1])

class Squared(keras.layers.Layer):
    def call(self, x):
        return module.square(x)

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Squared(name="squared")])
print(encode(model)[0].body["bound"])
"""


def test_a_layer_of_a_script_is_named(tmp_path):
    said = run(tmp_path, "script", IN_MAIN, module.__name__)
    ((owner, code),) = ast.literal_eval(said.splitlines()[-1])
    assert owner.startswith("layer 'squared'")
    assert code == "__main__.Squared.call"


def test_a_module_that_needs_the_sender_s_backend_is_named(tmp_path, monkeypatch):
    package = sorted(backends.PACKAGES[ELSEWHERE])[0]
    source = "import keras\nclass Layer(keras.layers.Layer):\n    def call(self, x): return x\n"
    (tmp_path / "needs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    header, frames = relabelled(importlib.import_module("needs").Layer())
    (tmp_path / "needs.py").write_text(f"import {package}\n{source}")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "needs")
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    said = f"its module 'needs' imports '{package}', and so is bound to the backend '{ELSEWHERE}'"
    with pytest.raises(DecodeError, match=said) as info:
        deserialize_keras(header, frames)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("bound", [7, ["x"], [["a", "b", "c"]]], ids=str)
def test_what_is_bound_may_be_malformed(bound):
    header, frames = relabelled(keras.Sequential([keras.Input((4,)), zoo.Scale(abs)]))
    header["body"]["bound"] = bound
    with pytest.raises(DecodeError, match="malformed header"):
        deserialize_keras(header, frames)


def test_what_is_the_sender_s_alone_has_no_name_here():
    translation = Translation(ELSEWHERE)
    adapter = f"{backends.__name__}.{ELSEWHERE}"
    for module in (f"{sorted(backends.PACKAGES[ELSEWHERE])[0]}.any", adapter):
        with pytest.raises(DecodeError, match=f"{module}.thing is of the backend '{ELSEWHERE}'"):
            translation.name(module, "thing")
    theirs, ours = (f"keras.src.backend.{name}.core" for name in (ELSEWHERE, HERE))
    assert translation.name(theirs, "Variable") == (ours, "Variable")
    assert translation.name("collections", "deque") == ("collections", "deque")
