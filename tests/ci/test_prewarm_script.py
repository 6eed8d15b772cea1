# SPDX-License-Identifier: Apache-2.0
"""``ci/prewarm.py``: the command ``prewarm``, run from a checkout. The command's own tests have the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*arguments):
    command = [sys.executable, ROOT / "ci" / "prewarm.py", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=600)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_it_compiles_then_hits_and_writes_its_summary(tmp_path):
    arguments = ("--kernel", "axpby", "--arch", "sm_90", "--cache-dir", tmp_path / "cache")
    done = run(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["ok"], summary["hits"], summary["failed"]) == (True, 0, 0)
    assert summary["root"] == str(tmp_path / "cache")
    assert f"[{summary['compiled']}/{summary['compiled']}] compiled axpby" in done.stderr
    done = run(*arguments, f"--json={tmp_path / 'summary.json'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["hits"] == summary["compiled"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kernel", "axpb", "--arch", "sm_90"), 2, "axpby"),
        (("--arch", "sm_91"), 2, "sm_90"),
        ((), 1, "--arch"),
        (("--arch", "sm_90", "--manifest", "nowhere"), 2, "nowhere"),
        (("--arch", "sm_90", "--cache-dir", "/dev/null/cache"), 3, "/dev/null"),
    ],
    ids=["kernel", "arch", "no-arch", "manifest", "cache"],
)
def test_wrong_usage_is_told_before_any_compile(arguments, code, message):
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
