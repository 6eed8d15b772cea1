# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernels over one-dimensional arrays against NumPy, for emulated launches and for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from launchers import At, evaluate, host_array, random_array, tolerance, values_of

SIZES = (0, 1, 31, 33, 1025, 5000)
HALVES = {"float16": 1e-3, "bfloat16": 8e-3}


def limits(spec: Any, dtype: str) -> dict[str, float]:
    """Return the manifest's tolerance, widened to the error of rounding the result to a half type."""
    extra = HALVES.get(dtype, 0.0)
    return {name: max(bound, extra) for name, bound in tolerance(spec).items()}


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def check_axpby(
    launch: Any,
    n: int,
    *,
    a: float = 1.5,
    b: float = -0.75,
    offsets: tuple[int, int] = (0, 0),
    blocks: int = 3,
    **params: Any,
) -> None:
    """Check axpby; x and y start `offsets` elements after a 16-byte boundary."""
    spec = launch.spec("axpby")
    bound = spec.bind(params)
    dtype = bound["dtype"]
    scalar = {"float64": np.float64, "int32": np.int32}.get(dtype, np.float32)
    a, b = scalar(a), scalar(b)
    x, y = random_array(n, dtype, seed=1), random_array(n, dtype, seed=2)
    result = host_array(y, dtype)
    arguments = [a, At(read_only(host_array(x, dtype)), offsets[0]), b, At(result, offsets[1]), np.int64(n)]
    launch("axpby", arguments, grid=blocks, **({"block": bound["block"]} | params))
    np.testing.assert_allclose(values_of(result, dtype), evaluate(spec, a=a, b=b, x=x, y=y), **limits(spec, dtype))


def check_axpby_ignores_y(launch: Any, dtype: str) -> None:
    """Check that axpby doesn't read y if b = 0; the test fills y with NaN, and NaN times zero would be NaN."""
    x = random_array(101, dtype, seed=1)
    y = host_array(np.full(101, np.nan), dtype)
    scalar = np.float64 if dtype == "float64" else np.float32
    launch("axpby", [scalar(2.0), host_array(x, dtype), scalar(0.0), y, np.int64(101)], grid=1, block=64, dtype=dtype)
    np.testing.assert_allclose(values_of(y, dtype), 2.0 * x, **limits(launch.spec("axpby"), dtype))


def result_dtype(dtype: str, op: str) -> str:
    """Return the result type of a reduction over `dtype`, as the kernel's header states it."""
    return {"float16": "float32", "bfloat16": "float32", "int32": "int64" if op == "sum" else "int32"}.get(dtype, dtype)


def check_reduce_rows(
    launch: Any,
    shape: tuple[int, int],
    *,
    pad: int = 0,
    offset: int = 0,
    blocks: int = 2,
    nan_at: int | None = None,
    **params: Any,
) -> None:
    spec = launch.spec("reduce")
    bound = spec.bind(params)
    dtype, op = bound["dtype"], bound["op"]
    rows, cols = shape
    x = random_array((rows, cols + pad), dtype, seed=3)
    if nan_at is not None:
        x[0, nan_at] = np.nan
    y = np.zeros(rows, result_dtype(dtype, op))
    sizes = [np.int64(rows), np.int64(cols), np.int64(cols + pad)]
    arguments = [At(read_only(host_array(x, dtype)), offset), y, *sizes]
    launch("reduce", arguments, grid=blocks, entry=0, **({"block": bound["block"]} | params))
    np.testing.assert_allclose(y, evaluate(spec, x=x[:, :cols], op=op), **tolerance(spec))


def check_reduce_all(launch: Any, n: int, *, blocks: int, offset: int = 0, **params: Any) -> None:
    """Check a reduction to one value, run twice with the same scratch memory: each run must reset the counter."""
    spec = launch.spec("reduce")
    bound = spec.bind(params)
    dtype, op = bound["dtype"], bound["op"]
    x = random_array(n, dtype, seed=4)
    partials, arrived = np.zeros(blocks, result_dtype(dtype, op)), np.zeros(1, np.uint32)
    found = []
    for _ in range(2):
        y = np.zeros(1, result_dtype(dtype, op))
        arguments = [At(read_only(host_array(x, dtype)), offset), y, partials, arrived, np.int64(n)]
        launch("reduce", arguments, grid=blocks, entry=1, **({"block": bound["block"]} | params))
        assert arrived[0] == 0, "the counter isn't as it was found"
        found.append(y)
    assert found[0].tobytes() == found[1].tobytes()
    np.testing.assert_allclose(found[0][0], evaluate(spec, x=x, op=op), **tolerance(spec))


