# SPDX-License-Identifier: Apache-2.0
"""Compiler processes: what they make is theirs alone, and they are there when, and only as long as, they are wanted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from cuda_progcache import CompileError, HeaderPolicy, LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.compile import compilers, own_process
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain

# With --restrict, b[0] is read once; with a struct by value, code after a debug compile differs.
SOURCE = """
__device__ int twice(int x) { return x * 2; }
struct S { float v[31]; int pad; float *p; };
extern "C" __global__ void k(int *a, const int *b) { a[0] = b[0] + 1; a[1] = twice(b[0]); }
extern "C" __global__ void by_value(S s, float *o) { o[threadIdx.x] = s.p[threadIdx.x] + s.v[threadIdx.x & 15]; }
"""
LASTING = [
    {"restrict": True},
    {"optimization_info": "inline"},
    {"debug": True},
    {"ofast_compile": "max"},
    {"restrict": True, "optimization_info": "inline"},
]
# These would wait for their own call's processes otherwise.
TIMEOUT = 600


@pytest.fixture(autouse=True)
def none_idle():
    """Each test begins, and ends, with no process of an earlier one."""
    own_process._pool.end_all()
    yield
    own_process._pool.end_all()


def idle():
    return list(own_process._pool.idle)


def in_a_new_process(target_type="ptx", arch="sm_80", **options):
    """What NVRTC makes of the source where it was never asked for anything else."""
    try:
        own_process._pool.end_all()
        return made(target_type, arch=arch, **options)
    finally:
        own_process._pool.end_all()


def made(target_type="ptx", source=SOURCE, **options):
    options = {"arch": "sm_80", "name": "k.cu"} | options
    done = Program(source, "c++", ProgramOptions(**options)).compiled(target_type)
    return done.data, done.log


@pytest.mark.parametrize(("target_type", "arch"), [("ptx", "sm_80"), ("cubin", "sm_120")])
def test_all_are_as_if_compiled_alone(target_type, arch):
    options = [{}, *LASTING, {}, *reversed(LASTING), {}]
    truth = {repr(given): in_a_new_process(target_type, arch, **given) for given in options[: len(LASTING) + 1]}
    assert len(set(truth.values())) > len(LASTING) - 1, "nearly each of them shows"
    assert [made(target_type, arch=arch, **given) for given in options] == [truth[repr(given)] for given in options]


@pytest.mark.parametrize("options", [{"debug": True}, {"optimization_level": 0}])
def test_links_are_as_if_linked_alone(options):
    part = Program(SOURCE, "c++", ProgramOptions(arch="sm_90")).compiled("ltoir")

    def linked(**given):
        return link([part], LinkerOptions(arch="sm_90", **given)).data

    truth = linked()
    own_process._pool.end_all()
    assert linked(**options) != truth
    assert linked() == truth


def test_what_lies_in_the_cache_is_right(compiled):
    """A plain program compiled after one with restrict=True was kept with the code of a restrict one."""
    truth = in_a_new_process()
    compiled(SOURCE, name="k.cu", target_type="ptx", restrict=True)
    kept = compiled(SOURCE, name="k.cu", target_type="ptx")
    assert (kept.hit, kept.data) == (False, truth[0])
    assert kept.record["log"] == ""


def test_this_process_loads_no_compiler(compiled):
    code = """
        from cuda_progcache import LinkerOptions, Program, ProgramOptions, link
        part = Program('__global__ void k() {}', "c++", ProgramOptions(arch="sm_80")).compiled("ltoir")
        link([part], LinkerOptions(arch="sm_80"))
        maps = open("/proc/self/maps").read()
        import sys
        print([name for name in ("nvrtc", "nvJitLink", "nvvm") if f"lib{name}" in maps], "cuda.bindings" in sys.modules)
    """
    assert run(code) == "[] False"


def run(code, *arguments, check=True, **given):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, **given)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_whatever_else_the_process_compiles(tmp_path):
    """cuda.core's own debug compile, and another NVRTC for everybody to see, before ours in one process."""
    code = """
        import ctypes, json, os, sys
        nvrtc, poison, source = sys.argv[1:]
        if poison == "True":
            ctypes.CDLL(nvrtc, ctypes.RTLD_GLOBAL)
            import cuda.core
            for options in ({"debug": True}, {"restrict": True}, {"ofast_compile": "max"}):
                other = 'extern "C" __global__ void w(int *a) { a[0] = 1; }'
                cuda.core.Program(other, "c++", cuda.core.ProgramOptions(arch="sm_120", **options)).compile("cubin")
        from cuda_progcache import InMemoryProgramCache, Program, ProgramOptions
        cache = InMemoryProgramCache()
        program = Program(source, "c++", ProgramOptions(arch="sm_120", name="k.cu"))
        done = [program.compiled("cubin", cache=cache) for _ in range(2)]
        print(json.dumps([done[0].reason, done[1].hit, done[1].data.hex()]))
    """
    for tool in toolchain.toolchain("c++"):
        shutil.copy(tool.path, tmp_path)
    other = tmp_path / os.path.basename(toolchain.locate("nvrtc"))
    clean, poisoned = (json.loads(run(code, other, poison, SOURCE, env=WITHOUT_WARNINGS)) for poison in (False, True))
    assert clean[:2] == [None, True]
    assert poisoned == clean


