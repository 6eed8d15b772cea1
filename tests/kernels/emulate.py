# SPDX-License-Identifier: Apache-2.0
"""Rendered CUDA C++ kernels on the host, compiled by the host's C++ compiler with ``host_shim.hpp``.

``run(source, entry, args, grid, block, shared_bytes)`` launches one kernel and leaves its results in the given arrays.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FLAGS = (
    *(
        "-std=c++20",
        "-Og",  # compiles a third faster than -O1; the kernels run about as fast
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-w",
        "-U_FORTIFY_SOURCE",
    ),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr"),
)
ORDERS = {"ascending": 0, "descending": 1}
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+((?:(?:__align__|alignas)\s*\([^()]*\)\s*)?)([\w:<>\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;"
)


class EmulationError(AssertionError):
    """The kernel did something undefined on a GPU, or couldn't be launched. The message names the block and thread."""


@dataclass(frozen=True)
class At:
    """An array argument whose first element lies `offset` elements after a 32-byte boundary."""

    array: np.ndarray
    offset: int


class _Argument(ctypes.Structure):  # mirrors cuda_host::Argument
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("integer", ctypes.c_int64),
        ("floating", ctypes.c_double),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("writable", ctypes.c_int64),
    )


class _Launch(ctypes.Structure):  # mirrors cuda_host::Launch
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("order", ctypes.c_uint64),
        ("resident", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(_Argument)),
        ("argument_count", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_uint64),
        ("fault_offset", ctypes.c_uint64),
    )


def compiler() -> str | None:
    """Return the path of the host C++ compiler: ``$CXX`` if it is set, otherwise g++. None if it isn't installed."""
    return shutil.which(os.environ.get("CXX", "g++"))


def prepare(folder: Path) -> None:
    """Build in `folder` from now on; processes that name the same folder share what they build.

    The fibers' object file and the precompiled shim are written to the folder; g++ finds the latter beside the sources.
    """
    global _folder  # noqa: PLW0603
    cxx = _required_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "host_shim.o").exists():
            _compile(cxx, "-x", "c++-header", str(HERE / "host_shim.hpp"), to=folder / "host_shim.hpp.gch")
            _compile(cxx, "-c", str(HERE / "host_shim.cpp"), to=folder / "host_shim.o")
    _folder = folder


_folder: Path | None = None


def _required_compiler() -> str:
    if (cxx := compiler()) is None:
        raise EmulationError("no C++ compiler for the host: install g++ or set CXX")
    return cxx


def _compile(cxx: str, *arguments: str, to: Path) -> None:
    part = to.with_suffix(f".{os.getpid()}")
    command = [cxx, *FLAGS, f"-I{HERE}", f"-I{HERE / 'host_include'}", *arguments, "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{Path(cxx).name} refused the kernel:\n{done.stderr[:4000]}")
    part.replace(to)


@functools.cache
def build(source: str, entries: tuple[str, ...]) -> ctypes.CDLL:
    """Compile CUDA C++ for the host; `entries` are kernel names or instantiations such as ``"sum<float>"``.

    Raises
    ------
    EmulationError
        If the source isn't valid host C++ under the shim; the message contains the compiler's errors.
    """
    body = DYNAMIC_SHARED.sub(r"\2* \3 = cuda_host::dynamic_shared<\2>();", source)
    launchers = "\n".join(
        f'extern "C" __attribute__((visibility("default"))) int cuda_host_launch_{i}(cuda_host::Launch* what) {{'
        f" return cuda_host::launch_kernel({entry}, what); }}"
        for i, entry in enumerate(entries)
    )
    text = f'#include "host_shim.hpp"\n#line 1 "rendered.cu"\n{body}\n#line 1 "launchers"\n{launchers}\n'
    if _folder is None:
        raise EmulationError("nowhere to build: call emulate.prepare first")
    library = _folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        unit = library.with_suffix(f".{os.getpid()}.cpp")
        unit.write_text(text)
        _compile(_required_compiler(), "-shared", str(unit), str(_folder / "host_shim.o"), to=library)
    return ctypes.CDLL(str(library))


