# SPDX-License-Identifier: Apache-2.0
"""A project of thirty tests, as somebody would write it, under xdist: first with an empty cache, then in CI's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

CONFTEST = """
import pathlib
import pytest
from cuda_progcache.compile import single_flight

# However long one worker is kept from running, the other waits for what it compiles.
single_flight.STANDSTILL = 600

@pytest.fixture(scope="session")
def header():
    return str(pathlib.Path(__file__).parent / "include")
"""

SOURCES = r"""
import cuda_progcache
import pytest

# Both workers want the same five programs, four times each.
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4] * 4)
def test_shared(number, program_cache, header):
    source = '#include "tile.h"\nextern "C" __global__ void k(int *a) { a[TILE] = %d; }' % number
    options = cuda_progcache.ProgramOptions(arch="sm_90", name="shared.cu", include_path=[header])
    program = cuda_progcache.Program(source, "c++", options)
    assert program.compiled("cubin", cache=program_cache).data.startswith(b"\x7fELF")
"""

KERNELS = r"""
import pytest

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_axpby(kernel, dtype, arch):
    assert kernel("axpby", dtype=dtype, arch=arch).resource_usage()

def test_again(kernel):
    assert kernel("axpby", dtype="float32", arch="sm_80").data
"""

THEIRS = r"""
import cuda.core
import pytest

@pytest.mark.parametrize("number", [0, 0, 0, 0])
def test_cuda_core(number, program_cache):
    options = cuda.core.ProgramOptions(arch="sm_90", name="theirs.cu")
    program = cuda.core.Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", options)
    assert len(program.compile("cubin", cache=program_cache).code)
"""

PLAIN = r"""
import pytest

@pytest.mark.no_compile
def test_nothing():
    pass
"""


def run_project(folder, *arguments):
    """Run the project's tests in two workers; give what was printed, and the report."""
    plugins = ("-p", "cuda_progcache.pytest_plugin", "-p", "xdist.plugin", "-p", "no:cacheprovider")
    command = ["timeout", "-s", "KILL", "600", sys.executable, "-m", "pytest", *plugins, "-n", "2", "--dist", "load"]
    done = subprocess.run(
        [*command, "--progcache-dir=programs", "--progcache-report=report.json", *arguments],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The first run, and a frozen one of another checkout with the same cache: ``(text, report)`` of each."""
    folder, elsewhere = (tmp_path_factory.mktemp(name) for name in ("project", "elsewhere"))
    files = {"conftest.py": CONFTEST, "test_sources.py": SOURCES, "test_kernels.py": KERNELS, "test_theirs.py": THEIRS}
    for name, text in {**files, "test_plain.py": PLAIN, "pytest.ini": "[pytest]\n"}.items():
        (folder / name).write_text(text)
    (folder / "include").mkdir()
    (folder / "include" / "tile.h").write_text("#define TILE 16\n")
    first = run_project(folder, "--progcache-record=run.json")
    shutil.copytree(folder, elsewhere, dirs_exist_ok=True)
    return [first, run_project(elsewhere, "--progcache=frozen")], folder


def test_each_program_is_compiled_once(runs):
    (text, report), folder = runs[0][0], runs[1]
    assert "30 passed" in text
    compiled = [one["digest"] for one in report["compiles"]]
    assert len(compiled) == len(set(compiled)) == report["misses"] == 10, "5 of headers, 4 kernels, 1 of cuda.core"
    assert (report["hits"], report["compiled_without_a_cache"], report["refused"]) == (19, 0, 0)
    assert sum(1 for path in (folder / "programs" / "entries").rglob("*") if path.is_file()) == 10
    assert sum(report["misses_by_reason"].values()) == 10
    assert report["compile_seconds"] > 0
    assert {one["where"].partition("::")[0] for one in report["compiles"]} == {
        "test_sources.py",
        "test_kernels.py",
        "test_theirs.py",
    }


def test_the_summary_is_one_over_all_workers(runs):
    text, _ = runs[0][0]
    assert text.count("progcache: ") == 1
    assert "progcache: 19 hits, 10 misses, 0 dropped (65% hits), " in text
    assert "  compiled 10 programs in " in text
    assert "× first compile of this program" in text
    assert text.count("  slowest: ") == 3
    assert " at test_" in text.split("slowest: ")[1]


def test_the_next_run_compiles_nothing_in_another_checkout(runs):
    text, report = runs[0][1]
    assert "30 passed" in text
    assert (report["hits"], report["misses"], report["compiles"], report["mode"]) == (29, 0, [], "frozen")
    assert "(100% hits)" in text
    assert "hits saved " in text
    assert report["avoided_seconds"] > 0


def test_what_was_used_is_recorded_by_all_workers(runs):
    from cuda_progcache.compile.recording import read

    used = read(runs[1] / "run.json")
    assert {one["name"] for one in used} >= {"shared.cu", "axpby.cu"}
    assert len(used) == 9, "what cuda.core compiles isn't recorded"
