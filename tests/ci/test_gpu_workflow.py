# SPDX-License-Identifier: Apache-2.0
"""The workflow for GPU runners: its own steps run here, with stand-ins for what the runner brings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


class Runner:
    """GitHub's runner, so far as this workflow asks of it; ``store`` is where its cache action keeps files."""

    def __init__(self, store):
        self.store = store

    def job(self, folder, *, ref, run_id, **inputs):
        """Do the job in a fresh checkout; the outcome of each step by name, and the tests' report."""
        folder.mkdir()
        self.folder = folder
        self.context = {
            "github.ref": ref,
            "github.run_id": str(run_id),
            "runner.os": "Linux",
            "runner.arch": "X64",
            **{f"inputs.{name}": value for name, value in inputs.items()},
        }
        self.env = {}
        for name, value in WORKFLOW["jobs"]["test"]["env"].items():
            self.env[name] = self.context[f"env.{name}"] = self.filled(value)
        outcomes, failed = {}, False
        for step in STEPS:
            name = step.get("name", step.get("uses"))
            if not self.value(step.get("if", "true")) or (failed and "always()" not in step.get("if", "")):
                outcomes[name] = "skipped"
                continue
            done = self.uses(step) if "uses" in step else self.run(step["run"])
            outcomes[name] = "success" if done else "failure"
            failed = failed or not (done or step.get("continue-on-error"))
        return outcomes, json.loads((folder / "progcache-report.json").read_text())

    def run(self, script):
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
        lighter = {"PYTEST_XDIST_AUTO_NUM_WORKERS": "0", "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
        env = {**os.environ, **self.env, **lighter, "PATH": path}
        command = ["bash", "-e", "-c", self.filled(script)]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        return done.returncode == 0

    def uses(self, step):
        action, given = step["uses"].partition("@")[0], {k: self.filled(v) for k, v in step.get("with", {}).items()}
        if action == "actions/checkout":
            for name, text in PROJECT.items():
                (self.folder / name).write_text(text)
        elif action == "actions/cache/save":
            shutil.copy(self.folder / given["path"], self.store / given["key"])
        elif action == "actions/cache/restore":
            kept = sorted(self.store.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            found = [path for path in kept if path.name.startswith((given["key"], given["restore-keys"]))]
            self.context[f"steps.{step['id']}.outputs.cache-matched-key"] = found[0].name if found else ""
            if found:
                shutil.copy(found[0], self.folder / given["path"])
        else:
            assert action in {"actions/setup-python", "actions/upload-artifact"}
        return True

    def filled(self, text):
        return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(self.value(match[1].strip())), str(text))

    def value(self, expression):
        """What an expression of a workflow comes to, of the few operators that this one has."""
        python = str(expression).replace("&&", " and ").replace("||", " or ").replace("always()", "True")
        python = re.sub(r"\btrue\b", "True", python)
        named = re.sub(r"(?<!')\b[a-z]+(?:\.[\w-]+)+", lambda match: f"of({match[0]!r})", python)
        return eval(named, {"of": lambda name: self.context.get(name, "")})


@pytest.fixture
def runner(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "CUDA_PROGCACHE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    (tmp_path / "store").mkdir()
    return Runner(tmp_path / "store")


def test_a_bundle_goes_from_main_to_pull_requests(runner, tmp_path):
    done, report = runner.job(tmp_path / "first", ref="refs/heads/main", run_id=1)
    assert done["Import it"] == "skipped"
    assert (done["Test"], done["Export"], done["Publish"]) == ("success",) * 3
    assert (report["hits"], report["misses"], report["mode"]) == (0, 3, "rw")
    assert [path.name for path in runner.store.iterdir()] == ["progcache-Linux-X64-1"]

    done, report = runner.job(tmp_path / "frozen", ref="refs/pull/7/merge", run_id=2, mode="frozen")
    assert (done["Import it"], done["Test"], done["Keep the report"]) == ("success",) * 3
    assert (report["hits"], report["compiles"], report["mode"]) == (3, [], "frozen")
    assert (done["Export"], done["Publish"]) == ("skipped", "skipped")

    bundle = runner.store / "progcache-Linux-X64-1"
    bundle.write_bytes(bundle.read_bytes()[:9000])
    done, report = runner.job(tmp_path / "damaged", ref="refs/pull/8/merge", run_id=3)
    assert (done["Import it"], done["Test"], done["Publish"]) == ("failure", "success", "skipped")
    assert (report["misses"], report["exit_status"]) == (3, 0)
    assert len(list(runner.store.iterdir())) == 1


def test_only_the_main_branch_publishes():
    conditions = [step["if"] for step in STEPS if step.get("uses", "").startswith("actions/cache/save")]
    assert len(conditions) == 1
    assert "github.ref == 'refs/heads/main'" in conditions[0]
    assert not any(step.get("uses", "").partition("@")[0] == "actions/cache" for step in STEPS), "it saves by itself"
