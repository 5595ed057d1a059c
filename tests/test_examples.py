"""The examples, run as a user runs them, and what examples/README.md says of them."""

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import click
import matplotlib.image
import nbformat
import numpy as np
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker

import dask_keras_serialize
from dask_keras_serialize import cli, placement
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
GPU_PAGE = (EXAMPLES / "gpu_cluster.md").read_text()

#: tests/test_demo.py and tests/test_search.py, where dask-ml is, run them, and ask more of them.
RUN_ELSEWHERE = {"demo.py", "search.py"}
SCRIPTS = sorted({path.name for path in EXAMPLES.glob("*.py")} - RUN_ELSEWHERE)
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))

#: It has nothing to draw.
WITHOUT_PICTURE = {"secure_cluster.py"}

#: Seconds that an example may take on two cores of its own.
LIMIT = 120


def run(command, folder):
    """Run a command in a folder that is not the checkout."""
    others = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # who wait for the same cores
    timeout = min(LIMIT * others, 280)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def copied(name, tmp_path):
    """Copy the examples without what they drew, so that what one draws is what it drew now."""
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return folder / name


def assert_is_a_picture(path):
    picture = matplotlib.image.imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert height > 300
    assert width > 600
    assert len(np.unique(picture.reshape(height * width, -1), axis=0)) > 20
    for half in np.array_split(picture, 2, axis=1):  # neither is blank
        assert (half.min(axis=-1) < 0.5).mean() > 0.002


def test_the_readme_lists_every_example_and_no_other():
    table = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert all(text == target for text, target in table)
    there = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".md")]
    assert sorted(text for text, _ in table) == sorted({*there} - {"README.md"})


@pytest.mark.programs
@pytest.mark.cluster
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path):
    printed = run([sys.executable, copied(name, tmp_path)], tmp_path)
    assert printed.strip()
    stem = name.removesuffix(".py")
    pictures = sorted((tmp_path / "examples" / "output").glob("*.png"))
    assert [path.stem for path in pictures] == ([] if name in WITHOUT_PICTURE else [stem])
    for path in pictures:
        assert_is_a_picture(path)
    if name in CHECKS:
        CHECKS[name](printed)


def check_finetune(printed):
    assert printed.count("came back to the last bit") == 3
    steps = [int(n) for n in re.findall(r"after (\d+) steps", printed)]
    assert steps[2] == 2 * steps[1] > 0  # of the second training: it went on
    before, after = (float(share) for share in re.findall(r"right: ([\d.]+)%", printed))
    assert 60 < before <= after + 5


def check_secure_cluster(printed):
    first, by_config, with_code, stranger = printed.splitlines()
    assert first.startswith("scheduler at tls://")
    assert by_config.endswith("predicted 1797 digits, came back as it was")
    assert "by-value forbids that here; code of its own that it names: __main__.wi" in with_code
    assert stranger.endswith(": not let in")


#: What else is asked of what a script prints.
CHECKS = {"finetune.py": check_finetune, "secure_cluster.py": check_secure_cluster}

EXECUTE = """
import nbclient, nbformat, sys
source, executed = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
nbformat.write(notebook, executed)
"""


@pytest.mark.programs
@pytest.mark.cluster
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_path):
    executed = tmp_path / "executed.ipynb"
    run([sys.executable, "-c", EXECUTE, copied(name, tmp_path), executed], tmp_path)
    cells = [cell for cell in json.loads(executed.read_text())["cells"] if "outputs" in cell]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells)
    printed = "".join("".join(out["text"]) for out in outputs if out.get("name") == "stdout")
    shown = [out["data"] for out in outputs if "data" in out]
    (view,) = ("".join(data["text/html"]) for data in shown if "text/html" in data)
    assert "digits/dense/kernel" in view  # pack(model), as notebooks see it
    assert ["2"] in [data.get("text/plain") for data in shown]  # workers that hold the model
    assert "135 steps here, 450 there" in printed
    shares = [float(share) for share in re.findall(r": ([\d.]+)%", printed)]
    assert len(shares) == 2
    assert min(shares) > 60
    assert any("image/png" in data for data in shown)


def test_there_are_scripts_and_a_notebook():
    assert "finetune.py" in SCRIPTS
    assert NOTEBOOKS == ["digits.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", GPU_PAGE, re.S)
    return [line for block in blocks for line in block.splitlines()]


def parse(command, *words):
    """Parse a command line by the program's own rules, and do not run it."""
    return command.make_context(command.name or "", list(words)).params


@pytest.mark.parametrize("line", commands())
def test_the_gpu_page_names_what_there_is(line):
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        assert name == "KERAS_BACKEND"
        assert value in ("tensorflow", "jax", "torch")
    match words:
        case ["dask", "scheduler", *rest]:
            parse(dask_scheduler.main, *rest)
        case ["dask", "worker", address, *rest]:
            assert address == "tcp://scheduler:8786"
            # parses the preload's arguments too, by its own command; whether they make sense:
            asked = parse(dask_worker.main, address, *rest)["preload_argv"]
            assert "--preload" in rest
            given = dict(zip(asked[::2], asked[1::2], strict=True))
            assert given
            settings = {k.removeprefix("--"): placement._number(v) for k, v in given.items()}
            dask_keras_serialize.PlaceKeras(**settings)
        case ["dask", "keras", command, *rest]:
            parse(cli.keras.commands[command], *rest)
        case ["pip", "install", package]:
            name, _, extra = package.removesuffix("]").partition("[")
            assert name in ("dask-keras-serialize", "dask-cuda")
            extras = (ROOT / "setup.cfg").read_text()
            assert not extra or re.search(rf"^{extra} =$", extras, re.M)
        case ["docker", "compose", *rest]:
            compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
            options = {word for word in rest if word.startswith("--")}
            assert options <= {"--profile", "--build"}
            if "--profile" in options:
                profile = rest[rest.index("--profile") + 1]
                assert any(profile in service.get("profiles", ()) for service in compose.values())
            if "run" in rest:
                assert rest[-1] in compose
        case ["make", target, setting]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}: \#\#|^{target}: .*\#\#", makefile, re.M)
            assert setting.partition("=")[0] == "BACKEND_EXTRA"
        case ["dask", "cuda", "worker", address]:  # dask-cuda is not installed: no options
            assert address == "tcp://scheduler:8786"
        case _:
            pytest.fail(f"nothing here checks this command: {line}")


def test_the_gpu_page_calls_what_there_is():
    """Every plugin it makes takes those arguments."""
    (program,) = re.findall(r"```python\n(.*?)```", GPU_PAGE, re.S)
    plugins = {}
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            cls = getattr(dask_keras_serialize, node.func.id, None)
            if cls is not None:
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                inspect.signature(cls).bind(*node.args, **named)
                if cls is dask_keras_serialize.PlaceKeras:
                    cls(**{key: ast.literal_eval(value) for key, value in named.items()})
                plugins[node.func.id] = plugins.get(node.func.id, 0) + 1
    assert plugins == {"PlaceKeras": 2, "WarmKeras": 1}


def test_no_option_is_taken_on_trust():
    """The commands are parsed by what would run them."""
    for option in ("--device-of-mine", "--no-such"):
        with pytest.raises(click.UsageError):
            test_the_gpu_page_names_what_there_is(
                "dask worker tcp://scheduler:8786 --preload dask_keras_serialize.placement "
                f"--device 0 {option} 1"
            )
    with pytest.raises(click.UsageError):
        test_the_gpu_page_names_what_there_is("dask keras doctor --no-such")
