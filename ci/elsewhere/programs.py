# SPDX-License-Identifier: Apache-2.0
"""The programs that are compiled in one place and asked for in another.

In a source, an option or a name, ``{here}`` is the place's project directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One program.

    Attributes
    ----------
    name : str
    source : str
    options : dict
        Fields of ProgramOptions.
    target_type : str
    code_type : str
    names : tuple of str
        Name expressions.
    wheels : tuple of str
        Wheels besides those of the ``headers`` extra whose headers it includes.
    """

    name: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    target_type: str = "cubin"
    code_type: str = "c++"
    names: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()

    @property
    def reads_the_project(self) -> bool:
        """Whether it includes anything, and could so come to a header of the project's."""
        return "#" in self.source or "pre_include" in self.options

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it to the place."""
        return {
            "name": self.name,
            "source": self.source,
            "options": self.options,
            "target_type": self.target_type,
            "code_type": self.code_type,
            "names": self.names,
        }


HEADERS = {
    "tile.h": "#pragma once\n#define TILE 16\n__device__ inline int scaled(int x) { return x * TILE; }\n",
    "include/tile.h": "#pragma once\n#define TILE 16\n__device__ inline int scaled(int x) { return x * TILE; }\n",
    "include/nested.h": '#pragma once\n#include "tile.h"\n#include "deep/deep.h"\n',
    "include/deep/deep.h": "#pragma once\n#include <tile.h>\ntemplate <int N> struct Deep { int a[N]; };\n",
    "include/checked.h": "#pragma once\n__device__ inline void check(int x) { assert(x >= 0); }\n",
    "include/named.h": "#pragma once\n__device__ inline int length() { return sizeof(__FILE__); }\n",
    "include/config.h": (
        '#pragma once\n#if __has_include("local_config.h")\n#include "local_config.h"\n#else\n#define N 4\n#endif\n'
    ),
}
"""The project's own headers, by path below the place's project directory."""

SAXPY = (
    'extern "C" __global__ void saxpy(float a, const float* __restrict__ x, float* __restrict__ y, int n) {\n'
    "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
    "    if (i < n) y[i] = a * x[i] + y[i];\n"
    "}\n"
)
GENERIC = (
    "template <typename T, int N> __global__ void fill(T* x, T value) {\n"
    "    for (int i = 0; i < N; ++i) x[threadIdx.x * N + i] = value;\n"
    "}\n"
)
_TILED = 'extern "C" __global__ void k(int* a) { a[threadIdx.x] = scaled(a[threadIdx.x]); }\n'
_PROJECT = {"include_path": ["{here}/include"]}
_VENDOR = {"include_path": ["{headers}"], "std": "c++17"}
NVVM = (
    'target triple = "nvptx64-nvidia-cuda"\n'
    'target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64-'
    'v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"\n'
    "define void @k(i32* %a) {\n  store i32 7, i32* %a\n  ret void\n}\n"
    '!nvvm.annotations = !{!0}\n!0 = !{void (i32*)* @k, !"kernel", i32 1}\n'
    "!nvvmir.version = !{!1}\n!1 = !{i32 2, i32 0}\n"
)


def _kernel(body: str, parameters: str = "float* x") -> str:
    return f'extern "C" __global__ void k({parameters}) {{\n{body}\n}}\n'


_OWN = (
    Asked("plain", SAXPY),
    Asked("plain to PTX", SAXPY, target_type="ptx"),
    Asked("plain to LTO-IR", SAXPY, target_type="ltoir"),
    Asked("line table", SAXPY, {"lineinfo": True}),
    Asked("debug", SAXPY, {"debug": True}),
    Asked("name with a directory", SAXPY, {"name": "{here}/src/saxpy.cu"}),
    Asked("macros and tuning", SAXPY, {"define_macro": ("N", "4"), "use_fast_math": True, "fma": False}),
    Asked("name expressions", GENERIC, names=("fill<float, 4>", "fill<double, 2>")),
    Asked("assert in the source", _kernel("assert(x != nullptr); *x = 1;"), {"name": "{here}/src/a.cu"}),
    Asked("printf", _kernel('printf("%d of %f", threadIdx.x, *x);')),
    Asked(
        "internal names",
        "namespace { __device__ int counter; }\nstatic __device__ __noinline__ int twice(int x) { return 2 * x; }\n"
        + _kernel("counter += twice(*x); *x = counter;", "int* x"),
    ),
    Asked("header beside", '#include "tile.h"\n' + _TILED),
    Asked("header by absolute path", "#include <tile.h>\n" + _TILED, _PROJECT),
    Asked("header by relative path", "#include <tile.h>\n" + _TILED, {"include_path": "include"}),
    Asked("headers in headers", '#include "nested.h"\n' + _TILED + "__device__ Deep<TILE> deep;\n", _PROJECT),
    Asked("pre-included header", _TILED, {**_PROJECT, "pre_include": "tile.h"}),
    Asked("pre-included by absolute path", _TILED, {"pre_include": "{here}/include/tile.h"}),
    Asked("computed include", '#define WHICH "tile.h"\n#include WHICH\n' + _TILED, _PROJECT),
    Asked("header with assert", "#include <checked.h>\n" + _kernel("check(*x);", "int* x"), _PROJECT),
    Asked("header that folds its path", "#include <named.h>\n" + _kernel("*x = length();", "int* x"), _PROJECT),
    Asked("optional header", "#include <config.h>\n" + _kernel("*x = N;", "int* x"), _PROJECT),
    Asked("header, line table", "#include <tile.h>\n" + _TILED, {**_PROJECT, "lineinfo": True}),
    Asked("header to LTO-IR", "#include <tile.h>\n" + _TILED, _PROJECT, "ltoir"),
    Asked("header to PTX", "#include <tile.h>\n" + _TILED, _PROJECT, "ptx"),
    Asked(
        "warning in a header's user",
        "#include <tile.h>\n" + _TILED + _kernel("int unused = TILE;").replace("k(", "w("),
        _PROJECT,
    ),
    Asked(
        "PTX",
        ".version 7.8\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{\n ret;\n}\n",
        code_type="ptx",
    ),
    Asked("NVVM IR", NVVM, {"name": "k.ll"}, "ptx", "nvvm"),
)

_BLOCK_SUM = "#include <cub/block/block_reduce.cuh>\n" + _kernel(
    "using Reduce = cub::BlockReduce<float, 128>;\n__shared__ typename Reduce::TempStorage storage;\n"
    "float sum = Reduce(storage).Sum(x[threadIdx.x]);\nif (threadIdx.x == 0) *x = sum;"
)
_GRID_SYNC = "#include <cooperative_groups.h>\n" + _kernel(
    "auto grid = cooperative_groups::this_grid();\nx[grid.thread_rank()] = 1;\ngrid.sync();\n*x += x[1];"
)
_VENDORS = (
    Asked("cuda_fp16.h", "#include <cuda_fp16.h>\n" + _kernel("*x = __hfma(*x, *x, *x);", "__half* x"), _VENDOR),
    Asked("cuda_bf16.h", "#include <cuda_bf16.h>\n" + _kernel("*x = *x * *x;", "__nv_bfloat16* x"), _VENDOR),
    Asked("cuda_fp8.h", "#include <cuda_fp8.h>\n" + _kernel("*x = __nv_fp8_e4m3(1.5f);", "__nv_fp8_e4m3* x"), _VENDOR),
    Asked(
        "mma.h",
        "#include <mma.h>\n#include <cuda_fp16.h>\n"
        + _kernel(
            "using namespace nvcuda;\nwmma::fragment<wmma::accumulator, 16, 16, 16, float> c;\n"
            "wmma::fill_fragment(c, 0.f);\nwmma::store_matrix_sync(x, c, 16, wmma::mem_row_major);"
        ),
        _VENDOR,
    ),
    Asked("cooperative_groups.h", _GRID_SYNC, _VENDOR),
    Asked("cooperative_groups.h, debug", _GRID_SYNC, {**_VENDOR, "debug": True}),
    Asked(
        "cooperative_groups/reduce.h",
        "#include <cooperative_groups.h>\n#include <cooperative_groups/reduce.h>\nnamespace cg = cooperative_groups;\n"
        + _kernel(
            "auto tile = cg::tiled_partition<32>(cg::this_thread_block());\n"
            "*x = cg::reduce(tile, x[threadIdx.x], cg::plus<float>());"
        ),
        _VENDOR,
    ),
    Asked("cub::BlockReduce", _BLOCK_SUM, _VENDOR),
    Asked("cub::BlockReduce to PTX", _BLOCK_SUM, _VENDOR, "ptx"),
    Asked("cub::BlockReduce to LTO-IR", _BLOCK_SUM, _VENDOR, "ltoir"),
    Asked("cub::BlockReduce, line table", _BLOCK_SUM, {**_VENDOR, "lineinfo": True}),
    Asked(
        "cub::BlockScan",
        "#include <cub/block/block_scan.cuh>\n"
        + _kernel(
            "using Scan = cub::BlockScan<float, 128>;\n__shared__ typename Scan::TempStorage storage;\n"
            "float v = x[threadIdx.x];\nScan(storage).ExclusiveSum(v, v);\nx[threadIdx.x] = v;"
        ),
        _VENDOR,
    ),
    Asked(
        "cub::BlockRadixSort",
        "#include <cub/block/block_radix_sort.cuh>\ntemplate <typename T> __global__ void sort(T* x) {\n"
        "using Sort = cub::BlockRadixSort<T, 128, 4>;\n__shared__ typename Sort::TempStorage storage;\nT v[4];\n"
        "for (int i = 0; i < 4; ++i) v[i] = x[threadIdx.x * 4 + i];\nSort(storage).Sort(v);\n"
        "for (int i = 0; i < 4; ++i) x[threadIdx.x * 4 + i] = v[i];\n}\n",
        _VENDOR,
        names=("sort<int>",),
    ),
    Asked(
        "cub::WarpReduce",
        "#include <cub/warp/warp_reduce.cuh>\n"
        + _kernel(
            "using Reduce = cub::WarpReduce<float>;\n__shared__ typename Reduce::TempStorage storage;\n"
            "*x = Reduce(storage).Sum(x[threadIdx.x]);"
        ),
        _VENDOR,
    ),
    Asked(
        "cub::BlockLoad",
        "#include <cub/block/block_load.cuh>\n"
        + _kernel("float v[4];\ncub::LoadDirectBlocked<float, 4>(threadIdx.x, x, v);\n*x = v[0] + v[3];"),
        _VENDOR,
    ),
    Asked(
        "cuda/std/complex",
        "#include <cuda/std/complex>\n" + _kernel("cuda::std::complex<float> z(*x, 1);\n*x = cuda::std::abs(z * z);"),
        _VENDOR,
    ),
    Asked(
        "cuda/std/tuple",
        "#include <cuda/std/tuple>\n#include <cuda/std/array>\n"
        + _kernel("auto t = cuda::std::make_tuple(*x, 2);\n*x = cuda::std::get<0>(t) * cuda::std::get<1>(t);"),
        _VENDOR,
    ),
    Asked(
        "cuda/std/span",
        "#include <cuda/std/span>\n" + _kernel("cuda::std::span<float> s(x, 4);\ns[0] = s[3];"),
        _VENDOR,
    ),
    Asked(
        "cuda/std/mdspan",
        "#include <cuda/std/mdspan>\n"
        + _kernel("cuda::std::mdspan<float, cuda::std::extents<int, 4, 4>> m(x);\n*x = m(1, 2);"),
        {**_VENDOR, "std": "c++17"},
    ),
    Asked(
        "cuda/atomic",
        "#include <cuda/atomic>\n"
        + _kernel("cuda::atomic_ref<int, cuda::thread_scope_device> r(*x);\nr.fetch_add(1);", "int* x"),
        _VENDOR,
    ),
    Asked(
        "cuda/barrier",
        "#include <cuda/barrier>\n"
        + _kernel(
            "__shared__ cuda::barrier<cuda::thread_scope_block> b;\nif (threadIdx.x == 0) init(&b, blockDim.x);\n"
            "__syncthreads();\nb.arrive_and_wait();\n*x = 1;"
        ),
        _VENDOR,
    ),
    Asked(
        "cuda/std/limits",
        "#include <cuda/std/limits>\n" + _kernel("*x = cuda::std::numeric_limits<float>::max();"),
        _VENDOR,
    ),
    Asked("cuda/ptx", "#include <cuda/ptx>\n" + _kernel("*x = cuda::ptx::get_sreg_laneid();"), _VENDOR),
    Asked(
        "cuda/functional",
        "#include <cuda/functional>\n#include <cuda/std/functional>\n"
        + _kernel("*x = cuda::maximum<float>{}(*x, x[1]);"),
        _VENDOR,
    ),
)

# What needs CuTe isn't among them: that of 4.2 doesn't compile with CCCL 13.3.
_CUTLASS = {"include_path": ["{cutlass}", "{headers}"], "std": "c++17", "device_as_default_execution_space": True}
_CURAND = {"include_path": ["{headers}"], "std": "c++17"}
_WHEELS = (
    Asked(
        "cutlass numeric types",
        "#include <cutlass/numeric_types.h>\n#include <cutlass/numeric_conversion.h>\n"
        + _kernel("cutlass::half_t h(*x);\n*x = float(h * h);"),
        _CUTLASS,
        wheels=("nvidia-cutlass",),
    ),
    Asked(
        "cutlass array",
        "#include <cutlass/array.h>\n#include <cutlass/functional.h>\n"
        + _kernel(
            "cutlass::Array<float, 4> a;\na.fill(*x);\ncutlass::plus<cutlass::Array<float, 4>> add;\n*x = add(a, a)[0];"
        ),
        _CUTLASS,
        wheels=("nvidia-cutlass",),
    ),
    Asked(
        "cutlass complex",
        "#include <cutlass/complex.h>\n" + _kernel("cutlass::complex<float> z(*x, 1);\n*x = (z * z).real();"),
        _CUTLASS,
        wheels=("nvidia-cutlass",),
    ),
    Asked(
        "cutlass layout",
        "#include <cutlass/layout/matrix.h>\n"
        + _kernel("cutlass::layout::RowMajor rows(4);\n*x = rows(cutlass::MatrixCoord(1, 2));"),
        _CUTLASS,
        wheels=("nvidia-cutlass",),
    ),
    Asked(
        "cutlass epilogue",
        "#include <cutlass/epilogue/thread/linear_combination.h>\n"
        + _kernel(
            "using Op = cutlass::epilogue::thread::LinearCombination<float, 4>;\n"
            "typename Op::Params scale(2.f, 1.f);\ntypename Op::FragmentOutput c;\nc.fill(*x);\n"
            "*x = Op(scale)(c, c)[0];"
        ),
        _CUTLASS,
        wheels=("nvidia-cutlass",),
    ),
    Asked(
        "curand philox",
        "#include <curand_kernel.h>\n"
        + _kernel("curandStatePhilox4_32_10_t s;\ncurand_init(1, threadIdx.x, 0, &s);\n*x = curand_uniform(&s);"),
        _CURAND,
        wheels=("nvidia-curand",),
    ),
    Asked(
        "curand xorwow normal",
        "#include <curand_kernel.h>\n"
        + _kernel("curandState s;\ncurand_init(1, threadIdx.x, 0, &s);\n*x = curand_normal(&s);"),
        _CURAND,
        wheels=("nvidia-curand",),
    ),
    Asked(
        "cuFFTDx fft",
        "#include <cufftdx.hpp>\n"
        "using namespace cufftdx;\nusing F = decltype(Size<16>() + Precision<float>() + Type<fft_type::c2c>() + "
        "Direction<fft_direction::forward>() + SM<800>() + Thread());\n"
        + _kernel("typename F::value_type v[F::storage_size] = {};\nF().execute(v);\n*x = v[0].x;"),
        {**_CUTLASS, "include_path": ["{mathdx}", "{mathdx_cutlass}", "{headers}"]},
        wheels=("nvidia-mathdx",),
    ),
)

PROGRAMS = (*_OWN, *_VENDORS, *_WHEELS)
BOUNDED = (
    *_OWN,
    *(p for p in _VENDORS if p.name in {"cuda_fp16.h", "cooperative_groups.h", "cuda/std/limits"}),
)
"""What the test compiles: all of the project's kind, and a vendor's header of each family."""
