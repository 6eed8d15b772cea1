# SPDX-License-Identifier: Apache-2.0
"""``diff --lock``: of a change to a library, which kernels' machine code changed, and which only their keys."""

from __future__ import annotations

import re

import pytest

from cuda_progcache import FileStreamProgramCache

KERNEL = """
[kernels.{name}]
template = "{name}.cu.j2"
entry_points = ["{name}"]
{options}
[[kernels.{name}.variants]]
[kernels.{name}.parameters]
n = {{type = "int", default = {default}, values = [2, 3]}}
"""
CODE = 'extern "C" __global__ void {name}(float *a) {{ {body} }}\n'
BODIES = {
    "edited": "a[threadIdx.x] *= {{ n }}.0f;",
    "same": "a[threadIdx.x] += {{ n }}.0f;",
    "defined": "a[0] = {{ n }};",
    "gone": "a[1] = {{ n }};",
}


def write(folder, bodies, options):
    folder.mkdir()
    text = "format = 1\n"
    for name, body in bodies.items():
        text += KERNEL.format(name=name, options=options.get(name, ""), default=2)
        (folder / f"{name}.cu.j2").write_text(CODE.format(name=name, body=body))
    (folder / "manifest.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two versions of a library, and their lockfiles over one cache."""
    from click.testing import CliRunner

    from cuda_progcache.cli.app import app

    place = tmp_path_factory.mktemp("versions")
    after = {name: body for name, body in BODIES.items() if name != "gone"}
    after["edited"] = (
        "__shared__ float s[64]; s[threadIdx.x] = a[0]; __syncthreads(); a[threadIdx.x] *= s[0] + {{ n }};"
    )
    write(place / "old", BODIES, {})
    write(place / "new", after | {"more": "a[2] = {{ n }};"}, {"defined": 'options = {define_macro = ["UNUSED"]}'})
    for name in ("old", "new"):
        for command in ("prewarm", "lock"):
            target = ["-o", str(place / f"{name}.lock")] if command == "lock" else []
            arguments = ["--manifest", str(place / name), "--arch", "sm_90", "--cache-dir", str(place / "cache")]
            done = CliRunner().invoke(app, [command, *arguments, *target], prog_name="cuda-progcache")
            assert done.exit_code == 0, done.output
    return place


@pytest.fixture
def diff(cli, cli_json, place):
    def run(*more, before="old", after="new", code=1, json=False, cache="cache"):
        call = cli_json if json else cli
        files = (place / f"{before}.lock", place / f"{after}.lock")
        return call("diff", "--lock", *files, "--cache-dir", place / cache, *more, code=code)

    return run


def test_each_program_has_its_kind(diff):
    found = diff(json=True)["programs"]
    assert {one["program"]: one["status"] for one in found} == {
        "edited n=2 sm_90": "code",
        "defined n=2 sm_90": "key",
        "more n=2 sm_90": "added",
        "gone n=2 sm_90": "removed",
    }
    (edited,) = [one for one in found if one["status"] == "code"]
    (kernel,) = edited["diff"]["kernels"]
    assert kernel["deltas"]["shared_bytes"] == [0, 256]
    assert any("BAR.SYNC" in line for line in kernel["lines"])


def test_for_people(diff):
    text = diff().stdout
    assert re.search(
        r"^machine code changed \(1\)\n  edited n=2 sm_90\n    template edited.cu.j2 changed \(", text, re.MULTILINE
    )
    assert re.search(r"^only the key changed.*\(1\)\n  defined n=2 sm_90\n    option define_macro", text, re.MULTILINE)
    assert "shared bytes 0 → 256" in text
    assert re.search(r"^    \+    BAR.SYNC", text, re.MULTILINE)
    assert text.endswith("1 with changed machine code, 1 with only a changed key, 1 added, 1 removed\n")
    assert "BAR.SYNC" not in diff("--stat").stdout


def test_for_a_pull_request(diff, tmp_path):
    diff("--markdown", tmp_path / "comment.md")
    text = (tmp_path / "comment.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0].count("|") == 8 and len(rows) == 5
    assert all(row.count("|") == 8 for row in rows)
    edited = next(row for row in rows if "edited" in row)
    assert "0 → **256**" in edited and "template edited.cu.j2 changed" in edited.replace("\\_", "_")
    assert text.count("<details>") == text.count("</details>") == 1
    assert "```diff\n--- before\n" in text
    diff("--markdown", tmp_path / "none.md", after="old", code=0)
    assert (tmp_path / "none.md").read_text() == "### Compiled kernels\n\nNo program changed.\n"


def test_alike_is_success(diff):
    assert diff(after="old", code=0).stdout == "no program changed\n"
    assert diff(after="old", code=0, json=True) == {"programs": []}


def test_what_is_not_in_the_cache_is_said(diff, place, cli, tmp_path):
    with FileStreamProgramCache(place / "empty"):
        pass
    text = diff(cache="empty").stdout
    assert "changed; a binary isn't in the cache (1)\n  edited n=2 sm_90\n" in text
    assert re.search(r"prewarm --cache-dir \S+ --lock \S*old.lock|prewarm --lock \S*old.lock", text)
    assert "only the key changed" in text  # the lockfiles have the digests of the binaries


def test_wrong_use(cli, place, tmp_path):
    assert "there is no file" in cli("diff", "--lock", tmp_path / "none", place / "new.lock", code=2).stderr
    (tmp_path / "other").write_text("{}")
    assert "is not a lockfile" in cli("diff", "--lock", tmp_path / "other", place / "new.lock", code=2).stderr
    assert "--markdown needs --lock" in cli("diff", "--markdown", tmp_path / "m", "abcd", "abce", code=2).stderr
