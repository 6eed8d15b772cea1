# SPDX-License-Identifier: Apache-2.0
"""``resources``, ``sass``, ``diff`` and ``top`` over programs that were compiled here."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.cli.inspection import of_library
from cuda_progcache.inspect import occupancy
from cuda_progcache.inspect.resources import Resources

SOURCE = """template <class T> __global__ void __launch_bounds__(128) scale(T *a) {
  __shared__ T s[128];
  s[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  a[threadIdx.x] = s[127 - threadIdx.x] * FACTOR;
}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A cache with two builds of one kernel, a variant with line information, and its PTX."""
    root = tmp_path_factory.mktemp("inspection") / "cache"
    with FileStreamProgramCache(root, durability="none") as cache:
        for name, factor, target, more in (
            ("old", 2, "cubin", {}),
            ("new", 5, "cubin", {}),
            ("lines", 2, "cubin", {"lineinfo": True}),
            ("text", 2, "ptx", {}),
        ):
            options = ProgramOptions(name=f"{name}.cu", arch="sm_90", define_macro=[("FACTOR", str(factor))], **more)
            Program(SOURCE, "c++", options).compile(target, name_expressions=["scale<float>"], cache=cache)
    return root


@pytest.fixture
def digests(root, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(root))
    with FileStreamProgramCache(root) as cache:
        return {entry.record["name"].removesuffix(".cu"): entry.digest[:12] for entry in cache.entries()}


def test_a_source_file_means_the_program_of_its_name(cli, digests, tmp_path, monkeypatch):
    """There is no machine code in a source; in a cubin that lies there, there is."""
    monkeypatch.chdir(tmp_path)
    Path("old.cu").write_text(SOURCE)
    told = cli("sass", "old.cu").stdout
    assert told == cli("sass", digests["old"]).stdout
    Path("none.cu").write_text(SOURCE)
    assert "is called none.cu; " in cli("sass", "none.cu", code=5).stderr
    shutil.copy(cli("show", "--path", "new.cu").stdout.strip(), "old.cubin")
    assert cli("diff", "old.cubin", "new.cu", "--stat").stdout == "the binaries are equal\n"


def test_resources_have_a_row_for_each_kernel(cli, cli_json, digests):
    found = cli_json("resources")["kernels"]
    assert [one["program"] for one in found] == ["lines.cu", "new.cu", "old.cu"]  # PTX uses nothing yet
    first = found[0]
    assert (first["kernel"], first["arch"]) == ("scale<float>", "sm_90")
    used = Resources(**first["resources"])
    assert (used.shared_bytes, used.max_threads) == (512, 128)
    runs = occupancy(used, "sm_90", 128)
    assert first["occupancy"] == {**runs._asdict(), "limiters": list(runs.limiters), "cliffs": []}
    rows = cli("resources", "--kernel", "old*").stdout.splitlines()
    assert rows[0].split()[:4] == ["kernel", "parameters", "arch", "registers"]
    assert re.search(rf"old\.cu: scale<float> +sm_90 +{used.registers} +0 +512 B .* 128 +100% +nothing", rows[1])
    assert len(rows) == 2


def test_occupancy_is_of_the_block_that_is_asked_for(cli, cli_json, digests):
    (one,) = cli_json("resources", "--kernel", "old*", "--block-size", "64", "--dynamic-shared", "60000")["kernels"]
    assert one["occupancy"] == {
        "block_size": 64,
        "dynamic_shared_bytes": 60000,
        "blocks": 3,
        "warps": 6,
        "most_warps": 64,
        "limiters": ["shared_bytes"],
        "cliffs": [{"resource": "shared_bytes", "fewer": 3168, "warps": 8}],
    }
    row = cli("resources", "--kernel", "old*", "--block-size", "64", "--dynamic-shared", "60000").stdout.splitlines()[1]
    assert row.endswith("shared memory  3.2 kB less shared memory: 12%")
    row = cli("resources", "--kernel", "old*", "--block-size", "512").stdout.splitlines()[1]
    assert row.endswith("0%  the block's size: such a block can't be launched")


def test_what_cannot_be_read_is_told_and_passed_over(cli, root, digests, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    with FileStreamProgramCache(tmp_path / "other") as other:
        about = {"name": "bad.cu", "target_type": "cubin", "arch": "sm_90"}
        other.publish(b"bad", b"\x7fELF\x02\x01 and no more", about)
    done = cli("resources", "--cache-dir", tmp_path / "other")
    assert re.search(r"[0-9a-f]{12} \(bad.cu\) is skipped: .*corrupt", done.stderr)
    assert len(done.stdout.splitlines()) == 4


def test_sass_shows_instructions_with_registers_in_use(cli, cli_json, digests):
    lines = cli("sass", digests["old"]).stdout.splitlines()
    assert re.match(r"scale<float>  \(\d+ instructions: ", lines[0])
    assert any(re.fullmatch(r"    [0-9a-f]{5} +\d+  EXIT", line) for line in lines)
    (code,) = cli_json("sass", digests["old"])["kernels"].values()
    assert {"offset", "labels", "text", "live", "source"} == code["instructions"][0].keys()
    assert sum(code["mix"].values()) == len(code["instructions"])
    assert len(cli("sass", digests["old"], "--mix").stdout.splitlines()) == 1
    assert "no kernel of" in cli("sass", digests["old"], "--kernel", "other", code=2).stderr


def test_sass_shows_source_lines(cli, digests, tmp_path, monkeypatch):
    assert "-O lineinfo=true" in cli("sass", digests["old"], "--source").stderr
    done = cli("sass", digests["lines"], "--source")
    assert not done.stderr
    assert re.search(r"lines\.cu:4$", done.stdout, re.MULTILINE)
    (place,) = set(re.findall(r"^  (\S*lines\.cu):4$", done.stdout, re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    if not os.path.isabs(place):  # the name is all that is known
        Path("lines.cu").write_text(SOURCE)
        assert "lines.cu:4  __syncthreads();" in cli("sass", digests["lines"], "--source").stdout


def test_sass_of_a_library_kernel_names_its_templates_lines(cli, digests, tmp_path, monkeypatch):
    (tmp_path / "manifest.toml").write_text(
        'format = 1\n[kernels.twice]\ntemplate = "twice.cu.j2"\nentry_points = ["twice"]\n'
        '[kernels.twice.parameters]\nn = {type = "int", default = 2}\n'
    )
    (tmp_path / "twice.cu.j2").write_text(
        '{% set k = n %}\nextern "C" __global__ void twice(float *a) {\n  a[0] *= {{ k }};\n}\n'
    )
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "cache"))
    shown = cli("sass", "twice?n=3@sm_80", "--source", "--manifest", tmp_path).stdout
    assert re.search(r"twice\.cu\.j2:3  a\[0\] \*= \{\{ k \}\};\n +[0-9a-f]+ +\d+  ", shown)
    changed = cli("diff", "twice?n=3@sm_80", "twice?n=4@sm_80", "--manifest", tmp_path, code=1).stdout
    assert changed.startswith("parameter n 3 → 4\n")
    assert "twice: changed (instructions -1 +1)" in changed


def test_diff_of_two_builds(cli, cli_json, digests):
    text = cli("diff", digests["old"], digests["new"], code=1).stdout
    assert "option define_macro" in text
    assert re.search(r"^\+    .*FMUL.*, 5", text, re.MULTILINE)
    found = cli_json("diff", digests["old"], digests["new"], code=1)
    assert (found["equal"], found["same_code"]) == (False, False)
    (one,) = found["kernels"]
    assert (one["kind"], one["deltas"]) == ("changed", {})
    short = cli("diff", digests["old"], digests["new"], "--stat", code=1).stdout
    assert "FMUL" not in short and "changed" in short


def test_diff_says_when_the_key_alone_differs(cli, cli_json, digests):
    text = cli("diff", digests["old"], digests["lines"], code=1).stdout
    assert "option lineinfo" in text
    assert text.endswith("the machine code is equal; only other parts of the files differ\n")
    assert cli_json("diff", digests["old"], digests["lines"], code=1)["same_code"]
    assert cli("diff", digests["old"], digests["old"]).stdout == "the binaries are equal\n"


def test_diff_of_files(cli, digests, root, tmp_path):
    for name in ("old", "text"):
        path = cli("show", digests[name], "--path").stdout.strip()
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    assert cli("diff", tmp_path / "old", digests["old"]).stdout == "the binaries are equal\n"
    (tmp_path / "edited").write_bytes((tmp_path / "text").read_bytes().replace(b".version", b"// more\n.version", 1))
    assert "+// more" in cli("diff", tmp_path / "text", tmp_path / "edited", code=1).stdout
    assert "only cubins and PTX can be compared" in cli("diff", tmp_path / "old", tmp_path / "text", code=1).stdout


@pytest.mark.parametrize("by", ["largest", "costliest", "newest", "unused"])
def test_top_has_the_most_of_it_first(cli, cli_json, digests, by):
    found = cli_json("top", by, "-n", "3")["entries"]
    assert len(found) == 3
    order = {
        "largest": lambda one: -one["size"],
        "costliest": lambda one: -one["seconds"],
        "newest": lambda one: one["created"],
        "unused": lambda one: max(one["last_used"], one["created"]),
    }[by]
    assert found == sorted(found, key=order, reverse=by == "newest")
    every = cli_json("top", by, "-n", "9")["entries"]
    assert len(every) == 4 and every[:3] == found
    assert len(cli("top", by).stdout.splitlines()) == 6


def test_an_empty_cache_has_nothing(cli, tmp_path):
    for command in (["resources"], ["top"]):
        assert "empty" in cli(*command, "--cache-dir", tmp_path / "none").stderr
    assert "no program" in cli("sass", "abcd", "--cache-dir", tmp_path / "none", code=5).stderr


def test_kernel_texts():
    both = (("dtype", "float16"), ("block", "256"))
    for text in ("softmax?dtype=float16&block=256@sm_90", "softmax?dtype=float16,block=256@sm_90"):
        assert of_library(text) == ("softmax", both, "sm_90")
    assert of_library("softmax@sm_90") == ("softmax", (), "sm_90")
    assert of_library("softmax?") == ("softmax", (), None)
    assert of_library("3f2a91c0") is of_library("k@home.cu") is None
