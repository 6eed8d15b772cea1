# SPDX-License-Identifier: Apache-2.0
"""The emulated softmax, layernorm and rmsnorm kernels: lengths, alignment, types, and extreme values."""

from __future__ import annotations

from typing import Any

import pytest
from checks_rows import SHAPES, check_norm, check_softmax, check_softmax_extremes

DTYPES = ("float32", "float16", "bfloat16")
PLACES = ((4, 0), (8, 0), (1, 0), (0, 1), (3, 2))  # elements between rows, elements after a 16-byte boundary


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows_by", ["warp", "block"])
def test_softmax_any_shape(launch: Any, shape: tuple[int, int], rows_by: str) -> None:
    check_softmax(launch, shape, rows_by=rows_by, block=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pad", "offset"), PLACES)
def test_softmax_any_stride_and_pointer(launch: Any, dtype: str, pad: int, offset: int) -> None:
    check_softmax(launch, (5, 72), dtype=dtype, pad=pad, offset=offset, block=64)


@pytest.mark.parametrize(
    ("dtype", "rows_by"), [("float32", "warp"), ("float32", "block"), ("float16", "block"), ("bfloat16", "warp")]
)
@pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])
def test_softmax_extreme_values(launch: Any, dtype: str, rows_by: str, log: bool) -> None:
    check_softmax_extremes(launch, dtype=dtype, rows_by=rows_by, log=log, block=64)


@pytest.mark.parametrize(
    "params", [{"block": 32}, {"block": 1024}, {"log": True}, {"block": 96, "rows_by": "warp"}], ids=str
)
def test_softmax_blocks(launch: Any, params: dict[str, Any]) -> None:
    check_softmax(launch, (7, 1030), **params)


@pytest.mark.parametrize("kernel", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows_by", ["warp", "block"])
def test_norm_any_shape(launch: Any, kernel: str, shape: tuple[int, int], rows_by: str) -> None:
    check_norm(launch, kernel, shape, rows_by=rows_by, block=64)


@pytest.mark.parametrize("kernel", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(
    ("dtype", "rows_by"), [*((dtype, "block") for dtype in DTYPES), ("float32", "warp"), ("float16", "warp")]
)
@pytest.mark.parametrize(("pad", "offset"), PLACES)
def test_norm_any_stride_and_pointer(launch: Any, kernel: str, dtype: str, rows_by: str, pad: int, offset: int) -> None:
    check_norm(launch, kernel, (5, 72), dtype=dtype, pad=pad, offset=offset, rows_by=rows_by, block=64)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"block": 32},
        {"block": 1024},
        {"bias": False, "save_statistics": True},
        {"save_statistics": True, "dtype": "bfloat16"},
        {"save_statistics": True, "rows_by": "warp", "block": 96},
    ],
    ids=str,
)
def test_layernorm_parameters(launch: Any, params: dict[str, Any]) -> None:
    check_norm(launch, "layernorm", (3, 1030), **params)


@pytest.mark.parametrize("rows_by", ["warp", "block"])
def test_layernorm_keeps_the_variance_of_values_far_from_zero(launch: Any, rows_by: str) -> None:
    # A float near 512 is exact to 3e-5; a variance computed as mean(x ** 2) - mean ** 2 would be off by 1e-2.
    check_norm(launch, "layernorm", (3, 4097), mean=512.0, atol=1e-4, rows_by=rows_by, save_statistics=True)
