"""Models spread over several devices arrive whole, and are spread again where that can be."""

import keras
import pytest

from tests.conftest import run_module

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="torch has one CPU, and no way to pretend others"
)

SPREAD, GATHERED = {
    "tensorflow": ("MirroredVariable", "ResourceVariable"),
    "jax": ("4 devices", "1 devices"),
    "torch": ("", ""),
}[keras.backend.backend()]


def run(*arguments):
    """Run tests.devices, for devices can be made up only before any is used; return its lines."""
    # JAX reads it when it is imported
    flags = f"--xla_force_host_platform_device_count={arguments[0]}"
    printed = run_module("tests.devices", *arguments, XLA_FLAGS=flags)
    return [line for line in printed.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    file = tmp_path_factory.mktemp("devices") / "models.pickle"
    lines = run(4, "write", file)
    assert all(SPREAD in line for line in lines[:2])
    return file


def test_are_gathered_where_there_is_one_device(sent):
    lines = run(1, "read", sent)
    assert len(lines) >= 2
    assert all(line == f"{{'{GATHERED}'}}" for line in lines)


def test_are_spread_where_the_receiver_says_how(sent):
    assert all(SPREAD in line for line in run(4, "read", sent, "distributed"))


def test_are_spread_as_they_were_where_there_are_as_many_devices(sent):
    expected = SPREAD if keras.backend.backend() == "jax" else GATHERED
    assert all(line == f"{{'{expected}'}}" for line in run(4, "read", sent))
