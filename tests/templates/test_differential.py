# SPDX-License-Identifier: Apache-2.0
"""Stock Jinja2 compared with all our ways to render: the features, the shapes, and new random templates in each run.

A failure prints its seed. ``python -m ci.differential --seed SEED`` reproduces the failure; add the seed to SEEDS.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = os.environ.get("PROGCACHE_EXAMPLES", "20")
SHARE = "0.2"  # each run draws other pairs of a template and a group of ways, but covers all ways and features


def differential(*arguments):
    command = [sys.executable, "-m", "ci.differential", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.returncode, done.stdout + done.stderr


def test_features_and_fresh_templates_give_what_jinja2_gives():
    status, said = differential("--templates", EXAMPLES, "--share", SHARE)
    assert status == 0, said
    assert said.splitlines()[-1].endswith(" 0 differences"), said


@pytest.mark.parametrize("broken", ["runtime.str_join = lambda parts: ''", "objects.LoopContext.last = True"])
def test_a_difference_is_found(broken):
    script = f"""
import sys
sys.argv = ["differential", "--templates", "0", "--most", "1"]
from cuda_progcache.templates import objects, runtime
{broken}
runtime.NAMES["str_join"] = runtime.str_join
from ci.differential import __main__ as tool
tool.FEATURES[:] = [c for c in tool.FEATURES if "~ n ~" in c.source or "l.last" in c.source]
tool.SHAPES[:] = []
sys.exit(tool.main(sys.argv[1:]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
