# SPDX-License-Identifier: Apache-2.0
"""Parsing of cubins as ELF files: sections, symbols, and the attributes in ``.nv.info``.

A cubin is a 64-bit little-endian ELF file (``elf(5)``) for the machine ``EM_CUDA`` (190). NVIDIA doesn't publish a
specification of its extensions; the numbers here are those of ``cuobjdump -elf`` and ``nvdisasm``, version 13.5.
"""

from __future__ import annotations

import struct

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError

_MAGIC = b"\x7fELF\x02\x01"
_EM_CUDA = 190
_HEADER = struct.Struct("<8xB7xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_ATTRIBUTE = struct.Struct("<BBH")
_WITH_PAYLOAD = 4
_ET_REL = 1
_STT_FUNC = 2
_STO_CUDA_ENTRY = 0x10

#: The first bytes of files that are mistaken for cubins, what they are, and what to do about it.
_OTHERS = (
    (b"\xed\x43\x4e\x7f", "LTO-IR; link it to a cubin first: registers and memory are assigned there"),
    (b"BC\xc0\xde", "NVVM bitcode; compile it to a cubin first"),
    (b"\x50\xed\x55\xba", "a fatbin; extract a cubin with `cuobjdump -xelf all`"),
    (b"\x7fELF", "an ELF file, but not a 64-bit little-endian one"),
)
_PTX = "PTX, which is text; compile it to a cubin first: registers and memory are assigned there"


class Section(NamedTuple):
    """A section: its name, ``sh_flags``, and its offset in the file and size (bytes)."""

    name: str
    flags: int
    offset: int
    size: int


class Symbol(NamedTuple):
    """A symbol: its name, the number of its section, and its offset in the section and size (bytes)."""

    name: str
    section: int
    start: int
    size: int
    is_function: bool
    is_kernel: bool


class Attribute(NamedTuple):
    """One ``EIATTR_...`` of a ``.nv.info`` section.

    ``value`` is the value in the attribute itself (formats 1 to 3), ``payload`` the bytes that follow it (format 4).
    """

    number: int
    value: int
    payload: bytes


class Cubin:
    """The parts of a cubin.

    Parameters
    ----------
    data : bytes
        The content of the file.

    Attributes
    ----------
    arch : int
        The architecture as a number: 90 is ``sm_90``.
    linked : bool
        False for a relocatable cubin (``-rdc=true``): its addresses, stacks and shared memory are assigned at link
        time.
    sections : dict
        The sections by name.
    symbols : list
        The symbols in the order of the file; attributes refer to symbols by number.

    Raises
    ------
    InspectError
        If the data isn't a cubin (the message says what it is instead), or is corrupt.
    """

    def __init__(self, data: bytes) -> None:
        check_cubin(data)
        self.data = data
        try:
            self._read()
        except (struct.error, IndexError, OverflowError, ValueError) as error:
            raise _damaged(data, error) from error

    def _read(self) -> None:
        abi, kind, machine, _, _, _, at, flags, _, _, _, size, count, names = _HEADER.unpack_from(self.data)
        if machine != _EM_CUDA:
            raise InspectError(f"not a cubin: an ELF file for machine {machine}, not for CUDA ({_EM_CUDA})")
        if size != _SECTION.size:
            raise ValueError(f"section headers of {size} bytes")
        self.arch = flags >> 8 & 0xFF if abi >= 8 else flags & 0xFF  # since CUDA 13 the number is in the second byte
        self.linked = kind != _ET_REL
        headers = [_SECTION.unpack_from(self.data, at + number * size) for number in range(count)]
        strings = headers[names][4]
        self.sections = {}
        for header in headers:
            section = Section(self._string(strings + header[0]), header[2], header[4], header[5])
            self.sections[section.name] = section
        self.symbols = list(self._symbols())

    def _symbols(self) -> list[Symbol]:
        table, strings = self.sections.get(".symtab"), self.sections.get(".strtab")
        if table is None or strings is None:
            return []
        found = []
        for name, info, other, section, start, size in _SYMBOL.iter_unpack(self.bytes_of(table)):
            is_function = info & 0xF == _STT_FUNC
            is_kernel = is_function and bool(other & _STO_CUDA_ENTRY)
            found.append(Symbol(self._string(strings.offset + name), section, start, size, is_function, is_kernel))
        return found

    def bytes_of(self, section: Section) -> bytes:
        """Return the contents of a section; raise ValueError if the file ends before the section does."""
        end = section.offset + section.size
        if end > len(self.data):
            raise ValueError(f"section {section.name} ends at byte {end}")
        return self.data[section.offset : end]

    def _string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode("utf-8", "surrogateescape")

    def kernels(self) -> list[Symbol]:
        """Return the kernels, in the order of the file."""
        return [symbol for symbol in self.symbols if symbol.is_kernel and symbol.section]

    def size_of(self, section: str) -> int:
        """Return the size of a section in bytes; 0 if there is no section of that name."""
        found = self.sections.get(section)
        return 0 if found is None else found.size

    def attributes(self, section: str) -> list[Attribute]:
        """Return the attributes in a ``.nv.info`` section; an empty list if there is no such section.

        Raises
        ------
        InspectError
            If the section is truncated.
        """
        found = self.sections.get(section)
        if found is None:
            return []
        try:
            return _attributes(self.bytes_of(found))
        except (struct.error, ValueError) as error:
            raise _damaged(self.data, error) from error


def _attributes(info: bytes) -> list[Attribute]:
    found, at = [], 0
    while at < len(info):
        form, number, value = _ATTRIBUTE.unpack_from(info, at)
        at += _ATTRIBUTE.size
        size = value if form == _WITH_PAYLOAD else 0
        if at + size > len(info):
            raise ValueError(f"attribute {number:#x} ends after its section")
        found.append(Attribute(number, value, info[at : at + size]))
        at += size
    return found


def _damaged(data: bytes, error: Exception) -> InspectError:
    return InspectError(f"this cubin of {len(data)} bytes is corrupt, or has a newer format: {error}")


def check_cubin(data: bytes) -> None:
    """Check that data begins like a cubin.

    Raises
    ------
    InspectError
        If it doesn't; the message says what the data is instead, and what to do about it.
    """
    if data.startswith(_MAGIC):
        return
    if not data:
        raise InspectError("not a cubin: it is empty (0 bytes)")
    what = next((words for magic, words in _OTHERS if data.startswith(magic)), None)
    if what is None and b".version" in data[:4096] and b"\0" not in data[:4096].rstrip(b"\0"):
        what = _PTX
    raise InspectError(f"not a cubin: this is {what or f'something else ({len(data)} bytes starting {data[:8]!r})'}")
