"""What a hostile config asks for: all of it is refused, and nothing of it has run.

The canary is a file that every payload would write, or a module whose import is seen; a good
config rebuilt under Python's audit hooks shows that none of the ways to run code is used at all.
"""

import base64
import copy
import json
import marshal
import os
import pickle
import subprocess
import sys
import textwrap
from importlib import import_module

import dask
import keras
import numpy as np
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.configs import layerwise
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.limits import calls, symbols, vetting
from dask_keras_serialize.wire.header import Header
from tests import zoo


class Gadget:
    """Unpickling it writes the canary."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert "canary_module" not in sys.modules
    assert keras.src.saving.serialization_lib.in_safe_mode() is None


def model():
    inputs = keras.Input((2,), name="input")
    outputs = keras.layers.Dense(2, name="dense")(inputs)
    return keras.Model(inputs, outputs, name="model")


def with_layer(node):
    """Serialize a model, with another layer in the place of its last, called as that was."""
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    layers = config["model"]["config"]["layers"]
    call = {"inbound_nodes": layers[1]["inbound_nodes"], "name": "dense"}
    layers[1] = call | node
    return changed(header, config), frames


def changed(header, config):
    return header | {"body": header["body"] | {"config": json.dumps(config)}}


def refused(header, frames, message):
    with pytest.raises(DecodeError, match=message) as info:
        deserialize_keras(header, frames)
    assert "\n" not in str(info.value)


def function(module, name, *args, **kwargs):
    """Name a function as a layer, and call it (CVE-2025-1550, CVE-2025-8747)."""
    calls = [{"args": list(args), "kwargs": kwargs}]
    node = {"module": module, "class_name": "function", "config": name}
    return node | {"registered_name": "function", "inbound_nodes": calls}


def layer(name, module="keras.layers", /, **config):
    node = {"module": module, "class_name": name, "config": config}
    return node | {"registered_name": None, "build_config": {"input_shape": [None, 2]}}


def bytecode(canary):
    code = marshal.dumps(compile(f"open({str(canary)!r}, 'w')", "gadget", "exec"))
    return base64.b64encode(code).decode()


def pickled(canary):
    return base64.b64encode(pickle.dumps(Gadget(canary))).decode()


PAYLOADS = {
    "CVE-2025-1550: any function of any module": lambda path: function(
        "os", "system", f"touch {path}"
    ),
    "the same, of one of Python's own": lambda path: function("builtins", "open", str(path), "w"),
    "CVE-2025-8747: a function of Keras's that downloads": lambda path: function(
        "keras.utils", "get_file", "canary", origin=f"file://{__file__}", cache_dir=str(path)
    ),
    "CVE-2025-9906: a function of Keras's that turns safety off": lambda _: function(
        "keras.config", "enable_unsafe_deserialization"
    ),
    "the same, where it stands in Keras's source": lambda _: function(
        "keras.src.saving.serialization_lib", "enable_unsafe_deserialization"
    ),
    "a function of Keras's that loads a model": lambda path: function(
        "keras.saving", "load_model", str(path)
    ),
    "one that is found by another name": lambda path: function("keras.activations", "__builtins__"),
    "CVE-2024-3660: a Lambda of bytecode": lambda path: layer(
        "Lambda", function={"class_name": "__lambda__", "config": {"value": bytecode(path)}}
    ),
    "the same, by no lambda": lambda path: layer("Lambda", function=[bytecode(path), None, None]),
    "the same, by the name in Keras's source": lambda path: layer(
        "Lambda", "keras.src.layers.core.lambda_layer", function=[bytecode(path), None, None]
    ),
    "the same, as Keras 2 wrote it, without a module": lambda path: {
        "class_name": "Lambda",
        "config": {"function": [bytecode(path), None, None], "function_type": "lambda"},
    },
    "a lambda for an activation": lambda path: layer(
        "Dense",
        units=2,
        activation={"class_name": "__lambda__", "config": {"value": bytecode(path)}},
    ),
    "CVE-2025-49655: a pickle of torch's": lambda path: layer(
        "TorchModuleWrapper", module={"class_name": "__bytes__", "config": pickled(path)}
    ),
    "a SavedModel of this machine's": lambda path: layer("TFSMLayer", filepath=str(path)),
    "JAX's function in a config": lambda path: layer("JaxLayer", call_fn=pickled(path)),
    "CVE-2025-12058: a file of this machine's": lambda _: layer(
        "StringLookup", vocabulary="/etc/passwd"
    ),
    "the same, of numbers": lambda _: layer("IntegerLookup", vocabulary="/etc/passwd"),
    "the same, from the net": lambda _: layer("TextVectorization", vocabulary="http://[::1]/"),
    "a module that is imported": lambda _: layer("Canary", "tests.canary_module"),
    "a module that says it is Keras's": lambda _: layer("Canary", "keras.canary_module"),
    "a class with a way out": lambda _: layer("Layer.__init__.__globals__"),
    "a class that is none": lambda _: layer("__class__"),
    "a function for a class": lambda _: layer("load_model", "keras.models"),
    "an object of Keras's that is no layer": lambda _: layer("CSVLogger", "keras.callbacks"),
    "a name that somebody registered": lambda _: (
        layer("Dense", units=2) | {"registered_name": "tests>Canary"}
    ),
    "a type of TensorFlow's": lambda _: {
        "class_name": "__typespec__",
        "spec_name": "TensorSpec",
        "module": "tensorflow",
        "config": [[2], "float32"],
        "registered_name": None,
    },
    "more memory than there is": lambda _: layer(
        "Dense",
        units=2,
        kernel_initializer={
            "class_name": "__numpy__",
            "config": {"value": ["x"], "dtype": "S9000000000000"},
        },
    ),
    "a list for a dtype": lambda _: layer(  # which a fuzz run found
        "Dense",
        units=2,
        kernel_initializer={
            "class_name": "__numpy__",
            "config": {"value": [1.0], "dtype": ["float32"]},
        },
    ),
    "more tensors than there is time for": lambda _: layer(
        "Split", "keras.src.ops.numpy", indices_or_sections=10**12, axis=0
    ),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("by_value", [True, False])
def test_a_payload_is_refused_and_has_not_run(payload, by_value, canary):
    with dask.config.set({"dask-keras-serialize.by-value": by_value}):
        refused(*with_layer(PAYLOADS[payload](canary)), "config cannot be rebuilt here")


@pytest.mark.parametrize("payload", ["CVE-2025-1550: any function of any module"])
def test_wherever_it_stands(payload, canary):
    """Not only among the layers: everything that is built from a config."""
    source = zoo.build("trained")
    header, frames = serialize_keras(source)
    node = PAYLOADS[payload](canary)
    for change in (
        lambda config: config | {"policy": node},
        lambda config: config | {"compile": config["compile"] | {"loss": node}},
        lambda config: config | {"compile": config["compile"] | {"metrics": [[node]]}},
        lambda config: config | {"model": node},
    ):
        config = change(json.loads(header["body"]["config"]))
        refused(changed(header, config), frames, "config cannot be rebuilt here")


FIELDS = {
    "seeds": [[[0, "__class__", 1]], [[0, "kernel", 1]], [["x", "y", 1]], [[10**9, "name", 1]], 3],
    "paths": [[1], "x", []],
    "frozen": [["x"], None],
    "history": [{"__class__": "x"}, {"on_epoch_end": 1}, 3],
    "trainer": [{}, {"attributes": {}}, 3],
    "assets": [[[1, "vocabulary.txt"]]],
    "floatx": [3, "int77", None],
    "policy": [3, "float77"],
    "compile": [3],
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_config_is_looked_at(field):
    header, frames = serialize_keras(model())
    for value in FIELDS[field]:
        config = json.loads(header["body"]["config"]) | {field: value}
        refused(changed(header, config), frames, "rebuilt|assets were sent|a seed was sent")
        config.pop(field)
        refused(changed(header, config), frames, f"malformed at '{field}'")
    assert keras.config.floatx() == "float32"
    assert not hasattr(keras.layers.Dense, "seed")


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A package of the user's own that the setting lists, which imports Keras as all do."""
    folder = tmp_path / "listed_layers"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import keras\nfrom keras.layers import TFSMLayer\nclass Own(keras.layers.Dense): pass\n"
        "class Coded(keras.layers.Lambda): pass\n"
    )
    (folder / "__main__.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "failing.py").write_text("raise RuntimeError('on import')\n")
    (folder / "exiting.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with dask.config.set({"dask-keras-serialize.modules": ["listed_layers"]}):
        yield
    for name in [name for name in sys.modules if name.startswith("listed_layers")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("keras.layers.Dense", "listed_layers"),
        ("keras.layers.TorchModuleWrapper", "listed_layers"),
        ("keras.layers.StringLookup", "listed_layers"),
        ("TFSMLayer", "listed_layers"),
        ("Coded", "listed_layers"),
        ("Own.__init__", "listed_layers"),
        ("Own", "listed_layers.__main__"),
        ("Own", "listed_layers.failing"),
        ("Own", "listed_layers.exiting"),
        ("Own", "listed_layers.missing"),
    ],
)
def test_a_listed_module_leads_to_nothing_but_its_own_classes(name, module, listed):
    refused(*with_layer(layer(name, module, units=2)), "config cannot be rebuilt here")


def test_classes_of_a_listed_module_are_imported_last(listed):
    header, frames = with_layer(layer("Own", "listed_layers", units=2))
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["layers"].append(layer("Canary", "tests.canary_module"))
    refused(changed(header, config), frames, "Canary")
    assert "listed_layers" not in sys.modules


@pytest.mark.parametrize("value", ["no", "off", "false", 0, None, 1])
def test_what_is_not_true_forbids_code(value):
    header, frames = serialize_keras(zoo.build("subclassed"))
    with dask.config.set({"dask-keras-serialize.by-value": value}):
        refused(header, frames, "by-value forbids that")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("layers.RepeatVector", {"n": 10**9}),
        ("metrics.AUC", {"num_thresholds": 10**9}),
        ("layers.TextVectorization", {"ngrams": 10**9}),
        ("layers.StringLookup", {"vocabulary": ["a"], "num_oov_indices": 10**9}),
        ("optimizers.Muon", {"exclude_layers": ["(e+)+b"]}),
        ("optimizers.Muon", {"exclude_layers": ["(a|aa)" * 26 + "!"]}),
        ("optimizers.Muon", {"exclude_layers": [r"(e*)\1\1\1b"]}),
        ("dtype_policies.DTypePolicyMap", {"policy_map": {"(a+)+b": {}}}),
        ("dtype_policies.DTypePolicyMap", {"policy_map": {"(a+)(?#)+b": {}}}),
        ("dtype_policies.DTypePolicyMap", {"policy_map": {".*" * 40 + "x": {}}}),
    ],
)
def test_what_takes_for_ever_is_refused(kind, arguments):
    space, _, name = kind.rpartition(".")
    refused(*with_layer(layer(name, f"keras.{space}", **arguments)), "at once|may take for ever")


