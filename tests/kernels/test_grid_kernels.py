# SPDX-License-Identifier: Apache-2.0
"""The emulated transpose and stencil2d kernels: shapes that aren't multiples of the tile, strides, types, edges."""

from __future__ import annotations

from typing import Any

import pytest
from checks_grids import check_stencil, check_transpose

SHAPES = ((1, 1), (1, 100), (33, 31), (64, 64), (70, 129))


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32", "float64", "int32"])
def test_transpose(launch: Any, dtype: str) -> None:
    for rows, cols in SHAPES:
        check_transpose(launch, rows, cols, dtype=dtype)
    check_transpose(launch, 40, 35, batch=3, pads=(3, 5), offset=1, dtype=dtype)


@pytest.mark.parametrize(("tile", "block_rows"), [(16, 4), (16, 16), (32, 32), (64, 16)])
def test_transpose_tiles(launch: Any, tile: int, block_rows: int) -> None:
    check_transpose(launch, 70, 129, tile=tile, block_rows=block_rows)
    check_transpose(launch, 200, 17, batch=2, grid_yz=(1, 1), tile=tile, block_rows=block_rows)


@pytest.mark.parametrize("boundary", ["zero", "clamp", "periodic"])
@pytest.mark.parametrize("radius", [1, 3, 8])
def test_stencil(launch: Any, boundary: str, radius: int) -> None:
    for rows, cols in ((1, 1), (3, 5), (33, 31), (40, 70)):
        check_stencil(launch, rows, cols, boundary=boundary, radius=radius)


@pytest.mark.parametrize("boundary", ["zero", "clamp", "periodic"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_stencil_types_and_strides(launch: Any, dtype: str, boundary: str) -> None:
    check_stencil(launch, 19, 45, pads=(3, 1), dtype=dtype, boundary=boundary, radius=2)


@pytest.mark.parametrize(("tile_x", "tile_y"), [(16, 2), (64, 16), (128, 8)])
def test_stencil_tiles(launch: Any, tile_x: int, tile_y: int) -> None:
    check_stencil(launch, 37, 131, grid_y=1, tile_x=tile_x, tile_y=tile_y, radius=2)
