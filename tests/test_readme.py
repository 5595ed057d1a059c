"""README's promises: its program runs as it stands, and its links lead somewhere."""

import os
import re
import subprocess
import sys

import keras
import pytest

from dask_keras_serialize import views
from dask_keras_serialize.cluster.verdict import judge
from tests import zoo
from tests.catalogue import CITIZENS, OF_KERAS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
#: The one with a search is run by test_dask_ml.py, where dask-ml is.
HERE = [program for program in PROGRAMS if "dask_ml" not in program]
#: What each prints.
PRINTED = [r"\{'accuracy': \[.*\], 'loss': \[.*\]\}", r"^\[[\d. ]+\]$"]


def test_the_first_program_does_not_name_the_package():
    assert "dask_keras_serialize" not in PROGRAMS[0]


@pytest.mark.programs
@pytest.mark.cluster
@pytest.mark.parametrize(("program", "printed"), list(zip(HERE, PRINTED, strict=True)))
def test_programs_run_as_they_stand(tmp_path, program, printed):
    script = tmp_path / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"DASK_DISTRIBUTED__DASHBOARD__LINK": ""},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(printed, done.stdout, re.MULTILINE)


def test_the_doctor_says_what_it_shows():
    """The cluster that it shows, as facts, judged and drawn again."""
    same = {"python": "3.11.7", "dask": "2026.8.0", "distributed": "2026.8.0"}
    ours = same | {"package": "0.1.0", "registered": True}
    keras = ours | {"keras": "3.15.1", "devices": "cpu, all cores", "threads": None}
    keras |= {"host": "one", "cores": 2, "affinity": "3"}
    tensorflow = keras | {"backend": "tensorflow", "backend-version": "2.21.0"}
    jax = keras | {"backend": "jax", "backend-version": "0.10.2"}
    (lines,) = re.findall(r"\$ dask keras doctor .*\n((?:    .*\n|\n)+)", README)
    shown = [line.removeprefix("    ") for line in lines.rstrip().splitlines()]
    facts = {
        "client": tensorflow,
        "scheduler": ours | {"workers": 3},
        "without": same | {"package": None, "registered": None},
        "tensorflow": tensorflow,
        "jax": jax,
    }
    processes = []
    for row, each in zip(shown[1:6], facts.values(), strict=True):
        who = re.split(r"  +", row)[0]
        processes.append({"who": who, "role": who.split()[0], "pid": len(processes)} | each)
        if took := re.search(r"(\d+) ms$", row):
            processes[-1]["round-trip"] = int(took[1]) / 1000
    assert views.examination(processes, judge(processes)).splitlines() == shown


def test_every_file_it_names_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_make_target_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_it_names_every_module():
    package = ROOT / "dask_keras_serialize"
    folders = {path.parent for path in package.rglob("*.py")} - {package}
    for folder in folders:
        assert f"\n{folder.name}/ " in README, folder.name
    for path in package.rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name not in ("backends", "devices"):
            assert path.name in README, path.name


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="made with TensorFlow")
@pytest.mark.skipif(zoo.KERAS < OF_KERAS, reason="an older Keras has less")
def test_its_counts_are_those_of_the_comparison():
    """Fails when the catalogue grows and ``make fidelity`` has not been run again."""
    text = (ROOT / "docs" / "fidelity.md").read_text()
    (total,) = re.findall(r"\| \*\*all\*\* \|(.*)\|", text)
    objects, *ours, keras = (int(cell.strip(" *")) for cell in total.split("|"))
    assert objects == len(CITIZENS) + len(zoo.ALL)
    assert set(ours) == {objects}
    assert f"{keras} of {objects} objects arrive by it" in " ".join(README.split())
