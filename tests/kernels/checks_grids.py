# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels over matrices (transpose, stencil2d) against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import At, evaluate, random_array, tolerance
from strided import pack_rows, unpack_rows


def check_transpose(
    launch: Any,
    rows: int,
    cols: int,
    *,
    batch: int = 1,
    pads: tuple[int, int] = (0, 0),
    offset: int = 0,
    grid_yz: tuple[int, int] = (2, 2),
    **params: Any,
) -> None:
    """Check that the transpose is exact; `pads` elements lie between the rows of x and of y.

    If `grid_yz` is smaller than the numbers of tile rows and of matrices, blocks stride over them.
    """
    spec = launch.spec("transpose")
    bound = spec.bind(params)
    dtype, tile = bound["dtype"], bound["tile"]
    x = random_array((batch, rows, cols), dtype, seed=12)
    x_rows = pack_rows(x.reshape(batch * rows, cols), cols + pads[0], dtype)
    x_rows.flags.writeable = False
    y_rows = pack_rows(np.zeros((batch * cols, rows)), rows + pads[1], dtype)
    strides = [np.int64(cols + pads[0]), np.int64(rows + pads[1])]
    batches = [np.int64(rows * strides[0]), np.int64(cols * strides[1])]
    launch(
        "transpose",
        [At(x_rows, offset), At(y_rows, offset), np.int32(rows), np.int32(cols), np.int32(batch), *strides, *batches],
        grid=(-(-cols // tile), *grid_yz),
        block=(tile, bound["block_rows"]),
        **params,
    )
    y = unpack_rows(y_rows, (batch * cols, rows), rows + pads[1], dtype).reshape(batch, cols, rows)
    np.testing.assert_array_equal(y, evaluate(spec, x=x))


def check_stencil(
    launch: Any, rows: int, cols: int, *, pads: tuple[int, int] = (0, 0), grid_y: int = 2, **params: Any
) -> None:
    spec = launch.spec("stencil2d")
    bound = spec.bind(params)
    dtype, radius = bound["dtype"], bound["radius"]
    x = random_array((rows, cols), dtype, seed=13)
    weights = random_array(radius + 1, "float64" if dtype == "float64" else "float32", seed=14)
    x_rows = pack_rows(x, cols + pads[0], dtype)
    x_rows.flags.writeable = False
    y_rows = pack_rows(np.zeros((rows, cols)), cols + pads[1], dtype)
    launch(
        "stencil2d",
        [x_rows, y_rows, weights, np.int32(rows), np.int32(cols), np.int64(cols + pads[0]), np.int64(cols + pads[1])],
        grid=(-(-cols // bound["tile_x"]), grid_y),
        block=(bound["tile_x"], bound["tile_y"]),
        **params,
    )
    y = unpack_rows(y_rows, (rows, cols), cols + pads[1], dtype)
    expected = evaluate(spec, x=x, weights=weights, boundary=bound["boundary"])
    allowed = tolerance(spec, rtol=2e-3, atol=2e-3) if dtype == "float16" else tolerance(spec)
    np.testing.assert_allclose(y, expected, **allowed)