def with_patterns(*patterns, layer="d"):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name=layer)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    header, frames = serialize_keras(model)
    config = json.loads(header["body"]["config"])
    muon = keras.saving.serialize_keras_object(keras.optimizers.Muon(0.01))
    muon["config"] |= {"exclude_layers": patterns, "exclude_embeddings": False}
    config["compile"]["optimizer"] = muon
    return header, frames, config


def test_patterns_in_long_paths_of_variables_are_refused():
    """Which only the header has."""
    header, frames, config = with_patterns("a*a*a*b")
    (row, *rows) = header["variables"]
    header["variables"] = [["a" * 2000 + "/d/kernel", *row[1:]], *rows]
    refused(changed(header, config), frames, "may take for ever")


def test_patterns_in_paths_of_nested_names_are_refused():
    """Which are no longer than each, and say nothing of it."""
    header, frames, config = with_patterns("a*a*a*b")
    nested = config["model"]
    for depth in range(100):
        nested = {**config["model"], "config": {"name": f"{'a' * 20}{depth}", "layers": [nested]}}
    refused(changed(header, config | {"model": nested}), frames, "may take for ever")


@pytest.mark.parametrize("patterns", [["a*a*a*a*b"] * 150, [f"x{i}" for i in range(20_000)]])
def test_many_patterns_are_refused(patterns):
    header, frames, config = with_patterns(*patterns, layer="a" * 99)
    refused(changed(header, config), frames, "may take for ever")


