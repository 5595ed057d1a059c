"""The house rules that a tool can check."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PACKAGE = Path(__file__).parent.parent / "dask_keras_serialize"

#: Modules from the top of the house down: each imports only what stands below it.
FLOORS = [
    {"__init__"},
    {"cli"},
    {"cluster.doctor"},
    {"cluster.checkup"},
    {"cluster.plugin", "placement", "cluster.warmup"},
    {"workflows.averaging", "workflows.estimators", "workflows.inference", "workflows.searching"},
    {"workflows.holding", "workflows.batches"},
    {"workflows.replicas", "workflows.means", "workflows.outputs"},
    {"workflows"},
    {"registration"},
    {"cluster.offload"},
    {"cluster.tasks", "cluster.handlers"},
    {"pickling", "inside"},
    {"configs.architecture"},
    {"packed", "copying"},
    {"protocol", "cluster.broken", "views", "wire.mapped"},
    {"configs.templates"},
    {"configs.by_config", "values.by_value"},
    {
        "configs.fidelity",
        "rebuilding.rebuild",
        "values.translation",
        "configs.compiled",
        "configs.sequentials",
        "limits.budget",
        "rebuilding.assets",
    },
    {"values.states", "limits.vetting"},
    {"configs.layerwise", "values.mending"},
    {"values.shells"},
    {"values.binding", "wire.environment"},
    {"limits.arguments"},
    {"limits.symbols"},
    {"limits.operations", "limits.calls", "configs.likeness"},
    {
        "private",
        "parts",
        "values.blame",
        "rebuilding.aside",
        "configs.skew",
        "rebuilding.hooks",
        "configs.defaults",
        "limits.names",
        "configs.fields",
    },
    {"backends.tensorflow", "backends.jax", "backends.torch"},
    {
        "backends.tensorflow_objects",
        "backends.jax_trainer",
        "backends.torch_objects",
        "backends.torch_memory",
    },
    {"devices.tensorflow", "devices.jax", "devices.torch"},
    {"devices"},
    {"backends"},
    {"cluster.verdict", "cluster.presence", "wire.sides"},
    {
        "wire.header",
        "limits.kinds",
        "limits.nests",
        "wire.strings",
        "cluster.meters",
        "rebuilding.garbage",
        "rebuilding.turns",
    },
    {"wire.fingerprints", "cluster.whereabouts"},
    {"wire.frames"},
    {"wire.cuda"},
    {"errors"},
    {"cluster", "configs", "limits", "rebuilding", "values", "wire"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


#: Modules below the picklers that a scheduler, or who only looks, loads.
WITHOUT_KERAS = {"inside", "packed", "views", "errors"}
WITHOUT_KERAS |= {"wire.mapped", "wire.header", "wire.frames", "wire.sides"}

WITH_DISTRIBUTED = {"placement", "cluster.plugin", "cluster.warmup"}
WITH_DISTRIBUTED |= {"cluster.checkup", "cluster.doctor"}
WITH_DISTRIBUTED |= {"workflows.averaging", "workflows.means", "workflows.searching"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


MODULES = dict(modules())


def imported(tree, inside_functions=True):
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor():
    assert MODULES.keys() == FLOOR.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    for target in imported(MODULES[name]):
        below = target.removeprefix("dask_keras_serialize.")
        # packed opens itself by way of protocol, handlers by way of both, when asked
        late = {"packed": {"protocol"}}.get(name, set())
        if target.startswith("dask_keras_serialize.") and below in FLOOR and below not in late:
            assert FLOOR[below] > FLOOR[name], f"{name} imports {below}"


def test_keras_and_distributed_stay_where_they_belong():
    for name, tree in MODULES.items():
        top = {target.partition(".")[0] for target in imported(tree, inside_functions=False)}
        if FLOOR[name] < FLOOR["pickling"] or name in WITHOUT_KERAS:
            assert not top & {"keras", "tensorflow", "jax", "torch"}, name
        anywhere = {target.partition(".")[0] for target in imported(tree)}
        assert "distributed" not in anywhere or name in WITH_DISTRIBUTED, name
        named = name.startswith(("backends.", "devices."))
        assert not anywhere & {"tensorflow", "jax", "torch"} or named, name


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_a_contract_and_are_short(name):
    docstring = ast.get_docstring(MODULES[name])
    assert docstring, name
    assert len(docstring) > 60 or name == "backends.torch", f"{name}: {docstring}"
    path = PACKAGE / Path(*name.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    assert len(source.read_text().splitlines()) <= 350, name


def test_public_functions_say_what_they_take_and_return():
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"
