# SPDX-License-Identifier: Apache-2.0
"""The workflow that says in a pull request what machine code it changes: its steps run here, over a repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from github_runner import Runner

WORKFLOW = yaml.safe_load((Path(__file__).resolve().parents[2] / "ci/github/kernel-diff.yml").read_text())
MANIFEST = "format = 1\n" + "".join(
    f"""
[kernels.{name}]
template = "{name}.cu.j2"
entry_points = ["{name}"]
[[kernels.{name}.variants]]
"""
    for name in ("edited", "same")
)
CODE = 'extern "C" __global__ void {name}(float *a) {{ a[threadIdx.x] *= {factor}; }}\n'
GH = """#!/bin/bash
echo "$@" > said; cp "${@: -1}" comment-of-the-pull-request.md
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits: the base, and one that edits a kernel."""
    for name in [name for name in os.environ if name.startswith(("CUDA_PROGCACHE", "GIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "repository"
    (folder / "kernels").mkdir(parents=True)
    (folder / "requirements-test.txt").write_text("")
    (folder / "kernels" / "manifest.toml").write_text(MANIFEST)
    git(folder, "init", "-q")
    commits = []
    for factor in (2, 5):
        for name in ("edited", "same"):
            text = CODE.format(name=name, factor=factor if name == "edited" else 3)
            (folder / "kernels" / f"{name}.cu.j2").write_text(text)
        git(folder, "add", "-A")
        git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one")
        commits.append(git(folder, "rev-parse", "HEAD").strip())
    return folder, commits


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_comment_names_what_changed(repository, tmp_path):
    folder, (base, _) = repository
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gh").write_text(GH)
    (tmp_path / "tools" / "gh").chmod(0o755)
    (tmp_path / "store").mkdir()
    runner = Runner(
        WORKFLOW, tmp_path / "store", lambda place: git(place, "clone", "-q", str(folder), "."), str(tmp_path / "tools")
    )
    pull = {"github.event.pull_request.base.sha": base, "github.event.pull_request.number": "7", "github.token": "t"}
    done = runner.job(tmp_path / "job", run_id=1, **pull)
    assert done["Import it"] == "skipped"
    assert {outcome for name, outcome in done.items() if name != "Import it"} == {"success"}
    comment = (tmp_path / "job" / "comment-of-the-pull-request.md").read_text()
    assert "2 with changed machine code" in comment  # one kernel, for two architectures
    assert "edited sm\\_80" in comment and "edited sm\\_90" in comment and "same" not in comment
    assert "pr comment 7" in (tmp_path / "job" / "said").read_text()
    assert (tmp_path / "job" / "summary.md").read_text() == comment
