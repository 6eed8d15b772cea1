# SPDX-License-Identifier: Apache-2.0
"""Processes of this package's own modules, that answer over pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def start_module(module: str, **given: Any) -> subprocess.Popen[Any]:
    """Run a module of this package in a new process, with pipes for its input and its output.

    Parameters
    ----------
    module : str
        ``python -m`` of it.
    **given
        For ``subprocess.Popen``.
    """
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        # -P: else a json.py in the working directory would be imported in place of Python's own.
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        **given,
    )


def end(process: subprocess.Popen[Any]) -> None:
    """End a process at once, and close its pipes."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it was gone already, with something unread
    process.wait()
