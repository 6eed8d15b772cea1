# SPDX-License-Identifier: Apache-2.0
"""Descriptions of entries without a record, such as those put by ``cuda.core`` or a script, taken from their bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cuda_progcache.errors import InspectError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cuda_progcache.store.base import EntryInfo

_TARGET = re.compile(rb"^\s*\.target\s+(sm_\w+)", re.MULTILINE)
_ENTRY = re.compile(rb"\.entry\s+([\w$]+)")
#: How many kernels a name lists.
_NAMED = 3


def described(entry: EntryInfo) -> EntryInfo:
    """Return the entry with name, type and architecture, from its record or, without one, from its bytes.

    The name lists the kernels. If the bytes can't be read, the entry is returned unchanged.
    """
    about = entry.about
    if about.target_type or about.name or entry.path is None:
        return entry
    try:
        told = _told(entry.path.read_bytes())
    except (OSError, InspectError):
        return entry
    return entry._replace(record={**entry.record, **told})


def all_described(entries: Iterable[EntryInfo]) -> Iterator[EntryInfo]:
    """Yield each entry as :func:`described` returns it."""
    return map(described, entries)


def _told(data: bytes) -> dict[str, Any]:
    from cuda_progcache.inspect import Cubin

    if data.startswith(b"\x7fELF"):
        cubin = Cubin(data)
        kernels = [symbol.name for symbol in cubin.kernels()]
        return {"target_type": "cubin", "arch": f"sm_{cubin.arch}"} | _named(kernels)
    target = _TARGET.search(data)
    if target is None:
        return {}
    kernels = [name.decode() for name in _ENTRY.findall(data)]
    return {"target_type": "ptx", "arch": target[1].decode()} | _named(kernels)


def _named(kernels: list[str]) -> dict[str, Any]:
    more = f" and {len(kernels) - _NAMED} more" if len(kernels) > _NAMED else ""
    return {"name": ", ".join(kernels[:_NAMED]) + more} if kernels else {}
