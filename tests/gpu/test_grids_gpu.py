# SPDX-License-Identifier: Apache-2.0
"""transpose and stencil2d on a GPU, against the manifest's references."""

from __future__ import annotations

from typing import Any

import pytest
from checks_grids import check_stencil, check_transpose

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32", "float64", "int32"])
def test_transpose(run_kernel: Any, dtype: str) -> None:
    for rows, cols in ((1, 1), (31, 33), (1025, 70), (333, 1000)):
        check_transpose(run_kernel, rows, cols, grid_yz=(16, 1), dtype=dtype)
    check_transpose(run_kernel, 140, 35, batch=5, pads=(3, 5), offset=1, dtype=dtype)


@pytest.mark.parametrize("boundary", ["zero", "clamp", "periodic"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_stencil(run_kernel: Any, dtype: str, boundary: str) -> None:
    for radius in (1, 4):
        for rows, cols in ((1, 1), (31, 33), (1025, 70), (300, 1001)):
            check_stencil(run_kernel, rows, cols, pads=(3, 1), grid_y=16, dtype=dtype, boundary=boundary, radius=radius)
