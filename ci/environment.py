# SPDX-License-Identifier: Apache-2.0
"""Create the development environment: ``python3 ci/environment.py .venv``.

The script is run by the interpreter that the environment is for, and needs only the standard library. It installs this
checkout (editable) with everything that its tests, linters and benchmarks need. A stamp file in the environment names
the interpreter and the requirements it was made for; while they are unchanged, nothing is done and no network is
needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import venv
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
STAMP = "progcache-environment.json"


def main(arguments: list[str]) -> int:
    """Bring the environment named by the only argument up to date; return 0."""
    if len(arguments) != 1:
        _stop("usage: python3 ci/environment.py DIRECTORY")
    directory = ROOT / arguments[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = _stamp(project)
    with _alone():
        if _found(directory) == wanted:
            return 0
        other = _interpreter_of(directory)
        if other != wanted["interpreter"]:
            if other is not None and _found(directory) is None:
                _stop(f"{directory} was made elsewhere for another Python ({other}): remove it, or make PYTHON=...")
            _create(directory)
        _install(directory, project)
        (directory / STAMP).write_text(json.dumps(wanted), encoding="utf-8")
    return 0


def _stamp(project: dict[str, object]) -> dict[str, str]:
    # Only the settings that affect the installation: editing those of a linter must not need a network.
    tool = project.get("tool")
    decisive = [project["project"], project["build-system"], tool.get("hatch") if isinstance(tool, dict) else None]
    return {
        "interpreter": _describe(sys.version, sys.executable),
        "requirements": hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest(),
        "checkout": str(ROOT),
    }


def _found(directory: Path) -> object:
    try:
        return json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _describe(version: str, executable: str) -> str:
    return f"{version} at {os.path.realpath(executable)}"


def _interpreter_of(directory: Path) -> str | None:
    """Describe the interpreter of an environment; return None if there is none that runs."""
    ask = "import sys; print(sys.version, sys.executable, sep='\\0')"
    command = [str(directory / "bin" / "python"), "-I", "-c", ask]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version, _, executable = answer.rstrip("\n").partition("\0")
    return _describe(version, executable)


@contextmanager
def _alone() -> Iterator[None]:
    """Make a second ``make`` wait; the lock is on the checkout's directory itself, so that no file is left behind."""
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        # Some network file systems don't support locks; the user must then avoid two first runs at once.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _create(directory: Path) -> None:
    _say(f"Making {directory.name} for Python {sys.version.split()[0]}")
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    if not has_ensurepip and importlib.util.find_spec("pip") is None:
        _stop(
            "this Python has neither ensurepip nor pip, so nothing can be installed; "
            "on Debian and Ubuntu, run: apt install python3-venv"
        )
    venv.create(directory, clear=True, with_pip=has_ensurepip, symlinks=True)
    if not has_ensurepip:
        _run([sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"), "install", "--quiet", "pip"])


def _install(directory: Path, project: dict[str, object]) -> None:
    _say(f"Installing cuda_progcache and its requirements into {directory.name} (once; later runs need no network)")
    build_system = project["build-system"]
    requires = build_system["requires"] if isinstance(build_system, dict) else []
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    # Install the build backend first and build without isolation: a complete environment then needs no network.
    _run([*pip, *requires, "editables"])
    _run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[dev]"])
    # pip compiles on one CPU, compileall on all. Like pip, it skips files that aren't for this Python.
    subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", str(directory / "lib")], check=False)


def _run(command: list[str]) -> None:
    status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    if status:
        _stop(f"installation failed (exit status {status}): {' '.join(command)}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _stop(message: str) -> NoReturn:
    _say(f"ci/environment.py: {message}")
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
