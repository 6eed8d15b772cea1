# SPDX-License-Identifier: Apache-2.0
"""A fleet whose holders and server are killed loses nothing and gets nothing wrong; longer: ``python -m ci.fleet``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ci.fleet.log import Happened, Log
from ci.fleet.server import why_no_server
from ci.fleet.verdicts import Extra, judge


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


@pytest.mark.parametrize(
    ("said", "extra"),
    [
        ("begin:1 end:1 landed:1", Extra(0, 0, 0)),
        ("begin:1 end:1 landed:1 there:2 end:2", Extra(1, 0, 0)),
        ("begin:1 begin:2 end:2 end:1", Extra(1, 0, 0)),
        ("begin:1 end:1 begin:2 landed:1 end:2", Extra(1, 0, 0)),
        ("begin:1 killed:1 begin:2 end:2", Extra(0, 0, 0)),
        ("begin:1 end:1 killed:1 begin:2 end:2", Extra(0, 0, 1)),
        ("begin:1 end:1 landed:1 begin:2 end:2", Extra(0, 0, 1)),
        ("away:1 away:2 end:1 end:2", Extra(0, 1, 0)),
        ("away:1 end:1 landed:1 begin:2 end:2 landed:2 there:3 end:3", Extra(1, 0, 1)),
    ],
)
def test_why_a_program_was_compiled_again(said, extra):
    """The reason follows from what each compiling process could have known when it began: needless, away, gone."""
    happened = [Happened(what, 0, 0, int(process)) for what, process in (one.split(":") for one in said.split())]
    assert judge(happened) == extra


def test_a_line_of_the_log_that_is_not_whole_yet_is_read_later(tmp_path):
    """A reader may see the first part of a line alone, if the line crosses a page of the file."""
    log = Log(tmp_path / "log")
    log.add("begin", 1, 2, 3)
    with (tmp_path / "log").open("ab") as file:
        file.write(b"end 1 2")
        file.flush()
        assert list(log.news()) == [("begin", 1, 2, 3)]
        file.write(b" 3\n")
    assert list(log.news()) == [("end", 1, 2, 3)]
    assert list(log.news()) == []
    log.close()
