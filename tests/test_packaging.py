"""The wheel works where there is no checkout, and says what a scheduler needs."""

import subprocess
import zipfile

import pytest

pytestmark = pytest.mark.once

LOOK = """
import importlib.metadata as m, importlib.util as u, sys
import dask, distributed, dask_keras_serialize as d
assert d.registered()
assert d.__version__ == m.version("dask-keras-serialize")
assert not [n for n in ("keras", "tensorflow", "jax", "torch") if u.find_spec(n)]
print(d.__file__)
print(*sorted(m.metadata("dask-keras-serialize").get_all("Provides-Extra")))
"""


def test_the_wheel_in_a_clean_environment(core_bin, tmp_path):
    done = subprocess.run(
        [core_bin / "python", "-c", LOOK], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    file, extras = done.stdout.splitlines()
    assert str(core_bin.parent) in file
    assert {"tensorflow", "jax", "torch", "dask-ml", "test", "bench", "dev"} <= set(extras.split())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dask_keras_serialize/py.typed" in names
    assert "dask_keras_serialize/backends/tensorflow.py" in names
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"dask_keras_serialize", "dask_keras_serialize-0.1.0.dist-info"}
