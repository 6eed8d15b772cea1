# SPDX-License-Identifier: Apache-2.0
"""Program: hits that are complete, a drop-in for cuda.core's, and what can't be cached."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import cuda.core
import pytest
from cuda.core.utils import InMemoryProgramCache as PeerMemory

from cuda_progcache import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    LinkerOptions,
    Program,
    ProgramOptions,
    make_program_cache_key,
    program_key,
)
from cuda_progcache.errors import ArchError, CompileError, ProgCacheError, UncacheableError

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'
TEMPLATE = "template <class T> __global__ void k(T *a) { *a = 1; }"
PTX = Program(SOURCE, "c++", ProgramOptions(arch="sm_80")).compiled("ptx").data.decode()
NVVM = """
target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64\
-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
declare double @__nv_sin(double)
define void @k(double* %p) {
  %x = load double, double* %p
  %y = call double @__nv_sin(double %x)
  store double %y, double* %p
  ret void
}
@llvm.used = appending global [1 x i8*] [i8* bitcast (void (double*)* @k to i8*)], section "llvm.metadata"
!nvvm.annotations = !{!0}
!0 = !{void (double*)* @k, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target_type": "ptx"},
        {"target_type": "ltoir"},
        {"code": TEMPLATE, "names": ("k<int>", b"k<float>")},
        {"code": PTX, "code_type": "ptx"},
        {"code": NVVM, "code_type": "nvvm", "target_type": "ptx", "use_libdevice": True},
        {"code": NVVM.encode(), "code_type": "nvvm", "target_type": "ltoir", "use_libdevice": True},
        {"lineinfo": True},
        {"debug": True},
        {"name": "some/where/k.cu"},
    ],
    ids=lambda given: "-".join(map(str, (*given.keys(), given.get("target_type", "")))),
)
def test_the_second_time_is_a_hit_and_gives_the_same(compiled, compiler_runs, given):
    first = compiled(**given)
    runs = len(compiler_runs)
    second = compiled(**given)
    assert (first.hit, second.hit) == (False, True)
    assert first.reason is None
    assert len(compiler_runs) == runs == 1
    for attribute in ("data", "symbol_mapping", "log", "digest", "name", "arch", "target_type"):
        assert getattr(first, attribute) == getattr(second, attribute)
    assert first.data
    assert second.record["duration"] > 0


def test_bytes_are_the_compilers_own(compiled):
    for options in ({}, {"fma": False, "max_register_count": 32}, {"std": "c++20", "define_macro": ("X", "2")}):
        theirs = cuda.core.Program(SOURCE, "c++", cuda.core.ProgramOptions(arch="sm_80", **options)).compile("cubin")
        assert compiled(**options).data == bytes(theirs.code)
    for code, code_type, target_type, options in (
        (PTX, "ptx", "cubin", {"max_register_count": 32}),
        (NVVM, "nvvm", "ptx", {"use_libdevice": True, "ftz": True}),
        (NVVM, "nvvm", "ltoir", {"use_libdevice": True}),
    ):
        peer = cuda.core.Program(code, code_type, cuda.core.ProgramOptions(arch="sm_80", **options))
        theirs = peer.compile(target_type)
        assert compiled(code, code_type, target_type, **options).data == bytes(theirs.code)


def test_symbol_mapping_survives(compiled):
    names = ("k<int>", b"k<float>")
    theirs = cuda.core.Program(TEMPLATE, "c++", cuda.core.ProgramOptions(arch="sm_80")).compile("cubin", names)
    for _ in range(2):
        made = compiled(TEMPLATE, names=names)
        assert made.symbol_mapping == theirs.symbol_mapping == {"k<int>": b"_Z1kIiEvPT_", b"k<float>": b"_Z1kIfEvPT_"}
        assert made.to_object_code().symbol_mapping == theirs.symbol_mapping


def test_the_log_is_replayed(compiled):
    logs = [io.StringIO(), io.StringIO()]
    for log in logs:
        compiled("#warning careful\n" + SOURCE, name="w.cu", logs=log)
    assert "w.cu(1): warning" in logs[0].getvalue()
    assert logs[0].getvalue() == logs[1].getvalue()
    silent = io.StringIO()
    compiled(logs=silent)
    assert silent.getvalue() == ""


@pytest.mark.parametrize("target_type", ["cubin", "ptx", "ltoir"])
def test_object_code(cache, target_type):
    made = Program(SOURCE, "c++", ProgramOptions(arch="sm_80", name="n")).compile(target_type, cache=cache)
    assert isinstance(made, cuda.core.ObjectCode)
    assert (made.code_type, made.name) == (target_type, "n")


