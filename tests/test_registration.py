"""Who holds the slots: in every import order, in processes of their own."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import dask.sizeof
import keras
import pytest
from distributed import Client, protocol
from distributed.protocol.cuda import cuda_serialize
from distributed.protocol.serialize import dask_deserialize, dask_serialize, families

import dask_keras_serialize
from dask_keras_serialize import pickling, registration
from dask_keras_serialize.cluster import handlers
from tests import zoo

OURS = """
import keras
from distributed import Client
from distributed.protocol.serialize import dask_serialize, dask_deserialize
from dask.sizeof import sizeof
from dask.tokenize import normalize_token
class Net(keras.Model): pass
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize
slots = dask_serialize, dask_deserialize, cuda_serialize, cuda_deserialize, sizeof, normalize_token
for cls in (keras.Model, keras.Sequential, Net):
    for dispatch in slots:
        handler = dispatch.dispatch(cls)
        ours = "dask_keras_serialize.cluster.handlers"
        assert handler.__module__ == ours, (dispatch, cls, handler)
assert keras.Model.__reduce_ex__.__module__ == "dask_keras_serialize.pickling"
assert Client.map.__wrapped__
from distributed.comm import tcp
from distributed.protocol import utils
assert tcp.host_array is utils.host_array
assert tcp.host_array.__module__ == "dask_keras_serialize.wire.frames"
"""

STALE = """
import keras
from distributed.protocol.serialize import dask_serialize
assert dask_serialize.dispatch(keras.Sequential).__module__ == "distributed.protocol.keras"
from distributed.comm import tcp
assert tcp.host_array.__module__ == "distributed.protocol.utils"
"""


def run(code, **env):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | env
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_all(codes, **env):
    """Run programs, two at a time: to import a backend takes each some seconds."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda code: run(code, **env), codes))


ORDERS = [
    *itertools.permutations(["import keras", "import distributed", "import dask"]),
    *itertools.permutations(["import keras", "import dask_keras_serialize"]),
    ["from dask_keras_serialize import pack"],
    ["import dask_keras_serialize", "dask_keras_serialize.pack"],
]


@pytest.mark.programs
def test_every_import_order():
    run_all(["\n".join(order) + OURS for order in ORDERS])


OFF = {"DASK_DASK_KERAS_SERIALIZE__REGISTER": "False"}


@pytest.mark.programs
def test_a_config_key_turns_it_off_and_an_import_on():
    on = ("import dask, dask_keras_serialize", "import dask_keras_serialize, dask")
    run_all(["import distributed" + STALE, *(imports + OURS for imports in on)], **OFF)
    run("import dask" + STALE + "import dask_keras_serialize" + OURS, **OFF)


@pytest.mark.once
def test_what_was_cached_under_the_old_handler_is_forgotten():
    run(STALE + "import dask_keras_serialize" + OURS, **OFF)


@pytest.mark.programs
def test_unregister_puts_back_what_was_there():
    run("import dask_keras_serialize as d\nd.unregister()" + STALE)
    run("import dask_keras_serialize as d" + OURS + "d.unregister()" + STALE)
    run("import dask_keras_serialize as d" + OURS + "d.unregister()\nd.register()" + OURS)


def test_importing_us_loads_neither_keras_nor_a_backend_nor_distributed():
    code = "import dask_keras_serialize, sys; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = set(run(code).split())
    assert not loaded & {"keras", "tensorflow", "jax", "torch", "distributed", "dask"}
    loaded = set(run("import distributed, sys; print(*sys.modules)").split())
    assert "dask_keras_serialize.registration" in loaded
    assert not loaded & {"keras", "tensorflow", "jax", "torch"}


def on_gpus(dispatch):
    try:
        return dispatch.dispatch(keras.Sequential)
    except TypeError:  # nobody but us has one
        return None


def test_register_and_unregister_are_idempotent():
    slots = [
        lambda: dask_serialize.dispatch(keras.Sequential),
        lambda: dask_deserialize.dispatch(keras.Sequential),
        lambda: dask.sizeof.sizeof.dispatch(keras.Sequential),
        lambda: getattr(keras.Model, "__reduce_ex__", None),
        lambda: (Client.map, Client.scatter, Client.submit),
        lambda: families["error"],
        lambda: families["cuda"],
        lambda: on_gpus(cuda_serialize),
    ]
    before = [slot() for slot in slots]
    assert before[:2] == [handlers.serialize_keras, handlers.deserialize_keras]
    assert before[3] is pickling.reduce_object
    dask_keras_serialize.register()
    dask_keras_serialize.register()
    assert [slot() for slot in slots] == before
    try:
        dask_keras_serialize.unregister()
        bare = [slot() for slot in slots]
        assert not registration.registered()
        assert all(a != b for a, b in zip(bare, before, strict=True))
        dask_keras_serialize.unregister()
        assert [slot() for slot in slots] == bare
    finally:
        dask_keras_serialize.register()
    assert [slot() for slot in slots][:4] == before[:4]


def test_a_model_through_the_family():
    model = zoo.build("trained")
    header, frames = protocol.serialize(model, on_error="raise")
    assert header["serializer"] == "dask"
    zoo.assert_same(model, protocol.deserialize(header, frames))
    zoo.assert_same(model, protocol.deserialize_bytes(protocol.serialize_bytes(model)))
    (copy,) = protocol.deserialize(*protocol.serialize([model]))
    zoo.assert_same(model, copy)


WHILE_KERAS_IS_IMPORTED = """
import threading
from distributed import Client
from dask_keras_serialize.cluster.tasks import holds_keras
import wrapt

def send(module):
    thread = threading.Thread(target=holds_keras, args=([0],), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "waits for the import"
    sent.append(module)

sent = []
wrapt.register_post_import_hook(send, "keras.src.layers")
import keras
assert sent
assert holds_keras([keras.Model()])
"""


@pytest.mark.more
@pytest.mark.once
def test_an_event_loop_does_not_wait_for_the_import_of_keras():
    """Or it may get half of a module, or the thread that imports Keras may."""
    run(WHILE_KERAS_IS_IMPORTED)
