# SPDX-License-Identifier: Apache-2.0
"""axpby, reduce, scan, histogram, lto_pair, block_sum_cub and saxpy_nvvm on a GPU, against the references."""

from __future__ import annotations

from typing import Any

import pytest
from checks_arrays import (
    check_axpby,
    check_axpby_ignores_y,
    check_bias_activation,
    check_block_sum,
    check_histogram,
    check_reduce_all,
    check_reduce_rows,
    check_saxpy,
    check_scan,
    check_scan_lookback,
)

pytestmark = pytest.mark.gpu

SIZES = (1, 31, 33, 1025, 100_003)
FLOATS = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
def test_axpby(run_kernel: Any, dtype: str) -> None:
    for n in SIZES:
        check_axpby(run_kernel, n, a=3, b=-2, dtype=dtype, blocks=40)
    for offsets in ((1, 1), (3, 3), (0, 1), (2, 3)):
        check_axpby(run_kernel, 1025, a=3, b=-2, offsets=offsets, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_axpby_ignores_y_where_b_is_zero(run_kernel: Any, dtype: str) -> None:
    check_axpby_ignores_y(run_kernel, dtype)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64"])
def test_reduce(run_kernel: Any, dtype: str, op: str) -> None:
    for cols in SIZES[:-1]:
        check_reduce_rows(run_kernel, (37, cols), pad=3, offset=1, blocks=20, dtype=dtype, op=op)
    for n in SIZES:
        check_reduce_all(run_kernel, n, blocks=133, dtype=dtype, op=op)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64"])
def test_reduce_rows_by_warp(run_kernel: Any, dtype: str, op: str) -> None:
    for shape in ((1, 1), (37, 31), (1000, 33), (333, 1025)):
        check_reduce_rows(run_kernel, shape, pad=3, offset=1, blocks=20, dtype=dtype, op=op, rows_by="warp", block=128)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("rows_by", ["warp", "block"])
def test_reduce_propagates_nan(run_kernel: Any, op: str, rows_by: str) -> None:
    check_reduce_rows(run_kernel, (2, 1025), nan_at=1000, op=op, rows_by=rows_by)


@pytest.mark.parametrize("kind", ["inclusive", "exclusive"])
@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "uint32"])
def test_scan(run_kernel: Any, dtype: str, kind: str) -> None:
    for n in (*SIZES, 3_000_001):
        check_scan(run_kernel, n, offset=1, dtype=dtype, kind=kind)


def test_scan_float32(run_kernel: Any) -> None:
    check_scan(run_kernel, 5000)


@pytest.mark.parametrize("kind", ["inclusive", "exclusive"])
@pytest.mark.parametrize("dtype", ["float64", "int32", "int64", "uint32"])
def test_scan_lookback(run_kernel: Any, dtype: str, kind: str) -> None:
    for n in (0, *SIZES, 3_000_001):
        for blocks in (1, 300, 10_000):  # tile after tile, all blocks at once, more blocks than the device holds
            check_scan_lookback(run_kernel, n, blocks=blocks, offset=1, dtype=dtype, kind=kind, items=4)
    check_scan_lookback(run_kernel, 3_000_001, blocks=1000, dtype=dtype, kind=kind, block=32, items=1)


def test_scan_lookback_float32(run_kernel: Any) -> None:
    check_scan_lookback(run_kernel, 5000, blocks=4, block=64, items=4)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32"])
def test_histogram(run_kernel: Any, dtype: str) -> None:
    for n in SIZES:
        check_histogram(run_kernel, n, blocks=50, offset=1, dtype=dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bias_activation(run_kernel: Any, dtype: str, activation: str) -> None:
    for shape in ((1, 1), (3, 31), (33, 5), (70, 1025)):
        check_bias_activation(run_kernel, shape, blocks=50, dtype=dtype, activation=activation)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_block_sum(run_kernel: Any, dtype: str) -> None:
    for n, segment in ((1, 5), (31, 31), (1025, 100), (100_003, 1024)):
        check_block_sum(run_kernel, n, segment, blocks=20, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saxpy(run_kernel: Any, dtype: str) -> None:
    for n in SIZES:
        check_saxpy(run_kernel, n, blocks=40, dtype=dtype)