def test_means_as_wide_as_an_input_are_refused():
    """They are no variables: 700 bytes took a GiB."""
    wide = layer("Normalization", mean=0.0, variance=1.0, axis=[1, 2])
    wide["build_config"] = {"input_shape": [None, 10_000, 15_000]}
    refused(*with_layer(wide), "a mean for each of 150000000 features")


def test_tensors_of_more_axes_than_arrays_have_are_refused():
    """Each layer that is called on one looks at all of its axes."""
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["layers"][0]["config"]["batch_shape"] = [1] * 50_000
    refused(changed(header, config), frames, "a tensor of 50000 axes")


def test_names_that_make_long_paths_are_refused():
    """Each of the innermost layers keeps a path of all that it is in: 600 kB took 800 MB."""
    node = layer("Sequential", "keras", name="x", layers=[])
    node["config"]["layers"] = [layer("Flatten", name=f"f{i}") for i in range(800)]
    for _ in range(5):
        node = layer("Sequential", "keras", name="x" * 100_000, layers=[node])
    refused(*with_layer(node), "make paths of [0-9]* letters")


def test_arguments_that_ask_for_much_together_are_refused():
    header, frames = serialize_keras(zoo.functional())
    config = json.loads(header["body"]["config"])
    much = [layer("TextVectorization", ngrams=10_000, name=f"t{i}") for i in range(30)]
    config["model"]["config"]["layers"] += much
    refused(changed(header, config), frames, "more than 200000 together")


def test_a_nest_is_read_once():
    """For tensors, in layers that are called on nests: each level read all below it again."""
    config = {"class_name": "__keras_tensor__", "config": {}}
    for _ in range(60):
        config = {"inbound_nodes": [[0, config]]}
    called = calls.Calls()
    asked = []

    class Counted(dict):
        def values(self):
            asked.append(self)
            return super().values()

    def counted(value):
        if isinstance(value, dict):
            return Counted({key: counted(each) for key, each in value.items()})
        return [counted(each) for each in value] if isinstance(value, list) else value

    config = counted(config)
    nested = config
    while "inbound_nodes" in nested:
        assert called.refusal(nested | {"class_name": "Dense"}) is None
        nested = nested["inbound_nodes"][0][1]
    assert len({id(each) for each in asked}) == len(asked)


@pytest.mark.parametrize(
    "make",
    [
        lambda inputs: keras.layers.RepeatVector(20_000)(inputs),
        lambda inputs: keras.ops.concatenate([inputs, np.zeros((0, 3), "float32")], axis=0),
        lambda inputs: keras.layers.LeakyReLU(np.float32(0.3), dtype="float16")(inputs),
    ],
)
def test_what_receivers_refuse_or_change_goes_by_value(make):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, make(inputs))
    header, frames = serialize_keras(model)
    assert header["encoding"] == "value"
    rows = np.arange(6, dtype="float32").reshape(2, 3) - 2
    ours, theirs = (each(rows) for each in (model, deserialize_keras(header, frames)))
    assert ours.dtype == theirs.dtype
    assert np.array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))


def test_metrics_of_many_thresholds_go_by_value():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", "mse", metrics=[keras.metrics.AUC(num_thresholds=20_000)])
    header, frames = serialize_keras(model)
    assert header["encoding"] == "value"
    assert zoo.bits(deserialize_keras(header, frames)) == zoo.bits(model)


def test_two_layers_of_one_name_are_refused():
    """Keras 3.11 never ends with them."""
    header, frames = serialize_keras(zoo.functional())
    config = json.loads(header["body"]["config"])
    layers = config["model"]["config"]["layers"]
    layers.insert(1, copy.deepcopy(layers[1]))
    refused(changed(header, config), frames, "two of its layers are named")


def test_patterns_of_users_are_taken():
    patterns = ["dense.*/attention_[0-9]+/.*", "embedding"]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Muon(0.01, exclude_layers=patterns), "mse")
    header, frames = serialize_keras(model)
    assert header["encoding"] == "config"
    assert deserialize_keras(header, frames).optimizer.exclude_layers == patterns


