"""The main job between processes: a scheduler without Keras, two workers, this client."""

import copy
import dataclasses
import os
import sys
import threading
from pathlib import Path

import cloudpickle
import dask
import keras
import numpy as np
import pytest
from distributed import Client, LocalCluster, wait
from sklearn.preprocessing import StandardScaler

from dask_keras_serialize import DecodeError, EncodeError, MissingPackageError, RegisterKeras
from tests import zoo
from tests.conftest import shipped, start_cluster, travelling_by_value

pytestmark = pytest.mark.cluster

CHUNKS = [zoo.X[i : i + 8] for i in range(0, len(zoo.X), 8)]

MODELS = ["sequential", "functional", "subclassed", "compiled", "trained", "trained functional"]
MODELS += ["trained subclassed", "lambda and custom layer", "lossy loss"]


@pytest.fixture(autouse=True)
def code_travels_by_value():
    """The workers cannot import this suite."""
    with travelling_by_value(sys.modules[__name__], zoo):
        yield


@shipped
def predict(chunk, model):
    return model.predict(chunk, batch_size=8, verbose=0)


@shipped
def train(model, x, y):
    import keras  # not a global: the scheduler unpickles this function, and has no keras

    if not model.compiled:
        optimizer = keras.optimizers.Adam(name="adam")
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    # torch's unseeded dropout draws from the process, and so does what builds a loss
    model.test_on_batch(x, y)
    keras.utils.set_random_seed(0)
    model.fit(x, y, epochs=1, batch_size=8, shuffle=False, verbose=0)
    return model


def same(results, expected):
    return all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_main_job(client, name):
    model = zoo.build(name)
    expected = [predict(chunk, model) for chunk in CHUNKS]
    future = client.scatter(model, broadcast=True)
    assert same(client.gather(client.map(predict, CHUNKS, model=future)), expected)
    assert same(client.gather(client.map(predict, CHUNKS, model=model)), expected)
    delayed = [dask.delayed(predict)(chunk, model) for chunk in CHUNKS]
    assert same(dask.compute(*delayed), expected)
    zoo.assert_same(model, future.result())


@pytest.mark.parametrize("name", ["functional", "subclassed", "trained", "trained subclassed"])
def test_a_model_trained_on_a_worker_comes_back(client, name):
    model = zoo.build(name)
    there = client.submit(train, model, zoo.X, zoo.LABELS).result()
    here = train(copy.deepcopy(model), zoo.X, zoo.LABELS)
    assert there.history.history == here.history.history
    zoo.assert_same(here, there)
    assert zoo.to_bytes(model.variables[0]) != zoo.to_bytes(there.variables[0])


@shipped
@dataclasses.dataclass
class Estimator:
    model: object
    twin: object


def test_models_anywhere_inside_a_value(client):
    model = zoo.build("trained")
    x = zoo.X
    expected = predict(x, model)

    def inside(value):
        return predict(x, value.model) if value.model is value.twin else "two models"

    def closed_over():
        return predict(x, model)

    estimator = Estimator(model, model)
    assert np.array_equal(client.submit(inside, estimator).result(), expected)
    assert np.array_equal(client.submit(inside, client.scatter(estimator)).result(), expected)
    assert np.array_equal(client.submit(closed_over).result(), expected)
    back = client.submit(lambda e: [{"deep": e}], estimator).result()[0]["deep"]
    zoo.assert_same(model, back.model)
    assert back.model is back.twin


