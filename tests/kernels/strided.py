# SPDX-License-Identifier: Apache-2.0
"""Matrices with a row stride: a buffer that ends with the last row, with a value to recognize between the rows."""

from __future__ import annotations

import numpy as np
from launchers import host_array, values_of

BETWEEN_ROWS = 77.0


def pack_rows(values: np.ndarray, stride: int, dtype: str) -> np.ndarray:
    """The buffer of a `dtype` matrix whose rows start `stride` elements apart."""
    rows, columns = values.shape
    buffer = np.full((rows, stride), BETWEEN_ROWS)
    buffer[:, :columns] = values
    return host_array(buffer.reshape(-1)[: max((rows - 1) * stride + columns, 0)], dtype)


def unpack_rows(buffer: np.ndarray, shape: tuple[int, int], stride: int, dtype: str) -> np.ndarray:
    """The matrix in a buffer from `pack_rows`; what lies between its rows must be as it was."""
    rows, columns = shape
    whole = np.full(rows * stride, BETWEEN_ROWS)
    whole[: len(buffer)] = values_of(buffer, dtype)
    matrix = whole.reshape(rows, stride)
    assert (matrix[:, columns:] == BETWEEN_ROWS).all(), "the kernel wrote between the rows"
    return matrix[:, :columns]
