# SPDX-License-Identifier: Apache-2.0
"""Checks of the fused attention kernels against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import evaluate, host_array, random_array, tolerance, values_of

ROUNDING = {"float16": 2e-3, "bfloat16": 1.6e-2}
BETWEEN = 77.0


def lay_out(values: np.ndarray, dtype: str, *, strided: bool) -> tuple[np.ndarray, list[Any]]:
    """Return a buffer that holds [batch, heads, seq, head_dim] values, and its strides.

    The strided layout is [batch, seq, heads, head_dim + 8]; a marker value fills the gap after each row.
    """
    if not strided:
        return host_array(values, dtype), []
    batch, heads, rows, head_dim = values.shape
    buffer = np.full((batch, rows, heads, head_dim + 8), BETWEEN)
    buffer[..., :head_dim] = values.transpose(0, 2, 1, 3)
    row = heads * (head_dim + 8)
    return host_array(buffer, dtype), [np.int64(rows * row), np.int64(head_dim + 8), np.int64(row)]


def take_out(buffer: np.ndarray, shape: tuple[int, ...], dtype: str, *, strided: bool) -> np.ndarray:
    """Return the values in a buffer from `lay_out`, and check that the gaps after the rows are unchanged."""
    values = values_of(buffer, dtype)
    if not strided:
        return values.reshape(shape)
    assert (values[..., shape[3] :] == BETWEEN).all(), "the kernel wrote between the rows"
    return values[..., : shape[3]].transpose(0, 2, 1, 3)


def log_sum_exp(q: np.ndarray, k: np.ndarray, scale: float, *, causal: bool) -> np.ndarray:
    """Return the log-sum-exp, in float64, of the scaled scores that each query sees; -inf if it sees none."""
    keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1).astype(np.float64)
    scores = float(scale) * (q.astype(np.float64) @ keys.swapaxes(2, 3))
    query, key = np.indices(scores.shape[2:])
    scores[..., (key > query + k.shape[2] - q.shape[2]) & causal] = -np.inf
    top = np.max(scores, axis=3, keepdims=True, initial=-1e300)
    with np.errstate(divide="ignore"):
        return (top + np.log(np.exp(scores - top).sum(axis=3, keepdims=True)))[..., 0]


def check_attention(
    launch: Any,
    seq_q: int,
    seq_k: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    spread: float = 2.0,
    scale: float | None = None,
    splits: int = 0,
    **params: Any,
) -> None:
    """Check any variant of attention: strided or not, with or without its log-sum-exp, with or without split keys.

    If `splits` isn't zero, the keys are divided into that many shares, and the partial results are combined. Queries
    and keys lie in [-`spread`, `spread`); with a large spread, one key takes nearly all the weight.
    """
    spec = launch.spec("attention")
    saves = params.get("lse", False)
    if splits:
        params = {**params, "split_keys": True, "lse": False}
    bound = spec.bind(params)
    dtype, head_dim, strided = bound["dtype"], bound["head_dim"], bound["strides"]
    q = random_array((batch, heads, seq_q, head_dim), dtype, seed=1, low=-spread, high=spread)
    k = random_array((batch, kv_heads, seq_k, head_dim), dtype, seed=2, low=-spread, high=spread)
    v = random_array((batch, kv_heads, seq_k, head_dim), dtype, seed=3)
    laid_out = [lay_out(t, dtype, strided=strided) for t in (q, k, v)]
    for tensor, _ in laid_out:
        tensor.flags.writeable = False
    inputs = [tensor for tensor, _ in laid_out]
    strides = [stride for _, of_one in laid_out for stride in of_one]
    out, out_strides = lay_out(np.full(q.shape, BETWEEN), dtype, strided=strided)
    lse = np.full(q.shape[:3], BETWEEN, np.float32)
    scale = np.float32(head_dim**-0.5 if scale is None else scale)
    sizes = [np.int32(seq_q), np.int32(seq_k), np.int32(heads), np.int32(kv_heads), scale]
    blocks = -(-seq_q // (16 * bound["warps"]))
    block = 32 * bound["warps"]
    if splits:
        parts, part_lse = np.full((splits, *q.shape), np.nan, np.float32), np.full((splits, *q.shape[:3]), np.nan, "f4")
        arguments = [*inputs, parts, part_lse, *sizes, *strides, np.int32(splits)]
        launch("attention", arguments, grid=(blocks * splits, heads, batch), block=block, **params)
        results = [out, lse] if saves else [out]
        places = [np.int32(heads), np.int32(seq_q), *out_strides] if strided else []
        launch(
            "attention_combine",
            [parts, part_lse, *results, np.int64(batch * heads * seq_q), np.int32(splits), *places],
            grid=3,
            block=64,
            dtype=dtype,
            head_dim=head_dim,
            strides=strided,
            lse=saves,
        )
    else:
        arguments = [*inputs, out, *([lse] if saves else []), *sizes, *strides, *out_strides]
        launch("attention", arguments, grid=(blocks, heads, batch), block=block, **params)

    expected = evaluate(spec, q=q, k=k, v=v, scale=scale, causal=bound["causal"])
    limits = {name: max(bound, ROUNDING[dtype]) for name, bound in tolerance(spec).items()}
    np.testing.assert_allclose(take_out(out, q.shape, dtype, strided=strided), expected, **limits)
    if saves:
        np.testing.assert_allclose(lse, log_sum_exp(q, k, scale, causal=bound["causal"]), rtol=1e-5, atol=1e-4)


def check_combine(launch: Any, splits: int, rows: int, *, blocks: int = 2, **params: Any) -> None:
    """Check the combination of parts with random weights; some shares have no keys, and for row 0 no share has any."""
    spec = launch.spec("attention_combine")
    bound = spec.bind(params)
    dtype, head_dim = bound["dtype"], bound["head_dim"]
    parts = random_array((splits, rows, head_dim), "float32", seed=4)
    part_lse = random_array((splits, rows), "float32", seed=5, low=-300.0, high=300.0)
    part_lse[::3, ::2], part_lse[:, 0] = -np.inf, -np.inf
    parts[np.isneginf(part_lse)] = 0.0
    out = host_array(np.full((rows, head_dim), BETWEEN), dtype)
    parts.flags.writeable = part_lse.flags.writeable = False
    arguments = [parts, part_lse, out, np.int64(rows), np.int32(splits)]
    launch("attention_combine", arguments, grid=blocks, **{"block": bound["block"], **params})
    limits = {name: max(bound, ROUNDING.get(dtype, 0.0)) for name, bound in tolerance(spec).items()}
    np.testing.assert_allclose(values_of(out, dtype), evaluate(spec, parts=parts, part_lse=part_lse), **limits)