def lone_objects():
    model = zoo.build("trained")
    early = keras.callbacks.EarlyStopping(patience=3)
    early.set_model(model)
    early.on_train_begin()
    early.best_weights = model.get_weights()
    # torch's tensors go torch's own way, which a scheduler without torch cannot follow
    tensor = keras.ops.convert_to_tensor([1.0, 2.0])
    tensors = {"tensor": tensor} if keras.backend.backend() != "torch" else {}
    return {
        "layer": model.layers[0],
        "optimizer": model.optimizer,
        "metric": model.metrics[0],
        "loss": keras.losses.Huber(delta=3.0),
        "custom loss": shipped(type("Mine", (keras.Loss,), {"call": lambda self, y, p: y - p}))(),
        "initializer": keras.initializers.Orthogonal(gain=2.0, seed=1),
        "schedule": keras.optimizers.schedules.CosineDecay(0.1, 10),
        "policy": keras.DTypePolicy("mixed_float16"),
        "seed": keras.random.SeedGenerator(5),
        "variable": keras.Variable([1.0, 2.0], name="v"),
        "callback": early,
        **tensors,
    }


@shipped
def identity(value):
    return value


def test_objects_that_are_no_models(client):
    """Past a scheduler without Keras: in a graph, scattered, and as a result."""
    for name, obj in lone_objects().items():
        for value in (obj, [obj, 1], {"deep": (obj, "it")}):
            arrived = client.submit(identity, value, pure=False).result()
            again = client.submit(identity, client.scatter(value), pure=False).result()
            for each in (arrived, again):
                while isinstance(each, (list, tuple, dict)):
                    each = each["deep"] if isinstance(each, dict) else each[0]
                assert type(each).__qualname__ == type(obj).__qualname__, name
                assert weights_of(each) == weights_of(obj), name
                if hasattr(obj, "get_config"):
                    assert each.get_config() == obj.get_config(), name
    assert not client.run_on_scheduler(lambda: "keras" in __import__("sys").modules)


def weights_of(obj):
    variables = getattr(obj, "variables", [obj] if isinstance(obj, keras.Variable) else [])
    return [zoo.to_bytes(variable) for variable in variables]


class Run:
    """An object of a user's own, with a model."""

    def __init__(self, model):
        self.model = model


def test_what_cannot_be_sent_is_named(client):
    """Dask says no more than the class of what was sent."""
    model = zoo.build("subclassed")
    model.thing = {"a": [threading.Lock()]}

    def in_a_graph(sent):
        return dask.delayed(id)(sent).compute()

    for sent in (model, [model], Run(model), {"a": [Run(model)]}):
        for send in (client.scatter, lambda sent: client.submit(id, sent), in_a_graph):
            with pytest.raises(EncodeError, match=r"attribute thing\['a'\]\[0\], a lock") as info:
                send(sent)
            assert "\n" not in str(info.value)


def test_a_scheduler_opens_nothing(client):
    """It has no scikit-learn, which a model in a task graph may hold an object of."""
    model = zoo.build("sequential")
    model.scaler = StandardScaler().fit(zoo.X)
    mean = client.submit(shipped(lambda model: model.scaler.mean_), model).result()
    np.testing.assert_array_equal(mean, model.scaler.mean_)
    for module in ("sklearn", "keras"):
        assert not client.run_on_scheduler(lambda name: name in __import__("sys").modules, module)


def test_what_objects_share_survives_the_cluster(client):
    generator, judge = zoo.mlp(zoo.WIDTH, None), zoo.mlp()
    both = keras.Sequential([keras.Input((zoo.WIDTH,)), generator, judge])
    value = {"generator": generator, "judge": judge, "both": both}

    def check(value):
        shared = value["both"].layers == [value["generator"], value["judge"]]
        return value if shared else "apart"

    for sent in (value, client.scatter([value])[0]):
        arrived = client.submit(check, sent).result()
        assert arrived["both"].layers == [arrived["generator"], arrived["judge"]]
        zoo.assert_same(both, arrived["both"])


def test_a_model_crosses_once_per_worker_and_is_one_replica_there(client):
    """1,000 chunks, of a model of a few kilobytes."""

    def which(i, model):
        model.predict_on_batch(CHUNKS[0])
        # held by the worker: no id is used again. Not by the model, which would carry it
        # on to the other worker with its attributes.
        sys.replicas = getattr(sys, "replicas", {})
        sys.replicas[id(model)] = model
        # of TensorFlow's alone
        count = getattr(model.predict_function, "experimental_get_tracing_count", lambda: 1)
        traces = count()
        return os.getpid(), len(sys.replicas), traces

    model = zoo.build("sequential")
    seen = client.gather(client.map(which, range(1000), model=model))
    assert len({pid for pid, _, _ in seen}) == 2
    assert {replicas for _, replicas, _ in seen} == {1}
    assert {traces for _, _, traces in seen} == {1}
    # a task's message carries no model: the scheduler holds it once, in one task
    assert client.run_on_scheduler(tasks_with_a_model) <= 1


