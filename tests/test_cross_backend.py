"""A model sent from any backend arrives on any other: golden files of each are read here.

``test_together.py`` has those that go by value, where all backends are installed.
"""

import importlib

import keras
import pytest

from dask_keras_serialize import backends
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.translation import Translation
from tests import golden, zoo


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("name", golden.NAMES)
def test_a_model_of_every_backend(name, backend):
    golden.check(name, *golden.read(golden.FOLDER, backend)[name])


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
    bound = BOUND()
    layer = keras.layers.Lambda(lambda x: bound.call(x), name="by hand")
    layer.extra = BOUND.call
    header, frames = relabelled(keras.Sequential([keras.Input((4,)), layer]))
    with pytest.raises(DecodeError, match=r"layer 'by hand' .*bound to"):
        deserialize_keras(header, frames)


def square(x):
    return keras.ops.abs(x) if x is None else module.square(x)


module = importlib.import_module({"tensorflow": "tensorflow", "jax": "jax.numpy"}.get(HERE, HERE))


class ByHelper(keras.layers.Layer):
    def call(self, x):
        return self.helped(x)

    def helped(self, x):
        return square(x)


class UsesKerasBackend(keras.layers.Layer):
    def call(self, x):
        return module.square(x) * (1 + keras.backend.epsilon())


class Unused(keras.layers.Layer):
    """Binds nothing: attributes of that name, and a method that Keras never calls."""

    def __init__(self):
        super().__init__()
        self.torch = self.jax = self.tensorflow = 1.0

    def call(self, x):
        return x * self.torch

    def by_hand(self, x):
        return module.square(x)


@pytest.mark.parametrize("make", [ByHelper, UsesKerasBackend], ids=lambda x: x.__name__)
def test_what_a_layer_calls_binds_it(make):
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), make()]))
    assert len(header["body"]["bound"]) == 1


@pytest.mark.parametrize("layer", [Asks(), Unused(), zoo.Scale(abs)], ids=lambda x: x.name)
def test_code_for_every_backend_is_not_bound(layer):
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), layer]))
    assert header["body"]["bound"] == []


def test_a_module_that_can_do_without_is_not_bound(tmp_path, monkeypatch):
    package = BOUND.call.__code__.co_names[0].partition(".")[0]
    (tmp_path / "does_without.py").write_text(
        f"import keras\ntry:\n    import {package}\nexcept ImportError:\n    {package} = None\n"
        f"class Layer(keras.layers.Layer):\n    def call(self, x):\n"
        f"        return x if {package} is None else keras.ops.abs(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    layer = importlib.import_module("does_without").Layer()
    header, _ = serialize_keras(keras.Sequential([keras.Input((4,)), layer]))
    assert header["body"]["bound"] == []


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
