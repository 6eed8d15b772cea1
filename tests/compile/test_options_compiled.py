# SPDX-License-Identifier: Apache-2.0
"""Every field of ProgramOptions, compiled with and without: what changes the output changes the key."""

from __future__ import annotations

import dataclasses

import cuda.core
import pytest

from cuda_progcache import CompileError, Program, ProgramOptions, make_program_cache_key
from cuda_progcache.errors import UncacheableError

# Sensitive to much: divisions, roots, multiply-adds, denormals, many live registers, aliasing, macros, warnings.
SOURCE = """
#ifndef STEP
#define STEP 3
#endif
namespace { __device__ int table[4]; }
static __device__ __noinline__ int pick(int x) { int unused = 3; return table[x & 3] * x; }
#ifdef __SIZEOF_INT128__
__device__ __int128 wide = 1;
#endif
#ifdef __SIZEOF_FLOAT128__
__device__ int has_float128 = 1;
#endif
#if __has_include("local.h")
#include "local.h"
#endif
__device__ long standard = __cplusplus;
extern "C" __global__ void k(float *a, const float *b, double *d, int *n) {
  float r[24];
  for (int i = 0; i < 24; ++i) r[i] = b[i * STEP] / (a[i] + 1.5f) + sqrtf(b[i + 7]) * 1e-39f;
  for (int i = 0; i < 24; ++i) a[i] = r[i] * r[23 - i] + b[i];
  a[1] = b[0] + 1; a[2] = b[0] + 2;
  *d = *d * 3.0 + a[0];
  *n = pick(*n);
  table[*n & 3] = 1;
}
"""
NVVM = """
target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64\
-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
declare float @__nv_sinf(float)
declare float @llvm.nvvm.sqrt.f(float)
define void @k(float* %p) {
  %l = load float, float* %p
  %x = call float @llvm.nvvm.sqrt.f(float %l)
  %s = call float @__nv_sinf(float %x)
  %q = fdiv float %s, %x
  %m = fmul float %q, %x
  %y = fadd float %m, %s
  store float %y, float* %p
  ret void
}
!nvvm.annotations = !{!0}
!0 = !{void (float*)* @k, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""
MORE_NVVM = """
target triple = "nvptx64-nvidia-cuda"
define float @__nv_sinf(float %x) {
  %y = fadd float %x, 1.0
  ret float %y
}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Options ``base`` without and with ``field=value``; ``seen``: whether the output showed it (NVRTC 13.5)."""

    field: str
    value: object
    seen: bool = True
    base: dict = dataclasses.field(default_factory=dict)
    target_type: str = "cubin"
    code_type: str = "c++"
    more: str = ""  # source


def nvvm(field, value, seen=True, **base):
    return Case(field, value, seen, {"use_libdevice": True} | base, "ptx", "nvvm")


CASES = [
    Case("name", "other.cu"),
    Case("arch", "sm_90"),
    Case("relocatable_device_code", True),
    Case("extensible_whole_program", True, seen=False),
    Case("debug", True),
    Case("lineinfo", True),
    Case("device_code_optimize", True, base={"debug": True}),
    Case("ptxas_options", ["-O1"]),
    Case("ptxas_options", ["-O1", "-O3"], base={"ptxas_options": ["-O3", "-O1"]}),
    Case("max_register_count", 24),
    Case("ftz", True),
    Case("prec_sqrt", False),
    Case("prec_div", False),
    Case("fma", False),
    Case("use_fast_math", True),
    Case("extra_device_vectorization", True, seen=False),
    Case("link_time_optimization", True, seen=False, target_type="ltoir"),
    Case("gen_opt_lto", True, target_type="ltoir"),
    Case("define_macro", ("STEP", "5")),
    Case("undefine_macro", "STEP", base={"define_macro": "STEP=9"}),
    Case("include_path", "inc"),
    Case("use_bundled_headers", True, more="#if __has_include(<cuda_fp16.h>)\n__device__ int there = 1;\n#endif"),
    Case("pre_include", "pre.h"),
    Case("no_source_include", True, base={"name": "src/k.cu"}),
    Case("std", "c++20"),
    Case("builtin_move_forward", False, more="__device__ int moved(int x) { return std::move(x); }"),
    Case("builtin_initializer_list", False, more="__device__ std::initializer_list<int> *list;"),
    Case("disable_warnings", True),
    Case("restrict", True),
    Case("device_as_default_execution_space", True, more="int unannotated(int x) { return x * 3; }"),
    Case("device_int128", True, more="__device__ __int128 wider = 1;"),
    Case("device_float128", True, base={"arch": "sm_100"}, more="__device__ __float128 q = 1;"),
    Case("optimization_info", "inline"),
    Case("no_display_error_number", True),
    Case("diag_error", 177),
    Case("diag_suppress", 177),
    Case("diag_warn", 177, base={"diag_suppress": 177}),
    Case("brief_diagnostics", True),
    Case("split_compile", 2),
    Case("fdevice_syntax_only", True),
    Case("minimal", True, more="__device__ float t(cudaTextureObject_t o) { return tex1Dfetch<float>(o, 1); }"),
    Case("no_cache", True, seen=False),
    Case(
        "frandom_seed",
        "seed",
        seen=False,
        base={"relocatable_device_code": True},
        target_type="ptx",
        more="static __device__ int hidden; __device__ int *seen() { return &hidden; }",
    ),
    Case("ofast_compile", "max"),
    Case("pch_verbose", True, seen=False),
    Case("pch_messages", False, seen=False),
    Case("instantiate_templates_in_pch", True, seen=False),
    nvvm("extra_sources", [("more", MORE_NVVM)], use_libdevice=None),
    nvvm("use_libdevice", True, use_libdevice=None),
    nvvm("numba_debug", True, seen=False),
    nvvm("ftz", True),
    nvvm("prec_div", False),
    nvvm("prec_sqrt", False),
    nvvm("fma", False),
    nvvm("debug", True, seen=False),
    nvvm("device_code_optimize", False),
]
REFUSED = ["create_pch", "time", "fdevice_time_trace", "pch", "use_pch", "pch_dir"]


@pytest.fixture(autouse=True)
def in_a_project(project):
    project("inc/local.h", "__device__ int local_header = 1;\n")
    project("src/local.h", "__device__ int local_header = 2;\n")
    project("pre.h", "#define STEP 7\n")


def outcome(case, options):
    """All that a user gets: the binary, the log and the name, or the compiler's refusal."""
    source = SOURCE + case.more if case.code_type == "c++" else NVVM
    try:
        made = Program(source, case.code_type, ProgramOptions(**options)).compiled(case.target_type)
    except CompileError as error:
        return error.log
    return made.data, made.log, made.name