@shipped
def tasks_with_a_model(dask_scheduler):
    import cloudpickle

    specs = [task.run_spec for task in dask_scheduler.tasks.values()]
    return sum(b"dask_keras_serialize.packed" in cloudpickle.dumps(spec) for spec in specs)


def test_methods_of_models_are_tasks(client):
    model = zoo.build("trained")
    expected = model.predict(CHUNKS[0], verbose=0)
    assert same([client.submit(model.predict, CHUNKS[0], verbose=0).result()], [expected])
    assert same([dask.delayed(model.predict)(CHUNKS[0], verbose=0).compute()], [expected])
    results = client.gather(client.map(model.predict, CHUNKS, verbose=0))
    assert same(results, [model.predict(chunk, verbose=0) for chunk in CHUNKS])
    assert client.run_on_scheduler(tasks_with_a_model) <= 3


def test_impure_maps_share_no_model(client):
    """Each may change its own."""

    def grow(i, model):
        model.variables[0].assign(model.variables[0] + 1)
        return float(np.asarray(model.variables[0]).mean())

    model = zoo.build("sequential")
    before = float(np.asarray(model.variables[0]).mean())
    first = client.map(grow, [0], model=model, pure=False)
    a = client.gather(first)[0]
    second = client.map(grow, [0], model=model, pure=False)
    b = client.gather(second)[0]
    assert a == b == pytest.approx(before + 1, abs=1e-5)


def test_two_maps_do_not_mix_their_models_up(client):
    a, b = zoo.build("sequential"), zoo.build("functional")
    first = client.map(predict, CHUNKS, model=a)
    second = client.map(predict, CHUNKS, model=b)
    assert same(client.gather(first), [predict(chunk, a) for chunk in CHUNKS])
    assert same(client.gather(second), [predict(chunk, b) for chunk in CHUNKS])


def test_lists_of_models_are_arguments_too(client):
    def all_of(chunk, models):
        return [predict(chunk, model) for model in models]

    models = [zoo.build("sequential"), zoo.build("subclassed")]
    results = client.gather(client.map(all_of, CHUNKS[:2], models=models))
    for chunk, result in zip(CHUNKS, results, strict=False):
        assert same(result, [predict(chunk, model) for model in models])


def test_a_worker_gives_a_model_to_another(client):
    workers = list(client.nthreads())
    model = zoo.build("trained subclassed")
    future = client.scatter(model, workers=workers[0])
    there = client.submit(predict, zoo.X, future, workers=workers[1])
    assert np.array_equal(there.result(), predict(zoo.X, model))


def test_the_scheduler_never_loads_keras(client):
    def loaded():
        return sorted({name.partition(".")[0] for name in sys.modules} & {"keras", "tensorflow"})

    model = zoo.build("trained")
    wait(client.map(predict, CHUNKS, model=model))
    wait(client.submit(train, model, zoo.X, zoo.LABELS))
    assert client.run_on_scheduler(loaded) == []


@pytest.mark.programs
def test_a_scheduler_that_has_keras_does_not_load_it_either(processes, tmp_path):
    here = Path(sys.executable).parent
    address = start_cluster(processes, here, here, tmp_path)
    model = zoo.build("trained")
    with Client(address) as client:
        expected = [predict(chunk, model) for chunk in CHUNKS]
        assert same(client.gather(client.map(predict, CHUNKS, model=model)), expected)
        assert same(dask.compute(*[dask.delayed(predict)(c, model) for c in CHUNKS]), expected)
        assert "keras" not in client.run_on_scheduler(lambda: list(sys.modules))