def test_no_compiler_library_on_a_hit(tmp_path):
    """In a new process, to the bytes of a cached kernel: no compiler process, no NVRTC, no cuda.core."""
    code = (
        "import sys\n"
        "from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions\n"
        f"cache = FileStreamProgramCache({str(tmp_path / 'c')!r})\n"
        f"program = Program({TEMPLATE!r}, 'c++', ProgramOptions(arch='sm_80'))\n"
        "done = program.compiled('cubin', ('k<int>',), cache=cache)\n"
        "maps = open('/proc/self/maps').read()\n"
        "modules = [name in sys.modules for name in ('cuda_progcache.compile.own_process', 'cuda.core')]\n"
        "print(done.hit, 'libnvrtc' in maps, *modules, done.symbol_mapping['k<int>'].decode())\n"
    )
    lines = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert lines[0].split() == ["False", "False", "True", "False", "_Z1kIiEvPT_"]
    assert lines[1].split() == ["True", "False", "False", "False", "_Z1kIiEvPT_"]


def test_a_hit_s_record_is_read_when_it_is_asked_for(cache, monkeypatch):
    from cuda_progcache.store import recent_records

    read = []
    real = recent_records.VerifiedRecord.__call__
    monkeypatch.setattr(recent_records.VerifiedRecord, "__call__", lambda self: (read.append(1), real(self))[1])
    source = "#warning careful\n" + SOURCE
    program = Program(source, "c++", ProgramOptions(arch="sm_80"))
    made = program.compiled("cubin", cache=cache)
    hits = [program.compiled("cubin", cache=cache) for _ in range(4)]
    assert all(done.hit for done in hits)
    assert program.compile("cubin", cache=cache).code == made.data
    assert not read
    assert hits[0].log == made.log != ""
    assert len(read) == 1
    assert hits[0].record["key"] == hits[1].record["key"] == made.record["key"]
    assert len(read) == 2
    hits[0].record.clear()
    assert hits[2] == hits[3]
    assert pickle.loads(pickle.dumps(hits[3])) == hits[3] == copy.copy(hits[3])
    with pytest.raises(AttributeError, match="'CompiledProgram' object has no attribute 'nothing'"):
        hits[3].nothing  # noqa: B018


