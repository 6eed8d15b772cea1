# SPDX-License-Identifier: Apache-2.0
"""The programs of ``ci/matrix.py``, and the script that compiles them through a cache in a given environment.

The script reads its task from stdin and writes the outcomes to stdout, both as JSON. It needs only the package.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from typing import Any, NamedTuple

from cuda_progcache import FileStreamProgramCache, LinkerOptions, Program, ProgramOptions, link, subscribe
from cuda_progcache.errors import ProgCacheError

ARCH = "sm_80"


class Case(NamedTuple):
    """A program.

    ``place``: the output contains the working directory or a header's path. ``quick``: CI runs the program. ``cccl``:
    the program includes headers of CCCL, which NVRTC can compile ``since`` that release of CCCL.
    """

    code: str
    target: str = "cubin"
    names: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 - never modified
    place: bool = False
    quick: bool = False
    cccl: bool = True
    since: str = "12.3"


def _cub(header: str, body: str) -> str:
    return f'#include "cfg.cuh"\n#include <{header}>\nextern "C" __global__ void k(int *p) {{ {body} }}\n'


_WARP = "typedef cub::WarpReduce<int> R; __shared__ R::TempStorage s; *p = R(s).Sum(*p) + CFG_N;"
CASES = {
    "cub block reduce": Case(
        _cub(
            "cub/block/block_reduce.cuh",
            "typedef cub::BlockReduce<int, 128> R; __shared__ R::TempStorage s; int x = R(s).Sum(*p); *p = x + CFG_N;",
        ),
        since="12.5",
    ),
    "cub block radix sort": Case(
        _cub(
            "cub/block/block_radix_sort.cuh",
            "typedef cub::BlockRadixSort<int, 64, 2> S; __shared__ S::TempStorage s; int v[2] = {p[0], p[1]}; "
            "S(s).Sort(v); p[threadIdx.x] = v[(CFG_N >> 1) & 1];",
        ),
        "ptx",
        since="12.5",
    ),
    "cub warp reduce": Case(_cub("cub/warp/warp_reduce.cuh", _WARP), quick=True, since="12.5"),
    "cub device": Case(
        _cub("cub/thread/thread_reduce.cuh", "int v[3] = {p[0], p[1], CFG_N}; *p = v[0] + v[1] + v[2];"),
        since="12.5",
    ),
    "cooperative groups": Case(
        '#include "cfg.cuh"\n#include <cooperative_groups.h>\n#include <cooperative_groups/reduce.h>\n'
        "namespace cg = cooperative_groups;\n"
        'extern "C" __global__ void k(int *p) { auto w = cg::tiled_partition<32>(cg::this_thread_block());\n'
        "int x = cg::reduce(w, *p, cg::plus<int>()); if (w.thread_rank() == 0) *p = x + CFG_N; }\n",
        quick=True,
    ),
    "cuda/std": Case(
        '#include "cfg.cuh"\n#include <cuda/std/array>\n#include <cuda/std/tuple>\n#include <cuda/std/type_traits>\n'
        'extern "C" __global__ void k(int *p) { cuda::std::array<int, 4> a{1, 2, CFG_N, 4};\n'
        "p[0] = a[p[1] & 3] + cuda::std::get<0>(cuda::std::make_tuple(CFG_N, 2)); }\n",
        "ptx",
        quick=True,
    ),
    "cuda/atomic": Case(
        '#include "cfg.cuh"\n#include <cuda/atomic>\nextern "C" __global__ void k(int *p) {\n'
        "cuda::atomic_ref<int, cuda::thread_scope_device> a(*p); a.fetch_add(CFG_N); }\n"
    ),
    "thrust": Case(
        '#include "cfg.cuh"\n#include <thrust/tuple.h>\n#include <thrust/functional.h>\n'
        'extern "C" __global__ void k(int *p) { thrust::plus<int> f; *p = f(*p, CFG_N); }\n',
        since="12.9",
    ),
    "name expressions": Case(
        '#include "cfg.cuh"\n#include <cuda_fp16.h>\nnamespace { template <class T> __device__ __noinline__ T '
        "twice(T x) { return x + x; } }\n"
        "template <class T, int N> __global__ void scale(T *p) { for (int i = 0; i < N; ++i) p[i] = twice(p[i]); }\n",
        names=("scale<__half, CFG_N>", "scale<float, 4>"),
        quick=True,
        cccl=False,
    ),
    "tests for headers": Case(
        '#include "cfg.cuh"\n#define HAS(x) __has_include(x)\n#if HAS("none.cuh") || HAS(<cuda_fp16.h>)\n'
        '#include <cuda_fp16.h>\n#endif\nextern "C" __global__ void k(__half *p) { *p = __int2half_rn(CFG_N); }\n',
        quick=True,
        cccl=False,
    ),
    "a header warns": Case(
        '#include "cfg.cuh"\n#include "warns.cuh"\nextern "C" __global__ void k(int *p) { *p = warned() + CFG_N; }\n',
        place=True,
        quick=True,
        cccl=False,
    ),
    "a header asserts": Case(
        '#include "cfg.cuh"\n#include "asserts.cuh"\nextern "C" __global__ void k(int *p) { check(*p); *p = CFG_N; }\n',
        place=True,
        quick=True,
        cccl=False,
    ),
    "lineinfo": Case(
        _cub("cuda_fp16.h", "*p = __half2int_rn(__int2half_rn(*p)) + CFG_N;"),
        options={"lineinfo": True},
        place=True,
        quick=True,
        cccl=False,
    ),
    "debug": Case(
        _cub("cuda_fp16.h", "*p = __half2int_rn(__int2half_rn(*p)) + CFG_N;"),
        options={"debug": True},
        place=True,
        quick=True,
        cccl=False,
    ),
    "lto": Case(
        _cub("cuda_fp16.h", "*p = __half2int_rn(__int2half_rn(*p)) + CFG_N;"),
        "ltoir",
        place=True,
        quick=True,
        cccl=False,
    ),
    "lto of cub": Case(_cub("cub/warp/warp_reduce.cuh", _WARP), "ltoir", place=True, since="12.5"),
    "all of it": Case(
        '#include "cfg.cuh"\n#include <cub/block/block_scan.cuh>\n#include <cuda/std/utility>\n'
        '#include <cooperative_groups.h>\n#include <cuda_bf16.h>\nextern "C" __global__ void k(int *p) {\n'
        "typedef cub::BlockScan<int, 64> S; __shared__ S::TempStorage s; int x;\n"
        "S(s).ExclusiveSum(*p, x); cooperative_groups::this_thread_block().sync(); p[threadIdx.x] = x + CFG_N; }\n",
        options={"std": "c++20", "use_fast_math": True, "ptxas_options": ["-v"]},
        since="12.5",
    ),
}


def compiled(name: str, cache: FileStreamProgramCache | None, include_path: list[str]) -> dict[str, Any]:
    """Compile a case; return whether it hit, why it isn't kept, and digests of the output without and with paths."""
    case = CASES[name]
    log = io.StringIO()
    given = {"arch": ARCH, "std": "c++17", "name": "k.cu", "include_path": include_path} | case.options
    program = Program(case.code, "c++", ProgramOptions(**given))
    why: list[str] = []
    end = subscribe(lambda event: why.extend(getattr(event, "reasons", ())))
    try:
        made = program.compiled(case.target, case.names, log, cache=cache)
        seen = [made.data, sorted(made.symbol_mapping.items())]
        found = {"hit": made.hit, "reason": made.reason, "why": why}
        if case.target == "ltoir":
            linked = link([made], LinkerOptions(arch=ARCH), cache=cache)
            seen.append(linked.data)
            found |= {"hit": made.hit and linked.hit, "reason": made.reason or linked.reason}
    except ProgCacheError as error:
        return {"refused": str(error)}
    finally:
        end()
    told = shown = log.getvalue()
    for number, root in enumerate(include_path):  # a warning contains the header's path, which differs between folders
        told = told.replace(root, f"<{number}>")
    return found | {"digest": _digest(seen, told), "exactly": _digest(seen, shown)}


def _digest(*seen: object) -> str:
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def main() -> None:
    """Compile the cases named on stdin: with ``cache``, and those in ``fresh`` also without a cache."""
    given = json.load(sys.stdin)
    cache = FileStreamProgramCache(given["cache"], durability="none")
    json.dump(
        {
            name: compiled(name, cache, given["include_path"])
            | ({"fresh": compiled(name, None, given["include_path"]).get("exactly")} if name in given["fresh"] else {})
            for name in given["cases"]
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
