# SPDX-License-Identifier: Apache-2.0
"""``ci/prewarm.py``, run as a release engineer runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

MANIFEST = """
format = 1
[kernels.fill]
template = "fill.cu.j2"
description = "set every element"
entry_points = ["fill"]
[kernels.fill.parameters]
dtype = { type = "dtype", values = ["float32", "int32"], default = "float32", description = "element type" }
[[kernels.fill.variants]]
[[kernels.fill.variants]]
dtype = "int32"
[kernels.twice]
template = "twice.cu.j2"
description = "double every element"
entry_points = ["twice"]
[[kernels.twice.variants]]
"""
FILL = """extern "C" __global__ void fill({{ dtype | ctype }} *out, {{ dtype | ctype }} value, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = value;
}
"""
TWICE = """extern "C" __global__ void twice(float *out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] *= 2;
}
"""


@pytest.fixture
def library(tmp_path):
    directory = tmp_path / "library"
    directory.mkdir()
    (directory / "manifest.toml").write_text(MANIFEST)
    (directory / "fill.cu.j2").write_text(FILL)
    (directory / "twice.cu.j2").write_text(TWICE)
    return directory


@pytest.fixture
def prewarm(library, tmp_path):
    def run(*arguments, archs=("sm_80", "sm_90"), cache_dir=None, manifest=None):
        command = [sys.executable, ROOT / "ci" / "prewarm.py", "--manifest", manifest or library, "--json", "-"]
        command += ["--cache-dir", cache_dir or tmp_path / "cache", "--jobs", "2"]
        command += [part for arch in archs for part in ("--arch", arch)]
        done = subprocess.run(
            [*map(str, command), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr

    return run


def entries(cache_dir):
    return [path for path in (cache_dir / "entries").rglob("*") if path.is_file()]


def test_every_variant_for_every_architecture_then_hits(prewarm, tmp_path):
    status, summary, stderr = prewarm()
    assert status == 0, stderr
    assert summary["ok"] is True
    assert (summary["compiled"], summary["hits"], summary["failed"]) == (6, 0, 0)
    assert summary["cache_dir"] == str(tmp_path / "cache")
    assert {(item["kernel"], item["arch"]) for item in summary["items"]} == {
        (kernel, arch) for kernel in ("fill", "twice") for arch in ("sm_80", "sm_90")
    }
    assert "[6/6] compiled" in stderr
    assert "fill dtype=int32 sm_90" in stderr
    assert len(entries(tmp_path / "cache")) == 6

    status, summary, stderr = prewarm()
    assert status == 0
    assert (summary["compiled"], summary["hits"]) == (0, 6)
    assert "0 compiled, 6 hits, 0 skipped, 0 failed" in stderr


def test_json_to_a_file_leaves_stdout_empty(library, tmp_path):
    command = [sys.executable, ROOT / "ci" / "prewarm.py", "--manifest", library / "manifest.toml", "--arch", "sm_90"]
    command += ["--kernel", "twice", "--cache-dir", tmp_path / "cache", "--json", tmp_path / "summary.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [item["kernel"] for item in summary["items"]] == ["twice"]
    assert summary["exit_status"] == 0


def test_default_cache_is_the_environments(library, tmp_path):
    command = [
        sys.executable,
        ROOT / "ci" / "prewarm.py",
        "--manifest",
        library,
        "--arch",
        "sm_90",
        "--kernel",
        "twice",
    ]
    environment = {**os.environ, "CUDA_PROGCACHE_DIR": str(tmp_path / "from-environment")}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(entries(tmp_path / "from-environment")) == 1


def test_a_kernel_that_does_not_compile_is_1_and_the_others_are_kept(prewarm, library, tmp_path):
    (library / "twice.cu.j2").write_text(TWICE.replace("*= 2", "*= missing_name"))
    status, summary, stderr = prewarm()
    assert status == 1
    assert summary["ok"] is False
    assert (summary["compiled"], summary["failed"]) == (4, 2)
    assert "missing_name" in stderr
    assert len(entries(tmp_path / "cache")) == 4


def test_what_the_manifest_rules_out_is_told_and_no_failure(prewarm, library, tmp_path):
    text = MANIFEST.replace('description = "double', 'min_arch = 90\ndescription = "double')
    (library / "manifest.toml").write_text(text)
    status, summary, stderr = prewarm()
    assert status == 0, stderr
    assert (summary["compiled"], summary["skipped"]) == (5, 1)
    assert "1 skipped" in stderr
    assert len(entries(tmp_path / "cache")) == 5


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("--kernel", "fil"), {}, "fill"),
        ((), {"archs": ("sm_91",)}, "sm_90"),
        ((), {"archs": ()}, "--arch"),
        (("--jobs", "0"), {}, "at least 1"),
        (("--json", "nowhere/summary.json"), {}, "there is no folder"),
    ],
    ids=["kernel", "arch", "no-arch", "jobs", "json"],
)
def test_wrong_usage_is_2_before_any_compile(prewarm, tmp_path, arguments, settings, message):
    status, _, stderr = prewarm(*arguments, **settings)
    assert status == 2
    assert message in stderr
    assert not (tmp_path / "cache" / "entries").exists() or entries(tmp_path / "cache") == []


def test_a_wrong_manifest_is_2(prewarm, library):
    (library / "manifest.toml").write_text(MANIFEST.replace('template = "fill.cu.j2"', 'tempalte = "fill.cu.j2"'))
    status, summary, stderr = prewarm()
    assert status == 2
    assert "fill" in stderr
    assert (summary["ok"], summary["exit_status"]) == (False, 2)


def test_no_manifest_is_2(prewarm, tmp_path):
    status, _, stderr = prewarm(manifest=tmp_path / "nowhere")
    assert status == 2
    assert "nowhere" in stderr


def test_a_cache_that_cannot_be_made_is_3(prewarm, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    status, summary, stderr = prewarm(cache_dir=tmp_path / "file" / "cache")
    assert status == 3, stderr
    assert summary["exit_status"] == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_1_and_names_what_is_missing(prewarm, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        (disk / "ballast").write_bytes(b"x" * 48 * 1024)
        status, summary, stderr = prewarm(cache_dir=disk / "cache")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert status == 1, stderr
    assert summary["ok"] is False
    assert summary["failed"] + summary["compiled"] == 6
    assert "not stored" in stderr


def test_interrupted_is_130_and_what_was_compiled_is_kept(tmp_path):
    command = [sys.executable, ROOT / "ci" / "prewarm.py", "--kernel", "softmax", "--kernel", "axpby"]
    command += [part for arch in ("sm_80", "sm_90", "sm_100", "sm_120") for part in ("--arch", arch)]
    command += ["--jobs", "2", "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("[1/")
        process.send_signal(signal.SIGINT)
        stderr = process.stderr.read()
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert entries(tmp_path / "cache")
