# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, in real test runs that compile, alone and under xdist."""

from __future__ import annotations

FOUR = r"""
import cuda_progcache
import pytest

@pytest.mark.parametrize("number", range(4))
def test_compile(number, program_cache):
    source = 'extern "C" __global__ void store(int *out) { *out = %d; }' % number
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90"))
    assert program.compiled("cubin", cache=program_cache).data.startswith(b"\x7fELF")
"""

WITH_OURS = r"""
import cuda_progcache

def test_compile(program_cache):
    source = "template <typename T> __global__ void store(T *out) { *out = 1; }"
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90"))
    code = program.compiled("cubin", name_expressions=["store<int>"], cache=program_cache)
    assert code.data.startswith(b"\x7fELF")
"""


def test_runs_share_what_was_compiled_alone_and_under_xdist(pytester, in_process, in_own_process):
    pytester.makepyfile(FOUR)
    first = in_own_process("-n", "2", "--progcache-dir=programs", passed=4)
    assert first.counts == (0, 4, 0)
    assert first.line["share"] == "0"
    assert first.line["path"] == str(pytester.path / "programs")
    for run, processes in ((in_process, ()), (in_own_process, ("-n", "1"))):
        later = run(*processes, "--progcache-dir=programs", passed=4)
        assert later.counts == (4, 0, 0)
        assert later.line["share"] == "100"
        assert later.line["size"] == first.line["size"] != "0 B"
    assert sum(1 for path in (pytester.path / "programs" / "entries").rglob("*") if path.is_file()) == 4


def test_our_program_with_name_expressions_in_the_default_directory(pytester, in_process, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(pytester.path / "from-environment"))
    pytester.makepyfile(WITH_OURS)
    assert in_process(passed=1).counts == (0, 1, 0)
    again = in_process(passed=1)
    assert again.counts == (1, 0, 0)
    assert again.line["share"] == "100"
    assert again.line["path"] == str(pytester.path / "from-environment")


ELSEWHERE = """
import os
import pytest

@pytest.fixture(autouse=True, scope='session')
def elsewhere(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('elsewhere'))
    yield
    os.chdir(before)

def test_path(elsewhere, program_cache):
    assert program_cache.get(b'absent') is None
"""


def test_option_wins_over_the_environment_and_is_relative_to_where_pytest_started(
    pytester, in_process, in_own_process, monkeypatch
):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(pytester.path / "from-environment"))
    pytester.makepyfile(ELSEWHERE)
    for run, processes in ((in_process, ()), (in_own_process, ("-n", "2"))):
        assert run(*processes, "--progcache-dir=from-option", passed=1).line["path"] == str(
            pytester.path / "from-option"
        )
    assert not (pytester.path / "from-environment").exists()


def test_nothing_is_said_or_imported_where_no_test_asks(pytester, in_own_process):
    pytester.makepyfile(
        "import sys\n"
        "def test_modules():\n"
        "    heavy = {'cuda', 'cuda_progcache.store', 'numpy', 'msgspec', 'xxhash', 'jinja2', 'rich'}\n"
        "    assert heavy & set(sys.modules) == set()\n"
        "    assert 'cuda_progcache.pytest_plugin' in sys.modules\n"
    )
    assert in_own_process("-n", "2", passed=1).line is None
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")  # as it is installed
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("progcache:*")


def test_a_crashed_worker_is_told(pytester, in_own_process):
    pytester.makepyfile(
        "import os, pytest\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_lookup(number, program_cache):\n"
        "    assert program_cache.get(b'%d' % number) is None\n"
        "    if number == 2:\n"
        "        os._exit(1)\n"
    )
    line = in_own_process("-n", "2", "--progcache-dir=programs").line
    assert line["note"] == " (not counting 1 crashed worker)"


def test_programs_that_could_not_be_kept_are_told(pytester, in_process):
    pytester.makepyfile(
        "import shutil, warnings\n"
        "import cuda_progcache\n"
        "def test_drop(program_cache):\n"
        "    root = program_cache.path\n"
        "    shutil.rmtree(root)\n"
        "    root.write_text('a file where the cache was')\n"
        "    options = cuda_progcache.ProgramOptions(arch='sm_90')\n"
        "    program = cuda_progcache.Program('__global__ void f() {}', 'c++', options)\n"
        "    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('ignore')\n"
        "        assert program.compiled('cubin', cache=program_cache).data\n"
    )
    assert in_process("--progcache-dir=programs", passed=1).counts == (0, 1, 1)


UNKEPT = r"""
import cuda_progcache
import pytest

@pytest.mark.filterwarnings("ignore:.*not kept")
@pytest.mark.parametrize("number", range(4))
def test_compile(number, program_cache):
    source = '__device__ int t = %d + sizeof(__TIME__); extern "C" __global__ void k(int *a) { *a = t; }' % number
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90"))
    program.compiled("cubin", cache=program_cache)
"""


def test_programs_that_are_not_kept_are_in_the_line(pytester, in_process, in_own_process):
    pytester.makepyfile(UNKEPT)
    for run, processes in ((in_own_process, ("-n", "2")), (in_process, ())):
        found = run(*processes, "--progcache-dir=programs", passed=4)
        assert (found.counts[0], found.counts[2], found.line["unkept"]) == (0, 0, "4")
