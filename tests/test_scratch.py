# SPDX-License-Identifier: Apache-2.0
"""Temporary folders are removed, whatever ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from cuda_progcache._util.scratch import ScratchFolder

STRUCK = """
import os, signal
from cuda_progcache._util.scratch import ScratchFolder

make = os.mkdir
def struck(path, mode):
    make(path, mode)
    assert os.path.isdir(path)
    signal.raise_signal(signal.SIGINT)

os.mkdir = struck
ScratchFolder("progcache-")
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_it_is_there_for_its_owner_and_gone_afterwards(temporary):
    with ScratchFolder("progcache-") as path:
        with open(os.path.join(path, "file"), "w") as file:
            file.write("x")
        assert os.path.dirname(path) == str(temporary)
        assert os.stat(path).st_mode & 0o777 == 0o700
    assert os.listdir(temporary) == []


def test_a_signal_right_after_it_is_made_leaves_nothing(temporary):
    done = subprocess.run([sys.executable, "-c", STRUCK], check=False, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(temporary) == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_it_to_its_parent(temporary):
    folder = ScratchFolder("progcache-")
    child = os.fork()
    if not child:
        folder.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.isdir(folder.path)
    folder.close()
    assert os.listdir(temporary) == []
