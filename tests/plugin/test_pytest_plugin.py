# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, in real test runs that compile, alone and under xdist."""

from __future__ import annotations

import re

import pytest

WITH_CUDA_CORE = r"""
import cuda.core
import pytest

@pytest.mark.parametrize("number", range(4))
def test_compile(number, program_cache):
    source = 'extern "C" __global__ void store(int *out) { *out = %d; }' % number
    options = cuda.core.ProgramOptions(arch="sm_90")
    code = cuda.core.Program(source, "c++", options).compile("cubin", cache=program_cache)
    assert bytes(code.code).startswith(b"\x7fELF")
"""

WITH_OURS = r"""
import cuda_progcache

def test_compile(program_cache):
    source = "template <typename T> __global__ void store(T *out) { *out = 1; }"
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90"))
    code = program.compile("cubin", name_expressions=["store<int>"], cache=program_cache)
    assert bytes(code.code).startswith(b"\x7fELF")
"""

LINE = re.compile(
    r"^progcache: (?P<hits>\d+) hits?, (?P<misses>\d+) miss(es)?, (?P<dropped>\d+) dropped"
    r"( \((?P<share>\d+)% hits\))?, (?P<size>[\d.]+ k?B) at (?P<path>\S+)(?P<note> \(.*\))?$",
    re.MULTILINE,
)


@pytest.fixture(params=[(), ("-n", "2")], ids=["alone", "xdist"])
def processes(request):
    return request.param


def run(pytester, *arguments, passed=None, failed=0):
    """Run the tests in a process of their own, as a user does; give the summary line's parts."""
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
    if passed is not None:
        result.assert_outcomes(passed=passed, failed=failed)
    lines = [match.groupdict() for match in LINE.finditer(result.stdout.str())]
    assert len(lines) <= 1, "the line is printed once, not by each worker"
    return lines[0] if lines else None


def counts(line):
    return tuple(int(line[name]) for name in ("hits", "misses", "dropped"))


def test_a_second_run_compiles_nothing(pytester, processes):
    pytester.makepyfile(WITH_CUDA_CORE)
    first = run(pytester, *processes, "--progcache-dir=programs", passed=4)
    assert counts(first) == (0, 4, 0)
    assert first["share"] == "0"
    assert first["path"] == str(pytester.path / "programs")
    second = run(pytester, *processes, "--progcache-dir=programs", passed=4)
    assert counts(second) == (4, 0, 0)
    assert second["share"] == "100"
    assert second["size"] == first["size"] != "0 B"
    assert sum(1 for path in (pytester.path / "programs" / "entries").rglob("*") if path.is_file()) == 4


def test_runs_alone_and_under_xdist_share_a_directory(pytester):
    pytester.makepyfile(WITH_CUDA_CORE)
    run(pytester, "-n", "2", "--progcache-dir=programs", passed=4)
    assert counts(run(pytester, "--progcache-dir=programs", passed=4)) == (4, 0, 0)


def test_our_program_with_name_expressions(pytester):
    pytester.makepyfile(WITH_OURS)
    assert counts(run(pytester, passed=1)) == (0, 1, 0)
    line = run(pytester, passed=1)
    assert counts(line) == (1, 0, 0)
    assert line["share"] == "100"


def test_directory_from_the_environment(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(pytester.path / "from-environment"))
    pytester.makepyfile(WITH_OURS)
    assert run(pytester, passed=1)["path"] == str(pytester.path / "from-environment")


def test_option_wins_over_the_environment_and_is_relative_to_where_pytest_started(pytester, processes, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(pytester.path / "from-environment"))
    pytester.makepyfile(
        "import os\n"
        "import pytest\n"
        "@pytest.fixture(autouse=True, scope='session')\n"
        "def elsewhere(tmp_path_factory):\n"
        "    os.chdir(tmp_path_factory.mktemp('elsewhere'))\n"
        "def test_path(elsewhere, program_cache):\n"
        "    assert program_cache.get(b'absent') is None\n"
    )
    line = run(pytester, *processes, "--progcache-dir=from-option", passed=1)
    assert line["path"] == str(pytester.path / "from-option")
    assert not (pytester.path / "from-environment").exists()


def test_nothing_is_said_or_imported_where_no_test_asks(pytester, processes):
    pytester.makepyfile(
        "import sys\n"
        "def test_modules():\n"
        "    heavy = {'cuda', 'cuda_progcache.store', 'numpy', 'msgspec', 'xxhash', 'jinja2', 'rich'}\n"
        "    assert heavy & set(sys.modules) == set()\n"
    )
    assert run(pytester, *processes, passed=1) is None


def test_a_crashed_worker_is_told(pytester):
    pytester.makepyfile(
        "import os, pytest\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_lookup(number, program_cache):\n"
        "    assert program_cache.get(b'%d' % number) is None\n"
        "    if number == 2:\n"
        "        os._exit(1)\n"
    )
    line = run(pytester, "-n", "2", "--progcache-dir=programs")
    assert line["note"] == " (without what 1 crashed worker did)"


def test_programs_that_could_not_be_kept_are_told(pytester):
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
        "        assert program.compile('cubin', cache=program_cache).code\n"
    )
    assert counts(run(pytester, "--progcache-dir=programs", passed=1)) == (0, 1, 1)


def test_help_names_the_option(pytester):
    result = pytester.runpytest_subprocess("--help")
    result.stdout.fnmatch_lines(["*--progcache-dir=DIR*"])
    result = pytester.runpytest_subprocess("--fixtures")
    result.stdout.fnmatch_lines(["program_cache*session scope*"])


UNKEPT = r"""
import cuda_progcache
import pytest

@pytest.mark.filterwarnings("ignore:.*isn't kept")
@pytest.mark.parametrize("number", range(4))
def test_compile(number, program_cache):
    source = '__device__ int t = %d + sizeof(__TIME__); extern "C" __global__ void k(int *a) { *a = t; }' % number
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90"))
    program.compiled("cubin", cache=program_cache)
"""


def test_programs_that_are_not_kept_are_in_the_line(pytester, processes):
    pytester.makepyfile(UNKEPT)
    for _ in range(2):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *processes, "--progcache-dir=programs")
        result.assert_outcomes(passed=4)
        result.stdout.re_match_lines([r"progcache: 0 hits, \d+ miss(es)?, 0 dropped, 4 not kept.*"])
