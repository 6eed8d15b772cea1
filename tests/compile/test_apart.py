# SPDX-License-Identifier: Apache-2.0
"""Options that NVRTC doesn't forget: no other compile of the process, or of its cache, is touched by them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from cuda_progcache import CompileError, HeaderPolicy, Program, ProgramOptions
from cuda_progcache.compile import apart
from cuda_progcache.errors import ToolchainError

# With --restrict, b[0] is read once.
SOURCE = """
__device__ int twice(int x) { return x * 2; }
extern "C" __global__ void k(int *a, const int *b) { a[0] = b[0] + 1; a[1] = twice(b[0]); }
"""
LASTING = [{"restrict": True}, {"optimization_info": "inline"}, {"restrict": True, "optimization_info": "inline"}]


@pytest.fixture(autouse=True)
def none_kept():
    """Each test begins, and ends, with no process of an earlier one."""
    apart._end_all()
    yield
    apart._end_all()


def in_a_new_process(target_type, **options):
    """What NVRTC makes of the source where it was never asked for anything else."""
    code = (
        "import sys\n"
        "from cuda_progcache.compile import nvrtc\n"
        "from cuda_progcache.keys.options import ProgramOptions, nvrtc_flags\n"
        f"flags = nvrtc_flags(ProgramOptions(arch='sm_80', **{options!r}))\n"
        f"code, target_type = {SOURCE.encode()!r}, {target_type!r}\n"
        "made = nvrtc.compile_here(code, 'k.cu', flags, 'text', target_type, (), {}, None, False)\n"
        "sys.stdout.buffer.write(len(made.log.encode()).to_bytes(4, 'big') + made.log.encode() + made.data)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True).stdout
    size = int.from_bytes(done[:4], "big")
    return done[4 + size :], done[4 : 4 + size].decode()


def made(target_type="ptx", source=SOURCE, **options):
    done = Program(source, "c++", ProgramOptions(arch="sm_80", name="k.cu", **options)).compiled(target_type)
    return done.data, done.log


@pytest.mark.parametrize("target_type", ["ptx", "cubin"])
def test_all_are_as_if_compiled_alone(target_type):
    options = [{}, *LASTING, {}, *reversed(LASTING), {}]
    truth = {repr(given): in_a_new_process(target_type, **given) for given in options}
    assert len(set(truth.values())) == 4, "each of them shows"
    assert [made(target_type, **given) for given in options] == [truth[repr(given)] for given in options]


def test_what_lies_in_the_cache_is_right(compiled):
    """A plain program compiled after one with restrict=True was kept with the code of a restrict one."""
    compiled(SOURCE, name="k.cu", target_type="ptx", restrict=True)
    kept = compiled(SOURCE, name="k.cu", target_type="ptx")
    assert (kept.hit, kept.data) == (False, in_a_new_process("ptx")[0])
    assert kept.record["log"] == ""


def test_side_by_side():
    truth = {flag: in_a_new_process("ptx", restrict=flag) for flag in (None, True)}
    results = []

    def work(flag):
        results.extend(made(restrict=flag) == truth[flag] for _ in range(3))

    threads = [threading.Thread(target=work, args=(flag,)) for flag in (None, True, None, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 12


def test_a_process_serves_many():
    made(restrict=True)
    ((kept,),) = apart._idle.values()
    made(restrict=True, fma=False)
    assert list(apart._idle.values()) == [[kept]]
    made(optimization_info="inline")
    assert len(apart._idle) == 2


def test_headers_names_and_refusals_come_through(compiled, project):
    project("inc/value.h", "#define VALUE 1")
    source = "#include <value.h>\ntemplate <class T> __global__ void k(T *a, const T *b) { a[0] = b[0] + VALUE; }"
    options = {"include_path": "inc", "restrict": True}
    for value in "12":
        project("inc/value.h", f"#define VALUE {value}")
        first, again = (compiled(source, names=("k<int>", b"k<float>"), **options) for _ in range(2))
        assert (first.hit, again.hit) == (False, True)
        assert [header["name"] for header in first.record["headers"]] == ["value.h"]
        assert (
            first.symbol_mapping
            == again.symbol_mapping
            == {"k<int>": b"_Z1kIiEvPT_PKS0_", b"k<float>": b"_Z1kIfEvPT_PKS0_"}
        )
    with pytest.raises(CompileError, match="undefined") as refused:
        compiled("#include <value.h>\nint x = nope;", **options)
    assert refused.value.diagnostics[0].line == 2
    assert len(apart._idle) == 1, "a refusal is an answer like any other"


def test_hermetic(compiled, project, cache):
    project("inc/value.h", "#define VALUE 1")
    source = "#include <value.h>\n__global__ void k(int *a, const int *b) { a[0] = b[0] + VALUE; a[1] = b[0]; }"
    options = ProgramOptions(arch="sm_80", include_path="inc", restrict=True)
    hermetic = Program(source, "c++", options, header_policy=HeaderPolicy(hermetic=True)).compiled("ptx", cache=cache)
    assert hermetic.reason is None
    assert hermetic.data == compiled(source, target_type="ptx", include_path="inc", restrict=True).data


def test_one_that_dies_is_told_and_replaced():
    before = made(restrict=True)
    ((kept,),) = apart._idle.values()
    os.kill(kept.pid, signal.SIGKILL)
    with pytest.raises(ToolchainError, match=r"that compiled k\.cu died \(signal 9\)"):
        made(restrict=True)
    assert made(restrict=True) == before


def test_another_nvrtc_gets_a_process_of_its_own(monkeypatch):
    made(restrict=True)
    monkeypatch.setattr(apart, "build", lambda: "another")
    made(restrict=True)
    assert sorted(map(len, apart._idle.values())) == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_asks_one_of_its_own():
    before = made(restrict=True)
    ((kept,),) = apart._idle.values()
    pid = os.fork()
    if not pid:
        try:
            right = not apart._idle and made(restrict=True) == before
            apart._end_all()
            os._exit(0 if right else 1)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made(restrict=True) == before
    assert kept.poll() is None


def test_the_folder_it_is_started_in_brings_no_modules(project):
    """``python -m`` would look there first."""
    project("json.py", "raise SystemExit(7)")
    project("marshal.py", "raise SystemExit(7)")
    assert made(restrict=True) == in_a_new_process("ptx", restrict=True)


def test_it_works_where_its_caller_does(project, monkeypatch):
    for place, value in (("one", 1), ("two", 2)):
        project(f"{place}/value.h", f"#define VALUE {value}")
    source = '#include "value.h"\nextern "C" __global__ void k(int *a) { *a = VALUE; }'
    outputs = []
    for place in ("one", "two"):
        monkeypatch.chdir(project.folder / place)
        outputs.append(made(source=source, restrict=True)[0])
    assert outputs[0] != outputs[1]
    assert len(apart._idle) == 1


def test_a_working_directory_that_is_gone(project, monkeypatch):
    (project.folder / "gone").mkdir()
    monkeypatch.chdir(project.folder / "gone")
    before = made(restrict=True)
    os.rmdir(project.folder / "gone")
    assert made(restrict=True) == before


@pytest.mark.parametrize("how", ["raise SystemExit", "import os; os._exit(0)"])
def test_it_ends_with_its_parent(how):
    code = (
        "from cuda_progcache import Program, ProgramOptions\n"
        f"Program({SOURCE!r}, 'c++', ProgramOptions(arch='sm_80', restrict=True)).compiled('ptx')\n"
    )
    # It has our stderr, too: while it lives, this waits for more of it.
    command = [sys.executable, "-W", "error", "-c", code + how]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr == ""
