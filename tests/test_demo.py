"""examples/demo.py, run as a user runs it."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
import pytest

from tests.conftest import ROOT, run_example

DEMO = ROOT / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("demo")
    return run_example("demo.py", output, "--epochs", "2", timeout=180), output


@pytest.mark.programs
@pytest.mark.cluster
def test_says_what_it_does_and_that_it_is_equal(demo):
    printed, _ = demo
    assert re.findall(r"^\[(\d)/6\] ", printed, re.MULTILINE) == list("123456")
    assert "workers that hold the model: 2" in printed
    assert printed.count("8/8 chunks") == 2
    compared = re.findall("bit-equal: (.*) \\(", printed)
    assert compared == [
        "predictions",
        "the model, gathered again",
        "predictions",
        "one chunk by dask.delayed",
        "weights, optimizer, dropout seed",
        "predictions after training",
    ]
    assert f"All {len(compared)} comparisons are bit-equal" in printed
    assert "DIFFER" not in printed


@pytest.mark.programs
@pytest.mark.cluster
def test_model_learns(demo):
    printed, _ = demo
    first, second = (float(x) for x in re.findall(r"accuracy ([\d.]+)%", printed))
    assert 80 < first < second


@pytest.mark.programs
@pytest.mark.cluster
def test_draws_a_picture(demo):
    _, output = demo
    assert [path.name for path in output.iterdir()] == ["demo.png"]
    picture = matplotlib.image.imread(output / "demo.png")
    height, width = picture.shape[:2]
    assert height > 400
    assert width > 800
    assert len(np.unique(picture.reshape(height * width, -1), axis=0)) > 50
    # digits above, bars below: neither half is blank
    for half in np.array_split(picture[..., :3], 2):
        assert (half.min(axis=-1) < 0.5).mean() > 0.01


@pytest.fixture
def module():
    with mock.patch.dict(os.environ):  # it sets what TensorFlow reads
        spec = importlib.util.spec_from_file_location("digits_demo", DEMO)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_exit_status_tells_of_a_difference(module, monkeypatch, capsys, tmp_path):
    """One bit is enough, and the last line says so."""
    report = module.Report(steps=1)
    a = np.arange(3.0)
    b = a.copy()
    b.view("u8")[1] ^= 1
    report.compare("same", [a], [a.copy()])
    assert report.different == 0
    report.compare("one bit", [a], [b])
    report.compare("dtype", [a], [a.astype("f4")])
    report.compare("number", [a], [a, a])
    assert report.different == 3
    assert "DIFFERENT: one bit, by 2.2e-16 at most" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    monkeypatch.setattr(module, "connect", lambda scheduler, stack: _NoCluster())
    monkeypatch.setattr(module, "ship", lambda model: {})
    monkeypatch.setattr(module, "draw", lambda *arguments: None)

    def run(client, report, epochs):
        report.compare("one bit", [a], [b])
        return module.Outcome(None, a, a, a)

    monkeypatch.setattr(module, "run", run)
    assert module.main() == 1
    assert "1 of 1 comparisons DIFFER" in capsys.readouterr().out


class _NoCluster:
    def scheduler_info(self, n_workers):
        return {"workers": {}}
