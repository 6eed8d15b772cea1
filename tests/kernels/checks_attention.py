# SPDX-License-Identifier: Apache-2.0
"""Check of the fused attention against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import evaluate, host_array, random_array, tolerance, values_of

ROUNDING = {"float16": 2e-3, "bfloat16": 1.6e-2}


def check_attention(
    launch: Any,
    seq_q: int,
    seq_k: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    spread: float = 2.0,
    **params: Any,
) -> None:
    """`spread`: how far queries and keys reach from zero; large values make one key take nearly all weight."""
    spec = launch.spec("attention")
    bound = spec.bind(params)
    dtype, head_dim = bound["dtype"], bound["head_dim"]
    q = random_array((batch, heads, seq_q, head_dim), dtype, seed=1, low=-spread, high=spread)
    k = random_array((batch, kv_heads, seq_k, head_dim), dtype, seed=2, low=-spread, high=spread)
    v = random_array((batch, kv_heads, seq_k, head_dim), dtype, seed=3)
    inputs = [host_array(t, dtype) for t in (q, k, v)]
    for tensor in inputs:
        tensor.flags.writeable = False
    out = host_array(np.full(q.shape, 77.0), dtype)
    scale = np.float32(head_dim**-0.5)
    launch(
        "attention",
        [*inputs, out, np.int32(seq_q), np.int32(seq_k), np.int32(heads), np.int32(kv_heads), scale],
        grid=(-(-seq_q // (16 * bound["warps"])), heads, batch),
        block=32 * bound["warps"],
        **params,
    )
    expected = evaluate(spec, q=q, k=k, v=v, scale=scale, causal=bound["causal"])
    limit = max(tolerance(spec)["atol"], ROUNDING[dtype])
    np.testing.assert_allclose(
        values_of(out, dtype), expected, rtol=max(tolerance(spec)["rtol"], ROUNDING[dtype]), atol=limit
    )
