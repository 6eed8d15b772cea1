# SPDX-License-Identifier: Apache-2.0
"""Fused attention on a GPU, against NumPy."""

from __future__ import annotations

from typing import Any

import pytest
from checks_attention import check_attention, check_combine

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
    "params",
    [
        {"warps": 8},
        {"warps": 1},
        {"warps": 2, "block_n": 32},
        {"warps": 4, "block_n": 32, "head_dim": 128},
        {"warps": 8, "block_n": 128, "head_dim": 128},
        {"warps": 4, "head_dim": 256},
        {"warps": 8, "block_n": 32, "head_dim": 256},
    ],
    ids=str,
)
def test_tiles(run_kernel: Any, params: dict[str, Any]) -> None:
    check_attention(run_kernel, 200, 300, heads=3, kv_heads=1, causal=True, **params)


def test_weights_that_one_key_takes(run_kernel: Any) -> None:
    check_attention(run_kernel, 100, 500, spread=30.0)


def test_no_keys_give_zeros(run_kernel: Any) -> None:
    check_attention(run_kernel, 40, 0)


SEQUENCES = [(1, 1), (31, 33), (65, 130), (1, 4000), (130, 7), (40, 0), (513, 1025)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("seq_q", "seq_k"), SEQUENCES)
def test_strides_and_log_sum_exp(run_kernel: Any, seq_q: int, seq_k: int, head_dim: int, causal: bool) -> None:
    of = {"head_dim": head_dim, "causal": causal, "strides": True, "lse": True}
    check_attention(run_kernel, seq_q, seq_k, batch=2, heads=4, kv_heads=2, **of)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("splits", [1, 3, 40])
@pytest.mark.parametrize(("seq_q", "seq_k"), SEQUENCES)
def test_split_keys(run_kernel: Any, seq_q: int, seq_k: int, splits: int, causal: bool) -> None:
    for params in ({"warps": 1, "head_dim": 128, "strides": True, "lse": True}, {"dtype": "bfloat16", "head_dim": 256}):
        check_attention(run_kernel, seq_q, seq_k, batch=2, heads=4, splits=splits, causal=causal, **params)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -0.0, 1e-30, 2.0])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_any_scale(run_kernel: Any, scale: float, head_dim: int) -> None:
    check_attention(run_kernel, 100, 300, scale=scale, causal=True, head_dim=head_dim, lse=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_combine(run_kernel: Any, dtype: str, head_dim: int) -> None:
    for splits, rows in ((1, 1), (2, 9), (100, 1000)):
        check_combine(run_kernel, splits, rows, blocks=50, dtype=dtype, head_dim=head_dim)
