"""examples/search.py, run as a user runs it; `make test-dask-ml` does."""

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.conftest import run_example


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("search")
    return run_example("search.py", output, "--max-iter", "4", timeout=500), output


@pytest.mark.cluster
def test_says_what_it_does_and_finds(search):
    printed, _ = search
    assert re.findall(r"^\[(\d)/3\] ", printed, re.MULTILINE) == list("123")
    ((done, total),) = re.findall(r"\[#+\] +(\d+)/(\d+) scores", printed)
    assert done == total
    assert set(re.findall(r"^ +(\w+) +[\d.e-]+$", printed, re.MULTILINE)) == {
        "dropout",
        "hidden",
        "learning_rate",
    }
    (right,) = re.findall(r"([\d.]+)% of 348 new digits", printed)
    assert float(right) > 50
    assert "holds what it promised, here and on a worker" in printed


@pytest.mark.cluster
def test_draws_a_picture(search):
    _, output = search
    assert [path.name for path in output.iterdir()] == ["search.png"]
    picture = matplotlib.image.imread(output / "search.png")
    height, width = picture.shape[:2]
    assert height > 400
    assert width > 800
    # curves at the left, points at the right: neither half is blank
    for half in np.array_split(picture[..., :3], 2, axis=1):
        assert (half.min(axis=-1) < 0.5).mean() > 0.01
