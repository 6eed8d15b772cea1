# SPDX-License-Identifier: Apache-2.0
"""softmax, layernorm and rmsnorm on a GPU, against NumPy."""

from __future__ import annotations

from typing import Any

import pytest
from checks_rows import SHAPES, check_norm, check_softmax, check_softmax_extremes

pytestmark = pytest.mark.gpu

ALL_SHAPES = (*SHAPES, (1000, 513), (7, 50257))


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_softmax_any_shape(run_kernel: Any, shape: tuple[int, int]) -> None:
    for variant in run_kernel.spec("softmax").variants:
        check_softmax(run_kernel, shape, **variant)


@pytest.mark.parametrize(("pad", "offset"), [(4, 0), (8, 0), (1, 0), (0, 1), (3, 2)])
def test_softmax_any_stride_and_pointer(run_kernel: Any, pad: int, offset: int) -> None:
    for variant in run_kernel.spec("softmax").variants:
        check_softmax(run_kernel, (9, 72), pad=pad, offset=offset, **variant)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows_by", ["warp", "block"])
@pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])
def test_softmax_extreme_values(run_kernel: Any, dtype: str, rows_by: str, log: bool) -> None:
    check_softmax_extremes(run_kernel, dtype=dtype, rows_by=rows_by, log=log)


@pytest.mark.parametrize("kernel", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_norm_any_shape(run_kernel: Any, kernel: str, shape: tuple[int, int]) -> None:
    for variant in run_kernel.spec(kernel).variants:
        check_norm(run_kernel, kernel, shape, **variant)


@pytest.mark.parametrize("kernel", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("pad", "offset"), [(4, 0), (8, 0), (1, 0), (0, 1), (3, 2)])
def test_norm_any_stride_and_pointer(run_kernel: Any, kernel: str, pad: int, offset: int) -> None:
    for variant in run_kernel.spec(kernel).variants:
        check_norm(run_kernel, kernel, (9, 72), pad=pad, offset=offset, **variant)


def test_layernorm_keeps_the_variance_of_values_far_from_zero(run_kernel: Any) -> None:
    check_norm(run_kernel, "layernorm", (3, 4097), mean=512.0, atol=1e-4, save_statistics=True)
