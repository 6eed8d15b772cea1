# SPDX-License-Identifier: Apache-2.0
"""The marker ``no_compile``: a test fails if anything is compiled during it, however that is done."""

from __future__ import annotations

import json

import pytest

HEADER = """
import threading
import cuda_progcache
import pytest

OPTIONS = cuda_progcache.ProgramOptions(arch="sm_90", name="k.cu")

def program(number):
    return cuda_progcache.Program('extern "C" __global__ void k(int *a) { *a = %d; }' % number, "c++", OPTIONS)
"""

WAYS = (
    HEADER
    + r"""
no_compile = pytest.mark.no_compile

@pytest.fixture(scope="module")
def warm(program_cache):
    program(0).compiled("cubin", cache=program_cache)

@no_compile
def test_passes_a_fixture_of_the_module_compiled_it(warm, program_cache):
    assert program(0).compiled("cubin", cache=program_cache).hit

@no_compile
def test_passes_nothing_is_compiled():
    pass

def test_passes_it_may(program_cache):
    program(1).compiled("cubin", cache=program_cache)

@no_compile
def test_fails_a_miss(program_cache):
    program(2).compiled("cubin", cache=program_cache)

@no_compile
def test_fails_no_cache():
    program(0).compiled("cubin")

@no_compile
def test_fails_another_thread(program_cache):
    thread = threading.Thread(target=lambda: program(3).compiled("cubin", cache=program_cache))
    thread.start()
    thread.join()

@no_compile
def test_fails_a_refusal(program_cache):
    with pytest.raises(cuda_progcache.CompileError):
        cuda_progcache.Program("garbage", "c++", OPTIONS).compiled("cubin", cache=program_cache)

@no_compile
def test_fails_a_library_kernel(kernel):
    kernel("axpby")

@pytest.fixture
def own(program_cache):
    program(4).compiled("cubin", cache=program_cache)

@no_compile
def test_fails_its_own_fixture(own):
    pass

@no_compile
def test_fails_by_its_own_error(program_cache):
    program(5).compiled("cubin", cache=program_cache)
    raise RuntimeError("its own")

@pytest.fixture
def late(program_cache):
    yield
    program(6).compiled("cubin", cache=program_cache)

@no_compile
def test_passes_and_errs_in_teardown(late):
    pass
"""
)


def told_of(text, test):
    """What a run says of one failed test."""
    return text.split(f"_ {test} _", 1)[1].split("\n____", 1)[0]


def test_however_it_is_compiled(pytester, in_process):
    pytester.makepyfile(WAYS)
    run = in_process("--progcache-dir=programs", "--progcache-report=report.json", passed=4, failed=7, errors=1)
    names = [line.split("::")[1].split(" ")[0] for line in run.text.splitlines() if line.startswith("FAILED")]
    assert len(names) == 7
    assert all(name.startswith("test_fails") for name in names)
    assert "k.cu (cubin, sm_90) compiled in" in told_of(run.text, "test_fails_a_miss")
    assert "the source differs" in told_of(run.text, "test_fails_a_miss")
    assert "no cache was given" in told_of(run.text, "test_fails_no_cache")
    assert "no_compile" in told_of(run.text, "test_fails_another_thread")
    assert "refused by the compiler: NVRTC_ERROR_COMPILATION" in told_of(run.text, "test_fails_a_refusal")
    assert "axpby" in told_of(run.text, "test_fails_a_library_kernel")
    assert "no_compile" in told_of(run.text, "test_fails_its_own_fixture")
    assert "RuntimeError: its own" in told_of(run.text, "test_fails_by_its_own_error")
    assert "ERROR at teardown of test_passes_and_errs_in_teardown" in run.text
    report = json.loads((pytester.path / "report.json").read_text())
    assert (report["hits"], report["misses"], report["compiled_without_a_cache"]) == (1, 8, 1)
    where = {one["where"].rpartition("::")[2] for one in report["compiles"]}
    assert {"test_fails_a_miss", "test_fails_no_cache", "test_fails_a_refusal"} <= where
    assert any(one["where"].startswith("fixture warm of ") for one in report["compiles"])


WITH_CUDA_CORE = r"""
import cuda.core
import pytest

OPTIONS = cuda.core.ProgramOptions(arch="sm_90", name="theirs.cu")

def compiled(number, **more):
    source = 'extern "C" __global__ void k(int *a) { *a = %d; }' % number
    return len(cuda.core.Program(source, "c++", OPTIONS).compile("cubin", **more).code)

@pytest.mark.parametrize("number", (1, 1, 2))
def test_cached(number, program_cache):
    assert compiled(number, cache=program_cache)

@pytest.mark.no_compile
def test_hit(program_cache):
    assert compiled(1, cache=program_cache)

@pytest.mark.no_compile
def test_miss(program_cache):
    assert compiled(3, cache=program_cache)

@pytest.mark.no_compile
def test_past_the_cache():
    assert compiled(1)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A run in which cuda.core compiles, under xdist, with all tests in one worker: ``(text, report)``."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("theirs")
    (folder / "test_theirs.py").write_text(WITH_CUDA_CORE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    plugins = ("-p", "cuda_progcache.pytest_plugin", "-p", "xdist.plugin", "-p", "no:cacheprovider")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        command = ["timeout", "-s", "KILL", "600", sys.executable, "-m", "pytest", *plugins, "-n", "1"]
        done = subprocess.run(
            [*command, "--progcache-dir=programs", "--progcache-report=report.json"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "report.json").read_text())


def test_cuda_cores_compiles_are_seen(theirs):
    text, report = theirs
    assert "4 passed" in text
    assert [line.split("::")[1].split(" ")[0] for line in text.splitlines() if line.startswith("FAILED")] == [
        "test_miss",
        "test_past_the_cache",
    ]
    assert "theirs.cu (cubin, sm_90) compiled in" in told_of(text, "test_miss")
    assert "the source differs" in told_of(text, "test_miss")
    assert "no cache was given" in told_of(text, "test_past_the_cache")
    assert (report["hits"], report["misses"]) == (2, 3)
    assert report["avoided_seconds"] > 0
    assert {one["name"] for one in report["compiles"]} == {"theirs.cu"}


def test_what_is_compiled_without_a_cache_lowers_the_share_of_hits(theirs):
    text, report = theirs
    assert report["compiled_without_a_cache"] == 1
    assert "2 hits, 3 misses, 0 dropped, 1 compiled without a cache (33% hits)" in text