@pytest.mark.once
def test_in_a_local_cluster_the_scheduler_builds_no_replica(monkeypatch):
    """Scheduler and client share this process; nothing may be decoded in it."""
    model = zoo.build("trained subclassed")
    expected = [predict(chunk, model) for chunk in CHUNKS]
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        monkeypatch.setattr("dask_keras_serialize.protocol.decode", refuse)
        assert same(client.gather(client.map(predict, CHUNKS, model=model)), expected)
        assert same(dask.compute(*[dask.delayed(predict)(c, model) for c in CHUNKS]), expected)
        assert client.submit(train, model, zoo.X, zoo.LABELS).status in ("pending", "finished")


def refuse(header, frames):
    raise AssertionError("a model was rebuilt on the scheduler's side")


def test_threads_of_one_process():
    model = zoo.build("trained")
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        expected = [predict(chunk, model) for chunk in CHUNKS]
        assert same(client.gather(client.map(predict, CHUNKS, model=model)), expected)


def test_spilling_and_back(tmp_path):
    """A worker whose memory is all spill: every model goes to disk and comes back."""
    config = {"distributed.worker.memory.target": 1e-9, "distributed.worker.memory.spill": False}
    config |= {
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
    }
    models = [zoo.build(name) for name in ("trained", "subclassed")]
    with (
        dask.config.set(config),
        LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0", memory_limit="4GiB",
            local_directory=tmp_path,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        futures = client.scatter(models)
        assert client.run(lambda dask_worker: len(dask_worker.data.slow)) != {}
        (on_disk,) = client.run(lambda dask_worker: len(dask_worker.data.slow)).values()
        assert on_disk == len(models)
        for model, future in zip(models, futures, strict=True):
            result = client.submit(predict, zoo.X, future).result()
            assert np.array_equal(result, predict(zoo.X, model))


def test_a_worker_without_the_class_says_so_and_lives(client):
    cloudpickle.unregister_pickle_by_value(zoo)
    try:
        model = zoo.build("subclassed")
        for attempt in (
            lambda: client.submit(model_name, model).result(),
            lambda: client.gather(client.map(predict, CHUNKS, model=model)),
            lambda: dask.delayed(predict)(CHUNKS[0], model).compute(),
            lambda: client.submit(model_name, client.scatter(model)).result(),
        ):
            with pytest.raises(Exception, match=r"module 'tests'.*register_pickle_by_value"):
                attempt()
    finally:
        cloudpickle.register_pickle_by_value(zoo)
    assert client.submit(predict, zoo.X, zoo.build("sequential")).result().shape == (32, 3)
    assert len(client.nthreads()) == 2


@shipped
def model_name(model):
    return model.name


def test_workers_with_an_unknown_backend_say_so_and_live(
    core_bin, processes, tmp_path, monkeypatch
):
    monkeypatch.setenv("KERAS_BACKEND", "abacus")
    address = start_cluster(processes, core_bin, Path(sys.executable).parent, tmp_path)
    model = zoo.build("trained")
    why = "model 'sequential.*cannot be imported here.*set KERAS_BACKEND"
    with Client(address) as client:
        for attempt in (
            lambda: client.submit(predict, CHUNKS[0], model),
            lambda: client.map(predict, CHUNKS, model=model)[0],
            lambda: client.submit(predict, CHUNKS[0], client.scatter(model)),
            lambda: client.submit(str, model),
        ):
            with pytest.raises(DecodeError, match=why):
                attempt().result(timeout=60)
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3


def test_a_model_that_cannot_be_opened_by_another_worker_fails_its_task(client):
    """It would wait forever, were the error raised where the worker reads."""
    first, second = client.nthreads()

    def class_of_one_worker():
        import types

        module = types.ModuleType("only_here")
        exec("import keras\nclass Net(keras.Model):\n    pass", vars(module))
        sys.modules["only_here"] = module
        return module.Net(name="net")

    future = client.submit(class_of_one_worker, workers=[first], pure=False)
    wait(future, timeout=60)
    there = client.submit(lambda model: model.name, future, workers=[second], pure=False)
    why = r"model 'net' .*module 'only_here', which is not installed"
    with pytest.raises(DecodeError, match=why):
        there.result(timeout=60)
    assert client.submit(sum, [1, 2], workers=[second]).result(timeout=60) == 3


@pytest.mark.once
def test_a_cluster_whose_workers_lack_the_package_says_so(core_bin, processes, tmp_path):
    without = environment_without_us(tmp_path)
    address = start_cluster(processes, core_bin, without, tmp_path)
    model = zoo.build("sequential")
    with Client(address) as client:
        for attempt in (
            lambda: client.scatter(model),
            lambda: client.scatter([model], broadcast=True),
            lambda: client.submit(predict, zoo.X, model),
            lambda: client.map(predict, CHUNKS, model=model),
            lambda: client.submit(model.predict, zoo.X),
            dask.delayed(predict)(CHUNKS[0], model).compute,
        ):
            with pytest.raises(MissingPackageError, match="dask-keras-serialize is not installed"):
                attempt()
        with pytest.raises(MissingPackageError, match="pip install dask-keras-serialize"):
            client.submit(make_model).result()
        with pytest.raises(Exception, match="No module named 'dask_keras_serialize'"):
            client.register_plugin(RegisterKeras())
        assert client.submit(sum, [1, 2]).result() == 3


@shipped
def make_model():
    import keras

    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])


