# SPDX-License-Identifier: Apache-2.0
"""A small kernel library to compile, and a service over it."""

from __future__ import annotations

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache

MANIFEST = """
format = 1
[kernels.fill]
template = "fill.cu.j2"
description = "a[i] = value"
entry_points = ["fill"]
[kernels.fill.parameters]
dtype = { type = "dtype", values = ["float32", "int32"], default = "float32" }
block = { type = "int", min = 32, max = 1024, default = 256 }
[[kernels.fill.variants]]
[[kernels.fill.variants]]
dtype = "int32"

[kernels.typed]
template = "typed.cu.j2"
name_expressions = ["typed<{{ dtype | ctype }}>"]
headers = ["cuda"]
min_arch = 80
[kernels.typed.parameters]
dtype = { type = "dtype", values = ["float16", "float32"], default = "float16" }

[kernels.pair]
templates = ["callee.cu.j2", "caller.cu.j2"]
entry_points = ["pair"]

[kernels.ir]
template = "ir.ll.j2"
code_type = "nvvm"
entry_points = ["ir"]
"""

TEMPLATES = {
    "fill.cu.j2": (
        'extern "C" __global__ void __launch_bounds__({{ block }})\n'
        "fill({{ dtype | ctype }} *a, {{ dtype | ctype }} value) {\n"
        "  a[blockIdx.x * {{ block }} + threadIdx.x] = value;\n}\n"
    ),
    "typed.cu.j2": "#include <cuda_fp16.h>\ntemplate <class T> __global__ void typed(T *a) { *a = *a + *a; }\n",
    "callee.cu.j2": "__device__ float twice(float x) { return x + x; }\n",
    "caller.cu.j2": (
        'extern __device__ float twice(float);\nextern "C" __global__ void pair(float *a) { *a = twice(*a); }\n'
    ),
    "ir.ll.j2": (
        'target triple = "nvptx64-nvidia-cuda"\n'
        'target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-'
        'f64:64:64-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"\n'
        "define void @ir(i32* %p) {\n  store i32 7, i32* %p\n  ret void\n}\n"
        '!nvvm.annotations = !{!0}\n!0 = !{void (i32*)* @ir, !"kernel", i32 1}\n'
        "!nvvmir.version = !{!1}\n!1 = !{i32 2, i32 0}\n"
    ),
}


@pytest.fixture
def library_dir(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    for name, text in TEMPLATES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def service(tmp_path, library_dir):
    return CompileService(FileStreamProgramCache(tmp_path / "cache", durability="none"), library=library_dir)
