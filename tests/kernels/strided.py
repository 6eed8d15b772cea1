# SPDX-License-Identifier: Apache-2.0
"""Matrices with a row stride: their buffer ends with the last row, and a marker value fills the gaps between rows."""

from __future__ import annotations

import numpy as np
from launchers import host_array, values_of

BETWEEN_ROWS = 77.0


def pack_rows(values: np.ndarray, stride: int, dtype: str) -> np.ndarray:
    """Return the buffer of a `dtype` matrix whose rows start `stride` elements apart."""
    rows, columns = values.shape
    buffer = np.full((rows, stride), BETWEEN_ROWS)
    buffer[:, :columns] = values
    return host_array(buffer.reshape(-1)[: max((rows - 1) * stride + columns, 0)], dtype)


def unpack_rows(buffer: np.ndarray, shape: tuple[int, int], stride: int, dtype: str) -> np.ndarray:
    """Return the matrix in a buffer from `pack_rows`, and check that the gaps between its rows are unchanged."""
    rows, columns = shape
    whole = np.full(rows * stride, BETWEEN_ROWS)
    whole[: len(buffer)] = values_of(buffer, dtype)
    matrix = whole.reshape(rows, stride)
    assert (matrix[:, columns:] == BETWEEN_ROWS).all(), "the kernel wrote between the rows"
    return matrix[:, :columns]
