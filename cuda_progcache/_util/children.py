# SPDX-License-Identifier: Apache-2.0
"""Child processes that run a module of this package and communicate over pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def start_module(module: str, env: Mapping[str, str] | None = None, **given: Any) -> subprocess.Popen[Any]:
    """Run a module of this package in a new process, by default with pipes for stdin and stdout.

    Parameters
    ----------
    module : str
        The module to run with ``python -m``.
    env : mapping, optional
        The environment of the process; by default that of the current one.
    **given
        Arguments for ``subprocess.Popen``; ``stdin`` and ``stdout`` replace the pipes.
    """
    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    # -P: otherwise a json.py in the working directory would be imported in place of Python's own.
    command = [next(interpreters(), sys.executable), "-P", "-m", module]
    environment = {**(os.environ if env is None else env), "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **given})


def interpreters() -> Iterator[str]:
    """Yield the paths of interpreters of the running Python, the most likely first.

    ``sys.executable`` may be empty, or an application that embeds Python and that must not be started.
    """
    frozen = getattr(sys, "frozen", False)
    own = () if frozen else (sys.executable, getattr(sys, "_base_executable", ""))
    name = "python{}.{}".format(*sys.version_info)
    beside = (os.path.join(prefix, "bin", name) for prefix in (sys.exec_prefix, sys.base_exec_prefix))
    for path in dict.fromkeys((*own, *beside)):
        if path and os.path.basename(path).startswith(("python", "pypy")) and _can_start(path):
            yield path


def _can_start(path: str) -> bool:
    # Check for the effective user: the real user may differ, as in a service that changed its user.
    return os.access(path, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # the process had ended before it read everything
    process.wait()