WITHOUT_WARNINGS = os.environ | {"PYTHONWARNINGS": "ignore"}


def test_a_process_that_would_tell_of_others_is_used_once(monkeypatch):
    """NVRTC up to 12.6 numbers the calls in PTX on and on."""
    processes = []
    original = own_process._Process.ask
    monkeypatch.setattr(
        own_process._Process, "ask", lambda process, job: processes.append(process.pid) or original(process, job)
    )
    monkeypatch.setattr(compilers, "tells_of_others", lambda files, target_type: target_type == "ptx")
    made("cubin")
    first = made("ptx")
    assert made("ptx") == first
    made("cubin")
    assert processes[0] == processes[3]
    assert len(set(processes)) == 3
    assert [process.pid for process in idle()] == processes[:1]


def test_side_by_side():
    truth = {flag: in_a_new_process(restrict=flag) for flag in (None, True)}
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
    (kept,) = idle()
    made(restrict=True, fma=False)
    assert idle() == [kept]
    made(optimization_info="inline")
    assert kept not in idle() or len(idle()) == 2


def test_one_process_serves_all_libraries():
    part = Program(SOURCE, "c++", ProgramOptions(arch="sm_90")).compiled("ltoir")
    link([part], LinkerOptions(arch="sm_90"))
    (kept,) = idle()
    assert [os.path.basename(path).split(".")[0] for path in kept.builds] == ["libnvrtc", "libnvJitLink"]


def test_there_are_no_more_than_cpus(monkeypatch):
    monkeypatch.setattr(own_process._pool, "limit", 2)
    seen, done = [], []

    def work(n):
        done.append(made(source=SOURCE + f"// {n}", **({"restrict": True} if n % 3 == 0 else {})))
        pool = own_process._pool
        with pool.changed:
            seen.append(len(pool.idle) + len(pool.taken))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 12
    assert max(seen) <= 2
    assert not own_process._pool.taken


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
    before = idle()
    with pytest.raises(CompileError, match="undefined") as refused:
        compiled("#include <value.h>\nint x = nope;", **options)
    assert refused.value.diagnostics[0].line == 2
    assert idle() == before, "a refusal is an answer like any other"


def test_hermetic(compiled, project, cache):
    project("inc/value.h", "#define VALUE 1")
    source = "#include <value.h>\n__global__ void k(int *a, const int *b) { a[0] = b[0] + VALUE; a[1] = b[0]; }"
    options = ProgramOptions(arch="sm_80", include_path="inc", restrict=True)
    hermetic = Program(source, "c++", options, header_policy=HeaderPolicy(hermetic=True)).compiled("ptx", cache=cache)
    assert hermetic.reason is None
    assert hermetic.data == compiled(source, target_type="ptx", include_path="inc", restrict=True).data


def test_an_idle_one_that_died_is_replaced_without_a_word():
    before = made()
    (kept,) = idle()
    os.kill(kept.pid, signal.SIGKILL)
    assert made() == before
    assert idle() != [kept]


