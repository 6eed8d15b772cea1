# SPDX-License-Identifier: Apache-2.0
"""Benchmarks over the number of entries, and their plot. No test is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import ci.bench.scaling as module

    return module


def test_a_small_store_is_measured(tmp_path):
    target = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "ci.bench", "--only", "scaling.*_1k*", "--effort", "0.01", "--json", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {b["name"]: b for b in json.loads(target.read_text())["benchmarks"]}
    assert list(found) == ["scaling.open_1k", "scaling.put_at_cap_1k", "scaling.put_at_cap_1k_p99"]
    puts, tail = found["scaling.put_at_cap_1k"], found["scaling.put_at_cap_1k_p99"]
    assert puts["sides"] == tail["sides"], "one set of puts"
    assert (puts["statistic"], tail["statistic"]) == ("mean", "p99")
    for side in puts["sides"].values():
        assert side["calls"] >= 2
        assert side["median"] <= side["p99"]
    ours, peer = puts["sides"]["ours"], puts["sides"]["cuda.core"]
    assert puts["ratio"] == pytest.approx(ours["mean"] / peer["mean"])


def test_the_plot_is_drawn_of_what_was_measured(scaling, tmp_path):
    from ci.bench.harness import Result, _summary

    results = [
        Result(benchmark, {"ours": _summary([1e-3, 2e-3]), "cuda.core": _summary([0.5])}, {})
        for benchmark in scaling.benchmarks(scaling.FULL_SIZES)
    ]
    target = tmp_path / "plot.png"
    assert scaling.plot(results, target) == target
    assert target.read_bytes().startswith(b"\x89PNG")
    assert scaling.plot(results[:1], tmp_path / "other.png") is None
    assert not (tmp_path / "other.png").exists()


def test_rows_come_in_an_order_that_lets_them_share_directories(scaling):
    names = [benchmark.name for benchmark in scaling.benchmarks(scaling.FULL_SIZES)]
    assert names[-1] == "scaling.clear_100k"
    assert "scaling.put_at_cap_1M" in names
    assert not [benchmark.name for benchmark in scaling.benchmarks(scaling.SIZES) if "1M" in benchmark.name]
