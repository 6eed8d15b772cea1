# SPDX-License-Identifier: Apache-2.0
"""What a kernel uses, read off the cubin itself.

A cubin is an ELF file (``elf(5)``, 64-bit, little-endian). The section
``.nv.info`` is a list of attributes; those in format 4 are (symbol, value)
pairs: 0x2f registers per thread, 0x12 minimum stack. Static shared memory,
local memory and the first constant bank are the sizes of ``.nv.shared.NAME``,
``.nv.local.NAME`` and ``.nv.constant0.NAME``. (Attribute numbers as in the
output of ``cuobjdump -elf``; tests compare with ``cuobjdump
--dump-resource-usage``, which takes a process and needs a wheel.)
"""

from __future__ import annotations

import struct

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import InspectError

_SECTION = struct.Struct("<IIQQQQIIQQ")
_ATTRIBUTE = struct.Struct("<BBH")
_PAIR = struct.Struct("<II")
_PAIRS_FORMAT = 4
_REGISTERS, _STACK = 0x2F, 0x12
_SIZED = {".nv.shared.": "shared_bytes", ".nv.local.": "local_bytes", ".nv.constant0.": "constant_bytes"}


class _Section(NamedTuple):
    name: str
    offset: int
    size: int


def resource_usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """Resource usage of each kernel in a cubin.

    Parameters
    ----------
    cubin : bytes

    Returns
    -------
    dict
        Kernel name to ``registers`` (per thread), ``stack_bytes`` and ``local_bytes`` (per thread; of a recursive one
        the least), ``shared_bytes`` (static, per block), ``constant_bytes`` (the first bank: parameters, launch data).

    Raises
    ------
    InspectError
        If this isn't a cubin, or not one that makes sense.
    """
    try:
        return _usage(cubin)
    except (struct.error, IndexError, ValueError) as error:
        raise InspectError(f"these {len(cubin)} bytes are no cubin that can be read ({error})") from error


def _usage(data: bytes) -> dict[str, dict[str, int]]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise InspectError(f"not a cubin: {len(data)} bytes that begin with {data[:4]!r} instead of an ELF header")
    sections = _sections(data)
    by_name = {section.name: section for section in sections}
    symbols, strings = by_name.get(".symtab"), by_name.get(".strtab")
    usage = {
        section.name.removeprefix(".text."): dict.fromkeys(
            ("registers", "stack_bytes", "shared_bytes", "local_bytes", "constant_bytes"), 0
        )
        for section in sections
        if section.name.startswith(".text.")
    }
    if symbols is not None and strings is not None and ".nv.info" in by_name:
        for attribute, index, value in _attributes(data, by_name[".nv.info"]):
            (name_at,) = struct.unpack_from("<I", data, symbols.offset + index * 24)
            found = usage.get(_string(data, strings.offset + name_at))
            if found is not None:
                found["registers" if attribute == _REGISTERS else "stack_bytes"] = value
    for section in sections:
        for prefix, label in _SIZED.items():
            found = usage.get(section.name.removeprefix(prefix)) if section.name.startswith(prefix) else None
            if found is not None:
                found[label] = section.size
    return usage


def _sections(data: bytes) -> list[_Section]:
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    if size != _SECTION.size:
        raise ValueError(f"section headers of {size} bytes")
    headers = [_SECTION.unpack_from(data, offset + n * size) for n in range(count)]
    names = headers[names_index][4]
    return [_Section(_string(data, names + header[0]), header[4], header[5]) for header in headers]


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode("utf-8", "surrogateescape")


def _attributes(data: bytes, section: _Section) -> list[tuple[int, int, int]]:
    """(attribute, symbol index, value) of registers and stack."""
    found = []
    at, end = section.offset, section.offset + section.size
    while at < end:
        form, attribute, size = _ATTRIBUTE.unpack_from(data, at)
        at += _ATTRIBUTE.size
        if form != _PAIRS_FORMAT:
            continue  # the value stood in the place of the size
        if attribute in {_REGISTERS, _STACK}:
            found += [(attribute, *pair) for pair in _PAIR.iter_unpack(data[at : at + size])]
        at += size
    return found