def test_one_that_died_is_tried_once_more(monkeypatch):
    """A crash may have been chance, or an older job's doing: the next process is a new one."""
    asked, original = [], own_process._Process.ask

    def dying(process, job):
        asked.append(process.pid)
        if len(asked) == 1:
            os.kill(process.pid, signal.SIGKILL)
        return original(process, job)

    before = made()
    monkeypatch.setattr(own_process._Process, "ask", dying)
    assert made() == before
    assert len(set(asked)) == 2


def test_one_that_dies_each_time_is_told(monkeypatch):
    original = own_process._Process.ask

    def dying(process, job):
        os.kill(process.pid, signal.SIGSEGV)
        return original(process, job)

    monkeypatch.setattr(own_process._Process, "ask", dying)
    with pytest.raises(ToolchainError, match=r"compiled k\.cu died \(signal 11\), and so did a second one"):
        made()
    monkeypatch.undo()
    assert made()[0]


def test_a_compile_that_crashes_the_compiler(compiled):
    """nvJitLink ends its process over an architecture that it doesn't know: not ours."""
    with pytest.raises((ToolchainError, CompileError)):
        compilers.link(
            [compilers.LinkerInput(b".version 8.0\n.target sm_90\n", "ptx", "k.ptx")],
            flags=["-arch=sm_1"],
            target_type="cubin",
        )
    assert compiled().data


def test_another_nvrtc_gets_a_process_of_its_own(monkeypatch):
    made(restrict=True)
    (kept,) = idle()
    monkeypatch.setattr(toolchain, "build", lambda code_type: "another")
    compilers.include_sources["another"] = "trace"
    made(restrict=True)
    assert len(idle()) == min(2, own_process._pool.limit)
    assert idle()[-1] is not kept


def test_an_interrupt_ends_the_compile():
    """The answer to the interrupted one must not be taken for the next one's, and nothing waits for it."""
    code = """
        import os, signal, threading
        from cuda_progcache import Program, ProgramOptions
        from cuda_progcache.compile import own_process
        options = ProgramOptions(arch="sm_80")
        small = Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", options)
        before = small.compiled("ptx").data
        main = threading.main_thread().ident
        ask = own_process._Process.ask

        def long(process, job):
            os.kill(process.pid, signal.SIGSTOP)  # it doesn't answer before the interrupt, whenever that comes
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
            return ask(process, job)

        own_process._Process.ask = long
        try:
            small.compiled("cubin")
        except KeyboardInterrupt:
            own_process._Process.ask = ask
            pool = own_process._pool
            print("interrupted", not pool.taken, not pool.idle, small.compiled("ptx").data == before)
    """
    assert run(code) == "interrupted True True True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_asks_one_of_its_own():
    before = made(restrict=True)
    (kept,) = idle()
    pid = os.fork()
    if not pid:
        try:
            right = not idle() and made(restrict=True) == before
            own_process._pool.end_all()
            os._exit(0 if right else 1)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is told
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert idle() == [kept]
    assert made(restrict=True) == before
    assert idle() == [kept]


def test_the_folder_it_is_started_in_brings_no_modules(project):
    for name in ("json", "marshal", "ctypes", "struct", "os", "select"):
        project(f"{name}.py", "raise SystemExit(7)")
    assert made(restrict=True) == in_a_new_process(restrict=True)


def test_it_works_where_its_caller_does(project, monkeypatch):
    for place, value in (("one", 1), ("two", 2)):
        project(f"{place}/value.h", f"#define VALUE {value}")
    source = '#include "value.h"\nextern "C" __global__ void k(int *a) { *a = VALUE; }'
    outputs = []
    for place in ("one", "two"):
        monkeypatch.chdir(project.folder / place)
        outputs.append(made(source=source)[0])
    assert outputs[0] != outputs[1]
    assert len(idle()) == 1


def test_a_working_directory_that_is_gone(project, monkeypatch):
    (project.folder / "gone").mkdir()
    monkeypatch.chdir(project.folder / "gone")
    before = made()
    os.rmdir(project.folder / "gone")
    assert made() == before


