# SPDX-License-Identifier: Apache-2.0
"""Occupancy: how many blocks of a kernel run on a multiprocessor at once, and what limits them.

The rules are those of ``cuda_occupancy.h`` (CUDA 13.5): registers are allocated to warps in units of 256 from one of
four parts of the register file (sm_60: two), shared memory to blocks in units of 128 or 256 bytes, and barriers to
blocks. The limits of each architecture are those of CCCL's ``cuda/__device/arch_traits.h`` and of the table "Technical
specifications per compute capability" in the CUDA C++ Programming Guide. Tests compile both headers and compare them
with the values computed here.

The assumptions are CUDA's: the kernel may use as much dynamic shared memory as it asks for
(``cudaFuncAttributeMaxDynamicSharedMemorySize``), and the driver assigns all of the memory that L1 and shared memory
share to shared memory if blocks need it.
"""

from __future__ import annotations

from bisect import bisect_left

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cuda_progcache.inspect.resources import Resources

_WARP = 32
_REGISTER_UNIT = 256
_LARGEST_BLOCK = 1024
_KIB = 1024
_UNLIMITED = 1 << 31


class Multiprocessor(NamedTuple):
    """The limits of a multiprocessor of an architecture.

    Attributes
    ----------
    warps, blocks : int
        The most warps and blocks that run at once.
    registers : int
        The number of 32-bit registers.
    registers_per_block : int
        The most registers of a block.
    registers_per_thread : int
        The most registers per thread with which a launch is allowed; the compiler uses at most 255.
    register_parts : int
        The number of parts of the register file; a warp's registers are all in one part.
    shared_bytes : int
        The size of shared memory.
    shared_bytes_per_block : int
        The most shared memory of a block, including the memory that CUDA reserves.
    reserved_shared_bytes : int
        The shared memory that CUDA reserves in each block.
    shared_unit : int
        The allocation unit in bytes; a block's shared memory is rounded up to a multiple of it.
    barriers : int
        The number of barriers; 0 if blocks can't run out of them (before sm_90).
    """

    warps: int
    blocks: int
    registers: int
    registers_per_block: int
    registers_per_thread: int
    register_parts: int
    shared_bytes: int
    shared_bytes_per_block: int
    reserved_shared_bytes: int
    shared_unit: int
    barriers: int


#: Architecture to (warps, blocks, KiB of shared memory, barriers per block; 0 if blocks can't run out of them).
_ARCHS = {
    50: (64, 32, 64, 0),
    52: (64, 32, 96, 0),
    53: (64, 32, 64, 0),
    60: (64, 32, 64, 0),
    61: (64, 32, 96, 0),
    62: (64, 32, 64, 0),
    70: (64, 32, 96, 0),
    72: (64, 32, 96, 0),
    75: (32, 16, 64, 0),
    80: (64, 32, 164, 0),
    86: (48, 16, 100, 0),
    87: (48, 16, 164, 0),
    88: (48, 16, 100, 0),
    89: (48, 24, 100, 0),
    90: (64, 32, 228, 2),
    100: (64, 32, 228, 2),
    101: (48, 24, 228, 1),
    103: (64, 32, 228, 1),
    107: (32, 16, 228, 1),
    110: (48, 24, 228, 1),
    120: (48, 24, 100, 1),
    121: (48, 24, 100, 1),
}
#: The architectures whose blocks may use at most half of the register file.
_SMALL_BLOCKS = {53, 62}


class Cliff(NamedTuple):
    """The smallest reduction of one resource that lets more warps run.

    ``resource`` is ``"registers"`` (per thread) or ``"shared_bytes"`` (per block), ``fewer`` is the reduction, and
    ``warps`` the number of warps that then run.
    """

    resource: str
    fewer: int
    warps: int


class Occupancy(NamedTuple):
    """The occupancy of a multiprocessor by a kernel.

    Attributes
    ----------
    block_size : int
        Threads per block.
    dynamic_shared_bytes : int
        Dynamic shared memory per block.
    blocks, warps : int
        The number that run at once; 0 if such a block can't be launched.
    most_warps : int
        The most warps that can run at once.
    limiters : tuple of str
        The limits that are reached: some of ``"registers"``, ``"shared_bytes"``, ``"warps"``, ``"blocks"``,
        ``"barriers"``, and ``"threads"`` if the block is larger than the architecture or the kernel allows.
    cliffs : tuple of Cliff
        The reductions of registers and of shared memory that would, on their own, let more blocks run.
    """

    block_size: int
    dynamic_shared_bytes: int
    blocks: int
    warps: int
    most_warps: int
    limiters: tuple[str, ...]
    cliffs: tuple[Cliff, ...]

    @property
    def ratio(self) -> float:
        """The fraction of the possible warps that run: 0 to 1."""
        return self.warps / self.most_warps


