# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: it measures what it says, and its JSON and exit status can be relied on. No test is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def bench(*arguments, status=0):
    command = [sys.executable, "-m", "ci.bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == status, done.stderr
    return done


def test_json_of_a_store_benchmark():
    report = json.loads(bench("--only", "store.*", "--effort", "0.01", "--json", "-").stdout)
    assert report["format"] == 1
    assert report["versions"]["cuda-core"]
    assert [b["name"] for b in report["benchmarks"]] == [
        "store.get",
        "store.load",
        "store.get_in_memory",
        "store.miss",
        "store.put_fsync",
        "store.put_none",
    ]
    for benchmark in report["benchmarks"]:
        ours, peer = benchmark["sides"]["ours"], benchmark["sides"]["cuda.core"]
        assert 0 < ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]
        assert ours["calls"] == peer["calls"] >= 20
        assert benchmark["ratio"] == pytest.approx(ours["median"] / peer["median"])


def test_what_the_peer_refuses_is_told():
    done = bench("--only", "program.hit_name_expressions", "--effort", "0.01", "--json", "-")
    (benchmark,) = json.loads(done.stdout)["benchmarks"]
    assert "name_expressions" in benchmark["refused"]["cuda.core"]
    assert benchmark["ratio"] is None
    assert "refuses" in done.stderr


def test_memo_benchmarks_name_their_peers_installed_or_not():
    report = json.loads(bench("--only", "memo.*", "--effort", "0.01", "--json", "-").stdout)
    rows = {b["name"]: b for b in report["benchmarks"]}
    assert all(row["sides"]["ours"]["median"] > 0 for row in rows.values())
    for name, peers in (
        ("memo.hit_memory", {"functools", "fleche"}),
        ("memo.miss_files", {"diskcache", "joblib", "fleche"}),
    ):
        assert {*rows[name]["sides"], *rows[name]["refused"]} == {"ours", *peers}
    assert {"memo.query_select", "memo.index_rebuild", "memo.index_refresh", "memo.expand"} <= rows.keys()


def test_unknown_pattern_is_an_error():
    assert "no benchmark fits" in bench("--only", "nothing.like.this", status=2).stderr


def test_list_runs_nothing():
    lines = bench("--list").stdout.splitlines()
    assert len(lines) >= 12
    assert any(line.startswith("process.cached_kernel ") for line in lines)


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import ci.bench.harness as module

    return module


def test_sides_take_turns_and_warm_up_first(harness, tmp_path):
    called = []

    @contextmanager
    def sides(directory):
        assert directory == tmp_path
        yield {"ours": lambda: called.append("o"), "cuda.core": lambda: called.append("p")}

    result = harness.measure(harness.Benchmark("a.b", "", harness.ratio(1.0), sides, rounds=3, calls=2), tmp_path)
    assert "".join(called) == "op" + "oopp" + "ppoo" + "oopp"
    assert result.measured["ours"].calls == 6


def test_goals(harness):
    medians = {"ours": 2.0, "cuda.core": 4.0, "bare": 1.5}
    assert harness.ratio(0.5).met(medians)
    assert not harness.ratio(0.4).met(medians)
    assert harness.at_most(2.0).met(medians)
    assert not harness.at_most(1.9).met(medians)
    assert harness.over("bare", 0.5).met(medians)
    assert not harness.over("bare", 0.4).met(medians)
    assert harness.over("bare", 0.1, share=0.4).met(medians)


def test_what_a_side_costs_over_another_is_told_by_least_p10_and_median(harness, tmp_path):
    taken = {"ours": [3.0, *[5.0] * 8, 9.0, 9.0], "bare": [1.0, *[4.0] * 8, 11.0, 11.0]}
    told = harness.Benchmark("a.b", "", harness.over("bare", 1.0), samples=lambda *_: taken, beside="bare")
    result = harness.measure(told, tmp_path)
    assert result.extra == "over bare: least +2 s, p10 +1 s, median +1 s"
    assert (result.to_dict()["sides"]["bare"]["least"], result.to_dict()["sides"]["ours"]["p10"]) == (1.0, 5.0)
    taken["ours"] = [0.5]
    assert "least -500 ms" in harness.measure(told, tmp_path).extra


def test_a_peer_that_no_longer_refuses_is_noticed(harness):
    with pytest.raises(AssertionError, match="give it a side"):
        harness.Refused(lambda: None, ValueError)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0304, "30.4 ms"), (17.2e-6, "17.2 µs"), (350e-9, "350 ns")]
)
def test_duration(harness, seconds, text):
    assert harness.duration(seconds) == text
