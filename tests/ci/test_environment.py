# SPDX-License-Identifier: Apache-2.0
"""``make`` and ``ci/environment.py``: which interpreter, when something is installed, and what is said."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def environment(tmp_path):
    """The script, in a checkout of its own that has nothing but pyproject.toml."""
    checkout = tmp_path / "checkout"
    (checkout / "ci").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    script = shutil.copy(ROOT / "ci" / "environment.py", checkout / "ci")
    spec = importlib.util.spec_from_file_location("progcache_environment", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stamp(environment):
    return environment._stamp(tomllib.loads((environment.ROOT / "pyproject.toml").read_text()))


def test_nothing_is_done_while_the_stamp_holds(environment, monkeypatch):
    directory = environment.ROOT / ".venv"
    directory.mkdir()
    (directory / environment.STAMP).write_text(json.dumps(stamp(environment)))
    monkeypatch.setattr(environment, "_install", lambda *_: pytest.fail("installed again"))
    assert environment.main([".venv"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("line-length = 120", "line-length = 119", False),
        ('"jinja2>=3.1.6"', '"jinja2>=3.1.7"', True),
        ("hatchling>=1.27", "hatchling>=1.28", True),
        ("cuda_progcache.cli:main", "cuda_progcache.cli:other", True),
    ],
    ids=["linter", "requirement", "build", "script"],
)
def test_only_what_decides_about_the_installation_renews_it(environment, old, new, again):
    before = stamp(environment)
    file = environment.ROOT / "pyproject.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert (stamp(environment) != before) is again


def test_another_interpreter_is_another_stamp(environment, monkeypatch):
    before = stamp(environment)
    monkeypatch.setattr(environment.sys, "version", "3.99.0 (another build)")
    assert stamp(environment) != before


def test_an_environment_of_another_interpreter_is_made_anew(environment, monkeypatch):
    made = []
    directory = environment.ROOT / ".venv"
    venv.create(directory, with_pip=False, symlinks=True)
    (directory / environment.STAMP).write_text("{}")
    monkeypatch.setattr(environment, "_install", lambda *_: None)
    monkeypatch.setattr(environment, "_create", made.append)
    assert environment.main([".venv"]) == 0
    assert made == [], "the same interpreter: only the installation is renewed"
    monkeypatch.setattr(environment.sys, "version", "3.99.0 (another build)")
    assert environment.main([".venv"]) == 0
    assert made == [directory]


def test_an_environment_that_was_not_made_here_is_not_removed(environment, monkeypatch, capfd):
    directory = environment.ROOT / ".venv"
    venv.create(directory, with_pip=False, symlinks=True)
    (directory / "mine").touch()
    monkeypatch.setattr(environment.sys, "version", "3.99.0 (another build)")
    with pytest.raises(SystemExit):
        environment.main([".venv"])
    assert "remove it" in capfd.readouterr().err
    assert (directory / "mine").exists()


def test_a_failed_installation_is_an_error_and_is_tried_again(environment, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    # The pip of this environment, since ensurepip takes ten seconds: an environment half installed, tried again.
    directory = environment.ROOT / ".venv"
    venv.create(directory, with_pip=False, symlinks=True)
    pip = Path(importlib.util.find_spec("pip").origin).parent
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "pip").symlink_to(pip)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            environment.main([".venv"])
        assert stop.value.code == 1
        assert "installation failed" in capfd.readouterr().err
    assert not (environment.ROOT / ".venv" / environment.STAMP).exists()


@pytest.mark.parametrize(("python", "what"), [("old-python", "Python 3.9.2"), ("no-such-python", "missing")])
def test_an_interpreter_that_is_too_old_is_named(tmp_path, python, what):
    old = tmp_path / "old-python"
    old.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), f"PYTHON={tmp_path / python}", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stderr
    assert f"{tmp_path / python} is {what}" in done.stderr
    assert "make PYTHON=python3.12 demo" in done.stderr


def test_a_chosen_interpreter_has_an_environment_of_its_own():
    def venv_of(*arguments):
        command = ["make", "-C", str(ROOT), "-n", "demo", *arguments]
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert ".venv/bin/cuda-progcache demo" in venv_of()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f".venv-{version}/bin/cuda-progcache demo" in venv_of(f"PYTHON={sys.executable}")