@pytest.mark.parametrize("patterns", [["(dense_?)+/kernel"], [f"b{i}/.*" for i in range(9_000)]])
def test_patterns_that_would_be_refused_are_not_sent(patterns):
    """But the model is, by value: its user built it, and it works."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
    model.compile(keras.optimizers.Muon(0.01, exclude_layers=patterns), "mse")
    model.optimizer.build(model.trainable_variables)
    header, frames = serialize_keras(model)
    assert header["encoding"] == "value"
    assert deserialize_keras(header, frames).optimizer.exclude_layers == patterns


def called_often(depth, calls=40):
    """Nest models, each called so many times on other batches than it was made for."""
    inner = keras.layers.ReLU()
    for _ in range(depth):
        x = inputs = keras.Input((2,), batch_size=3 + depth)
        for _ in range(calls if inner.name.startswith("functional") else 1):
            x = inner(x)
        for _ in range(calls):
            x = keras.layers.ReLU()(x)
        inner = keras.Model(inputs, x)
    return inner


def test_models_are_not_called_without_end():
    honest = called_often(2)
    header, frames = serialize_keras(honest)
    zoo.assert_same(honest, deserialize_keras(header, frames))
    unstack = {"module": "keras.src.ops.core", "class_name": "Unstack", "config": {"axis": 1}}
    header, frames = with_layer(unstack | {"registered_name": "Unstack"})
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["layers"][0]["config"]["batch_shape"] = [None, 10**6]
    text = json.dumps(config).replace('"shape": [null, 2]', '"shape": [null, 1000000]')
    refused(changed(header, json.loads(text)), frames, "symbolic tensors")


def test_a_refusal_leaves_keras_s_defaults_as_they_were():
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    for policy in ("float77", {}, "float64"):
        lie = config | {"floatx": "float64", "policy": policy, "paths": []}
        refused(changed(header, lie), frames, "cannot be rebuilt")
        assert keras.config.floatx() == "float32"
        assert keras.config.dtype_policy().name == "float32"


def test_what_a_terminal_would_obey_is_not_in_errors():
    header, frames = serialize_keras(model())
    with pytest.raises(DecodeError) as info:
        deserialize_keras(header | {"owner": "x\x1b[2J\u202e", "encoding": "none"}, frames)
    assert str(info.value).isprintable()


def test_no_layer_runs_on_arrays_of_the_config_s_own():
    node = layer("Rescaling", scale=2.0)
    header, frames = with_layer(node)
    config = json.loads(header["body"]["config"])
    array = {"class_name": "__numpy__", "config": {"value": [[1.0, 2.0]], "dtype": "float32"}}
    config["model"]["config"]["layers"][1]["inbound_nodes"] = [{"args": [array], "kwargs": {}}]
    refused(changed(header, config), frames, "called without a tensor")


def stack():
    cells = layer("StackedRNNCells", cells=[layer("LSTMCell", units=1)] * 200)
    return layer("RNN", cell=cells) | {"build_config": {"input_shape": [None, 4, 1]}}


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ([300], [layer("Dense", units=300)] * 50, "larger than all the bytes that were sent"),
        ([1], [layer("Dense", units=1)] * 60, "more variables than the 2 that were sent"),
        # Keras takes our refusal for an error of the layer's, and words one of its own
        ([4, 1], [stack()], "more variables than the 2 that were sent"),
    ],
)
def test_more_variables_than_were_sent_are_not_made(shape, layers, message):
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    config["model"] = layer("Sequential", "keras", name="model", layers=[
        layer("InputLayer", batch_shape=[None, *shape], dtype="float32", name="input"), *layers,
    ])  # fmt: skip
    refused(changed(header, config), frames, rf"^model '\S+' \(\S+\): its config asks.*{message}")


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 5000])
def test_calls_as_deep_as_can_be_are_refused(depth):
    header, frames = serialize_keras(model())
    text = header["body"]["config"]
    config = json.loads(text)
    config["model"]["config"]["layers"][1]["inbound_nodes"] = "here"
    lie = json.dumps(config).replace('"here"', "[" * depth + "]" * depth)
    refused(header | {"body": header["body"] | {"config": lie}}, frames, "cannot be rebuilt")


@pytest.mark.parametrize("given", [5, "x", [[5]], True])
def test_patterns_that_are_none_are_refused(given):
    node = layer("DTypePolicyMap", "keras.dtype_policies", policy_map=given)
    refused(*with_layer(node), "cannot be rebuilt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frozen", [10**9]), ("frozen", [-1]),
        ("history", {"history": 3}), ("history", {"epoch": "x"}), ("history", {"params": []}),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(field, value):
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    refused(changed(header, config | {field: value}), frames, "malformed at|has not got")


@pytest.mark.parametrize("times", [1, 3])
def test_what_a_clone_takes_from_a_config_is_looked_at_too(times):
    header, frames = serialize_keras(model())
    for _ in range(times):
        deserialize_keras(header, frames)
    config = json.loads(header["body"]["config"])
    refused(changed(header, config | {"history": {"on_epoch_end": 1}}), frames, "'history'")


@pytest.mark.parametrize(
    "name", ["../canary", "/tmp/canary", "a/b", "..", ".", "", "a\0b", ".bashrc", "x" * 300]
)
def test_no_asset_leaves_its_folder(name, tmp_path, monkeypatch):
    if "vocabulary" in zoo.NOT_HERE:
        pytest.skip("lookups are TensorFlow's")
    source = keras.Sequential([keras.Input((1,), dtype="string"), keras.layers.StringLookup()])
    source.layers[0].set_vocabulary(["a", "b"])
    header, frames = serialize_keras(source)
    config = json.loads(header["body"]["config"])
    assert config["assets"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refused(
        changed(header, config | {"assets": [[config["assets"][0][0], name]]}), frames, "'assets'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("vocabulary" in zoo.NOT_HERE, reason="lookups are TensorFlow's")
def test_assets_go_elsewhere_where_a_worker_s_folder_takes_none(monkeypatch):
    source = zoo.build("vocabulary")
    monkeypatch.setattr(
        "dask_keras_serialize.rebuilding.assets.temporary_folder", lambda: "/nowhere"
    )
    header, frames = serialize_keras(source)
    assert header["encoding"] == "config"
    zoo.assert_same(source, deserialize_keras(header, frames))


@pytest.mark.skipif("vocabulary" in zoo.NOT_HERE, reason="lookups are TensorFlow's")
def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one where assets could be written, nor one that a config names."""
    theirs = tmp_path / "theirs"
    theirs.write_text("c\nd")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    source = zoo.build("vocabulary")
    header, frames = serialize_keras(source)
    name = json.loads(header["body"]["config"])["assets"][0][1]
    link = tmp_path / "temporary" / name
    link.symlink_to(theirs)
    zoo.assert_same(source, deserialize_keras(header, frames))
    assert theirs.read_text() == "c\nd"
    assert list(link.parent.iterdir()) == [link]
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", pytest.fail)
    for kind in ("StringLookup", "IntegerLookup", "TextVectorization"):
        refused(*with_layer(layer(kind, vocabulary=str(link))), kind)


