# SPDX-License-Identifier: Apache-2.0
"""Detection of the instructions of a kernel that spill registers, from the cubin itself.

When registers run out, ptxas saves a register to memory and reads it back later. It marks each of these instructions in
the attribute ``EIATTR_ANNOTATIONS`` of the kernel's ``.nv.info``; ``nvdisasm -json -annotate`` prints the marks as
``SpillRefill``. The encoding of an instruction tells how many bytes it moves. The bytes moved through local memory add
up to the "bytes spill stores" and "bytes spill loads" of ``ptxas -v``. Spills through shared memory (``.pragma
"enable_smem_spilling"``) are marked, too, but ptxas doesn't count them.

A function that isn't inlined (because of recursion or a function pointer) saves and restores registers of its caller.
ptxas counts these instructions but doesn't mark them. They are recognised as pairs: a store of a register that the
callee must preserve to a slot in its frame, and a load from the same slot into the same register.

ptxas marks spills since CUDA 12.6. An older cubin can only show that nothing was spilled: if its code never touches
local memory.
"""

from __future__ import annotations

import struct

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.inspect.elf import Attribute, Cubin, Symbol

_ANNOTATIONS = 0x55
_SPILL, _INSTRUCTION_INFO, _FUNCTION_INFO = 1, 2, 3
_API_VERSION = 0x37
_FIRST_WITH_NOTES = 126
_FIRST_128_BIT = 70

#: Opcode (the low 12 bits) to what the instruction does: all of sm_70 to sm_121, as nvdisasm 13.5 decodes them.
_STL, _LDL = 0x387, 0x983
_STORES = {_STL: "local", 0x388: "shared", 0x988: "shared"}
_LOADS = {_LDL: "local", 0x984: "shared"}
#: Bits 73 to 75 to bytes: U8, S8, U16, S16, 32, 64, 128.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 8, 6: 16}
#: The callee-saved registers, as observed in the output of ptxas: R2, R16 to R31, and the upper four of each group of
#: eight above.
_PRESERVED = frozenset({2, *range(16, 32), *(number for number in range(36, 255) if number % 8 >= 4)})
_STACK_POINTER = 1
_INSTRUCTION = struct.Struct("<QQ")
_WORD = struct.Struct("<I")


class Spill(NamedTuple):
    """An instruction that saves a register to memory, or reads it back.

    ``function`` is the kernel, or the function within its code; ``offset`` is in bytes from the start of the kernel's
    code, as nvdisasm prints it; ``size`` is in bytes per thread; ``memory`` is ``"local"`` or ``"shared"``.
    """

    function: str
    offset: int
    is_store: bool
    size: int
    memory: str


def spills(cubin: Cubin, kernel: Symbol) -> list[Spill] | None:
    """Return the instructions of a kernel that spill registers.

    Parameters
    ----------
    cubin : Cubin
    kernel : Symbol
        One of ``cubin.kernels()``.

    Returns
    -------
    list or None
        The instructions in the order of the code, including called functions. None if the compiler doesn't mark spills
        (before CUDA 12.6) and the code uses local memory, or may use it (before sm_70).

    Raises
    ------
    ValueError, IndexError
        The cubin is corrupt, or has a newer format.
    """
    info = cubin.attributes(f".nv.info.{kernel.name}")
    notes = [attribute.payload for attribute in info if attribute.number == _ANNOTATIONS]
    code = cubin.bytes_of(cubin.sections[f".text.{kernel.name}"])
    if not notes and not _writes_notes(info):
        return None if _uses_local_memory(cubin, code) else []
    functions = [
        symbol
        for symbol in cubin.symbols
        if symbol.is_function and symbol.section == kernel.section and symbol != kernel
    ]
    marked = {offset for payload in notes for offset in _marked(payload)}
    saved = {offset for function in functions for offset in _saved(code, function)} if cubin.arch >= 70 else set()
    return [_spill(code, offset, kernel.name, functions) for offset in sorted(marked | saved)]


def _writes_notes(info: list[Attribute]) -> bool:
    """Return whether the compiler marks spills, by the CUDA version in a kernel's attributes."""
    versions = [_WORD.unpack(attribute.payload)[0] for attribute in info if attribute.number == _API_VERSION]
    return bool(versions) and versions[0] >= _FIRST_WITH_NOTES


def _uses_local_memory(cubin: Cubin, code: bytes) -> bool:
    if cubin.arch < _FIRST_128_BIT:
        return True  # the older instruction encoding isn't parsed
    return any(low & 0xFFF in {_STL, _LDL} for low, _ in _INSTRUCTION.iter_unpack(code[: len(code) // 16 * 16]))


def _marked(notes: bytes) -> list[int]:
    """Return the offsets of the instructions marked as spills.

    Each note begins with its kind. A spill note has the offset of its instruction; a text about an instruction has the
    offset, a length and the text; a text about the function has a length and the text. Texts are padded to four bytes.
    """
    words = [word for (word,) in _WORD.iter_unpack(notes)]
    found, at = [], 0
    while at < len(words):
        kind = words[at]
        if kind == _SPILL:
            found.append(words[at + 1])
            at += 2
        elif kind == _INSTRUCTION_INFO:
            at += 3 + (words[at + 2] + 3) // 4
        elif kind == _FUNCTION_INFO:
            at += 2 + (words[at + 1] + 3) // 4
        else:
            raise ValueError(f"unknown annotation of kind {kind}")
    return found


def _saved(code: bytes, function: Symbol) -> list[int]:
    """Return the offsets of the instructions of a function that save or restore its caller's registers."""
    stores: dict[tuple[int, int, int], list[int]] = {}
    loads: dict[tuple[int, int, int], list[int]] = {}
    for offset in range(function.start, min(function.start + function.size, len(code) - 15), 16):
        low, high = _INSTRUCTION.unpack_from(code, offset)
        opcode = low & 0xFFF
        if opcode not in {_STL, _LDL} or low >> 24 & 0xFF != _STACK_POINTER:
            continue
        register = low >> (32 if opcode == _STL else 16) & 0xFF
        if register in _PRESERVED:
            place = (register, low >> 40, high >> 9 & 7)
            (stores if opcode == _STL else loads).setdefault(place, []).append(offset)
    return [offset for place in stores.keys() & loads.keys() for offset in (*stores[place], *loads[place])]


def _spill(code: bytes, offset: int, kernel: str, functions: list[Symbol]) -> Spill:
    low, high = _INSTRUCTION.unpack_from(code, offset)
    opcode, width = low & 0xFFF, high >> 9 & 7
    memory = _STORES.get(opcode) or _LOADS.get(opcode)
    if memory is None or width not in _WIDTHS:
        raise ValueError(f"instruction {low:#x} at {offset:#x} of {kernel} is marked as a spill but no load or store")
    within = next((one.name for one in functions if one.start <= offset < one.start + one.size), kernel)
    return Spill(within.removeprefix(f"${kernel}$"), offset, opcode in _STORES, _WIDTHS[width], memory)
