# SPDX-License-Identifier: Apache-2.0
"""Checks of the row-wise kernels (softmax, layernorm, rmsnorm) against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import At, evaluate, host_array, random_array, tolerance
from strided import pack_rows, unpack_rows

ROUNDING = {"float16": 2e-3, "bfloat16": 1.2e-2}
EPS = 1e-5

SHAPES = ((1, 1), (3, 31), (2, 33), (5, 256), (3, 1025), (2, 2048))


def limits(spec: Any, dtype: str) -> dict[str, float]:
    """Return the manifest's tolerance, widened to the error of rounding the result to a half type."""
    extra = ROUNDING.get(dtype, 0.0)
    return {name: max(bound, extra) for name, bound in tolerance(spec).items()}


def launch_rows(
    launch: Any, kernel: str, x: np.ndarray, others: list[Any], *, pad: int, offset: int, blocks: int, **params: Any
) -> np.ndarray:
    """Run a row-wise kernel over x and return y; `others` are its arguments between y and the number of rows."""
    bound = launch.spec(kernel).bind(params)
    dtype = bound["dtype"]
    rows, columns = x.shape
    x_rows = pack_rows(x, columns + pad, dtype)
    x_rows.flags.writeable = False
    y_rows = pack_rows(np.zeros_like(x, dtype=np.float32), columns + pad, dtype)
    sizes: list[Any] = [np.int64(rows), np.int32(columns), np.int64(columns + pad), np.int64(columns + pad)]
    if kernel != "softmax":
        sizes.append(np.float32(EPS))
    arguments = [At(x_rows, offset), At(y_rows, offset), *others, *sizes]
    launch(kernel, arguments, grid=blocks, **({"block": bound["block"]} | params))
    return unpack_rows(y_rows, x.shape, columns + pad, dtype)


def check_softmax(
    launch: Any, shape: tuple[int, int], *, scale: float = 8.0, pad: int = 0, offset: int = 0, **params: Any
) -> None:
    """Check softmax; two blocks stride over the rows, however many there are."""
    spec = launch.spec("softmax")
    bound = spec.bind(params)
    x = random_array(shape, bound["dtype"], seed=4, low=-scale, high=scale)
    y = launch_rows(launch, "softmax", x, [], pad=pad, offset=offset, blocks=2, **params)
    np.testing.assert_allclose(y, evaluate(spec, x=x, log=bound["log"]), **limits(spec, bound["dtype"]))


def check_softmax_extremes(launch: Any, **params: Any) -> None:
    """Check softmax on rows that hold -inf, +inf, NaN, only -inf, or values whose exponentials overflow."""
    spec = launch.spec("softmax")
    bound = spec.bind(params)
    x = random_array((6, 301), bound["dtype"], seed=5).astype(np.float32)
    x[0, :200] = -np.inf
    x[1, 7:] = -np.inf
    x[2, 100] = np.inf
    x[3, 300] = np.nan
    x[4, :] = -np.inf
    x[5] = np.where(x[5] > 0, 60000.0, -60000.0)
    if bound["dtype"] == "bfloat16":
        x[5] = np.where(x[5] > 0, 65536.0, -65536.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = evaluate(spec, x=x, log=bound["log"])
    y = launch_rows(launch, "softmax", x, [], pad=0, offset=0, blocks=6, **params)
    assert np.isnan(y[2:5]).all()
    if bound["dtype"] == "float16":  # log-softmax can exceed the range of a half
        with np.errstate(over="ignore"):
            expected = expected.astype(np.float16)
    np.testing.assert_allclose(y, expected, **limits(spec, bound["dtype"]))


def check_norm(
    launch: Any,
    kernel: str,
    shape: tuple[int, int],
    *,
    mean: float = 0.0,
    atol: float = 0.0,
    pad: int = 0,
    offset: int = 0,
    **params: Any,
) -> None:
    """Check a normalization; two blocks stride over the rows.

    The values are centred on `mean`; `atol` allows for the larger rounding errors far from zero.
    """
    spec = launch.spec(kernel)
    bound = spec.bind(params)
    dtype = bound["dtype"]
    x = random_array(shape, dtype, seed=6, low=mean - 2.0, high=mean + 2.0)
    gamma, beta = random_array(shape[1], dtype, seed=7), random_array(shape[1], dtype, seed=8)
    inputs: dict[str, Any] = {"x": x, "gamma": gamma, "eps": EPS}
    others: list[Any] = [At(host_array(gamma, dtype), offset)]
    statistics = [np.full(shape[0], 77.0, np.float32) for _ in range(2)] if bound.get("save_statistics") else []
    if kernel == "layernorm":
        inputs |= {"beta": beta, "bias": bound["bias"]}
        if bound["bias"]:
            others.append(At(host_array(beta, dtype), offset))
        others += statistics
    y = launch_rows(launch, kernel, x, others, pad=pad, offset=offset, blocks=2, **params)
    allowed = limits(spec, dtype)
    np.testing.assert_allclose(y, evaluate(spec, **inputs), rtol=allowed["rtol"], atol=max(allowed["atol"], atol))
    if statistics:
        wide = x.astype(np.float64)
        np.testing.assert_allclose(statistics[0], wide.mean(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics[1], 1.0 / np.sqrt(wide.var(axis=1) + EPS), rtol=1e-4)
