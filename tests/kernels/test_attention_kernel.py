# SPDX-License-Identifier: Apache-2.0
"""The emulated attention kernels; host_include/mma_sync.hpp replaces their PTX, with the layouts of the PTX ISA."""

from __future__ import annotations

from typing import Any

import pytest
from checks_attention import check_attention, check_combine

from cuda_progcache.errors import ParameterError


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (31, 33), (33, 31), (64, 64), (65, 130), (1, 100), (130, 7)])
def test_any_sequence_length(launch: Any, seq_q: int, seq_k: int, causal: bool) -> None:
    check_attention(launch, seq_q, seq_k, causal=causal, block_n=32, warps=2)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"causal": True},
        {"dtype": "bfloat16", "head_dim": 128, "causal": True},
        {"dtype": "bfloat16", "block_n": 32, "warps": 4},
        {"warps": 8, "causal": True},
        {"head_dim": 128, "block_n": 32, "warps": 1},
        # These use dynamic shared memory. With a head_dim of 256, the queries stay in shared memory.
        {"head_dim": 128, "block_n": 128, "warps": 8, "causal": True},
        {"head_dim": 256, "warps": 2, "causal": True},
        {"head_dim": 256, "block_n": 32, "warps": 1, "dtype": "bfloat16", "lse": True},
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


SMALL = {"block_n": 32, "warps": 2}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (65, 130), (70, 7), (40, 0)])
def test_strides_and_log_sum_exp(launch: Any, seq_q: int, seq_k: int, causal: bool) -> None:
    of = {"heads": 2, "kv_heads": 1, "strides": True, "lse": True, "causal": causal}
    check_attention(launch, seq_q, seq_k, batch=2, **of, **SMALL)


def test_log_sum_exp_where_one_key_takes_all(launch: Any) -> None:
    check_attention(launch, 20, 100, spread=30.0, lse=True, **SMALL)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 130), (65, 130), (70, 7), (40, 0)])
def test_split_keys(launch: Any, seq_q: int, seq_k: int, splits: int, causal: bool) -> None:
    check_attention(launch, seq_q, seq_k, heads=2, splits=splits, causal=causal, **SMALL)


@pytest.mark.parametrize(
    "params",
    [
        {"strides": True, "lse": True, "dtype": "bfloat16", "head_dim": 128, "warps": 1},
        {"strides": True, "causal": True, "head_dim": 256, "warps": 1, "block_n": 32},
        {"lse": True, "spread": 30.0},
    ],
    ids=str,
)
def test_split_keys_and_all_else(launch: Any, params: dict[str, Any]) -> None:
    check_attention(launch, 20, 200, batch=2, heads=2, kv_heads=1, splits=3, **params)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -0.0, 1e-30, 2.0])
@pytest.mark.parametrize(
    "params", [{"causal": True, "lse": True}, {"splits": 2, "head_dim": 256, "dtype": "bfloat16"}], ids=str
)
def test_any_scale(launch: Any, scale: float, params: dict[str, Any]) -> None:
    check_attention(launch, 20, 50, scale=scale, **params, **SMALL)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float16", 64), ("bfloat16", 128), ("float32", 256), ("float32", 64), ("float16", 256)]
)
def test_combine(launch: Any, dtype: str, head_dim: int) -> None:
    for splits, rows in ((1, 1), (2, 9), (40, 5)):
        check_combine(launch, splits, rows, dtype=dtype, head_dim=head_dim, block=96)


def test_the_log_sum_exp_of_split_keys_is_for_the_combine_kernel_to_write(launch: Any) -> None:
    with pytest.raises(ParameterError, match="attention_combine writes the log-sum-exp where the keys are split"):
        launch.spec("attention").bind({"lse": True, "split_keys": True})
