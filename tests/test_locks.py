"""Rebuilds beside what else a process does: forks, imports, other threads that all do the same."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
from dask_keras_serialize.rebuilding import aside
from tests import leaks, zoo

FORKED = """
    import faulthandler, gc, os, random, sys, threading, time
    import keras
    from dask_keras_serialize.rebuilding import aside
    from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
    from keras.src.random import seed_generator

    class Slow:
        def __getstate__(self):
            return 1

        def __setstate__(self, state):
            threading.begun.set()
            time.sleep(2)

    threading.begun = threading.Event()  # no global: the class goes by value
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    quick = serialize_keras(model)
    model.note = Slow()
    slow = serialize_keras(model)
    threading.Thread(target=deserialize_keras, args=slow).start()
    assert threading.begun.wait(60)
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        assert gc.isenabled()
        assert not aside.LOCK.taken
        assert seed_generator.python_random is random
        if sys.argv[1] == "tensorflow":  # the others' own threads do not survive a fork
            deserialize_keras(*quick)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    deserialize_keras(*quick)
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_process_that_is_forked_in_a_rebuild_can_rebuild():
    """``multiprocessing`` forks, up to Python 3.13."""
    program = textwrap.dedent(FORKED)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, keras.backend.backend()],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "done\n"


def test_a_fork_does_not_wait_for_ever(monkeypatch):
    """For a thread that holds the lock for longer than anybody's patience."""
    from dask_keras_serialize.rebuilding import turns

    registered = {}
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: registered.update(hooks))
    turn = turns.Turn()
    turns.at_forks(turn, 0.1)
    for of in ("after_in_parent", "after_in_child"):
        with turn.held(0), ThreadPoolExecutor(1) as other:
            other.submit(registered["before"]).result(10)
            other.submit(registered[of]).result(10)
            assert turn.taken is (of == "after_in_parent")
    with turn.held(0) as held:
        assert held


SERVING = """
    import os, pickle, time
    import keras

    class Custom(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    if os.path.exists({path!r}):
        time.sleep(1)
        with open({path!r}, "rb") as file:
            DEFAULT = pickle.load(file)
"""


def test_a_module_may_open_a_model_as_it_is_imported(tmp_path, monkeypatch):
    """While another thread opens one whose code is in it: each has what the other wants."""
    path = tmp_path / "default.pickle"
    source = textwrap.dedent(SERVING.format(path=str(path)))
    (tmp_path / "serving_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import pickle

    import serving_module

    model = keras.Sequential([keras.Input((4,)), serving_module.Custom()])
    message = serialize_keras(model)
    path.write_bytes(pickle.dumps(zoo.build("sequential")))
    del sys.modules["serving_module"], serving_module, model
    thread = threading.Thread(target=__import__, args=("serving_module",), daemon=True)
    thread.start()
    time.sleep(0.3)
    with ThreadPoolExecutor(1) as other:
        opened = other.submit(deserialize_keras, *message).result(60)
    thread.join(60)
    assert not thread.is_alive()
    assert type(opened.layers[-1]) is sys.modules["serving_module"].Custom
    del sys.modules["serving_module"]


def test_threads_that_take_turns_all_the_time():
    """They pack, rebuild, train, deep-copy and interrupt each other ten times as often as usual."""
    model = zoo.build("trained")
    other = zoo.build("functional")
    messages = [serialize_keras(each) for each in (model, other, zoo.build("subclassed"))]
    sent = [[bytes(frame) for frame in frames] for _, frames in messages]
    expected = [zoo.bits(deserialize_keras(h, f)) for (h, _), f in zip(messages, sent, strict=True)]
    inputs = zoo.inputs_for(model)

    def work(number):
        for turn in range(6):
            which = (number + turn) % 3
            arrived = deserialize_keras(messages[which][0], sent[which])
            assert zoo.bits(arrived) == expected[which]
            header, frames = serialize_keras(arrived)
            again = deserialize_keras(header, [bytes(frame) for frame in frames])
            assert zoo.bits(again) == expected[which]
            if which == 0:
                predictions = again(inputs, training=False)
                assert np.isfinite(
                    keras.ops.convert_to_numpy(keras.tree.flatten(predictions)[0])
                ).all()

    switch = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    try:
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(work, number) for number in range(8)]:
                done.result(250)
    finally:
        sys.setswitchinterval(switch)
    assert not aside.LOCK.taken
    assert not leaks.locks_held()


@pytest.mark.more
@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_at_any_moment_of_rebuilds():
    """In a process of its own, many times: nothing is held, hooked or off afterwards."""
    program = textwrap.dedent(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 20  # of 40, some end before


INTERRUPTED = """
    import gc, os, random, signal, threading, time
    import keras
    from dask_keras_serialize.configs import templates
    from dask_keras_serialize.cluster.handlers import deserialize_keras, serialize_keras
    from tests import hostile, leaks, zoo

    model = zoo.build("trained")
    header, frames = serialize_keras(model)
    frames = [bytes(frame) for frame in frames]
    # who runs in the background of a shell ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deserialize_keras(header, frames)  # the first takes longer
    templates.forget()
    begin = time.perf_counter()
    deserialize_keras(header, frames)
    whole = time.perf_counter() - begin
    before = hostile.settings()
    chosen = random.Random(0)
    interrupted = 0
    for _ in range(40):
        templates.forget()
        after = chosen.uniform(0, whole)
        timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            deserialize_keras(header, frames)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        gc.collect()
        assert not leaks.locks_held()
        assert hostile.settings() == before
    zoo.assert_same(model, deserialize_keras(header, frames))
    print(interrupted)
"""
