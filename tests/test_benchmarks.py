"""The bench: judging, comparing and drawing on made-up rows, and its command, quick."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.once

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Let tests import the bench's modules by the names that they have for each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(peer, figure, seconds, workload="ResNet50", nbytes=100 << 20, **more):
    times = {"seconds": [seconds], "median": seconds, "minimum": seconds}
    base = {"workload": workload, "peer": peer, "figure": figure, "weights_bytes": nbytes}
    return base | {"backend": "tensorflow"} | times | more


def rows(ours=0.04, slow=1.0):
    """Rows of a run on a machine that is so many times as slow."""
    import peers

    return [
        row(peers.OURS, "out", ours * slow, extra_bytes=0, copied_bytes=0, wire_bytes=100 << 20),
        row(peers.OURS, "in", 0.2 * slow, extra_bytes=0, copied_bytes=0, equal="all variables"),
        row(peers.KERAS, "out", 1.2 * slow, extra_bytes=2 << 20, equal="all variables"),
        row(peers.KERAS, "in", 1.0 * slow, extra_bytes=2 << 20, equal="all variables"),
        row(peers.CONFIG, "out", 0.03 * slow),
        row(peers.CONFIG, "in", 0.5 * slow),
        row(peers.OURS, "scatter", 0.3 * slow, equal="all variables"),
        row(peers.ARRAYS, "scatter", 0.1 * slow, equal="arrays"),
        {"workload": "ResNet50", "peer": peers.KERAS, "figure": "scatter", "backend": "tensorflow"}
        | {"failed": "TypeError: Could not serialize"},
        *(row(peers.OURS, "in", 0.002 * x * slow, "against layers", curve="layers", x=x)
          for x in (1, 10, 100, 1000)),
    ]  # fmt: skip


HEAD = {
    "versions": {"keras": "3.15.1"},
    "machine": {"system": "Linux", "architecture": "x86_64", "cores": 2, "memory-gib": 24},
}


def compared(tmp_path, old, new, *arguments):
    for name, content in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"head": HEAD, "rows": content}))
    return run("compare.py", tmp_path / "old.json", tmp_path / "new.json", *arguments)


def run(name, *arguments, timeout=60, **env):
    command = [sys.executable, BENCHMARKS / name, *arguments]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=timeout,
    )


def test_a_machine_of_half_the_speed_is_no_regression(tmp_path):
    done = compared(tmp_path, rows(), rows(slow=2.0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 rows compared, 0 beyond" in done.stdout


def test_a_slower_row_is_found_by_its_ratio_on_a_faster_machine(tmp_path):
    """Half again as slow beside its limit, while all seconds have become less."""
    done = compared(tmp_path, rows(), rows(ours=0.06, slow=0.5))
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if "->" in line)
    assert line.startswith("ResNet50, dask-keras-serialize, out, tensorflow: 1.33 -> 2")
    assert line.endswith("1.50 times as much")


def test_the_tolerance_is_what_was_asked_for(tmp_path):
    assert compared(tmp_path, rows(), rows(ours=0.06), "--tolerance", 1.6).returncode == 0
    assert compared(tmp_path, rows(), rows(ours=0.06), "--tolerance", 1.4).returncode == 1


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"extra_bytes": 90 << 20}, "extra_bytes 1,048,576 -> 94,371,840"),
        ({"copied_bytes": 90 << 20}, "copied_bytes 0 -> 94,371,840"),
        ({"equal": "weights"}, "all variables -> weights"),
    ],
)
def test_more_bytes_or_less_that_is_equal_is_worse(tmp_path, now, said):
    before = {"extra_bytes": 1 << 20, "copied_bytes": 0, "equal": "all variables"}
    old, new = rows(), rows()
    old[0] |= before
    new[0] |= before
    assert compared(tmp_path, old, new).returncode == 0
    new[0] |= now
    done = compared(tmp_path, old, new)
    assert done.returncode == 1
    assert said in done.stdout


def test_what_fails_now_is_worse(tmp_path):
    new = rows()
    new[0] = {k: new[0][k] for k in ("workload", "peer", "figure", "backend", "weights_bytes")}
    new[0]["failed"] = "it died"
    done = compared(tmp_path, rows(), new)
    assert done.returncode == 1
    assert "inf times as much" in done.stdout


def test_a_row_that_is_gone_is_worse_unless_a_part_was_measured(tmp_path):
    done = compared(tmp_path, rows(), rows()[1:])
    assert done.returncode == 1
    assert "not measured any more" in done.stdout
    assert compared(tmp_path, rows(), rows()[1:], "--part").returncode == 0


def test_rows_without_a_limit_are_named(tmp_path):
    new = [each for each in rows() if each["peer"] != "numpy arrays"]
    done = compared(tmp_path, rows(), new)
    assert done.returncode == 0
    named = "ResNet50, dask-keras-serialize, scatter, tensorflow: numpy arrays is not in both"
    assert f"not compared: {named}" in done.stdout
    assert "2 rows compared" in done.stdout


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": []}', '{"rows": [{"peer": "x"}]}'])
def test_files_that_hold_no_results(tmp_path, content):
    (tmp_path / "old.json").write_text(json.dumps({"rows": rows()}))
    (tmp_path / "new.json").write_text(content)
    done = run("compare.py", tmp_path / "old.json", tmp_path / "new.json")
    assert done.returncode == 2
    assert str(tmp_path / "new.json") in done.stderr
    assert run("compare.py", tmp_path / "none.json", tmp_path / "old.json").returncode == 2


def test_files_with_nothing_in_common(tmp_path):
    other = [each | {"workload": "another"} for each in rows()]
    assert compared(tmp_path, rows(), other).returncode == 2


def test_targets_are_met_missed_and_not_measured():
    import report

    def verdict(results, start):
        (found,) = {v for v, what in report.judge(results) if what.startswith(start)}
        return found

    assert verdict(rows(), "ResNet50, out: 30 times as fast") == "met"
    assert verdict(rows(), "ResNet50, out: 1.33 times the time") == "met"
    assert verdict(rows(ours=0.06), "ResNet50, out: 20 times as fast") == "MISSED"
    assert verdict(rows(ours=0.06), "ResNet50, out: 2 times the time") == "MISSED"
    assert verdict(rows(), "ResNet50, in: 5 times as fast") == "MISSED"
    assert verdict(rows(), "ResNet50, in, jax") == "not measured"
    assert verdict(rows(), "dense, 1 GiB, gather") == "not measured"


def test_extra_memory_is_judged():
    import peers
    import report

    for extra, expected in ((5 << 20, "met"), (20 << 20, "MISSED")):
        dense = row(peers.OURS, "out", 0.01, "dense, 1 GiB", 1 << 30, extra_bytes=extra)
        (found,) = (v for v, what in report.judge([dense]) if "out: extra memory" in what)
        assert found == expected


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slopes_are_fitted_to_the_upper_part(power):
    import scale

    points = [(x, 0.01 + 1e-6 * x**power) for x in (1, 4, 16)]  # the floor, which is flat
    points += [(x, 1e-3 * x**power) for x in (1000, 4000, 16000)]
    assert scale.slope(points) == pytest.approx(power)
    assert scale.slope(points[:1]) is None


def test_a_steep_curve_is_called_so():
    import pages
    import report

    (linear,) = report.slopes(rows())
    assert not linear["steep"]
    assert linear["slope"] == pytest.approx(1)
    bent = [
        each | {"minimum": each["x"] ** 1.3, "median": each["x"] ** 1.3} if "x" in each else each
        for each in rows()
    ]
    (steep,) = report.slopes(bent)
    assert steep["steep"]
    assert "steeper than linear" in pages.growth({"rows": bent})
    assert "steeper than linear" not in pages.growth({"rows": rows()})


def test_tables_have_every_row_and_the_reasons_of_those_that_fail():
    import pages

    results = {"head": HEAD, "rows": rows()}
    short = pages.short(results)
    assert "| dask-keras-serialize | 40 ms (**30x**) | 200 ms (**5x**) |" in short
    assert "| ResNet50, scatter | 300 ms | 100 ms | **3.00** | fails: TypeError |" in short
    assert "keras 3.15.1" in short
    whole = pages.whole(results)
    assert "**ResNet50** (tensorflow)" in whole
    assert "| Keras's config alone | 30 ms" in whole
    assert "fails: TypeError" in pages.through_cluster(results)
    results["rows"] += [
        {"workload": "ResNet50", "peer": "memcpy", "figure": figure, "backend": "tensorflow"}
        | {"failed": "needs about 32 GiB of memory"}
        for figure in ("out", "in")
    ]
    assert re.search(r"\| memcpy \| failed \|.*needs about 32 GiB", pages.whole(results))


def test_tables_go_between_their_marks():
    import pages

    page = "a\n<!-- table:begin -->\nold\n<!-- table:end -->\nb\n"
    results = {"head": HEAD, "rows": rows()}
    filled = pages.fill(page, results, {"table": pages.short})
    assert filled.startswith("a\n<!-- table:begin -->\n| by |")
    assert filled.endswith("<!-- table:end -->\nb\n")
    assert "old" not in filled
    assert pages.fill(filled, results, {"table": pages.short}) == filled
    with pytest.raises(ValueError, match="targets:begin"):
        pages.fill(page, results, {"targets": pages.targets})


def test_the_pages_have_the_marks():
    import pages

    results = {"head": HEAD, "rows": rows()}
    for file, tables in (("README.md", pages.README), ("docs/performance.md", pages.WHOLE)):
        pages.fill((ROOT / file).read_text(), results, tables)


def test_pictures_are_the_same_for_the_same_rows(tmp_path):
    import pictures

    results = {"head": HEAD, "rows": rows()}
    drawn = [pictures.draw(results, tmp_path / name) for name in ("one", "two")]
    assert [path.name for path in drawn[0]] == ["serialize.svg", "cluster.svg", "scale.svg"]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert b"<svg" in one.read_bytes()
    alone = [each for each in rows() if each["figure"] == "out"]
    (path,) = pictures.draw({"head": HEAD, "rows": alone}, tmp_path / "three")
    assert path.name == "serialize.svg"


def test_copies_are_told_by_address():
    import values

    whole = np.zeros(100, np.uint8)
    inside, copy = whole[20:60], np.zeros(30, np.uint8)
    assert values.elsewhere([inside, whole], [whole]) == 0
    assert values.elsewhere([inside, copy], [whole]) == 30
    assert values.elsewhere([whole], [inside]) == 100
    assert values.elsewhere([copy], []) == 30


def test_models_that_differ_are_told_apart():
    import keras
    import values

    def model(seed, *layers):
        keras.utils.set_random_seed(seed)
        built = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), *layers])
        built.compile("adam")
        built.optimizer.build(built.trainable_variables)
        return built

    assert values.equal(model(0), model(0)) == "all variables"
    with pytest.raises(ValueError, match="weights"):
        values.equal(model(0), model(1))
    bare = model(0)
    bare.optimizer = None
    with pytest.raises(ValueError, match="optimizer"):
        values.equal(model(0), bare)
    one, two = (model(0, keras.layers.Dropout(0.5)) for _ in range(2))
    two.layers[-1].seed_generator.state.assign([7, 7])
    assert values.equal(one, two) == "weights, optimizer"


def test_what_a_process_raises_is_its_answer_and_it_goes_on():
    import operator

    import meter
    import processes

    with processes.Process(processes.requests, operator.truediv) as process:
        assert process.ask(6, 3) == 2
        with pytest.raises(meter.MeasuringError, match="ZeroDivisionError: division by zero"):
            process.ask(6, 0)
        assert process.ask(6, 2) == 3


def test_a_process_that_dies_or_hangs_says_so():
    import time

    import meter
    import processes

    with processes.Process(processes.requests, os._exit) as process:
        with pytest.raises(meter.MeasuringError, match="died, exit status 7"):
            process.ask(7)
        assert not process.alive
    with processes.Process(processes.requests, time.sleep) as process:
        process.tell(100)
        with pytest.raises(meter.MeasuringError, match="longer than 0 s"):
            process.answer(patience=0.1)
        assert not process.alive


@pytest.mark.programs
def test_the_command_runs_quick(tmp_path):
    """In processes of its own; peers that are not installed here say so."""
    file = tmp_path / "rows.json"
    done = run(
        "bench.py", "--quick", "--only", "peers", "--workloads", "one tiny layer",
        "--backends", os.environ.get("KERAS_BACKEND", "tensorflow"),
        "--json", file, "--images", tmp_path, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    import limits
    import peers

    results = json.loads(file.read_text())
    measured = {(each["peer"], each["figure"]): each for each in results["rows"]}
    wanted = [n for g in limits.GROUPS for n in limits.chosen(g, "one tiny layer", True)]
    assert set(measured) == {(name, way) for name in wanted for way in ("out", "in")}
    for name in (peers.OURS, peers.OURS_PICKLE, peers.KERAS, peers.OLD, peers.SCIKERAS):
        assert measured[name, "in"]["equal"] == "all variables", measured[name, "in"]
    assert measured[peers.ARRAYS, "in"]["equal"] == "arrays"
    for each in measured.values():
        assert ("failed" in each) != ("median" in each)
        if each["peer"] in (peers.RAY, peers.TORCH, peers.SAFETENSORS) and "failed" in each:
            assert "ModuleNotFoundError" in each["failed"]
    assert results["head"]["versions"]["keras"]
    assert "not measured: ResNet50, out" in done.stdout
    assert (tmp_path / "serialize.svg").exists()
