"""Between host and device: one copy, out of a frame's own memory or into the frame's.

No device but the CPU is needed: an adapter is made to believe in one (tests/pretending.py), and
what is allocated on the host is counted.
"""

import keras
import numpy as np
import pytest

from dask_keras_serialize.backends import borrowed
from tests import pretending
from tests.conftest import run_module
from tests.pretending import ADAPTER, BACKEND, NAME, counting_host_bytes
from tests.test_backends import DTYPES, at

#: Too many to be anything but an array.
COUNT = 400_000


def bytes_of(tensor):
    view = ADAPTER._as_array if NAME == "torch" else ADAPTER._view_of
    return view(tensor).tobytes()


def no_frame_for(dtype):
    return NAME == "tensorflow" and "float8" in dtype.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 16, 1])
@pytest.mark.parametrize("writeable", [True, False])
def test_a_frame_goes_to_a_device_from_where_it_lies(dtype, offset, writeable, monkeypatch):
    pretending.variables_go_to_a_gpu(monkeypatch, copies=False)
    array = at(offset, dtype, COUNT).reshape(100, -1)
    array.flags.writeable = writeable
    before = array.tobytes()
    with counting_host_bytes() as counted:
        tensor = BACKEND.tensor(array)
    if not no_frame_for(dtype):  # tf.constant's own
        assert counted[0] < array.nbytes / 2
    assert bytes_of(tensor) == before


@pytest.mark.skipif(NAME == "jax", reason="JAX copies into memory that Python does not count")
def test_on_the_host_the_same_is_counted_as_a_copy():
    array = at(0, "float32", COUNT)
    array.flags.writeable = False
    with counting_host_bytes() as counted:
        BACKEND.tensor(array)
    assert counted[0] >= array.nbytes


def test_what_is_borrowed_is_the_array():
    array = at(0, "float32", COUNT).reshape(100, -1)
    array.flags.writeable = False
    view = borrowed(array)
    assert view.ctypes.data == array.ctypes.data
    assert (view.dtype, view.shape, view.flags.writeable) == (array.dtype, array.shape, True)
    assert not array.flags.writeable
    assert borrowed(np.array(3.0)).shape == ()
    np.testing.assert_array_equal(borrowed(array.T), array.T)


def test_on_the_host_nothing_is_sent_anywhere(monkeypatch):
    """No GPU: the ways to one are not taken."""

    def refuse(*args, **kwargs):
        raise AssertionError("to a GPU")

    if NAME == "tensorflow":
        monkeypatch.setattr(ADAPTER.tf, "identity", refuse)
        monkeypatch.setattr(ADAPTER.tf, "zeros", refuse)
    elif NAME == "jax":
        monkeypatch.setattr(ADAPTER.jax, "make_array_from_single_device_arrays", refuse)
    else:
        monkeypatch.setattr(ADAPTER, "borrowed", refuse)
    for writeable in (True, False):
        array = at(0, "float32", COUNT)
        array.flags.writeable = writeable
        variable = keras.Variable(np.zeros(COUNT), dtype="float32")
        variable._value = None
        BACKEND.initialize(variable, BACKEND.tensor(array))
        (view,) = BACKEND.views([variable])
        assert view.tobytes() == array.tobytes()


@pytest.mark.skipif(NAME != "jax", reason="values that are given away")
def test_what_was_given_away_meanwhile_is_no_view(monkeypatch):
    variable = keras.Variable(np.ones(3), dtype="float32")
    monkeypatch.setattr(ADAPTER, "_on_host", lambda value: False)
    variable._value.delete()
    assert BACKEND.views([variable]) == [None]


@pytest.mark.skipif(NAME != "torch", reason="which overlaps by streams")
def test_copies_are_all_under_way_before_one_is_waited_for(monkeypatch):
    import torch

    done = []

    class Stream:
        def synchronize(self):
            done.append("waited")

    class Host(torch.Tensor):
        def copy_(self, source, non_blocking=False):
            assert non_blocking
            done.append("copied")
            return super().copy_(source)

    empty, variables = (
        torch.empty,
        [keras.Variable(np.full((9,), i), dtype="float32") for i in range(3)],
    )

    def pinned(shape, *, dtype, pin_memory):
        assert pin_memory
        return empty(shape, dtype=dtype).as_subclass(Host)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(ADAPTER, "_on_cpu", lambda tensor: False)
    monkeypatch.setattr(ADAPTER, "_as_array", lambda tensor: tensor.tolist())
    assert BACKEND.views(variables) == [[i] * 9 for i in range(3)]
    assert done == ["copied"] * 3 + ["waited"]


@pytest.mark.skipif(NAME != "torch", reason="torch's device that is none")
def test_tensors_are_made_on_keras_s_device():
    array = at(0, "float32", COUNT)
    array.flags.writeable = False
    with keras.device("meta"), counting_host_bytes() as counted:
        tensor = BACKEND.tensor(array)
    assert (tensor.device.type, tuple(tensor.shape)) == ("meta", array.shape)
    assert counted[0] < array.nbytes / 2


@pytest.mark.skipif(NAME == "torch", reason="torch has one CPU, and no way to pretend others")
def test_a_model_arrives_on_the_device_that_is_chosen_and_leaves_from_there():
    two = "--xla_force_host_platform_device_count=2"
    run_module("tests.devices", 2, "elsewhere", "", XLA_FLAGS=two)
