# SPDX-License-Identifier: Apache-2.0
"""Who runs here: host, process and command line, as people look for them in their logs."""

from __future__ import annotations

import os
import shlex
import sys

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.secrets import masked

#: Characters of a command line that are kept.
_LONGEST = 256


class Who(NamedTuple):
    """A process that compiled something.

    Attributes
    ----------
    host : str
        The machine's name.
    pid : int
        The process that asked, where a worker process compiled for it.
    command : str
        Its command line, as it can be typed, but that no URL in it has a user or a password; cut at 256 characters.
    """

    host: str
    pid: int
    command: str


_acts_for: list[Who] = []


def who() -> Who:
    """The process that runs here, or the one that it works for."""
    if _acts_for:
        return _acts_for[-1]
    return Who(os.uname().nodename if hasattr(os, "uname") else "", os.getpid(), _command())


def act_for(host: str, pid: int, command: str) -> None:
    """Say from now on that another process asked: this one is its worker."""
    _acts_for[:] = [Who(host, int(pid), command)]


def _command() -> str:
    words = getattr(sys, "orig_argv", None) or getattr(sys, "argv", None) or [sys.executable]
    # Program text after -c isn't for a log.
    shown = ["..." if n and words[n - 1] == "-c" and len(word) > 40 else word for n, word in enumerate(words)]
    told = shlex.join(map(masked, shown)).encode("utf-8", "replace").decode()
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."
