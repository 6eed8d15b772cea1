# SPDX-License-Identifier: Apache-2.0
"""The emulation itself: it must report what is undefined on a GPU, or the kernels' checks would prove little."""

from __future__ import annotations

from typing import Any

import emulate
import numpy as np
import pytest
from emulate import At, EmulationError
from launchers import HostLauncher

SOURCE = r"""
#include <cuda_fp16.h>
#include <mma.h>
#include <cuda_pipeline_primitives.h>
extern "C" __global__ void past_the_end(float* x, int n) { x[n + 4] = 1; }
extern "C" __global__ void just_past_the_end(float* x, int n) { x[n] = 1; }
extern "C" __global__ void before_the_start(float* x) { x[-1] = 1; }
extern "C" __global__ void write_x(float* x) { *x = 1; }
extern "C" __global__ void read_four(const float* x, float4* y) { *y = *reinterpret_cast<const float4*>(x); }
extern "C" __global__ void divergent(float* x)
{
    if (threadIdx.x < 5) __syncthreads();
    else __shfl_sync(0xffffffffu, 1, 0);
}
extern "C" __global__ void two_masks(float* x) { __shfl_sync(threadIdx.x < 2 ? 0xfu : 0x3u, 1, 0); }
extern "C" __global__ void half_a_warp(int* x)
{
    if (threadIdx.x >= 16) return;
    x[threadIdx.x] = __shfl_down_sync(0xffffffffu, int(threadIdx.x), 1);
}
extern "C" __global__ void fresh_shared(unsigned* x) { __shared__ unsigned s; x[blockIdx.x] = s; s = 7; }
extern "C" __global__ void dynamic(float* x)
{
    extern __shared__ __align__(16) float s[];
    s[threadIdx.x] = threadIdx.x;
    __syncthreads();
    x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void after_its_neighbour(volatile int* done)
{
    __shared__ int mine[32];
    mine[threadIdx.x] = blockIdx.x;
    while (blockIdx.x > 0 && !done[blockIdx.x - 1]) __nanosleep(10);
    __syncthreads();
    if (threadIdx.x == 0) done[blockIdx.x] = 1 + mine[31];
}
extern "C" __global__ void overflow(int* x) { *x = *x + 0x7fffffff; }
extern "C" __global__ void divide(int* x) { *x = 1 / *x; }
extern "C" __global__ void integers(int n, long long m, int* x) { *x = int(n + m); }
extern "C" __global__ void halves(const __half* x, __half* y)
{
    y[threadIdx.x] = __float2half_rn(__half2float(x[threadIdx.x]) * 3.0f);
}
extern "C" __global__ void unwaited(const float4* x, float4* y)
{
    __shared__ float4 s[2];
    __pipeline_memcpy_async(&s[0], &x[0], 16), __pipeline_commit();
    __pipeline_memcpy_async(&s[1], &x[1], 16), __pipeline_commit();
    __pipeline_wait_prior(1);
    y[0] = s[0], y[1] = s[1];
}
using namespace nvcuda;
extern "C" __global__ void product(const half* a, const half* b, float* c)
{
    wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> A;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> B;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> C;
    wmma::fill_fragment(C, 0.0f);
    wmma::load_matrix_sync(A, a, 16), wmma::load_matrix_sync(B, b, 16);
    wmma::mma_sync(C, A, B, C);
    wmma::store_matrix_sync(c, C, 16, wmma::mem_row_major);
}
"""
ENTRIES = tuple(part.split("(")[0] for part in SOURCE.split('extern "C" __global__ void ')[1:])


def run(entry: str, args: list[Any], block: int = 1, grid: int = 1, shared_bytes: int = 0) -> None:
    emulate.run(SOURCE, entry, args, grid, block, shared_bytes, entries=ENTRIES)