def test_variables_that_nobody_knows_do_not_reach_it(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE_OF_A_LATER_COMPILER", "1")
    monkeypatch.setenv("LLVM_OVERRIDE_PRODUCER", "somebody")
    made()
    (kept,) = idle()
    with open(f"/proc/{kept.pid}/environ", "rb") as file:
        given = dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if entry)
    assert b"SOME_VARIABLE_OF_A_LATER_COMPILER" not in given
    assert given[b"LLVM_OVERRIDE_PRODUCER"] == b"somebody"
    monkeypatch.setenv("LLVM_OVERRIDE_PRODUCER", "somebody else")
    made()
    assert idle()[-1] is not kept


ENDS = """
    import os, signal, sys, threading, time
    from cuda_progcache import Program, ProgramOptions
    from cuda_progcache.compile import own_process
    options = ProgramOptions(arch="sm_80")
    Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", options).compiled("ptx")
    print(own_process._pool.idle[0].pid, flush=True)
    if "busy" in sys.argv:
        slow = "".join(
            'extern "C" __global__ void k%d(float *a) { for (int i = 0; i < 64; ++i) a[i] = sinf(a[i]) + %d; }' % (n, n)
            for n in range(2000)
        )
        threading.Thread(target=Program(slow, "c++", options).compiled, args=["cubin"], daemon=True).start()
        while not own_process._pool.taken:
            time.sleep(0.01)
        time.sleep(0.2)
"""


@pytest.mark.parametrize("busy", ["idle", "busy"])
@pytest.mark.parametrize("how", ["raise SystemExit", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_its_caller(how, busy):
    # It has our stderr, too: while it lives, this waits for more of it.
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(ENDS) + how, busy]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.stderr == ""
    deadline = time.monotonic() + TIMEOUT
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")


def test_it_ends_when_nobody_wants_it():
    code = """
        from cuda_progcache.compile import own_process
        own_process.PATIENCE = 0.2
        from cuda_progcache import Program, ProgramOptions
        program = Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", ProgramOptions(arch="sm_80"))
        program.compiled("ptx")
        (kept,) = own_process._pool.idle
        print(kept._popen.wait(600), len(program.compiled("ptx").data) > 0)
    """
    assert run(code) == "0 True"


@pytest.mark.parametrize("executable", ["", "/bin/false", "application", "python-that-is-none"])
def test_without_sys_executable(executable, tmp_path):
    """An application that embeds Python: what it is called mustn't be started, and Python is found beside it."""
    path = executable
    if executable.startswith(("app", "python")):
        path = tmp_path / executable
        path.write_text('#!/bin/sh\ntouch "$0.started"\necho hello; exec sleep 0.1\n')
        path.chmod(0o755)
    code = """
        import sys
        sys.executable, sys._base_executable = sys.argv[1], ""
        from cuda_progcache import InMemoryProgramCache, Program, ProgramOptions
        program = Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", ProgramOptions(arch="sm_80"))
        print(program.compiled("ptx", cache=InMemoryProgramCache()).reason)
    """
    assert run(code, path) == "None"
    assert not os.path.exists(f"{tmp_path / 'application'}.started")


def test_where_no_process_can_be_started(project):
    project("value.h", "#define VALUE 1")
    code = """
        import sys
        sys.executable = sys._base_executable = ""
        sys.exec_prefix = sys.base_exec_prefix = "/nowhere"
        from cuda_progcache import InMemoryProgramCache, LinkerOptions, Program, ProgramOptions, link
        cache = InMemoryProgramCache()
        options = ProgramOptions(arch="sm_80")
        program = Program('#include "value.h"\\n__global__ void k(int *a) { *a = VALUE; }', "c++", options)
        made = program.compiled("ltoir", cache=cache)
        linked = link([made], LinkerOptions(arch="sm_80"), cache=cache)
        print(len(cache), len(linked.data) > 0, made.reason, linked.reason, sep="\\n")
    """
    kept, worked, *reasons = run(code).splitlines()
    assert (kept, worked) == ("0", "True")
    assert all("no compiler process can be started (there is no Python to start" in reason for reason in reasons)


def test_a_sandbox_without_processes(cache, compiled, monkeypatch):
    def forbidden(*arguments, **given):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(own_process.subprocess, "Popen", forbidden)
    made_ = compiled()
    assert "no compiler process can be started" in made_.reason
    assert "Operation not permitted" in made_.reason
    assert len(cache) == 0
    monkeypatch.undo()
    assert compiled().reason is None
