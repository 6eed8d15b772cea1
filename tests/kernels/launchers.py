# SPDX-License-Identifier: Apache-2.0
"""The launch interface of the kernel checks: a check is written once, and runs both emulated and on a GPU.

``launch(kernel, args, grid=, block=, entry=, **params)`` renders a library kernel, runs it with the dynamic shared
memory that the manifest specifies, and leaves its results in the writable arrays among `args`. If the kernel has a
parameter `block`, the launch's block size is passed for it. Scalars are NumPy scalars of the parameter's exact type (a
Python int is 64 bits wide).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import emulate
import numpy as np
from emulate import At, EmulationError

__all__ = [
    "At",
    "HostLauncher",
    "Launcher",
    "evaluate",
    "from_bfloat16",
    "host_array",
    "random_array",
    "to_bfloat16",
    "widen",
]


class Launcher(Protocol):
    """The launch function that a kernel's check takes."""

    def __call__(
        self,
        kernel: str,
        args: Sequence[Any],
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        entry: int | str = 0,
        **params: Any,
    ) -> None: ...

    def spec(self, kernel: str) -> Any: ...


class HostLauncher:
    """A launcher of library kernels on the host: it runs each kernel once for each of `orders`.

    By default, threads and blocks run in ascending and then in descending order. If a barrier is missing, the result
    depends on the order, so all runs must give the same bits. `resident` blocks run side by side.
    """

    def __init__(
        self, library: Any, orders: Sequence[str | int] = ("ascending", "descending"), resident: int = 1
    ) -> None:
        self.library = library
        self.orders = tuple(orders)
        self.resident = resident

    def spec(self, kernel: str) -> Any:
        return self.library[kernel]

    def __call__(
        self,
        kernel: str,
        args: Sequence[Any],
        *,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        entry: int | str = 0,
        **params: Any,
    ) -> None:
        if "block" in self.spec(kernel).parameters:
            params["block"] = block
        rendered = self.library.render(kernel, **params)
        names = tuple(rendered.name_expressions) or tuple(rendered.entry_points)
        source = "\n".join(module.source for module in rendered.modules)  # LTO modules form one program
        name = names[entry] if isinstance(entry, int) else entry
        bounds = self.spec(kernel).launches(params)[names.index(name)]
        threads = math.prod(block) if isinstance(block, Sequence) else block
        if threads > bounds.threads:
            raise EmulationError(f"{name}: a block of {threads} threads, of {bounds.threads} at most")

        arrays = [getattr(a, "array", a) for a in args if isinstance(a, np.ndarray | At)]
        written = [a for a in arrays if a.flags.writeable]
        before = [a.copy() for a in written]
        results: list[bytes] = []
        for order in self.orders:
            for array, start in zip(written, before, strict=True):
                array[...] = start
            emulate.run(
                source,
                name,
                args,
                grid,
                block,
                bounds.shared_bytes,
                entries=names,
                order=order,
                resident=self.resident,
            )
            results.append(b"".join(a.tobytes() for a in written))
        if len(set(results)) > 1:
            raise EmulationError(f"{name}: the result depends on the order in which threads run: a barrier is missing")


def evaluate(spec: Any, **inputs: Any) -> Any:
    """Evaluate the kernel's reference from the manifest, an expression or statements that set ``out``, over `inputs`.

    Floating inputs narrower than float64 are widened first, so that the reference is more exact than the kernel.
    """
    names: dict[str, Any] = {"np": np} | {name: widen(value) for name, value in inputs.items()}
    text = spec.reference.strip()
    try:
        expression = compile(text, "reference", "eval")
    except SyntaxError:
        exec(compile(text, "reference", "exec"), names)
        return names["out"]
    return eval(expression, names)


def widen(value: Any) -> Any:
    """Convert float16 and float32 to float64; return anything else unchanged."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f":
        return value.astype(np.float64)
    return value


def to_bfloat16(values: Any) -> np.ndarray:
    """Round to bfloat16 (nearest even); NumPy lacks the type, so the result holds the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits as float32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def host_array(values: Any, dtype: str) -> np.ndarray:
    """Return the values as a new array that a kernel over `dtype` takes: for bfloat16, the bits as uint16."""
    return to_bfloat16(values) if dtype == "bfloat16" else np.array(values, dtype=dtype, order="C")


def values_of(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers in an array made by `host_array`."""
    return from_bfloat16(array) if dtype == "bfloat16" else array


def random_array(
    shape: int | tuple[int, ...], dtype: str, *, seed: int = 0, low: float = -1.0, high: float = 1.0
) -> np.ndarray:
    """Return seeded uniform values that `dtype` holds exactly; for integer types, -9 to 9 (unsigned: 0 to 9)."""
    generator = np.random.default_rng(seed)
    if dtype.startswith(("int", "uint")):
        return generator.integers(0 if dtype.startswith("u") else -9, 10, shape).astype(dtype)
    values = generator.uniform(low, high, shape)
    return values_of(host_array(values, dtype), dtype) if dtype == "bfloat16" else values.astype(dtype)


def tolerance(spec: Any, **tighter: float) -> Mapping[str, float]:
    """Return the manifest's rtol and atol, updated with `tighter`, for ``np.testing.assert_allclose``."""
    return {**spec.tolerance, **tighter}