def archs() -> tuple[str, ...]:
    """Return the architectures whose limits are known: ``sm_50``, ``sm_52`` and so on."""
    return tuple(f"sm_{number}" for number in sorted(_ARCHS))


def multiprocessor(arch: str | int) -> Multiprocessor:
    """Return the limits of a multiprocessor.

    Parameters
    ----------
    arch : str or int
        ``"sm_90a"``, ``"90"`` or 90; letters after the number are ignored.

    Raises
    ------
    InspectError
        If the architecture is unknown; the message names the known ones.
    """
    number = _number(arch)
    if number not in _ARCHS:
        known = ", ".join(f"sm_{one}" for one in _ARCHS)
        raise InspectError(f"unknown architecture {arch!r}: the limits of its multiprocessors are known for {known}")
    warps, blocks, shared, barriers = _ARCHS[number]
    reserved = _KIB if number >= 80 else 0
    return Multiprocessor(
        warps=warps,
        blocks=blocks,
        registers=65_536,
        registers_per_block=32_768 if number in _SMALL_BLOCKS else 65_536,
        registers_per_thread=255 if number < 70 else 256,
        register_parts=2 if number == 60 else 4,
        shared_bytes=shared * _KIB,
        shared_bytes_per_block=(shared if number >= 70 else 48) * _KIB,
        reserved_shared_bytes=reserved,
        shared_unit=256 if number < 80 else 128,
        barriers=barriers * blocks,
    )


def _number(arch: str | int) -> int | None:
    digits = str(arch).removeprefix("sm_").removeprefix("compute_").rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def occupancy(used: Resources, arch: str | int, block_size: int, dynamic_shared_bytes: int = 0) -> Occupancy:
    """Return how many blocks and warps of a kernel run on a multiprocessor at once.

    Parameters
    ----------
    used : Resources
        The kernel's resource usage.
    arch : str or int
        ``"sm_90"`` or 90.
    block_size : int
        Threads per block, at least 1.
    dynamic_shared_bytes : int
        Dynamic shared memory per block, in addition to the static.

    Raises
    ------
    InspectError
        If the architecture is unknown, or an argument is out of range.
    """
    if block_size < 1 or dynamic_shared_bytes < 0:
        raise InspectError(
            f"block_size must be at least 1 and dynamic_shared_bytes at least 0, not block_size = {block_size}, "
            f"dynamic_shared_bytes = {dynamic_shared_bytes}"
        )
    has = multiprocessor(arch)
    block_warps = -(-block_size // _WARP)
    shared = used.shared_bytes + dynamic_shared_bytes
    fits = block_size <= min(used.max_threads or _LARGEST_BLOCK, _LARGEST_BLOCK)
    limits = {
        "registers": _by_registers(has, used.registers, block_warps),
        "shared_bytes": _by_shared(has, shared),
        "warps": has.warps // block_warps,
        "blocks": has.blocks,
        "barriers": has.barriers // used.barriers if used.barriers and has.barriers else _UNLIMITED,
        **({} if fits else {"threads": 0}),
    }
    blocks = min(limits.values())

    def cliff(resource: str, have: int, by: Callable[[int], int]) -> list[Cliff]:
        others = min(limit for name, limit in limits.items() if name != resource)
        if others <= blocks or by(0) <= blocks:
            return []
        fewer = bisect_left(range(have), blocks + 1, key=lambda less: by(have - less)) if have else 0
        return [Cliff(resource, fewer, min(by(have - fewer), others) * block_warps)]

    return Occupancy(
        block_size=block_size,
        dynamic_shared_bytes=dynamic_shared_bytes,
        blocks=blocks,
        warps=blocks * block_warps,
        most_warps=has.warps,
        limiters=tuple(name for name, limit in limits.items() if limit == blocks),
        cliffs=(
            *cliff("registers", used.registers, lambda registers: _by_registers(has, registers, block_warps)),
            *cliff("shared_bytes", shared, lambda size: _by_shared(has, size)),
        ),
    )


def _by_registers(has: Multiprocessor, registers: int, block_warps: int) -> int:
    if registers > has.registers_per_thread:
        return 0
    warp = _up(registers * _WARP, _REGISTER_UNIT)
    if not warp:
        return _UNLIMITED
    # For the limit per block, warps count in multiples of four, even on sm_60 with its two parts.
    if warp * _up(block_warps, 4) > has.registers_per_block:
        return 0
    return has.registers // has.register_parts // warp * has.register_parts // block_warps


def _by_shared(has: Multiprocessor, size: int) -> int:
    block = _up(size + has.reserved_shared_bytes, has.shared_unit)
    if block > has.shared_bytes_per_block:
        return 0
    return has.shared_bytes // block if block else _UNLIMITED


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