def key(case, options):
    source = SOURCE + case.more if case.code_type == "c++" else NVVM
    given = {"code": source, "code_type": case.code_type, "target_type": case.target_type}
    try:
        ours, theirs = (
            make_program_cache_key(options=kind(**options), **given)
            for kind in (ProgramOptions, cuda.core.ProgramOptions)
        )
    except UncacheableError:
        return None  # the compiler refuses the program: nothing of it is kept
    assert ours == theirs, "our options and cuda.core's give one key"
    return ours


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.code_type}-{case.field}")
def test_what_changes_the_output_changes_the_key(case):
    without = {"arch": "sm_80"} | case.base
    with_it = without | {case.field: case.value}
    flags = [kind(**with_it).as_bytes(*backend(case)) for kind in (ProgramOptions, cuda.core.ProgramOptions)]
    assert flags[0] == flags[1]
    before = outcome(case, without)
    differs = before != outcome(case, with_it)
    assert differs or not case.seen, "the case shows nothing"
    assert outcome(case, without) == before, "the compiler forgets the option"
    if differs:
        keys = key(case, without), key(case, with_it)
        assert keys[0] != keys[1]


def backend(case):
    return ("nvvm", case.target_type) if case.code_type == "nvvm" else ("nvrtc",)


def test_what_ends_in_the_same_flags_is_the_same_key():
    case = next(case for case in CASES if case.field == "link_time_optimization")
    assert key(case, {"arch": "sm_80"}) == key(case, {"arch": "sm_80", "link_time_optimization": True})


@pytest.mark.parametrize("field", REFUSED)
def test_what_writes_or_hides_files_is_refused(field):
    with pytest.raises(UncacheableError):
        make_program_cache_key(
            code=SOURCE, code_type="c++", target_type="cubin", options=ProgramOptions(arch="sm_80", **{field: "x"})
        )


def test_every_field_has_its_case():
    """A field of a newer cuda.core wants one, too."""
    have = {case.field for case in CASES} | set(REFUSED)
    assert have == {f.name for f in dataclasses.fields(cuda.core.ProgramOptions)}