def _argument(value: Any, keep: list[Any]) -> _Argument:
    """Convert one kernel argument; objects that must outlive the launch are appended to `keep`."""
    if value is None:
        return _Argument(kind=2)
    offset = 0
    if isinstance(value, At):
        offset = value.offset * value.array.itemsize
        value = value.array
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("kernel arguments must be contiguous arrays; pass the whole buffer")
        keep.append(value)
        return _Argument(2, 0, 0.0, value.ctypes.data, value.nbytes, offset, int(value.flags.writeable))
    if isinstance(value, bytes | np.generic):
        raw = value if isinstance(value, bytes) else value.tobytes()
        buffer = ctypes.create_string_buffer(raw, len(raw))
        keep.append(buffer)
        floating = not isinstance(value, bytes) and value.dtype.kind == "f"
        kind = 3 if isinstance(value, bytes) else int(floating)
        integer = 0 if floating or isinstance(value, bytes) else int(value)
        return _Argument(kind, integer, float(value) if floating else 0.0, ctypes.addressof(buffer), len(raw), 0, 0)
    if isinstance(value, float):
        return _Argument(1, 0, value)
    return _Argument(0, int(value), 0.0)


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*((size,) if isinstance(size, int) else size), 1, 1)[:3]
    return x, y, z


def run(
    source: str,
    entry: str,
    args: Sequence[Any],
    grid: int | Sequence[int],
    block: int | Sequence[int],
    shared_bytes: int = 0,
    *,
    entries: Iterable[str] = (),
    order: str | int = "ascending",
    resident: int = 1,
) -> None:
    """Launch `entry` over `grid` × `block`; afterwards, writable arrays hold the kernel's results.

    Parameters
    ----------
    source : str
        The rendered CUDA C++ source.
    entry : str
        A kernel's name, or an instantiation of a kernel template.
    args : sequence
        Arrays or `At` (for pointers), None (a null pointer), Python or NumPy numbers, bytes (a struct by value). An
        array that isn't writable is read-only memory to the kernel.
    grid, block : int or up to three ints
    shared_bytes : int
        Dynamic shared memory in bytes.
    entries : iterable of str
        Other entries of the same source; all are built together.
    order : {"ascending", "descending"} or int
        The order in which ready threads and blocks run; an int (from 2) seeds a shuffle.
    resident : int
        How many blocks run side by side. Another block takes over once no thread of the running block is ready; with a
        shuffled order, once no thread of one warp is.

    Raises
    ------
    EmulationError
        On an access out of bounds, a misaligned vector access, a deadlock, a mismatched warp collective, and the like.
    """
    names = tuple(dict.fromkeys((*entries, entry)))
    library = build(source, names)
    keep: list[Any] = []
    arguments = (_Argument * max(len(args), 1))(*(_argument(a, keep) for a in args))
    message = ctypes.create_string_buffer(1024)
    what = _Launch(
        (ctypes.c_uint * 3)(*_three(grid)),
        (ctypes.c_uint * 3)(*_three(block)),
        shared_bytes,
        order if isinstance(order, int) else ORDERS[order],
        resident,
        arguments,
        len(args),
        ctypes.cast(message, ctypes.c_char_p),
        len(message),
        0,
    )
    if getattr(library, f"cuda_host_launch_{names.index(entry)}")(ctypes.byref(what)):
        raise EmulationError(f"{entry}: {message.value.decode()}{_where(library, what.fault_offset)}")


def _where(library: ctypes.CDLL, offset: int) -> str:
    """Return ``" (rendered.cu:12)"`` for a fault's address, or "" if binutils can't resolve it."""
    if not offset or not (addr2line := shutil.which("addr2line")):
        return ""
    command = [addr2line, "-i", "-e", str(library._name), hex(offset)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    # Some versions of binutils name the compiled file instead of the one its #line directive gives.
    unit = Path(library._name).stem
    places = [line.split(" (")[0].rpartition(":") for line in lines]
    numbers = [number for file, _, number in places if Path(file).name == "rendered.cu" or unit in file]
    return f" (rendered.cu:{numbers[0]})" if numbers else ""
