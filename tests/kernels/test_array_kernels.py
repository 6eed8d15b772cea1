# SPDX-License-Identifier: Apache-2.0
"""The emulated kernels over one-dimensional arrays: lengths, alignment, types, special values."""

from __future__ import annotations

from typing import Any

import pytest
from checks_arrays import (
    SIZES,
    check_axpby,
    check_axpby_ignores_y,
    check_bias_activation,
    check_block_sum,
    check_histogram,
    check_reduce_all,
    check_reduce_rows,
    check_scan,
    check_scan_lookback,
)
from launchers import HostLauncher

FLOATS = ("float16", "bfloat16", "float32", "float64")
SCANS = (  # both kinds, both widths, integer and floating types
    *(("float32", "inclusive"), ("float32", "exclusive"), ("float64", "exclusive")),
    *(("int32", "inclusive"), ("int64", "exclusive"), ("int64", "inclusive"), ("uint32", "exclusive")),
)
OFFSETS = ((0, 0), (1, 1), (3, 3), (0, 1), (2, 3))  # elements of x and of y after a 16-byte boundary


@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
def test_axpby(launch: Any, dtype: str) -> None:
    for n in SIZES:
        check_axpby(launch, n, a=3, b=-2, dtype=dtype, block=64)
    for offsets in OFFSETS:
        check_axpby(launch, 333, a=3, b=-2, offsets=offsets, dtype=dtype, block=64)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_axpby_vector_widths(launch: Any, width: int) -> None:
    for offsets in OFFSETS:
        check_axpby(launch, 1025, offsets=offsets, vector_width=width)


@pytest.mark.parametrize("dtype", FLOATS)
def test_axpby_ignores_y_where_b_is_zero(launch: Any, dtype: str) -> None:
    check_axpby_ignores_y(launch, dtype)


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        *((dtype, "sum") for dtype in (*FLOATS, "int32")),
        ("float16", "min"),
        ("float32", "max"),
        ("int32", "min"),
        ("int64", "max"),
    ],
)
def test_reduce(launch: Any, dtype: str, op: str) -> None:
    for shape in ((1, 1), (3, 31), (5, 33), (2, 1025), (3, 4099)):
        check_reduce_rows(launch, shape, dtype=dtype, op=op, block=64)
    check_reduce_rows(launch, (3, 100), pad=3, offset=1, dtype=dtype, op=op, block=64)
    for n, blocks in ((1, 1), (33, 3), (5000, 7), (1025, 70)):
        check_reduce_all(launch, n, blocks=blocks, offset=1, dtype=dtype, op=op, block=64)


@pytest.mark.parametrize(
    ("dtype", "op"), [("float32", "sum"), ("float16", "min"), ("int32", "sum"), ("float64", "max")]
)
def test_reduce_rows_by_warp(launch: Any, dtype: str, op: str) -> None:
    for shape in ((1, 1), (3, 31), (9, 33), (5, 1025)):
        check_reduce_rows(launch, shape, pad=3, offset=1, dtype=dtype, op=op, rows_by="warp", block=96)
    check_reduce_all(launch, 5000, blocks=7, dtype=dtype, op=op, rows_by="warp", block=64)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("rows_by", ["warp", "block"])
def test_reduce_propagates_nan(launch: Any, op: str, rows_by: str) -> None:
    for at in (0, 63, 99):
        check_reduce_rows(launch, (2, 100), nan_at=at, op=op, rows_by=rows_by, block=32)


@pytest.mark.parametrize("block", [32, 96, 1024])
def test_reduce_blocks(launch: Any, block: int) -> None:
    check_reduce_rows(launch, (2, 2050), block=block)
    check_reduce_all(launch, 9001, blocks=2, block=block)


@pytest.mark.parametrize(("dtype", "kind"), SCANS)
def test_scan(launch: Any, dtype: str, kind: str) -> None:
    for n in (1, 31, 33, 255, 256, 257, 1025, 5000):
        check_scan(launch, n, dtype=dtype, kind=kind, block=64)
    check_scan(launch, 1025, offset=1, dtype=dtype, kind=kind, block=64)


@pytest.mark.parametrize(("block", "items"), [(32, 1), (32, 2), (96, 8), (256, 16), (1024, 1)])
def test_scan_tiles(launch: Any, block: int, items: int) -> None:
    check_scan(launch, 3 * block * items + 1, dtype="int32", block=block, items=items)


def test_scan_totals_longer_than_a_tile(launch: Any) -> None:
    check_scan(launch, 64 * 65 + 5, dtype="int64", block=64, items=1)


@pytest.mark.parametrize(("dtype", "kind"), SCANS)
def test_scan_lookback(launch: Any, dtype: str, kind: str) -> None:
    for n in (0, 1, 31, 33, 255, 256, 257, 1025, 5000):
        check_scan_lookback(launch, n, blocks=3, dtype=dtype, kind=kind, block=64, items=4)
    check_scan_lookback(launch, 1025, blocks=9, offset=1, dtype=dtype, kind=kind, block=64, items=8)


@pytest.mark.parametrize(("block", "items"), [(32, 1), (32, 2), (96, 8), (256, 16), (1024, 1)])
def test_scan_lookback_tiles(launch: Any, block: int, items: int) -> None:
    check_scan_lookback(launch, 3 * block * items + 1, blocks=2, dtype="int32", block=block, items=items)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(("resident", "blocks"), [(2, 2), (3, 7), (8, 40), (40, 40)])
def test_tiles_that_look_back_on_tiles_at_work(launch: Any, dtype: str, resident: int, blocks: int) -> None:
    # A block can be suspended at any access to the state that blocks share. The others then find a sum, a prefix,
    # nothing, or words of two of these.
    crowd = HostLauncher(launch.library, ["ascending", "descending", *range(2, 8)], resident)
    check_scan_lookback(crowd, 40 * 32 - 5, blocks=blocks, dtype=dtype, block=32, items=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(2, 6))
def test_floating_tiles_that_look_back_on_tiles_at_work(launch: Any, dtype: str, seed: int) -> None:
    check_scan_lookback(HostLauncher(launch.library, [seed], 6), 900, blocks=20, dtype=dtype, block=32, items=1)


@pytest.mark.parametrize(
    ("dtype", "copies"), [("uint8", 8), ("int32", 4), ("float16", 4), ("float32", 1), ("float32", 32)]
)
def test_histogram(launch: Any, dtype: str, copies: int) -> None:
    for n in (1, 31, 33, 1025, 5000):
        check_histogram(launch, n, dtype=dtype, copies=copies, block=64)
    check_histogram(launch, 500, offset=3, dtype=dtype, copies=copies, block=64)


@pytest.mark.parametrize("bins", [1, 100, 3000])
def test_histogram_bins(launch: Any, bins: int) -> None:
    check_histogram(launch, 4000, bins=bins, dtype="int32", count_dtype="uint64")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_bias_activation(launch: Any, activation: str) -> None:
    for shape in ((1, 1), (3, 31), (33, 5), (7, 1025), (2000, 1)):
        check_bias_activation(launch, shape, activation=activation, block=64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bias_activation_half_types(launch: Any, dtype: str) -> None:
    check_bias_activation(launch, (9, 77), dtype=dtype, activation="relu", block=32)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_block_sum(launch: Any, dtype: str) -> None:
    for n, segment in ((1, 5), (31, 31), (1025, 100), (5000, 1024), (100, 2**63 - 1)):
        check_block_sum(launch, n, segment, dtype=dtype, block=64)
