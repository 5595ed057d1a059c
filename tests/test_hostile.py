"""Any bytes give an error of this package's own, or an object that is what they say."""

import json
import re
import subprocess
import sys

import hypothesis
import keras
import msgpack
import pytest
from hypothesis import strategies as st

from dask_keras_serialize.cluster.handlers import deserialize_keras
from dask_keras_serialize.errors import DecodeError
from dask_keras_serialize.wire.header import Header
from tests import fuzz, hostile, leaks

#: More on one backend: most of what is tried is refused before any has a say.
MESSAGES, OF_EACH_LAYER = (1000, 20) if keras.backend.backend() == "tensorflow" else (300, 6)

#: The same inputs in every run: what is found at random is `make fuzz`'s to find.
SETTINGS = hypothesis.settings(
    max_examples=MESSAGES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


def test_good_messages_come_out_whole():
    for header, frames in hostile.messages():
        assert hostile.outcome(header, frames) == "whole"


@SETTINGS
@hypothesis.given(st.data())
def test_mutated_messages(data):
    header, frames = hostile.mutated(lambda below: data.draw(st.integers(0, below - 1)))
    hostile.outcome(header, frames)


def test_mutations_get_everywhere():
    """Or the tests above would be about the first check alone."""
    outcomes, reasons = set(), set()
    for seed in range(300):
        header, frames = hostile.mutated(hostile.at_random(seed))
        outcomes.add(hostile.outcome(header, frames))
        try:
            deserialize_keras(header, frames)
        except DecodeError as error:
            reasons.add(re.sub(r"[0-9']+", "", str(error).partition(": ")[2])[:60])
    assert outcomes == {"refused", "whole"}
    assert len(reasons) > 60
    assert keras.Variable._initialize_with_initializer.__module__.startswith("keras")


def test_arguments_that_cost_a_lot():
    """Of each of Keras's layers some: they are refused, or cost nothing before they are used."""
    choose = hostile.at_random(0)
    for header, frames in hostile.layer_messages():
        for _ in range(OF_EACH_LAYER):
            config = json.loads(header["body"]["config"])
            layers = config["model"]["config"]["layers"][1:]
            named = [each for each in hostile.named(layers) if "module" in each]
            hostile.ask_too_much(named[choose(len(named))], choose)
            body = header["body"] | {"config": json.dumps(config)}
            hostile.outcome(header | {"body": body}, frames)


def test_what_the_fuzzer_found():
    corpus = sorted(path for path in fuzz.CORPUS.iterdir() if path.is_file())
    assert len(corpus) > 20
    assert {fuzz.run(path.read_bytes()) for path in corpus} == {"refused", "whole"}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@pytest.mark.once
@SETTINGS
@hypothesis.given(PLAIN | st.dictionaries(st.sampled_from(["format", "body", "owner"]), PLAIN))
def test_any_header(wire):
    with pytest.raises(DecodeError):
        Header.from_wire(wire)


@pytest.mark.once
@SETTINGS
@hypothesis.given(st.binary(max_size=500))
def test_any_bytes_for_a_header(packed):
    with pytest.raises(DecodeError):
        Header.from_bytes(packed)


@pytest.mark.parametrize(
    "packed",
    [
        b"\x91" * 100_000,  # lists in lists
        b"\x81\xa1a" * 100_000,
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",  # four gigabytes
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        msgpack.packb({"a": 1})[:-1],
        b"",
    ],
)
def test_bytes_that_promise_more_than_they_are(packed):
    with pytest.raises(DecodeError):
        Header.from_bytes(packed)


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 2**62],
        [2**62, 2**62, 0],
        [2**31] * 64 + [0],
        [1] * 65,
        [2**63 - 1] * 50_000,
        [0] * 65,
    ],
)  # fmt: skip
def test_shapes_that_no_backend_survives(shape):
    header, frames = hostile.messages()[0]
    row = list(header["variables"][0])
    row[1], row[6] = shape, 0
    with pytest.raises(DecodeError, match="no possible shape"):
        deserialize_keras(header | {"variables": [row, *header["variables"][1:]]}, frames)


LIMITED = """
    from tests import hostile
    for seed in range(150):
        hostile.outcome(*hostile.mutated(hostile.at_random(seed)))
    hostile.limit_memory(512 << 20)
    for seed in range(150, 400):
        hostile.outcome(*hostile.mutated(hostile.at_random(seed)))
    print("survived")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mutated_messages_ask_for_little_memory():
    """A process that may take half a GiB more survives: backends end it where they get none."""
    program = "\n".join(line[4:] for line in LIMITED.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("survived")


def test_what_was_refused_is_freed():
    header, frames = hostile.messages()[-1]
    before = leaks.layers_alive()
    for _ in range(20):
        with pytest.raises(DecodeError):
            deserialize_keras(header | {"variables": header["variables"][:-1]}, frames)
    assert leaks.layers_alive() == before
