# SPDX-License-Identifier: Apache-2.0
"""Fused attention on a GPU, against NumPy."""

from __future__ import annotations

from typing import Any

import pytest
from checks_attention import check_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (31, 33), (33, 31), (65, 130), (1, 1025), (130, 7), (513, 1025)])
def test_any_sequence_length(run_kernel: Any, seq_q: int, seq_k: int, dtype: str, head_dim: int, causal: bool) -> None:
    check_attention(
        run_kernel, seq_q, seq_k, batch=2, heads=4, kv_heads=2, dtype=dtype, head_dim=head_dim, causal=causal
    )


@pytest.mark.parametrize(
    "params", [{"warps": 8}, {"warps": 2, "block_n": 32}, {"warps": 4, "block_n": 32, "head_dim": 128}], ids=str
)
def test_tiles(run_kernel: Any, params: dict[str, Any]) -> None:
    check_attention(run_kernel, 200, 300, heads=3, kv_heads=1, causal=True, **params)


def test_weights_that_one_key_takes(run_kernel: Any) -> None:
    check_attention(run_kernel, 100, 500, spread=30.0)


def test_no_keys_give_zeros(run_kernel: Any) -> None:
    check_attention(run_kernel, 40, 0)
