# SPDX-License-Identifier: Apache-2.0
"""The identity of the current process for logs: host, process id and command line."""

from __future__ import annotations

import os
import shlex
import sys

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.secrets import masked

#: Characters of a command line to keep.
_LONGEST = 256


class Who(NamedTuple):
    """A process that compiled something.

    Attributes
    ----------
    host : str
        The machine's name.
    pid : int
        Id of the process; if a worker process compiled, of the process that asked for it.
    command : str
        The command line, quoted for a shell, with credentials in URLs masked; truncated to 256 characters.
    """

    host: str
    pid: int
    command: str


_acts_for: list[Who] = []


def who() -> Who:
    """Return the current process, or the process that it works for."""
    if _acts_for:
        return _acts_for[-1]
    return Who(os.uname().nodename if hasattr(os, "uname") else "", os.getpid(), _command())


def act_for(host: str, pid: int, command: str) -> None:
    """Make :func:`who` return another process, whose worker this one is."""
    _acts_for[:] = [Who(host, int(pid), command)]


def _command() -> str:
    words = getattr(sys, "orig_argv", None) or getattr(sys, "argv", None) or [sys.executable]
    # Leave long program text after -c out of logs.
    shown = ["..." if n and words[n - 1] == "-c" and len(word) > 40 else word for n, word in enumerate(words)]
    told = shlex.join(map(masked, shown)).encode("utf-8", "replace").decode()
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."