def test_duplicate_keys_and_escapes_hide_nothing(canary):
    header, frames = serialize_keras(model())
    text = header["body"]["config"]
    for new in (
        '"module": "os", "class_name": "system"',
        '"module": "keras.layers", "class_name": "Dense", "module": "os"',
        '"module": "keras.layers", "class_\\u006eame": "Lambda"',
        '"module": "keras.layers", "class_name": "Dense", "class_\\u006eame": "Lambda"',
    ):
        assert '"module": "keras.layers", "class_name": "Dense"' in text
        lie = text.replace('"module": "keras.layers", "class_name": "Dense"', new)
        refused(
            header | {"body": header["body"] | {"config": lie}}, frames, "config cannot be rebuilt"
        )


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 10**5, "nul", "", "[]", "3"])
def test_what_is_no_config(text):
    header, frames = serialize_keras(model())
    refused(header | {"body": header["body"] | {"config": text}}, frames, "rebuilt here")


@pytest.mark.parametrize("depth", [30, 300, 3000])
def test_a_nest_of_models_deeper_than_python_recurses(depth):
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    nest = layer("Dense", units=2)
    for _ in range(min(depth, 300)):
        nest = layer("Sequential", "keras", layers=[nest], name="nest")
    nest = json.dumps(nest)
    if depth > 300:
        nest = "[" * depth + nest + "]" * depth
    text = json.dumps(config | {"model": "here"}).replace('"here"', nest)
    refused(header | {"body": header["body"] | {"config": text}}, frames, "rebuilt|a seed was")


def test_classes_of_listed_modules_travel_by_config(canary):
    source = keras.Sequential([keras.Input((2,)), Doubled(3, name="doubled")])
    header, frames = serialize_keras(source)
    assert header["encoding"] == "value"
    listed = {"dask-keras-serialize.modules": ["tests.test_vetting"]}
    with dask.config.set(listed):
        header, frames = serialize_keras(source)
        assert header["encoding"] == "config"
        with dask.config.set({"dask-keras-serialize.by-value": False}):
            for _ in range(4):
                copy = deserialize_keras(header, frames)
                assert type(copy.layers[0]) is Doubled
                zoo.assert_same(source, copy)
        lie = header["body"]["config"].replace('"class_name": "Doubled"', '"class_name": "zoo"')
        refused(header | {"body": header["body"] | {"config": lie}}, frames, "not a class of Keras")
        lie = header["body"]["config"].replace('"class_name": "Doubled"', '"class_name": "None"')
        refused(header | {"body": header["body"] | {"config": lie}}, frames, "is not there")
    refused(header, frames, "'Doubled' of 'tests.test_vetting'.*dask-keras-serialize.modules")


class Doubled(keras.layers.Dense):
    """A layer whose config is whole."""

    def call(self, inputs):
        return 2 * super().call(inputs)


AUDITED = """
    import pickle, sys, sysconfig, tempfile
    from importlib.util import find_spec
    from pathlib import Path

    import dask
    import keras
    import dask_keras_serialize.protocol  # with all that opening a model takes
    from dask_keras_serialize.cluster.handlers import deserialize_keras

    # whatever the backend, Keras imports it for layers that preprocess, where it is installed
    if find_spec("tensorflow"):
        import tensorflow

    *sent, by_value = pickle.loads(Path(sys.argv[1]).read_bytes())
    dask.config.set({"dask-keras-serialize.by-value": False})
    INSTALLED = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    FOLDERS = (*INSTALLED, tempfile.gettempdir(), "/sys/", "/proc/", "<frozen")
    # and where JAX looks for what is installed; of a checkout relative to it
    FOLDERS += (*filter(None, sys.path), ".", "dask_keras_serialize.egg-info")
    # of a process's first model: Keras's own, and the libraries that JAX looks for its devices by
    ROOTS = {"keras", keras.backend.backend(), "jaxlib", "libtpu"}
    RUN = {"exec", "compile", "import", "marshal.loads", "pickle.find_class", "code.__new__",
           "function.__new__", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.listdir",
           "os.symlink", "os.link", "os.rename", "os.truncate", "os.chmod", "open", "os.spawn",
           "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo",
           "urllib.Request", "ctypes.dlopen"}
    events = []

    def note(event, arguments):
        if event in RUN:
            # a code's file: torch names the functions that it wraps anew, when Keras imports them
            (what, *_) = arguments[event == "code.__new__" :] or [None]
            what = getattr(what, "co_filename", what)
            events.append((event, str(what)[:200]))

    def is_of_a_first(event, what):
        match event:
            case "import":
                return what.partition(".")[0] in ROOTS
            case "open" | "exec" | "os.listdir" | "code.__new__":
                return what.startswith(FOLDERS)
            case _:
                return event == "marshal.loads"  # of a module in those folders

    def found(is_expected):
        seen, events[:] = set(events), []
        return sorted(each for each in seen if not is_expected(*each))

    def imported(before):  # also by importlib.import_module, which no event tells of
        return sorted(set(sys.modules) - before)

    sys.addaudithook(note)
    modules = set(sys.modules)
    for header, frames in sent:
        deserialize_keras(header, frames)
    theirs = ROOTS | sys.stdlib_module_names
    strange = [name for name in imported(modules) if name.partition(".")[0] not in theirs]
    print("first:", *found(is_of_a_first), *strange)
    modules = set(sys.modules)
    for _ in range(2):
        for header, frames in sent:
            deserialize_keras(header, frames)
    temporary = tempfile.gettempdir()  # assets
    is_asset = lambda event, what: event == "open" and what.startswith(temporary)
    print("later:", *found(is_asset), *imported(modules))
    with dask.config.set({"dask-keras-serialize.by-value": True}):
        deserialize_keras(*by_value)
    assert "pickle.find_class" in {event for event, _ in events}, "the hook sees nothing"
    print("audited", len(sent))
"""


