# SPDX-License-Identifier: Apache-2.0
"""sgemm and hgemm_wmma on a GPU, against NumPy."""

from __future__ import annotations

from typing import Any

import pytest
from checks_gemm import SHAPES, check_product

pytestmark = pytest.mark.gpu

LARGE = ((1025, 257, 513), (384, 640, 1024))


@pytest.mark.parametrize("kernel", ["sgemm", "hgemm_wmma"])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_any_shape(run_kernel: Any, kernel: str, shape: tuple[int, int, int]) -> None:
    for variant in run_kernel.spec(kernel).variants:
        check_product(run_kernel, kernel, shape, alpha=0.5, beta=-2.0, **variant)


@pytest.mark.parametrize("kernel", ["sgemm", "hgemm_wmma"])
@pytest.mark.parametrize(("pad", "offset"), [(0, 0), (8, 0), (4, 0), (3, 0), (0, 1), (5, 2), (3, 8)])
def test_any_stride_and_pointer(run_kernel: Any, kernel: str, pad: int, offset: int) -> None:
    for variant in run_kernel.spec(kernel).variants:
        check_product(run_kernel, kernel, (137, 168, 120), pad=pad, offset=offset, **variant)


@pytest.mark.parametrize("kernel", ["sgemm", "hgemm_wmma"])
def test_nothing_to_sum_scales_c(run_kernel: Any, kernel: str) -> None:
    check_product(run_kernel, kernel, (40, 50, 0), beta=3.0)
