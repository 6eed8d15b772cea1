# SPDX-License-Identifier: Apache-2.0
"""What each kernel of a cubin uses, read off the cubin itself.

The section ``.nv.info`` holds (symbol, value) pairs: registers (``EIATTR_REGCOUNT``), a function's stack frame
(``EIATTR_FRAME_SIZE``), and the stack of a kernel with all that it calls (``EIATTR_MIN_STACK_SIZE``). ``.nv.info.NAME``
holds one kernel's: barriers (``EIATTR_NUM_BARRIERS``; before CUDA 13 in the flags of ``.text.NAME``) and launch bounds
(``EIATTR_MAX_THREADS``, ``EIATTR_REQNTID``). Static shared memory, local memory and constant banks are the sizes of
``.nv.shared.NAME``, ``.nv.local.NAME``, ``.nv.constant0.NAME`` and ``.nv.constant2.NAME``. Every figure is that of
``ptxas -v``, where it prints one; tests compare them.
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

#: From sm_90 on a linked kernel's static shared memory begins with what CUDA keeps for itself: 1 KiB for each block
#: (CUDA C++ Programming Guide, compute capability 9.0; ``cudaDevAttrReservedSharedMemoryPerBlock``).
_RESERVED_SHARED, _FIRST_RESERVED = 1024, 90


class Resources(NamedTuple):
    """What a kernel uses.

    Attributes
    ----------
    registers : int
        A thread.
    spill_store_bytes, spill_load_bytes : int or None
        Bytes a thread moves to and from local memory for want of registers, each instruction counted once, in the
        kernel and the functions within its code. None: the compiler left no notes of it (before CUDA 12.6).
    stack_bytes : int or None
        A thread, functions that are called included (before linking: the kernel's own frame). None: unknown, since
        functions call themselves.
    shared_bytes : int
        Static shared memory of a block, without what CUDA reserves.
    local_bytes : int
        Local memory of a thread apart from its stack (0 but for very old compilers).
    constant_bytes : int
        Constant bank 0: parameters and what the launch passes along.
    literal_bytes : int
        Constant bank 2: constants of the code that the compiler put there.
    barriers : int
        Barriers of a block, 16 at most.
    max_threads : int or None
        Threads of the largest block that the kernel declares (``__launch_bounds__``, ``__block_size__``); None: it
        declares none.
    code_bytes : int
        Machine code, functions within it and padding included.
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
        Kernel name, as it stands in the cubin, to :class:`Resources`.

    Raises
    ------
    InspectError
        If this isn't a cubin (the message says what it is), or one that doesn't make sense.
    """
    cubin = Cubin(data)
    try:
        figures = _by_symbol(cubin)
        return {kernel.name: _resources(cubin, kernel, figures) for kernel in cubin.kernels()}
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise InspectError(
            f"this cubin of {len(data)} bytes is damaged, or of a later format: {type(error).__name__}: {error}"
        ) from error


def resource_record(data: bytes) -> dict[str, dict[str, int | None]]:
    """:func:`resource_usage` as it is kept in a record: JSON, with the fields of :class:`Resources`."""
    return {name: used._asdict() for name, used in resource_usage(data).items()}


def _by_symbol(cubin: Cubin) -> dict[tuple[int, str], int]:
    """(Attribute, name of a symbol) to its value."""
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
