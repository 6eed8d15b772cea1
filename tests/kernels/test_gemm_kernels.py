# SPDX-License-Identifier: Apache-2.0
"""The emulated sgemm and hgemm_wmma kernels: every path through bounds, alignment, buffers and tiles."""

from __future__ import annotations

from typing import Any

import pytest
from checks_gemm import SHAPES, check_product

SMALL = {"tile_m": 32, "tile_n": 64, "tile_k": 8, "thread_m": 4, "thread_n": 8}
TENSOR = {"tile_m": 32, "tile_n": 64, "tile_k": 16, "warps_m": 2, "warps_n": 2}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgemm_any_shape(launch: Any, shape: tuple[int, int, int]) -> None:
    check_product(launch, "sgemm", shape, **SMALL)


@pytest.mark.parametrize(("pad", "offset"), [(4, 0), (3, 0), (0, 1), (5, 2)])
def test_sgemm_any_stride_and_pointer(launch: Any, pad: int, offset: int) -> None:
    check_product(launch, "sgemm", (37, 68, 20), alpha=-0.5, beta=2.0, pad=pad, offset=offset, **SMALL)


def test_sgemm_at_its_defaults(launch: Any) -> None:
    check_product(launch, "sgemm", (130, 132, 24), alpha=2.0, beta=0.5)


@pytest.mark.parametrize(
    "params",
    [
        {"dtype": "float64", "tile_m": 64, "tile_n": 64, "thread_m": 4, "thread_n": 4, "vector": 2},
        {"dtype": "float64", "tile_m": 32, "tile_n": 32, "tile_k": 16, "thread_m": 2, "thread_n": 2, "vector": 1},
        {"tile_m": 64, "tile_n": 64, "tile_k": 16, "thread_m": 4, "thread_n": 4},
        {"tile_m": 64, "tile_n": 32, "tile_k": 32, "thread_m": 8, "thread_n": 2, "vector": 2},
        {"tile_m": 32, "tile_n": 32, "tile_k": 32, "thread_m": 8, "thread_n": 4, "vector": 1},
    ],
    ids=str,
)
def test_sgemm_tiles(launch: Any, params: dict[str, Any]) -> None:
    check_product(launch, "sgemm", (65, 67, 45), beta=-1.0, pad=1, **params)


@pytest.mark.parametrize("kernel", ["sgemm", "hgemm_wmma"])
def test_nothing_to_sum_scales_c(launch: Any, kernel: str) -> None:
    check_product(launch, kernel, (40, 50, 0), beta=3.0, **(SMALL if kernel == "sgemm" else TENSOR))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hgemm_any_shape(launch: Any, shape: tuple[int, int, int]) -> None:
    check_product(launch, "hgemm_wmma", shape, **TENSOR)


@pytest.mark.parametrize(("pad", "offset"), [(8, 0), (4, 0), (0, 1), (3, 8)])
def test_hgemm_any_stride_and_pointer(launch: Any, pad: int, offset: int) -> None:
    check_product(launch, "hgemm_wmma", (37, 72, 40), alpha=-0.5, beta=2.0, pad=pad, offset=offset, **TENSOR)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "stages"),
    [
        *(("float16", "float16", 2), ("float16", "float16", 3), ("bfloat16", "float32", 2)),
        *(("bfloat16", "float32", 4), ("bfloat16", "bfloat16", 3), ("bfloat16", "bfloat16", 4)),
    ],
)
def test_hgemm_types_and_stages(launch: Any, dtype: str, out_dtype: str, stages: int) -> None:
    check_product(
        launch, "hgemm_wmma", (33, 65, 130), beta=1.0, dtype=dtype, out_dtype=out_dtype, stages=stages, **TENSOR
    )


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"out_dtype": "float16", "tile_m": 64, "tile_n": 64, "warps_m": 2, "stages": 4},
        {"tile_m": 64, "tile_n": 128, "tile_k": 16, "warps_m": 4, "warps_n": 4},
        {"tile_m": 32, "tile_n": 32, "tile_k": 32, "warps_m": 1, "warps_n": 1},
        # These use dynamic shared memory.
        {"stages": 4},
        {"tile_n": 256, "warps_m": 2, "warps_n": 4, "stages": 3},
        {"tile_m": 256, "tile_n": 32, "warps_m": 4, "warps_n": 1, "stages": 4, "dtype": "bfloat16"},
        {"tile_m": 32, "tile_n": 256, "tile_k": 16, "warps_m": 2, "warps_n": 4, "stages": 4},
    ],
    ids=str,
)
def test_hgemm_tiles(launch: Any, params: dict[str, Any]) -> None:
    check_product(launch, "hgemm_wmma", (70, 136, 72), alpha=0.25, **params)
