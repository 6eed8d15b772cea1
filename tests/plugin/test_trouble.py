# SPDX-License-Identifier: Apache-2.0
"""A cache in trouble fails no test and has none wait: its directory is full, read-only, damaged, or none."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

# Runs in this process begin with the filters of this one, which make errors of the cache's warnings.
pytestmark = pytest.mark.filterwarnings("default")

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")

COMPILE = r"""
import cuda_progcache
import pytest

@pytest.mark.parametrize("number", range(3))
def test_compile(number, program_cache):
    source = 'extern "C" __global__ void k(int *out) { *out = %d; }' % number
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90", name="k.cu"))
    assert program.compiled("cubin", cache=program_cache).data.startswith(b"\x7fELF")
    assert program.compiled("cubin", cache=program_cache).data.startswith(b"\x7fELF")
"""

WITH_CUDA_CORE = r"""
import cuda.core

def test_compile_with_cuda_core(program_cache):
    source = 'extern "C" __global__ void k(int *out) { *out = 7; }'
    for _ in range(2):
        program = cuda.core.Program(source, "c++", cuda.core.ProgramOptions(arch="sm_90"))
        assert len(program.compile("cubin", cache=program_cache).code)
"""


@pytest.fixture(params=["", "error"], ids=["", "warnings are errors"])
def strictly(request):
    """The arguments of a run in which warnings are errors, too."""
    return ("-W", request.param) if request.param else ()


def test_a_file_for_a_directory(pytester, in_process, strictly):
    (pytester.path / "programs").write_text("a file")
    pytester.makepyfile(COMPILE)
    run = in_process("--progcache-dir=programs", *strictly, passed=3)
    assert run.counts == (3, 3, 0)
    assert "compiled programs are kept in memory only" in run.text
    assert (pytester.path / "programs").read_text() == "a file"


def test_a_directory_in_a_file(pytester, in_process):
    (pytester.path / "file").write_text("a file")
    pytester.makepyfile(COMPILE)
    assert in_process("--progcache-dir=file/programs", passed=3).counts == (3, 3, 0)


def test_a_directory_that_anyone_can_write_to(pytester, in_process):
    (pytester.path / "programs").mkdir()
    (pytester.path / "programs").chmod(0o777)
    pytester.makepyfile(COMPILE)
    run = in_process("--progcache-dir=programs", passed=3)
    assert run.counts == (3, 3, 0)
    assert list((pytester.path / "programs").iterdir()) == []


def test_damaged_entries(pytester, in_process):
    pytester.makepyfile(COMPILE)
    in_process("--progcache-dir=programs", passed=3)
    entries = [path for path in (pytester.path / "programs" / "entries").rglob("*") if path.is_file()]
    for path in entries[:2]:
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run = in_process("--progcache-dir=programs", "--progcache-report=report.json", passed=3)
    assert run.counts == (4, 2, 0)
    assert "2 damaged entries found and not used" in run.text
    assert "missed: 2 × it was in the cache before, and was evicted, removed or damaged since" in run.text
    assert json.loads((pytester.path / "report.json").read_text())["cache"]["damaged"] == 2
    assert in_process("--progcache-dir=programs", passed=3).counts == (6, 0, 0), "they are healed"


def test_the_directory_goes_while_it_runs(pytester, in_process):
    pytester.makepyfile(COMPILE + "\n\n" + GONE)
    run = in_process("--progcache-dir=programs", passed=4)
    assert run.counts[0] == 3


GONE = r"""
def test_zz_gone(program_cache):
    import shutil
    shutil.rmtree(program_cache.path)
    program_cache.path.write_text("a file")
"""


@pytest.fixture
def disk(pytester):
    """A file system of a megabyte."""
    path = pytester.path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


@needs_root
def test_a_full_disk_and_a_read_only_one(pytester, in_process, in_own_process, disk):
    """With all warnings errors; under ``cuda.core`` and xdist, too."""
    pytester.makepyfile(test_ours=COMPILE, test_theirs=WITH_CUDA_CORE)
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    full = in_process("--progcache-dir=disk/programs", "-W", "error", "test_ours.py", passed=3)
    assert (full.counts[0], full.counts[2]) == (0, 6), "each is compiled, and told"
    (disk / "filler").unlink()
    in_process("--progcache-dir=disk/programs", "test_ours.py", "-k", "0", passed=1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    read_only = in_own_process("-n", "1", "--progcache-dir=disk/programs", "-W", "error", passed=4)
    assert read_only.counts == (2, 6, 6), "what is there is used"


def test_a_report_or_record_that_cannot_be_written(pytester, in_process):
    (pytester.path / "file").write_text("a file")
    pytester.makepyfile(COMPILE)
    run = in_process(
        "--progcache-dir=programs", "--progcache-report=file/report.json", "--progcache-record=file/run.json", passed=3
    )
    assert run.result.ret == 0
    assert "progcache: can't write the report " in run.text
    assert "can't record programs in " in run.text


def test_a_record_of_nothing_is_named(pytester, in_process):
    """What cuda.core compiles itself isn't recorded; without a word, the lockfile's command would find no file."""
    pytester.makepyfile(WITH_CUDA_CORE)
    assert "run.json wasn't written" in in_process("--progcache-record=run.json", passed=1).text
    pytester.makepyfile(COMPILE)
    assert "wasn't written" not in in_process("--progcache-record=run.json", passed=3).text


@pytest.mark.parametrize(
    ("line", "outcome"),
    [("error", "passed"), ("error::RuntimeWarning", "passed"), ("error::cuda_progcache.ProgCacheWarning", "failed")],
)
def test_warnings_are_errors_where_they_are_asked_to_be_by_name(pytester, in_process, line, outcome):
    pytester.makeini(f"[pytest]\nfilterwarnings =\n    {line}\n    ignore:another message\n")
    pytester.makepyfile(
        "import warnings\n"
        "import cuda_progcache\n"
        "def test_warning():\n"
        "    warnings.warn('trouble', cuda_progcache.ProgCacheWarning)\n"
    )
    in_process(**{outcome: 1})