def check_scan(launch: Any, n: int, *, offset: int = 0, **params: Any) -> None:
    spec = launch.spec("scan")
    bound = spec.bind(params)
    dtype, block = bound["dtype"], bound["block"]
    tile = block * bound["items"]
    tiles = -(-n // tile)
    x = random_array(n, dtype, seed=5)
    y, totals, size = np.zeros(n, dtype), np.zeros(tiles, dtype), np.int64(n)
    scanned = At(y, offset)
    of = {"block": block, **params}
    launch(
        "scan",
        [At(read_only(x), offset), scanned, totals if tiles > 1 else None, size],
        grid=tiles,
        entry="scan_tiles",
        **of,
    )
    if tiles > 1:
        launch("scan", [totals, np.int64(tiles)], grid=1, entry="scan_totals", **of)
        launch("scan", [scanned, read_only(totals), size], grid=tiles, entry="scan_add", **of)
    # The values have mixed signs: rounding errors scale with the values, not with the sums left after cancellation.
    expected = evaluate(spec, x=x, kind=bound["kind"])
    allowed = tolerance(spec, atol=1e-4) if dtype == "float32" else tolerance(spec)
    np.testing.assert_allclose(y, expected.astype(dtype), **allowed)


def check_scan_lookback(launch: Any, n: int, *, blocks: int, offset: int = 0, **params: Any) -> None:
    """Check the one-pass scan, run twice with the same state: each run must reset the state."""
    spec = launch.spec("scan_lookback")
    bound = spec.bind(params)
    dtype, block = bound["dtype"], bound["block"]
    x = random_array(n, dtype, seed=5)
    tiles = -(-n // (block * bound["items"]))
    state = np.zeros(1 + tiles * x.itemsize // 4, np.uint64)
    expected = evaluate(spec, x=x, kind=bound["kind"])
    allowed = tolerance(spec, atol=1e-4) if dtype == "float32" else tolerance(spec)
    for _ in range(2):
        y = np.zeros(n, dtype)
        arguments = [At(read_only(x), offset), At(y, offset), state, np.int64(n)]
        launch("scan_lookback", arguments, grid=blocks, **{"block": block, **params})
        assert not state.any(), "the state isn't as it was found"
        np.testing.assert_allclose(y, expected.astype(dtype), **allowed)


def check_histogram(launch: Any, n: int, *, offset: int = 0, blocks: int = 2, **params: Any) -> None:
    """Check a histogram of samples below, in and above the bins.

    Floating samples include NaN. The counts aren't zero at the start.
    """
    spec = launch.spec("histogram")
    bound = spec.bind(params)
    dtype, bins = bound["dtype"], bound["bins"]
    generator = np.random.default_rng(6)
    if dtype.startswith("float"):
        samples = generator.uniform(-1.25, 1.25, n).astype(dtype)
        samples[::17] = np.nan
        samples[5::17] = np.inf
        lower, scale = np.float32(-1.0), np.float32(bins / 2.0)
        place = [lower, scale]
    else:
        info = np.iinfo(dtype)
        samples = generator.integers(0, min(bins + 20, info.max + 1), n).astype(dtype)
        samples[::19], samples[3::19] = info.min, info.max
        lower, scale = np.int64(7), None
        place = [lower]
    counts = generator.integers(0, 5, bins).astype(bound["count_dtype"])
    with np.errstate(invalid="ignore"):
        expected = evaluate(spec, samples=samples, counts=counts.copy(), lower=lower, scale=scale, **bound)
    arguments = [At(read_only(samples), offset), counts, np.int64(n), *place]
    launch("histogram", arguments, grid=blocks, **({"block": bound["block"]} | params))
    np.testing.assert_array_equal(counts, expected)


def check_block_sum(launch: Any, n: int, segment: int, *, blocks: int = 2, **params: Any) -> None:
    spec = launch.spec("block_sum_cub")
    bound = spec.bind(params)
    x = random_array(n, bound["dtype"], seed=7)
    y = np.zeros(-(-n // segment), bound["dtype"])
    arguments = [read_only(x), y, np.int64(n), np.int64(segment)]
    launch("block_sum_cub", arguments, grid=blocks, **({"block": bound["block"]} | params))
    np.testing.assert_allclose(y, evaluate(spec, x=x, segment=segment), **tolerance(spec))


def check_bias_activation(launch: Any, shape: tuple[int, int], *, blocks: int = 3, **params: Any) -> None:
    spec = launch.spec("lto_pair")
    bound = spec.bind(params)
    dtype = bound["dtype"]
    x, bias = random_array(shape, dtype, seed=8, low=-4, high=4), random_array(shape[1], dtype, seed=9)
    y = host_array(np.zeros(shape), dtype)
    arguments = [
        read_only(host_array(x, dtype)),
        read_only(host_array(bias, dtype)),
        y,
        np.int64(shape[0]),
        np.int32(shape[1]),
    ]
    launch("lto_pair", arguments, grid=blocks, **({"block": bound["block"]} | params))
    expected = evaluate(spec, x=x, bias=bias, activation=bound["activation"])
    np.testing.assert_allclose(values_of(y, dtype), expected, **limits(spec, dtype))


def check_saxpy(launch: Any, n: int, *, blocks: int = 3, **params: Any) -> None:
    spec = launch.spec("saxpy_nvvm")
    bound = spec.bind(params)
    a = np.dtype(bound["dtype"]).type(1.3)
    x, y = random_array(n, bound["dtype"], seed=10), random_array(n, bound["dtype"], seed=11)
    expected = evaluate(spec, a=a, x=x, y=y)
    launch("saxpy_nvvm", [a, read_only(x), y, np.int64(n)], grid=blocks, **({"block": bound["block"]} | params))
    np.testing.assert_allclose(y, expected, **tolerance(spec))
