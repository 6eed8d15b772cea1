# SPDX-License-Identifier: Apache-2.0
"""attention, emulated: host_include/mma_sync.hpp stands in for its PTX, with the layouts that the PTX ISA gives."""

from __future__ import annotations

from typing import Any

import pytest
from checks_attention import check_attention


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (31, 33), (33, 31), (64, 64), (65, 130), (1, 100), (130, 7)])
def test_any_sequence_length(launch: Any, seq_q: int, seq_k: int, causal: bool) -> None:
    check_attention(launch, seq_q, seq_k, causal=causal, block_n=32, warps=2)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"causal": True},
        {"head_dim": 128, "causal": True},
        {"dtype": "bfloat16", "head_dim": 128},
        {"dtype": "bfloat16", "block_n": 32, "warps": 4},
        {"warps": 8, "causal": True},
        {"head_dim": 128, "block_n": 32, "warps": 2},
    ],
    ids=str,
)
def test_parameters(launch: Any, params: dict[str, Any]) -> None:
    check_attention(launch, 70, 150, **params)


def test_heads_and_batches(launch: Any) -> None:
    check_attention(launch, 20, 40, batch=2, heads=6, kv_heads=3, causal=True, block_n=32, warps=2)


def test_weights_that_one_key_takes(launch: Any) -> None:
    check_attention(launch, 40, 200, spread=30.0, block_n=32, warps=2)


def test_no_keys_give_zeros(launch: Any) -> None:
    check_attention(launch, 40, 0, block_n=32, warps=2)