def environment_without_us(folder: Path) -> Path:
    """Make an environment of all packages of this one but ours; return its bin."""
    import venv

    venv.create(folder / "env")
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    for entry in Path(keras.__file__).parent.parent.iterdir():
        if "dask_keras_serialize" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    script = folder / "env" / "bin" / "dask"
    python = folder / "env" / "bin" / "python"
    script.write_text(f"#!{python}\nimport sys\nfrom dask.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return script.parent


@pytest.mark.programs
def test_the_plugin_registers_where_the_config_does_not(processes, tmp_path, core_bin):
    here = Path(sys.executable).parent
    off = {"DASK_DASK_KERAS_SERIALIZE__REGISTER": "False"}
    file = tmp_path / "scheduler.json"
    processes.start(
        core_bin / "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
        "--scheduler-file", file,
    )  # fmt: skip
    worker = [here / "dask", "worker", "--scheduler-file", file, "--no-dashboard", "--no-nanny"]
    processes.start(*worker, env=off)
    with Client(scheduler_file=str(file), timeout=60) as client:
        client.wait_for_workers(1, timeout=60)
        assert list(client.run(is_registered).values()) == [False]
        client.register_plugin(RegisterKeras())
        assert list(client.run(is_registered).values()) == [True]
        processes.start(*worker, env=off)
        client.wait_for_workers(2, timeout=60)
        assert list(client.run(is_registered).values()) == [True, True]
        model = zoo.build("trained")
        result = client.gather(client.map(predict, CHUNKS, model=model))
        assert same(result, [predict(chunk, model) for chunk in CHUNKS])


@shipped
def is_registered():
    import sys  # importing the package would register it

    return sys.modules["dask_keras_serialize.registration"].registered()


def test_a_method_of_what_cannot_be_opened_fails_its_task(client):
    """It is looked up while the worker unpickles the task, which must not fail."""
    cloudpickle.unregister_pickle_by_value(zoo)
    try:
        model = zoo.build("subclassed")
        with pytest.raises(DecodeError, match="module 'tests'"):
            client.submit(model.predict, zoo.X, pure=False).result(timeout=60)
        # nor may it come back as a result
        with pytest.raises(Exception, match="module 'tests'"):
            client.submit(identity, model, pure=False).result(timeout=60)
    finally:
        cloudpickle.register_pickle_by_value(zoo)
    assert client.submit(sum, [1, 2], pure=False).result(timeout=60) == 3
    assert len(client.nthreads()) == 2
