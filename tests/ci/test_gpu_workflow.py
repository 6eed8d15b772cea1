# SPDX-License-Identifier: Apache-2.0
"""The workflow for GPU runners: its own steps run here, with stand-ins for what the runner brings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from github_runner import Runner

WORKFLOW = yaml.safe_load((Path(__file__).resolve().parents[2] / "ci/github/gpu-tests.yml").read_text())
STEPS = WORKFLOW["jobs"]["test"]["steps"]

PROJECT = {
    "requirements-test.txt": "",
    "pytest.ini": "[pytest]\n",
    "test_kernels.py": """
import cuda_progcache
import pytest

@pytest.mark.parametrize("number", range(3))
def test_source(number, program_cache):
    source = 'extern "C" __global__ void k(int *a) { *a = %d; }' % number
    options = cuda_progcache.ProgramOptions(arch="sm_90", name="k.cu")
    cuda_progcache.Program(source, "c++", options).compiled("cubin", cache=program_cache)
""",
}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "CUDA_PROGCACHE"))]:
        if name != "PYTEST_DEBUG_TEMPROOT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    (tmp_path / "store").mkdir()

    def checkout(folder):
        for name, text in PROJECT.items():
            (folder / name).write_text(text)

    return Runner(WORKFLOW, tmp_path / "store", checkout)


def job(runner, folder, *, ref, mode=None, run_id):
    """Do the job; the outcome of each step by name, and the tests' report."""
    done = runner.job(folder, run_id=run_id, **{"github.ref": ref, "inputs.mode": mode or ""})
    return done, json.loads((folder / "progcache-report.json").read_text())


def test_a_bundle_goes_from_main_to_pull_requests(runner, tmp_path):
    done, report = job(runner, tmp_path / "first", ref="refs/heads/main", run_id=1)
    assert done["Import it"] == "skipped"
    assert (done["Test"], done["Export"], done["Publish"]) == ("success",) * 3
    assert (report["hits"], report["misses"], report["mode"]) == (0, 3, "rw")
    assert [path.name for path in runner.store.iterdir()] == ["progcache-Linux-X64-1"]

    done, report = job(runner, tmp_path / "frozen", ref="refs/pull/7/merge", run_id=2, mode="frozen")
    assert (done["Import it"], done["Test"], done["Keep the report"]) == ("success",) * 3
    assert (report["hits"], report["compiles"], report["mode"]) == (3, [], "frozen")
    assert (done["Export"], done["Publish"]) == ("skipped", "skipped")

    bundle = runner.store / "progcache-Linux-X64-1"
    bundle.write_bytes(bundle.read_bytes()[:9000])
    done, report = job(runner, tmp_path / "damaged", ref="refs/pull/8/merge", run_id=3)
    assert (done["Import it"], done["Test"], done["Publish"]) == ("failure", "success", "skipped")
    assert (report["misses"], report["exit_status"]) == (3, 0)
    assert len(list(runner.store.iterdir())) == 1


def test_only_the_main_branch_publishes():
    conditions = [step["if"] for step in STEPS if step.get("uses", "").startswith("actions/cache/save")]
    assert len(conditions) == 1
    assert "github.ref == 'refs/heads/main'" in conditions[0]
    assert not any(step.get("uses", "").partition("@")[0] == "actions/cache" for step in STEPS), "it saves by itself"
