# SPDX-License-Identifier: Apache-2.0
"""A fleet whose holders and server are killed loses nothing, and gets nothing wrong; longer: ``python -m ci.fleet``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ci.fleet.server import why_no_server


@pytest.mark.skipif(why_no_server() is not None, reason=str(why_no_server()))
def test_nothing_is_lost_or_wrong_whoever_dies(tmp_path):
    account = tmp_path / "account.json"
    command = [sys.executable, "-m", "ci.fleet", "--small", "--json", str(account)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(account.read_text())
    assert told["nothing happens"]["compiles"] == 30
    assert told["holders and the server"]["killed"] == 3
    assert told["NVRTC"]["compiles"] == 3
