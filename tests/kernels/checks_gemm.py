# SPDX-License-Identifier: Apache-2.0
"""Checks of the matrix products against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import At, evaluate, random_array, tolerance
from strided import pack_rows, unpack_rows

# The error of rounding the result to its type; a float result is as exact as the manifest says.
ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3}

SHAPES = ((1, 1, 1), (31, 33, 17), (33, 65, 8), (64, 64, 64), (129, 131, 70), (5, 200, 1))


def check_product(
    launch: Any,
    kernel: str,
    shape: tuple[int, int, int],
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    pad: int = 0,
    offset: int = 0,
    **params: Any,
) -> None:
    """Check a product; `pad` elements lie between rows, and pointers lie `offset` elements after a 16-byte boundary."""
    spec = launch.spec(kernel)
    bound = spec.bind(params)
    m, n, k = shape
    dtype, out_dtype = bound["dtype"], bound.get("out_dtype", bound["dtype"])
    a, b = random_array((m, k), dtype, seed=1), random_array((k, n), dtype, seed=2)
    c = random_array((m, n), out_dtype, seed=3)
    if beta == 0.0:  # the kernel must not read C
        c = np.full_like(c, np.nan)
    a_rows, b_rows, c_rows = (
        pack_rows(a, k + pad, dtype),
        pack_rows(b, n + pad, dtype),
        pack_rows(c, n + pad, out_dtype),
    )
    for operand in (a_rows, b_rows):
        operand.flags.writeable = False

    scalar = np.float64 if dtype == "float64" else np.float32
    threads = (
        32 * bound["warps_m"] * bound["warps_n"]
        if "warps_m" in bound
        else (bound["tile_m"] // bound["thread_m"] * (bound["tile_n"] // bound["thread_n"]))
    )
    sizes = [np.int32(size) for size in shape] + [np.int64(length + pad) for length in (k, n, n)]
    launch(
        kernel,
        [At(a_rows, offset), At(b_rows, offset), At(c_rows, offset), *sizes, scalar(alpha), scalar(beta)],
        grid=(-(-n // bound["tile_n"]), -(-m // bound["tile_m"])),
        block=threads,
        **params,
    )

    expected = evaluate(spec, a=a, b=b, c=np.zeros_like(c) if beta == 0.0 else c, alpha=alpha, beta=beta)
    result = unpack_rows(c_rows, (m, n), n + pad, out_dtype)
    limits = tolerance(spec)
    extra = ROUNDING.get(out_dtype, 0.0)
    np.testing.assert_allclose(result, expected, rtol=max(limits["rtol"], extra), atol=max(limits["atol"], extra))