def test_output_is_reproducible_across_processes(tmp_path):
    """Anonymous namespaces and noinline statics otherwise carry the process id."""
    source = (
        "namespace { __device__ int table[4]; __device__ __noinline__ int f(int x) { return table[x & 3] * x; } }\n"
        "static __device__ __noinline__ int g(int x) { return f(x) + 1; }\n"
        'extern "C" __global__ void k(int *a) { *a = g(*a); table[*a & 3] = 1; }'
    )
    code = (
        "import hashlib, sys\n"
        "from cuda_progcache import Program, ProgramOptions\n"
        f"p = Program({source!r}, 'c++', ProgramOptions(arch='sm_80', relocatable_device_code=True))\n"
        "print(*(hashlib.sha256(p.compiled(t).data).hexdigest() for t in ('cubin', 'ptx', 'ltoir')))\n"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        for _ in range(3)
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("target_type", ["cubin", "ptx", "ltoir"])
def test_cached_output_is_uncached_output(compiled, target_type):
    source = "namespace { __device__ int t[4]; __device__ __noinline__ int f(int x) { return t[x & 3] * x; } }\n"
    source += 'extern "C" __global__ void k(int *a) { *a = f(*a); t[*a & 3] = 1; }'
    options = {"relocatable_device_code": True, "include_path": ["a", "b"]}
    fresh = compiled(source, target_type=target_type, store=None, **options)
    assert compiled(source, target_type=target_type, **options).data == fresh.data


def test_works_with_cuda_cores_program(cache, compiled):
    options = cuda.core.ProgramOptions(arch="sm_80")
    first = cuda.core.Program(SOURCE, "c++", options).compile("cubin", cache=cache)
    again = cuda.core.Program(SOURCE, "c++", options).compile("cubin", cache=cache)
    assert bytes(first.code) == bytes(again.code) == compiled().data
    assert cache.stats().hits == 1


def test_works_with_a_store_of_cuda_cores(compiled):
    peer = PeerMemory()
    assert [compiled(store=peer).hit for _ in range(2)] == [False, True]
    with pytest.raises(UncacheableError, match="InMemoryProgramCache stores only bytes"):
        compiled(TEMPLATE, names=("k<int>",), store=peer)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_miss_is_counted_once(compiled, cache, kind):
    store = cache if kind == "disk" else InMemoryProgramCache()
    for _ in range(2):
        compiled(store=store)
    assert (store.stats().hits, store.stats().misses) == (1, 1)


def test_every_store_of_ours(compiled):
    memory = InMemoryProgramCache()
    assert [compiled(TEMPLATE, names=("k<int>",), store=memory).hit for _ in range(2)] == [False, True]


def test_bytes_put_by_hand_do_not_serve_name_expressions(cache, compiled):
    options = ProgramOptions(arch="sm_80")
    key = make_program_cache_key(
        code=TEMPLATE, code_type="c++", options=options, target_type="cubin", name_expressions=("k<int>",)
    )
    cache[key] = b"not from a compile"
    made = compiled(TEMPLATE, names=("k<int>",))
    assert not made.hit
    assert compiled(TEMPLATE, names=("k<int>",)).hit


def test_public_key_is_the_one_that_is_used(cache, compiled, project):
    project("inc/h.h", "#define N 3\n")
    source = "#include <h.h>\n" + SOURCE
    given = {"code": source, "code_type": "c++", "target_type": "cubin"}
    key = program_key(options=ProgramOptions(arch="sm_80", include_path="inc"), **given)
    made = compiled(source, include_path="inc")
    assert made.record["key"] == key.digest.hex()
    assert cache.get(key.digest) == made.data
    assert [h.name for h in key.headers.headers] == ["h.h"]
    assert (
        make_program_cache_key(options=cuda.core.ProgramOptions(arch="sm_80", include_path="inc"), **given)
        == key.digest
    )
    project("inc/h.h", "#define N 4\n")
    assert make_program_cache_key(options=ProgramOptions(arch="sm_80", include_path="inc"), **given) != key.digest


def test_a_key_for_a_source_the_compiler_refuses(project):
    with pytest.raises(UncacheableError, match="cannot open source file"):
        program_key(
            code='#include "gone.h"', code_type="c++", options=ProgramOptions(arch="sm_80"), target_type="cubin"
        )


@pytest.mark.parametrize("macro", ["__DATE__", "__TIME__"])
def test_time_macros_have_no_key(macro):
    with pytest.raises(UncacheableError, match=macro):
        program_key(
            code=f"{SOURCE} __device__ const char *now = {macro};",
            code_type="c++",
            options=ProgramOptions(arch="sm_80"),
            target_type="cubin",
        )


@pytest.mark.parametrize("macro", ["__DATE__", "__TIME__"])
def test_time_macros_compile_but_are_not_kept(cache, compiled, macro):
    for _ in range(2):
        made = compiled(f"{SOURCE}\n__device__ const char *built = {macro};")
        assert not made.hit
        assert made.digest is None
        assert macro in made.reason
    assert len(cache) == 0


@pytest.mark.parametrize("option", ["create_pch", "time", "fdevice_time_trace"])
def test_side_effects_are_refused_with_a_cache_and_done_without(compiled, tmp_path, option):
    target = str(tmp_path / "artifact")
    with pytest.raises(ValueError, match=option.replace("_", "-")):
        compiled(**{option: target})
    assert not (tmp_path / "artifact").exists()


def test_time_is_written_without_a_cache(tmp_path):
    Program(SOURCE, "c++", ProgramOptions(arch="sm_80", time=str(tmp_path / "t.csv"))).compiled("cubin")
    assert (tmp_path / "t.csv").stat().st_size > 0


def test_a_pch_is_made_without_a_cache(project):
    project("h.h", "#define N 3\n")
    program = Program('#include "h.h"\n' + SOURCE, "c++", ProgramOptions(arch="sm_80", create_pch="h.pch"))
    assert program.pch_status is None
    program.compiled("cubin")
    assert program.pch_status == "created"
    plain = Program(SOURCE, "c++", ProgramOptions(arch="sm_80"))
    plain.compiled("cubin")
    assert plain.pch_status is None


def test_options_as_a_mapping_and_by_default():
    assert Program(SOURCE, "c++", {"arch": "sm_80"}).compiled("cubin").arch == "sm_80"
    with pytest.raises(TypeError, match="options must be ProgramOptions"):
        Program(SOURCE, "c++", 3)
    with pytest.raises(TypeError, match="options must be ProgramOptions"):
        Program(SOURCE, "c++", LinkerOptions())


@pytest.mark.parametrize(
    "arguments",
    [
        (b"x", "c++", {}),
        ("x", "foo", {}),
        ("x", 3, {}),
        (3, "nvvm", {}),
        ("x", "ptx", {"extra_sources": [("a", "b")]}),
        ("x", "c++", {"extra_sources": [("a", "b")]}),
    ],
    ids=str,
)
def test_wrong_arguments_raise_what_cuda_core_raises(arguments):
    code, code_type, options = arguments
    with pytest.raises(Exception) as theirs:
        cuda.core.Program(code, code_type, cuda.core.ProgramOptions(arch="sm_80", **options))
    with pytest.raises(theirs.type):
        Program(code, code_type, ProgramOptions(arch="sm_80", **options))


@pytest.mark.parametrize("target_type", ["fatbin", 3])
def test_wrong_target(target_type):
    for program in (cuda.core.Program, Program):
        made = program(SOURCE, "C++", {"arch": "sm_80"})
        with pytest.raises(ValueError, match="Unsupported target_type"):
            made.compile(target_type)


def test_closing():
    program = Program(SOURCE, "c++", ProgramOptions(arch="sm_80"))
    assert not program.is_closed
    assert (program.backend, repr(program)) == ("NVRTC", "<Program backend='NVRTC'>")
    assert int(program.handle)
    program.close()
    assert program.is_closed
    with pytest.raises(RuntimeError, match="Program has been closed"):
        program.compile("cubin")


@pytest.mark.parametrize("backend", [("ptx", PTX, "nvJitLink"), ("nvvm", NVVM, "NVVM")])
def test_backends_are_named_as_by_cuda_core(backend):
    code_type, code, name = backend
    for program in (cuda.core.Program, Program):
        assert str(program(code, code_type, {"arch": "sm_80"}).backend) == name


def test_no_architecture_and_no_device(monkeypatch):
    def no_device():
        raise RuntimeError("no driver")

    monkeypatch.setattr(cuda.core, "Device", no_device)
    with pytest.raises(ArchError, match="sm_75, sm_80"):
        Program(SOURCE, "c++").compiled("cubin")


def test_architecture_of_the_device(monkeypatch):
    monkeypatch.setattr(cuda.core, "Device", type("Hopper", (), {"arch": "90"}))
    assert Program(SOURCE, "c++").compiled("cubin").arch == "sm_90"


def test_a_failed_compile(cache, compiled):
    with pytest.raises(CompileError) as caught:
        compiled("int x = nope;\n", name="bad.cu", fma=False)
    error = caught.value
    assert isinstance(error, ProgCacheError)
    assert (error.name, error.code_type, error.target_type) == ("bad.cu", "c++", "cubin")
    assert error.options == ("-arch=sm_80", "--fmad=false")
    assert 'identifier "nope" is undefined' in error.log
    assert next((d.severity, d.file, d.line, d.rendered) for d in error.diagnostics) == (
        "error", "bad.cu", 1, "int x = nope;",
    )  # fmt: skip
    assert str(error).startswith("bad.cu: c++ -> cubin failed (NVRTC_ERROR_COMPILATION) with -arch=sm_80")
    assert len(cache) == 0


def test_a_failed_compile_is_cuda_cores_error_too():
    from cuda.core._utils.cuda_utils import NVRTCError

    with pytest.raises(NVRTCError):
        Program("nope", "c++", ProgramOptions(arch="sm_80")).compiled("cubin")


def test_compile_errors_can_be_sent_to_another_process():
    with pytest.raises(CompileError) as caught:
        Program("nope", "c++", ProgramOptions(arch="sm_80")).compiled("cubin")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is CompileError
    assert (str(copy), copy.log, copy.options) == (str(caught.value), caught.value.log, caught.value.options)


@pytest.mark.parametrize(("code_type", "target_type", "words"), [("ptx", "cubin", "PTX"), ("nvvm", "ptx", "expected")])
def test_other_compilers_refusals(compiled, code_type, target_type, words):
    with pytest.raises(CompileError, match=f"{code_type} -> {target_type} failed") as caught:
        compiled("nonsense", code_type, target_type)
    assert words in caught.value.log


def test_trouble_in_the_cache_costs_no_compile(compiled, tmp_path):
    import shutil

    store = FileStreamProgramCache(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file where the cache was")
    with pytest.warns(RuntimeWarning):
        made = compiled(store=store)
    assert made.data
    assert made.digest is None
    assert "dropped" in made.reason


def test_a_truncated_entry_is_compiled_again(cache, compiled):
    first = compiled()
    path = cache.info(first.digest).path
    path.write_bytes(first.data[:100])
    again = compiled()
    assert not again.hit
    assert again.data == first.data
    assert compiled().hit


def test_a_compiler_that_is_replaced_during_the_compile(cache, compiled, monkeypatch):
    """Keyed by the files that were there before: what another build made must not be stored under that."""
    from cuda_progcache.keys import toolchain

    original, looks = toolchain.toolchain, []

    def replaced(code_type, *, libdevice=False, thorough=False):
        tools = original(code_type, libdevice=libdevice, thorough=thorough)
        looks.append(thorough)
        return tools if not thorough else (tools[0]._replace(identity="another"), *tools[1:])

    monkeypatch.setattr(toolchain, "toolchain", replaced)
    made = compiled()
    assert looks[-1]
    assert "were replaced while it was compiling" in made.reason
    assert len(cache) == 0
