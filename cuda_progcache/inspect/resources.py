# SPDX-License-Identifier: Apache-2.0
"""The resource usage of each kernel of a cubin, read from the cubin itself.

The section ``.nv.info`` holds (symbol, value) pairs: registers (``EIATTR_REGCOUNT``), a function's stack frame
(``EIATTR_FRAME_SIZE``), and the stack of a kernel with all its callees (``EIATTR_MIN_STACK_SIZE``). ``.nv.info.NAME``
holds the barriers (``EIATTR_NUM_BARRIERS``; before CUDA 13 in the flags of ``.text.NAME``) and launch bounds
(``EIATTR_MAX_THREADS``, ``EIATTR_REQNTID``) of one kernel. Static shared memory, local memory and constant banks are
the sizes of ``.nv.shared.NAME``, ``.nv.local.NAME``, ``.nv.constant0.NAME`` and ``.nv.constant2.NAME``. Every figure
equals the one of ``ptxas -v``, if it prints one; tests compare them.
"""

from __future__ import annotations

import struct

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError
from cuda_progcache.inspect.elf import Attribute, Cubin, Symbol
from cuda_progcache.inspect.spilling import spills

_REGISTERS, _FRAME, _STACK = 0x2F, 0x11, 0x12
_MAX_THREADS, _REQUIRED_THREADS, _BARRIERS = 0x05, 0x10, 0x4C
_UNKNOWN = 0xFFFFFFFF
_PAIR = struct.Struct("<II")
_SIZES = struct.Struct("<III")

#: From sm_90 on, a linked kernel's static shared memory begins with the memory that CUDA reserves: 1 KiB per block
#: (CUDA C++ Programming Guide, compute capability 9.0; ``cudaDevAttrReservedSharedMemoryPerBlock``).
_RESERVED_SHARED, _FIRST_RESERVED = 1024, 90


class Resources(NamedTuple):
    """The resource usage of a kernel.

    Attributes
    ----------
    registers : int
        Registers per thread.
    spill_store_bytes, spill_load_bytes : int or None
        Bytes that a thread moves to and from local memory because registers ran out, each instruction counted once, in
        the kernel and the functions within its code. None if unknown: compilers before CUDA 12.6 don't mark spills.
    stack_bytes : int or None
        Stack per thread, including called functions (before linking, only the kernel's own frame). None if unknown
        because of recursion.
    shared_bytes : int
        Static shared memory per block, without the memory that CUDA reserves.
    local_bytes : int
        Local memory per thread apart from the stack (0 except with very old compilers).
    constant_bytes : int
        Constant bank 0: parameters and other values passed by the launch.
    literal_bytes : int
        Constant bank 2: constants that the compiler placed there.
    barriers : int
        Barriers per block, at most 16.
    max_threads : int or None
        Threads of the largest block that the kernel declares (``__launch_bounds__``, ``__block_size__``); None if it
        declares none.
    code_bytes : int
        Size of the machine code, including functions within it and padding.
    """

    registers: int
    spill_store_bytes: int | None
    spill_load_bytes: int | None
    stack_bytes: int | None
    shared_bytes: int
    local_bytes: int
    constant_bytes: int
    literal_bytes: int
    barriers: int
    max_threads: int | None
    code_bytes: int


def resource_usage(data: bytes) -> dict[str, Resources]:
    """Return the resources that each kernel in a cubin uses.

    Parameters
    ----------
    data : bytes
        The cubin.

    Returns
    -------
    dict
        Kernel name, as in the cubin, to :class:`Resources`.

    Raises
    ------
    InspectError
        If the data isn't a cubin (the message says what it is), or is corrupt.
    """
    cubin = Cubin(data)
    try:
        figures = _by_symbol(cubin)
        return {kernel.name: _resources(cubin, kernel, figures) for kernel in cubin.kernels()}
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise InspectError(
            f"this cubin of {len(data)} bytes is corrupt, or has a newer format: {type(error).__name__}: {error}"
        ) from error


def resource_record(data: bytes) -> dict[str, dict[str, int | None]]:
    """Return :func:`resource_usage` as kept in a record: JSON, with the fields of :class:`Resources`."""
    return {name: used._asdict() for name, used in resource_usage(data).items()}


def _by_symbol(cubin: Cubin) -> dict[tuple[int, str], int]:
    """Return the values in ``.nv.info`` by attribute and symbol name."""
    return {
        (attribute.number, cubin.symbols[number].name): value
        for attribute in cubin.attributes(".nv.info")
        if attribute.number in {_REGISTERS, _FRAME, _STACK}
        for number, value in _PAIR.iter_unpack(attribute.payload)
    }


def _resources(cubin: Cubin, kernel: Symbol, figures: dict[tuple[int, str], int]) -> Resources:
    name = kernel.name
    info = cubin.attributes(f".nv.info.{name}")
    stores = loads = None
    found = spills(cubin, kernel)
    if found is not None:
        local = [spill for spill in found if spill.memory == "local"]
        stores = sum(spill.size for spill in local if spill.is_store)
        loads = sum(spill.size for spill in local if not spill.is_store)
    return Resources(
        registers=figures[_REGISTERS, name],
        spill_store_bytes=stores,
        spill_load_bytes=loads,
        stack_bytes=_stack(figures, name),
        shared_bytes=_shared(cubin, name),
        local_bytes=cubin.size_of(f".nv.local.{name}"),
        constant_bytes=cubin.size_of(f".nv.constant0.{name}"),
        literal_bytes=cubin.size_of(f".nv.constant2.{name}"),
        barriers=_barriers(cubin, name, info),
        max_threads=_max_threads(info),
        code_bytes=cubin.size_of(f".text.{name}"),
    )


def _stack(figures: dict[tuple[int, str], int], name: str) -> int | None:
    with_callees = figures.get((_STACK, name), 0)
    return None if with_callees == _UNKNOWN else max(with_callees, figures.get((_FRAME, name), 0))


def _shared(cubin: Cubin, name: str) -> int:
    size = cubin.size_of(f".nv.shared.{name}")  # a kernel without shared memory may have no such section
    reserved = _RESERVED_SHARED if cubin.linked and cubin.arch >= _FIRST_RESERVED else 0
    return max(size - reserved, 0)


def _barriers(cubin: Cubin, name: str, info: list[Attribute]) -> int:
    told = [attribute.value for attribute in info if attribute.number == _BARRIERS]
    return told[0] & 0xFF if told else cubin.sections[f".text.{name}"].flags >> 20 & 0x7F


def _max_threads(info: list[Attribute]) -> int | None:
    for attribute in info:
        if attribute.number in {_MAX_THREADS, _REQUIRED_THREADS}:
            x, y, z = _SIZES.unpack(attribute.payload)
            return int(x * y * z)
    return None
