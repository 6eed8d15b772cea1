# SPDX-License-Identifier: Apache-2.0
"""``lock`` and ``check --lock``: the release engineer's way, by the command line."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

ARCHS = ("--arch", "sm_90")


def test_locked_prewarmed_and_proved(cli, cli_json, library, root, tmp_path, monkeypatch):
    manifest = ("--manifest", library)
    told = cli_json("lock", *manifest, *ARCHS, "-o", tmp_path / "early.lock")
    assert (told["programs"], told["unlocked"]) == (3, 3)
    assert not root.exists()
    cli("prewarm", *manifest, *ARCHS)
    assert cli("lock", *manifest, *ARCHS, "-o", tmp_path / "a.lock").stdout == f"3 programs in {tmp_path / 'a.lock'}\n"
    locked = json.loads((tmp_path / "a.lock").read_text())
    assert {tool["name"] for tool in locked["toolchain"]} == {"nvrtc", "nvrtc-builtins"}

    lock = ("--lock", tmp_path / "a.lock", *manifest)
    assert "3 of 3 programs are in" in cli("check", *lock).stdout
    other = ("--cache-dir", tmp_path / "other")
    assert "0 of 3 programs are in" in cli("check", *lock, *other, code=1).stdout
    assert cli_json("prewarm", *lock, *other)["compiled"] == 3
    assert cli_json("prewarm", *lock, *other, "--require-hits")["hits"] == 3
    cli("export", tmp_path / "b.tar", *other)
    cli("check", tmp_path / "b.tar", *lock)  # a bundle
    cli("check", tmp_path / "other", *lock)  # a directory
    cli("check", *manifest, *ARCHS)  # a manifest
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"file://{tmp_path / 'other'}")
    empty = tmp_path / "empty"
    proved = cli("check", *lock, "--cache-dir", empty).stdout
    assert f"3 of 3 programs are in {empty} and its tiers" in proved
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS")

    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text() + "__device__ int edited;\n")
    done = cli("check", *lock, "--junit", tmp_path / "j.xml", code=1)
    assert "stale   fill sm_90" in done.stdout
    assert "template fill.cu.j2 changed" in done.stdout
    assert "unused  fill cubin sm_90" in done.stdout
    assert f"--manifest {library}" in done.stdout
    assert "2 of 3 programs" in done.stdout
    refused = cli("compile", "--kernel", "fill", *manifest, *ARCHS, "--mode", "frozen", code=1).stderr
    assert "template fill.cu.j2 changed" in refused
    (suite,) = ET.parse(tmp_path / "j.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    proof = cli_json("check", *lock, code=1)
    assert proof["counts"] == {"hit": 2, "missing": 0, "stale": 1, "failed": 0, "skipped": 0, "unused": 1}


def test_what_is_there_for_another_architecture_alone_is_missing(cli, cli_json, library, tmp_path):
    manifest = ("--manifest", library, "--kernel", "fill")
    cli("prewarm", *manifest, "--arch", "sm_80")
    proof = cli_json("check", *manifest, "--arch", "sm_80", "--arch", "sm_90", code=1)
    assert [(one["arch"], one["status"]) for one in proof["programs"]] == [("sm_80", "hit"), ("sm_90", "missing")]
    assert proof["programs"][1]["reasons"] == ["option arch sm_80 → sm_90"]
    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text() + "__device__ int edited;\n")
    proof = cli_json("check", *manifest, "--arch", "sm_80", code=1)
    assert [one["status"] for one in proof["programs"]] == ["stale"]


def test_what_nothing_needs_hides_nothing_else(cli, library, tmp_path):
    """A few rows, and their number, in a cache of many programs."""
    manifest = ("--manifest", library)
    for block in range(32, 480, 32):
        cli("compile", "--kernel", "scale", "-p", f"block={block}", "--arch", "sm_90", *manifest)
    told = cli("lock", "--kernel", "fill", "--arch", "sm_90", *manifest, "-o", tmp_path / "a.lock")
    assert (
        "1 program isn't in" in told.stderr
        and f"compile with prewarm --lock {tmp_path}/a.lock, then run lock again" in told.stderr
    )
    cli("prewarm", "--lock", tmp_path / "a.lock", *manifest)
    lines = cli("check", "--lock", tmp_path / "a.lock", *manifest).stdout.splitlines()
    assert sum(line.startswith("unused") for line in lines) == 10
    assert lines[-2:] == ["and 4 more (--json has all)", lines[-1]]
    assert lines[-1].startswith("1 of 1 program is in ")
    assert lines[-1].endswith("; 14 unused")


def test_wrong_usage(cli, tmp_path):
    (tmp_path / "x.lock").write_text("{}")
    assert "--from" in cli("lock", code=2).stderr
    assert "is not a lockfile" in cli("check", "--lock", tmp_path / "x.lock", code=2).stderr
    assert "--arch" in cli("prewarm", "--lock", tmp_path / "x.lock", "--arch", "sm_90", code=2).stderr
    assert "is not a recording" in cli("lock", "--from", tmp_path / "x.lock", code=2).stderr
