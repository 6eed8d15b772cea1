# SPDX-License-Identifier: Apache-2.0
"""``--mode``: one option before or after any command's name, over its worker processes too."""

from __future__ import annotations

import os

import pytest

KERNEL = ("compile", "--kernel", "axpby", "--arch", "sm_90")


@pytest.mark.parametrize("mode", ["ro", "off"])
def test_nothing_is_kept_and_it_compiles(mode, cli_json, root):
    assert cli_json("--mode", mode, *KERNEL)["hit"] is False
    assert cli_json(*KERNEL, "--mode", mode)["hit"] is False
    assert not root.exists()
    assert "CUDA_PROGCACHE" not in os.environ, "the option is one call's"


def test_frozen_compiles_nothing_and_the_error_names_the_command(cli, cli_json, root):
    error = cli("--mode", "frozen", *KERNEL, code=1).stderr
    assert "the cache is frozen" in error
    assert "To fix it: CUDA_PROGCACHE=rw cuda-progcache compile --kernel axpby" in error
    assert not root.exists()
    assert cli_json(*KERNEL)["hit"] is False
    assert cli_json("--mode", "frozen", *KERNEL)["hit"] is True
    assert cli_json("--mode", "off", *KERNEL)["hit"] is False
    assert "is off" in cli("list", "--mode", "off").stderr


def test_workers_are_frozen_too(cli, library, root):
    done = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--mode", "frozen", code=1)
    assert "3 failed" in done.stdout
    assert "the cache is frozen" in done.stdout
    assert not root.exists()


def test_a_mode_that_is_none_is_usage(cli):
    assert "'rw', 'ro', 'off', 'frozen'" in cli("stats", "--mode", "readonly", code=2).stderr


def test_what_would_change_the_cache_is_refused(cli, kept):
    assert "in mode 'frozen'" in cli("clear", "--yes", "--mode", "frozen", code=3).stderr
    assert "in mode 'ro'" in cli("prune", "--max-size", "0", "--mode", "ro", code=3).stderr


@pytest.mark.parametrize("mode", ["ro", "off"])
def test_nothing_is_prewarmed_where_nothing_is_kept(mode, cli, library, root):
    """It says so before any compile; what is there already is a hit in mode ro."""
    ask = ("prewarm", "--manifest", library, "--kernel", "fill", "--arch", "sm_90")
    done = cli(*ask, "--mode", mode, code=2)
    assert f"1 program of 1 can't be prewarmed: nothing is kept in mode '{mode}'" in done.stderr
    assert "compiled" not in done.stderr + done.stdout
    assert not root.exists()
    cli(*ask)
    assert "100% hits" in cli(*ask, "--mode", "ro").stdout


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_prewarm_into_memory_is_refused(cli, library, monkeypatch):
    """For root every directory can be written, so the answer to "can it?" is injected."""
    monkeypatch.setattr("cuda_progcache.store.root.Root.writable", lambda _: False)
    done = cli("prewarm", "--manifest", library, "--kernel", "fill", "--arch", "sm_90", code=3)
    assert "can't prewarm: the programs would be kept only in memory" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("mode", ["ro", "off", "frozen"])
def test_why_there_is_no_entry_is_told_by_the_mode(mode, cli, tmp_path, monkeypatch):
    """Of a miss, and of a hit that a tier gave."""
    tier, ask = tmp_path / "tier", ("compile", "--kernel", "axpby", "--arch", "sm_90", "--mode", mode)
    cli("compile", "--kernel", "axpby", "--arch", "sm_90", "--cache-dir", tier)
    told = [] if mode == "frozen" else [cli(*ask).stdout]
    if mode != "off":
        monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"file:{tier}")
        told.append(cli(*ask).stdout)
        assert told[-1].startswith("hit ")
    for each in told:
        assert f"not cached: nothing is kept in mode '{mode}'" in each