def zeros(n: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(n, dtype)


@pytest.fixture(autouse=True)
def _compiler(launch: Any) -> None:
    """Skip the tests if `launch` skips: without a host C++ compiler."""


@pytest.mark.parametrize(
    ("entry", "args", "message"),
    [
        ("past_the_end", [zeros(6), 6], r"access outside any buffer.*\(rendered\.cu:5\)"),
        ("just_past_the_end", [zeros(6), 6], "write outside the buffer of argument 0"),
        ("before_the_start", [zeros(6)], "write outside the buffer of argument 0"),
        ("read_four", [At(zeros(8), 1), zeros(4)], "misaligned"),
        ("overflow", [np.ones(1, np.int32)], "undefined behaviour"),
        ("divide", [zeros(1, "int32")], "undefined behaviour"),
        ("write_x", [None], "null pointer"),
        ("write_x", [], "takes 1 arguments, 0 were given"),
        ("write_x", [1.0], "an array must be given for a pointer"),
        ("integers", [np.int64(1), np.int64(1), zeros(1, "int32")], "8 bytes was given where 4 are read"),
        ("integers", [np.float32(1), np.int64(1), zeros(1, "int32")], "floating argument was given for an integer"),
    ],
)
def test_refuses(entry: str, args: list[Any], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(entry, args)


def test_refuses_writes_to_read_only_arrays() -> None:
    x = zeros(1)
    x.flags.writeable = False
    with pytest.raises(EmulationError, match="access outside any buffer"):
        run("write_x", [x])


def test_names_what_deadlocks() -> None:
    with pytest.raises(
        EmulationError, match="0 of 32 threads ended, thread 4 waits in __syncthreads, thread 31 in __shfl_sync"
    ):
        run("divergent", [zeros(1)], block=32)
    with pytest.raises(EmulationError, match=r"lacks the calling lane"):
        run("two_masks", [zeros(1)], block=4)


def test_blocks_that_wait_for_each_other() -> None:
    def launch(order: str | int, resident: int) -> list[int]:
        done = zeros(5, "int32")
        emulate.run(SOURCE, "after_its_neighbour", [done], 5, 32, entries=ENTRIES, order=order, resident=resident)
        return done.tolist()

    assert launch("ascending", 1) == [1, 2, 3, 4, 5]
    with pytest.raises(EmulationError, match=r"block \(4, 0, 0\).*waits in __nanosleep for what no running block does"):
        launch("descending", 1)
    with pytest.raises(EmulationError, match="for what no running block does"):
        launch("descending", 4)
    for order in ("ascending", "descending", 2, 3, 4):  # each block has its own shared memory
        assert launch(order, 5) == [1, 2, 3, 4, 5]


def test_absent_lanes_give_poison() -> None:
    x = zeros(16, "int32")
    run("half_a_warp", [x], block=32)
    assert x.tolist() == [*range(1, 16), -1]


def test_shared_memory_starts_as_poison_in_each_block() -> None:
    x = zeros(3, "uint32")
    run("fresh_shared", [x], grid=3)
    assert (x == 0xFFFFFFFF).all()


def test_dynamic_shared_memory() -> None:
    x = zeros(64)
    run("dynamic", [x], block=64, shared_bytes=256)
    assert x.tolist() == [*range(63, -1, -1)]
    with pytest.raises(EmulationError, match="past the end of dynamic shared memory"):
        run("dynamic", [x], block=64, shared_bytes=252)


def test_asynchronous_copies_land_when_they_are_waited_for() -> None:
    x, y = np.arange(8, dtype=np.float32), zeros(8)
    run("unwaited", [x, y])
    assert y[:4].tolist() == [0, 1, 2, 3]
    assert np.isnan(y[4:]).all()


def test_half_arithmetic_rounds_as_numpy() -> None:
    x = np.random.default_rng(0).normal(size=256).astype(np.float16)
    y = np.zeros_like(x)
    run("halves", [x, y], block=256)
    np.testing.assert_array_equal(y, (x.astype(np.float32) * 3).astype(np.float16))


def test_wmma() -> None:
    a, b = (np.random.default_rng(seed).normal(size=(16, 16)).astype(np.float16) for seed in (1, 2))
    c = np.zeros((16, 16), np.float32)
    run("product", [a, b, c], block=32)
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    with pytest.raises(EmulationError, match="not aligned to 256 bits"):
        run("product", [At(a, 8), b, c], block=32)


@pytest.mark.parametrize(
    ("kernel", "args", "geometry", "params"),
    [
        (
            "transpose",
            [zeros(2500), zeros(2500), np.int32(50), np.int32(50), np.int32(1), *(np.int64(n) for n in (50, 50, 0, 0))],
            ((2, 2), (32, 8)),
            {},
        ),
        ("reduce", [zeros(5000), zeros(1), np.int64(1), np.int64(5000), np.int64(5000)], (1, 256), {}),
        ("histogram", [zeros(999), zeros(256, "uint32"), np.int64(999), np.float32(-1), np.float32(100)], (1, 256), {}),
    ],
    ids=["transpose", "reduce", "histogram"],
)
def test_a_missing_barrier_shows(
    library: Any, kernel: str, args: list[Any], geometry: tuple[Any, Any], params: dict[str, Any]
) -> None:
    grid, block = geometry
    rendered = library.render(kernel, **params)
    HostLauncher(library)(kernel, args, grid=grid, block=block, **params)

    class WithoutBarriers:
        def __getitem__(self, kernel: str) -> Any:
            return library[kernel]

        @staticmethod
        def render(kernel: str, **params: Any) -> Any:
            module = type("Module", (), {"source": rendered.modules[0].source.replace("__syncthreads();", "")})
            names = {"entry_points": rendered.entry_points, "name_expressions": rendered.name_expressions}
            return type("Rendered", (), {"modules": [module], **names})

    with pytest.raises(EmulationError, match="depends on the order"):
        HostLauncher(WithoutBarriers())(kernel, args, grid=grid, block=block, **params)
