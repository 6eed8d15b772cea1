# SPDX-License-Identifier: Apache-2.0
"""The first request after a deploy took 40 seconds: what it was, what it cost, who asked. And others' caches."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from ci import matrix
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions

# What runs in production: two programs over one header, and one over none.
SERVE = """
import sys
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
root, folder = sys.argv[1:]
with FileStreamProgramCache(root, durability="none") as cache:
    for name, source in {
        "scale.cu": '#include "tile.h"\\nextern "C" __global__ void scale(float* x) { x[threadIdx.x] *= TILE; }',
        "shift.cu": '#include "tile.h"\\nextern "C" __global__ void shift(float* x) { x[threadIdx.x] += TILE; }',
        "fill.cu": 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = 1; }',
    }.items():
        for count in (32, 64):
            options = ProgramOptions(name=name, arch="sm_80", include_path=folder, max_register_count=count)
            Program(source, "c++", options).compiled("cubin", cache=cache)
"""


def serve(python, script, root, folder):
    """Run the service of a deploy, by an interpreter with its own compiler."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "PYTHON"))}
    environment = kept | {"PYTHONPATH": str(matrix.ROOT), "PYTHONWARNINGS": "ignore"}
    command = [str(python), str(script), str(root), str(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def deploys(tmp_path_factory, oldest_release):
    """The cache before and after: one header was edited, and NVRTC is another one."""
    folder = tmp_path_factory.mktemp("deploys")
    script = folder / "serve.py"
    script.write_text(SERVE)
    (folder / "tile.h").write_text("#define TILE 16\n")
    serve(oldest_release, script, folder / "old", folder)
    shutil.copytree(folder / "old", folder / "new")
    (folder / "tile.h").write_text("#define TILE 32\n")
    serve(sys.executable, script, folder / "new", folder)
    return folder


def test_three_commands_lead_to_both_causes_their_cost_and_who_asked(cli, cli_json, deploys):
    old, new = deploys / "old", deploys / "new"
    # What was compiled since, and what was dear?
    listed = cli("list", "--cache-dir", new, "--since", "1h", "--sort", "cost").stdout.splitlines()
    assert len(listed) == 1 + 12
    assert any("scale.cu" in line and "--maxrregcount=64" in line for line in listed)
    assert "cost" in listed[0].split() and re.search(r" \d[\d.]* m?s ", listed[1])
    # Why?
    told = cli("explain", "scale.cu", "--cache-dir", new)
    assert "4 programs match scale.cu; this is the one compiled last" in told.stderr
    _, *reasons, by = told.stdout.splitlines()
    assert f" on {os.uname().nodename}, " in by and "serve.py" in by
    assert "header tile.h changed (1 of 1 headers differ)" in reasons[-1]
    assert "nvrtc build differs: 12.9.86 → 13." in reasons[0]
    # Is that all of it?
    compared = cli("compare", old, new, code=1).stdout
    assert compared.startswith("6 the same, 6 under another key, 0 only in")
    found = cli_json("compare", old, new, code=1)
    causes = {one["reason"].partition(" (")[0].partition(":")[0]: one for one in found["causes"]}
    assert (causes["nvrtc build differs"]["count"], causes["header tile.h changed"]["count"]) == (6, 4)
    assert 0 < causes["header tile.h changed"]["seconds"] < causes["nvrtc build differs"]["seconds"] <= found["seconds"]
    (maker,) = found["made_by"]
    assert maker["host"] == os.uname().nodename and "serve.py" in maker["command"] and maker["count"] == 6
    assert "6 changed" in compared and "4 changed" in compared and "serve.py" in compared


def test_lists_and_bundles_are_compared_too(cli, cli_json, deploys, tmp_path):
    old, new = deploys / "old", deploys / "new"
    cli("export", tmp_path / "old.tar", "--cache-dir", old)
    for name, root in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(cli("list", "--json", "--cache-dir", root).stdout)
    whole = cli_json("compare", old, new, code=1)
    of_bundle = cli_json("compare", tmp_path / "old.tar", new, code=1)
    assert (of_bundle["causes"], of_bundle["same"]) == (whole["causes"], whole["same"])
    of_lists = cli_json("compare", tmp_path / "old.json", tmp_path / "new.json", code=1)
    for part in ("same", "changed", "added", "gone"):
        one, other = (found[part] for found in (of_lists, whole))
        assert one == other if part == "same" else [o["digest"] for o in one] == [o["digest"] for o in other]
    assert "a list doesn't say why" in of_lists["causes"][0]["reason"] if of_lists["causes"] else True
    assert cli_json("compare", old, tmp_path / "old.tar")["same"] == 6
    (tmp_path / "junk").write_text("{}")
    assert "isn't the output of" in cli("compare", tmp_path / "junk", new, code=1).stderr
    (tmp_path / "junk").write_text("PK")
    assert "bundle" in cli("compare", tmp_path / "junk", new, code=1).stderr


def test_a_record_says_nothing_of_who_compiled(deploys, tmp_path):
    """A bundle goes to others: neither host nor command line is in it, and two exports are the same bytes."""
    with FileStreamProgramCache(deploys / "new") as cache:
        for name in ("a.tar", "b.tar"):
            cache.export(tmp_path / name)
        assert all("serve.py" not in json.dumps(dict(entry.record)) for entry in cache.entries())
    content = (tmp_path / "a.tar").read_bytes()
    assert content == (tmp_path / "b.tar").read_bytes()
    assert os.uname().nodename.encode() not in content and b"serve.py" not in content


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made by root alone")
def test_anothers_cache_is_looked_into_and_nothing_is_written(cli, cli_json, deploys, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(deploys / "old", theirs)
    for folder, _, files in os.walk(theirs):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.chown(path, 12345, 12345)
    before = sorted((path, os.stat(path).st_mtime_ns) for path in map(str, theirs.rglob("*")))
    for arguments in (["list"], ["stats"], ["show", "scale.cu"], ["explain", "--last"], ["verify"], ["top"]):
        assert "belongs to user id 12345; it is only read" in cli(*arguments, "--cache-dir", theirs).stderr
    assert cli_json("stats", "--cache-dir", theirs)["entries"] == 6
    assert cli_json("compare", deploys / "old", theirs)["same"] == 6
    assert sorted((path, os.stat(path).st_mtime_ns) for path in map(str, theirs.rglob("*"))) == before
    for arguments in (["clear", "--yes"], ["prune", "--max-size", "0"], ["verify", "--repair"], ["pin", "scale.cu"]):
        assert "belongs to user id 12345" in cli(*arguments, "--cache-dir", theirs, code=3).stderr
    assert cli_json("stats", "--cache-dir", theirs)["entries"] == 6


def test_a_clock_that_was_ahead_names_nothing_for_the_last(cli, root, monkeypatch):
    import time

    def compiled(count):
        options = ProgramOptions(arch="sm_80", name="k.cu", max_register_count=count)
        return Program('extern "C" __global__ void k(int* a) { *a = 1; }', "c++", options).compiled(
            "cubin", cache=cache
        )

    now = time.time
    with FileStreamProgramCache() as cache:
        compiled(32)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + 86400)
            ahead = compiled(64)
        last = compiled(128)
    told = cli("explain", "--last").stdout
    assert told.startswith(last.digest[:12])
    assert "first compile" not in cli("explain", ahead.digest[:12]).stdout


def test_names_that_steer_a_terminal_are_escaped(cli, cli_json, root, tmp_path):
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp.cu\nsecond"
    with FileStreamProgramCache() as cache:
        options = ProgramOptions(arch="sm_80", name="k.cu")
        made = Program('extern "C" __global__ void k(int* a) { *a = 1; }', "c++", options).compiled(
            "cubin", cache=cache
        )
        entry = cache.info(made.digest)
        kernel = {"name": evil, "parameters": {"a": evil}, "templates": [{"name": evil, "digest": "12" * 32}]}
        record = {**entry.record, "kernel": kernel, "log": evil, "arch": evil, "symbol_mapping": {evil: evil}}
        cache.publish(b"evil", entry.path.read_bytes(), record)
        digest = next(one.digest for one in cache.entries() if one.record.get("arch") == evil)
    calls = [["list"], ["show", digest], ["explain", digest], ["provenance", digest], ["stats"], ["top"], ["check"]]
    calls += [["provenance", digest, "--format", kind] for kind in ("dot", "svg", "json", "prov")]
    calls += [["resources"], ["compare", root, tmp_path / "none"], ["list", "--json"], ["show", digest, "--json"]]
    (tmp_path / "none").mkdir()
    for arguments in calls:
        from click.testing import CliRunner

        from cuda_progcache.cli.app import app

        done = CliRunner().invoke(app, [str(a) for a in arguments])
        text = done.stdout + done.stderr
        assert done.exit_code in {0, 1}, (arguments, text)
        assert not set(text) & set("\x1b\x07\x00\x9b\u202e"), arguments
    import xml.etree.ElementTree as ET

    ET.fromstring(cli("provenance", digest, "--format", "svg").stdout)
