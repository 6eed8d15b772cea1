# SPDX-License-Identifier: Apache-2.0
"""An interpreter of small PTX kernels, one thread after another, to check a kernel written in NVVM IR without a GPU.

It understands only the instructions that `saxpy_nvvm` compiles to: no shared memory, barriers or calls. Any other
instruction is an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from launchers import At

LIMIT = 100_000  # instructions that a thread may execute


class PtxError(AssertionError):
    """The interpreter doesn't understand the PTX, or the kernel did something undefined on a GPU."""


class PtxLauncher:
    """A launcher of library kernels of code type "nvvm": it interprets the PTX that libNVVM generates for `arch`."""

    def __init__(self, service: Any, arch: str) -> None:
        self.service = service
        self.arch = arch

    def spec(self, kernel: str) -> Any:
        return self.service.library[kernel]

    def __call__(
        self, kernel: str, args: Sequence[Any], *, grid: int, block: int, entry: int = 0, **params: Any
    ) -> None:
        params = {"block": block} | params
        ptx = self.service.kernel(kernel, arch=self.arch, target_type="ptx", **params).data
        entry_points = self.service.library.render(kernel, **params).entry_points
        machine = _Machine(ptx.decode(), entry_points[entry], args)
        if block > machine.max_threads:
            raise PtxError(f"a block of {block} threads, of {machine.max_threads} at most")
        for block_id, thread in itertools.product(range(grid), range(block)):
            machine.run({"%tid.x": thread, "%ntid.x": block, "%ctaid.x": block_id, "%nctaid.x": grid})


class _Machine:
    def __init__(self, ptx: str, entry: str, args: Sequence[Any]) -> None:
        _, _, rest = ptx.partition(f".visible .entry {entry}(")
        declared, _, rest = rest.partition(")")
        if not rest:
            raise PtxError(f"no kernel {entry} in the PTX")
        self.max_threads = int(re.search(r"\.maxntid (\d+)", rest)[1])  # type: ignore[index]
        names = re.findall(r"\w+_param_\d+", declared)
        types = re.findall(r"\.param \.(\w+)", declared)
        self.arrays: dict[int, np.ndarray] = {}
        self.params = {n: self._value(a, t, i) for i, (n, t, a) in enumerate(zip(names, types, args, strict=True))}
        self.lines = [line.strip() for line in rest[rest.index("{") + 1 : rest.index("}\n")].splitlines()]
        self.lines = [line for line in self.lines if line and not line.startswith((".reg", "//"))]
        self.labels = {line.rstrip(":"): i for i, line in enumerate(self.lines) if line.endswith(":")}

    def _value(self, argument: Any, declared: str, index: int) -> Any:
        argument = getattr(argument, "array", argument) if isinstance(argument, At) else argument
        if isinstance(argument, np.ndarray):
            self.arrays[index + 1] = argument
            return (index + 1) << 40  # an address: the array's number, then the byte offset in its low 40 bits
        size = {"f32": 4, "b32": 4, "f64": 8, "b64": 8, "u64": 8}[declared]
        if argument.itemsize != size:
            raise PtxError(f"argument {index} has {argument.itemsize} bytes, {size} are read")
        return int(argument) if argument.dtype.kind in "iu" else argument

    def _element(self, address: int, size: int) -> tuple[np.ndarray, int]:
        array, byte = self.arrays.get(address >> 40), address & ((1 << 40) - 1)
        if array is None or byte % size or array.itemsize != size or byte // size >= array.size:
            raise PtxError(f"access of {size} bytes at byte {byte} of argument {(address >> 40) - 1}")
        return array.reshape(-1), byte // size

    def run(self, special: dict[str, int]) -> None:
        registers: dict[str, Any] = dict(special)
        at = 0
        for _ in range(LIMIT):
            line = self.lines[at]
            at += 1
            if line.endswith(":"):
                continue
            guard, operation, operands = re.fullmatch(r"(?:@(%p\d+)\s+)?([\w.]+)\s*(.*);", line).groups()  # type: ignore[union-attr]
            if guard and not registers[guard]:
                continue
            if operation == "ret":
                return
            if operation in ("bra", "bra.uni"):
                at = self.labels[operands.strip()]
            else:
                self._execute(operation, [o.strip().strip("[]") for o in operands.split(",")], registers)
        raise PtxError(f"a thread took more than {LIMIT} instructions")

    def _execute(self, operation: str, operands: list[str], registers: dict[str, Any]) -> None:
        target, *sources = operands
        read = [registers[s] if s in registers else self.params[s] if s in self.params else _number(s) for s in sources]
        kind = operation.split(".", maxsplit=1)[0]
        size = int(re.search(r"(\d+)$", operation)[1]) // 8  # type: ignore[index]
        if operation.startswith("st.global"):
            array, index = self._element(registers[target], size)
            array[index] = read[0]
        elif operation.startswith("ld.global"):
            array, index = self._element(read[0], size)
            if ".nc" in operation and array.flags.writeable:
                raise PtxError("a read through the read-only cache, of memory that the kernel may write")
            registers[target] = array[index]
        elif kind in ("mov", "cvt") or operation.startswith("ld.param"):
            registers[target] = read[0]
        elif operation in ("mul.wide.u32", "mul.lo.s64"):
            registers[target] = read[0] * read[1]
        elif operation == "add.s64":
            registers[target] = read[0] + read[1]
        elif operation == "shl.b64":
            registers[target] = read[0] << read[1]
        elif operation in ("setp.ge.s64", "setp.lt.s64"):
            registers[target] = read[0] >= read[1] if ".ge" in operation else read[0] < read[1]
        elif operation.startswith("fma.rn"):
            a, b, c = (np.float64(v) for v in read)
            registers[target] = a * b + c
        else:
            raise PtxError(f"{operation} is not understood")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise PtxError(f"{text} was read before it was written") from error
