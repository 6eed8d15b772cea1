# SPDX-License-Identifier: Apache-2.0
"""``ci/servers/install.sh``: what it asks apt for, and that it never fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "ci" / "servers" / "install.sh"


@pytest.fixture
def machine(tmp_path):
    """Runs it where nothing is on PATH but what it needs, an apt-get that notes its calls, and what is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("timeout", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    calls = tmp_path / "calls"
    # Its own list of places for servers would lead out of this machine.
    script = tmp_path / "install.sh"
    script.write_text(SCRIPT.read_text().replace("PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin\n", ""))

    def run(*programs, user=0, apt=None):
        made = dict.fromkeys(programs, "") | {"id": f"echo {user}"}
        if apt is not None:
            made["apt-get"] = f'echo "$@" >> {calls}\n{apt}'
        for name, does in made.items():
            (folder / name).write_text(f"#!/bin/bash\n{does}\n")
            (folder / name).chmod(0o755)
        done = subprocess.run(
            [shutil.which("bash"), script], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_nothing_is_asked_for_that_is_there(machine):
    assert machine("redis-server", "nginx", "docker-registry", "skopeo", apt="exit 0") == ("", [])


def test_what_is_missing_is_installed_and_nothing_else(machine):
    said, calls = machine("redis-server", "skopeo", apt="exit 0")
    assert "Installing nginx-light docker-registry" in said
    assert len(calls) == 1
    assert calls[0].endswith("install --yes --no-install-recommends nginx-light docker-registry")


@pytest.mark.parametrize(
    "where", [{"user": 1000, "apt": "exit 0"}, {"user": 0, "apt": None}], ids=["no root", "no apt"]
)
def test_where_it_may_not_it_says_what_is_skipped(machine, where):
    said, calls = machine("redis-server", **where)
    assert "without nginx-light docker-registry skopeo, whose tests are skipped" in said
    assert calls == []


def test_a_package_that_cannot_be_had_keeps_no_other_away(machine):
    """Lists are brought up to date once, then each is tried by itself."""
    said, calls = machine("redis-server", apt='case "$*" in *docker-registry*) exit 100;; esac')
    assert [call.rsplit(" ", 1)[1] for call in calls] == [
        "skopeo",
        "update",
        "skopeo",
        "nginx-light",
        "docker-registry",
        "skopeo",
    ]
    assert "docker-registry can't be installed; its tests are skipped" in said
    assert "nginx-light can't" not in said