def test_nothing_on_the_way_of_a_config_runs_or_imports_code(tmp_path):
    sent = [serialize_keras(zoo.build(name)) for name in zoo.BY_CONFIG]
    assert {header["encoding"] for header, _ in sent} == {"config"}
    messages = tmp_path / "messages"
    all_of_them = [*sent, serialize_keras(zoo.build("subclassed"))]
    messages.write_bytes(
        pickle.dumps([(header, [bytes(each) for each in frames]) for header, frames in all_of_them])
    )
    program = textwrap.dedent(AUDITED)
    done = subprocess.run(
        [sys.executable, "-c", program, str(messages)],
        # what JAX compiled for others is read from files, if so asked
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["first:", "later:", f"audited {len(sent)}"]


def call(*args, **kwargs):
    return {"args": list(args), "kwargs": kwargs}


def tensor(layer, node=0, shape=(None, 2)):
    config = {"shape": list(shape), "dtype": "float32", "keras_history": [layer, node, 0]}
    return {"class_name": "__keras_tensor__", "config": config}


def at(node, *calls):
    return node | {"name": node["config"]["name"], "inbound_nodes": list(calls)}


def with_more_layers(*nodes):
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["layers"] += nodes
    return changed(header, config), frames


ARRAY = {"class_name": "__tensor__", "config": {"value": [[[[[1.0]]]]], "dtype": "float32"}}

NO_TENSORS = {
    "one without a config": {"class_name": "__keras_tensor__"},
    "one whose config is none": {"class_name": "__keras_tensor__", "config": [1]},
    "in a slice": {
        "class_name": "__slice__",
        "config": {"start": tensor("input"), "stop": None, "step": None},
    },
    "named in a name": {"a": {"class_name": "__keras_tensor__"}},
}


@pytest.mark.parametrize("looks_like", NO_TENSORS)
def test_no_layer_runs_on_arrays_beside_what_only_looks_like_a_tensor(looks_like):
    """MaxPooling3D of such sizes ends the process (SIGFPE), UpSampling1D takes all memory."""
    inner = layer("MaxPooling3D", pool_size=[2**30] * 3, strides=[1] * 3, padding="same")
    outer = layer("Sequential", "keras", name="s", layers=[inner])
    refused(
        *with_more_layers(at(outer, call(ARRAY, training=NO_TENSORS[looks_like]))),
        "called without a tensor|calls 's' without a tensor",
    )


def test_nor_where_nothing_was_seen_of_it_in_the_config(monkeypatch):
    monkeypatch.setattr(calls.Calls, "refusal", lambda *_: None)
    outer = layer("Rescaling", name="s", scale=2.0, offset=0.0)
    refused(*with_more_layers(at(outer, call(ARRAY))), "calls 's' without a tensor")


@pytest.mark.parametrize("name", ["torch_xla", "canary_module"])
def test_what_stands_for_a_module_does_not_import_it(name, tmp_path, monkeypatch):
    """``keras/src/utils/module_utils.py`` has such, which import when they are asked for a name."""
    from keras.src.utils import module_utils

    monkeypatch.setattr(module_utils, name, module_utils.LazyModule(name, name), raising=False)
    (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    module = f"keras.src.utils.module_utils.{name}"
    refused(*with_layer(layer("Dense", module, units=2)), "not a class of Keras's own")
    assert name not in sys.modules


def pipelines(depth, calls, inner):
    """Nest Pipelines of functional models, each called so many times."""
    for d in range(depth):
        before = [tensor(f"i{d}") if k == 0 else tensor(f"p{d}", k - 1) for k in range(calls)]
        layers = [
            at(layer("InputLayer", name=f"i{d}", batch_shape=[None, 2], dtype="float32")),
            at(layer("Pipeline", name=f"p{d}", layers=[inner]), *map(call, before)),
        ]
        inner = layer(
            "Functional", "keras.src.models.functional", name=f"m{d}", trainable=True,
            layers=layers, input_layers=[[f"i{d}", 0, 0]], output_layers=[[f"p{d}", calls - 1, 0]],
        ) | {"registered_name": "Functional", "name": f"m{d}"}  # fmt: skip
    return at(layer("Pipeline", name="big", layers=[inner]), call(tensor("input")))


def unrolled(steps):
    inner = layer("SimpleRNN", units=1, unroll=True, name="r")
    inner["build_config"] = {"input_shape": [None, steps, 1]}
    shape = (None, steps, 1)
    return (
        at(layer("InputLayer", name="i2", batch_shape=list(shape), dtype="float32")),
        at(layer("Pipeline", name="p", layers=[inner]), call(tensor("i2", shape=shape))),
    )


def test_layers_that_are_run_for_their_shapes_are_refused():
    refused(*with_more_layers(pipelines(5, 6, layer("Identity", name="leaf"))), "would be run")
    refused(*with_more_layers(*unrolled(20_000)), "would be run")
    refused(*with_layer(layer("FeatureSpace", "keras.utils")), "cannot be rebuilt here")


@pytest.mark.parametrize(
    "nodes", [[pipelines(5, 6, layer("Identity", name="leaf"))], unrolled(20_000)]
)
def test_nor_do_layers_call_layers_without_end(nodes, monkeypatch):
    """Whatever layers of a later Keras are run for theirs."""
    monkeypatch.setattr(vetting, "_RUN_FOR_SHAPES", ())
    message = "(?s)^(?!.*\n).*asks for more than [0-9]* calls of layers in layers|larger than"
    refused(*with_more_layers(*nodes), message)


def kinds_of(cls):
    return {cls}.union(*map(kinds_of, cls.__subclasses__()))


def test_which_layers_are_run_for_their_shapes():
    """All others of Keras's say their shapes without, or run for nothing on what has no data."""
    own = ("compute_output_shape", "compute_output_spec")
    found = {
        cls.__name__
        for cls in kinds_of(keras.Layer)
        if symbols.of_keras(cls.__module__)
        and all(getattr(cls, each) is getattr(keras.Layer, each) for each in own)
    }
    cells = {"GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"}
    # of applications, which compute what they are called on; in a FeatureSpace; subclasses of Model
    small = {"LayerScale", "StochasticDepth", "CustomScaleLayer", "TFDConcat", "TFDIdentity"}
    refused_otherwise = {"InputLayer", "Model", "Distiller", *layerwise.NEVER_BY_CONFIG}
    known = cells | small | refused_otherwise | {*layerwise.RUN_FOR_SHAPES, *layerwise.ABSTRACT}
    assert found <= known


@pytest.mark.parametrize("name", ["Layer", "Wrapper", "DataLayer"])
def test_layers_that_compute_nothing_are_not_run(name):
    module = "keras.layers"
    if not hasattr(keras.layers, name):
        module = "keras.src.layers.preprocessing.data_layer"
        pytest.importorskip(module, reason="an older Keras, with TFDataLayer in its place")
    big = layer("InputLayer", batch_shape=[10**9, 2], dtype="float32", name="big")
    node = layer(name, module, name="c")
    nodes = (at(big), at(node, call(tensor("big", shape=(1, 1)))))
    refused(*with_more_layers(*nodes), f"{name} would be run for its shapes")


def in_a_policy(node):
    """Serialize a model with a map of dtype policies that has something else in it."""
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    config["policy"] = layer("DTypePolicyMap", "keras.dtype_policies", policy_map={"x": node})
    return changed(header, config), frames


@pytest.mark.parametrize(
    "node",
    [
        layer("Dense", units=20_000, name="x") | {"build_config": {"input_shape": [None, 20_000]}},
        layer("DTypePolicyMap", "keras.dtype_policies", policy_map={"x": layer("ReLU")}),
        layer("DTypePolicyMap", "keras.dtype_policies", policy_map=[1]),
        layer("SGD", "keras.optimizers"),
        {"class_name": "__tensor__", "config": {"value": [1], "dtype": "float32"}},
        [1],
    ],
    ids=lambda node: str(node)[:70],
)
def test_a_policy_is_a_policy(node):
    refused(*in_a_policy(node), "no dtype policy|no map of dtype policies|policy_map.*is no list")
    own = layer("Dense", units=2, name="dense")
    own["config"]["dtype"] = layer("DTypePolicyMap", "keras.dtype_policies", policy_map={"x": node})
    refused(*with_layer(own), "no dtype policy|no map of dtype policies|policy_map.*is no list")


@pytest.mark.parametrize(
    ("depth", "message"), [(100, "no dtype policy"), (300, "too much in too many layers")]
)
def test_maps_of_policies_are_looked_at_however_deep(depth, message):
    node = layer("ReLU")
    for _ in range(depth):
        node = layer("DTypePolicyMap", "keras.dtype_policies", policy_map={"x": node})
    refused(*in_a_policy(node), message)


def test_policies_are_built_under_the_same_limits(monkeypatch):
    for each in ("_is_no_policy", "_is_no_map"):
        monkeypatch.setattr(vetting, each, lambda value: None)
    node = layer("Dense", units=20_000, name="x")
    node["build_config"] = {"input_shape": [None, 20_000]}
    refused(*in_a_policy(node), "larger than all the bytes that were sent")


@pytest.mark.parametrize("name", ["__bytes__", "__numpy__", "__tensor__", "function", "Dense"])
def test_a_tensor_in_what_becomes_something_else_is_none(name):
    hidden = {"class_name": name, "config": {"value": "x", "dtype": "int8", "t": tensor("input")}}
    pool = layer("MaxPooling3D", pool_size=[2**30] * 3, name="c")
    message = "without a tensor of the model's|malformed|not Keras's own|not a class of Keras's own"
    refused(*with_more_layers(at(pool, call(ARRAY, training=hidden))), message)


@pytest.mark.parametrize("name", ["Mean", "auc", "AUC", "MeanSquaredError", "get", "deserialize"])
def test_functions_are_functions_and_none_is_made_to_know(name):
    state = import_module("keras.src.backend.common.global_state")
    before = dict(state.get_global_attribute("object_name_uids"))
    node = layer("Dense", units=2, activation=layer("function", "builtins") | {"config": name})
    message = with_layer(node)
    state.get_global_attribute("object_name_uids").update(before)
    refused(*message, f"the function '{name}' of 'builtins' is not Keras's own")
    assert state.get_global_attribute("object_name_uids") == before


def test_axes_that_no_machine_can_count():
    big = layer("InputLayer", batch_shape=[10**6, 10**6], dtype="float32", name="big")
    calls = [call(*[tensor(*("o", i - 1) if i else ("big",), shape=(1, 1))] * 2) for i in range(40)]
    outer = layer("Outer", "keras.src.ops.numpy", name="o") | {"registered_name": "Outer"}
    del outer["build_config"]
    said = ""  # older Kerases multiply as NumPy does, in no time
    try:
        deserialize_keras(*with_more_layers(at(big), at(outer, *calls)))
    except DecodeError as error:
        said = str(error)
    assert not said or ("axes as no array has" in said and "\n" not in said)
    assert said or tuple(map(int, keras.version().split(".")[:2])) < (3, 13)


@pytest.mark.parametrize(
    "shape", [[0, 10**7, 10**7], [10**7] * 40 + [0], [0, 2**64], [1] * 65], ids=len
)
def test_variables_of_no_bytes_have_a_shape_too(shape):
    node = layer("LayerNormalization", axis=list(range(len(shape))), center=False, name="n")
    node["build_config"] = {"input_shape": shape}
    refused(*with_more_layers(at(node)), "axes that no array has|larger than a")


def test_a_constant_is_of_the_variables_shape():
    constant = layer("Constant", "keras.initializers", value=[0] * 20_000)
    node = layer("Dense", units=1, kernel_initializer=constant, name="n")
    node["build_config"] = {"input_shape": [None, 16_000]}
    message = r"of shape \(16000, 1\), and gives it a value of \(20000,\)"
    refused(*with_more_layers(at(node)), message)


def test_a_pipeline_goes_by_value_and_back():
    pipeline = keras.layers.Pipeline([keras.layers.Rescaling(2.0), keras.layers.Rescaling(3.0)])
    source = keras.Sequential([keras.Input((2,)), pipeline, keras.layers.Dense(2)])
    header, frames = serialize_keras(source)
    assert header["encoding"] == "value"
    zoo.assert_same(source, deserialize_keras(header, frames))


@pytest.mark.parametrize("by_value", [True, False])
def test_subclasses_of_model_are_refused(by_value):
    node = layer("Distiller", "keras.distillation", name="d")
    if not hasattr(keras, "distillation"):
        node = layer("Model", "keras.src.trainers.trainer", name="d")
    with dask.config.set({"dask-keras-serialize.by-value": by_value}):
        refused(*with_layer(node), "subclass of Model|not a class of Keras")


def test_half_a_surrogate_pair_is_no_text():
    header, frames = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    config["model"]["config"]["name"] = "\ud800"
    refused(changed(header, config), frames, "half of a surrogate pair")
    config["model"]["config"]["name"] = "\U0001f600"
    assert deserialize_keras(changed(header, config), frames).name == "\U0001f600"


@pytest.mark.parametrize("code", [[{"a": 1, "b": 2}], ["ab"], [["a", "value", "c"]], [3], 3, [[]]])
def test_code_is_named_whatever_its_rows_are(code):
    header, frames = serialize_keras(keras.optimizers.SGD())
    header["body"]["code"] = code
    with dask.config.set({"dask-keras-serialize.by-value": False}):
        refused(header, frames, "by-value forbids that|malformed")


def test_a_header_says_what_its_config_is_of():
    header, frames = serialize_keras(model())
    refused(header | {"class-name": "keras.src.models.sequential.Sequential"}, frames, "was sent")


@pytest.mark.parametrize("rows", [[[9, [0, 1]]], [[-1, [0, 1]]]])
def test_no_variable_is_placed_that_is_not_there(rows):
    header, frames = serialize_keras(model())
    body = header["body"] | {"placements": rows}
    refused(header | {"body": body}, frames, "placements of")


def test_names_are_not_used_up(canary):
    """Neither by what arrives nor by what is refused: a user's next layers are called as ever."""
    source = zoo.build("trained")
    header, frames = serialize_keras(source)
    config = json.loads(header["body"]["config"])
    state = keras.src.backend.common.global_state
    keras.layers.Dense(1)
    before = dict(state.get_global_attribute("object_name_uids"))
    for _ in range(4):
        deserialize_keras(header, frames)
        refused(changed(header, config | {"paths": []}), frames, "cannot be rebuilt")
    assert state.get_global_attribute("object_name_uids") == before


def test_what_nobody_expected_is_refused_too(monkeypatch):
    header, frames = serialize_keras(model())
    monkeypatch.setattr(vetting, "_refusal", lambda *_: 1 // 0)
    refused(header, frames, "ZeroDivisionError.*did not expect: please report it")


def test_data_does_not_count_as_objects():
    """Of which each may have tensors and calls of its own."""
    header, _ = serialize_keras(model())
    config = json.loads(header["body"]["config"])
    objects = vetting.read(json.dumps(config), Header.from_wire(header)).nodes
    data = [{"class_name": name, "config": ""} for name in ("__bytes__", "__keras_tensor__")]
    config["history"] = {"history": {}, "epoch": data * 100, "params": None}
    assert vetting.read(json.dumps(config), Header.from_wire(header)).nodes == objects
