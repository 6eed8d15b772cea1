# SPDX-License-Identifier: Apache-2.0
"""``explain``, on real compiles."""

from __future__ import annotations

import os

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, ProgramOptions

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.fixture
def compiles():
    service = CompileService()
    return [
        service.compile(SOURCE, options=ProgramOptions(arch="sm_80", name="k.cu", **options)).digest
        for options in ({}, {"max_register_count": 32})
    ]


def test_the_last_and_any(cli, cli_json, compiles):
    told = cli("explain", "--last").stdout
    about, reason, by = told.splitlines()
    assert about.startswith(f"{compiles[1][:12]} k.cu --maxrregcount=32 (cubin, sm_80) was compiled in ")
    assert by.startswith(f"compiled by process {os.getpid()} on {os.uname().nodename}, ")
    assert reason == "  option max_register_count unset → 32"
    assert cli("explain", "k.cu").stdout == told
    assert "first compile of this program" in cli("explain", compiles[0][:10]).stdout
    found = cli_json("explain", compiles[1])
    assert (found["digest"], found["reasons"]) == (compiles[1], ["option max_register_count unset → 32"])


def test_a_kernel_is_compared_with_itself_or_what_it_was_called_before(cli, library):
    """Of another kernel it may share a header of templates; under another name it is of the same templates."""
    (library / "pack.cuh.j2").write_text("// shared\n")
    for template in ("scale.cu.j2", "fill.cu.j2"):
        path = library / template
        path.write_text('{% include "pack.cuh.j2" %}\n' + path.read_text())
    ask = ("compile", "--manifest", library, "--arch", "sm_80", "--kernel")
    cli(*ask, "scale")
    cli(*ask, "fill")
    assert cli("explain", "--last").stdout.splitlines()[1] == "  first compile of this program"
    manifest = library / "manifest.toml"
    manifest.write_text(manifest.read_text().replace("kernels.fill", "kernels.filled"))
    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text().replace("= 3", "= 4"))
    cli(*ask, "filled")
    assert "\n  template fill.cu.j2 changed (" in cli("explain", "--last").stdout


def test_wrong_calls(cli, compiles):
    assert cli("explain", code=2).stderr.count("--last") == 1
    assert cli("explain", compiles[0], "--last", code=2)
    assert "a digest that starts with 0000" in cli("explain", "0000", code=5).stderr
    with FileStreamProgramCache() as cache:
        cache["by hand"] = b"x"
        digest = next(e.digest for e in cache.entries() if not e.record)
    assert "by hand" in cli("explain", digest, code=5).stderr


def test_an_empty_cache(cli):
    assert "no program has been compiled" in cli("explain", "--last", code=5).stderr


UNKEPT = "__device__ int t = sizeof(__TIME__);\n" + SOURCE


def test_what_is_not_kept_is_listed_and_explained(cli, cli_json, compiles, tmp_path):
    path = tmp_path / "when.cu"
    path.write_text(UNKEPT)
    made = cli_json("compile", path, "--arch", "sm_90")
    assert made["digest"] is None
    (one,) = cli_json("list", "--unkept")["unkept"]
    assert (one["kind"], one["arch"], one["reason"]) == ("time_macro", "sm_90", made["reason"])
    text = cli("list", "--unkept").stdout
    assert made["reason"] in text
    assert one["advice"] in text
    assert cli_json("list", "--unkept", "--arch", "sm_80")["unkept"] == []
    for arguments in (["--last"], [one["digest"][:8]]):
        said = cli("explain", *arguments).stdout
        assert "was compiled but not kept" in said
        assert made["reason"] in said
        assert cli_json("explain", *arguments)["reasons"] == [made["reason"]]
    assert "first compile" in cli("explain", compiles[0]).stdout
    assert "1 time macro" in cli("stats").stdout
    assert cli_json("stats")["unkept"] == {"time_macro": 1}
