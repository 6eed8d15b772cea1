# SPDX-License-Identifier: Apache-2.0
r"""The one object that a tier keeps per program or header manifest: its sidecar and its bytes, never two keys.

::

    "CPCO\x01\0\0\0"    8 bytes: format 1
    u32, u32             lengths of what follows, little-endian
    sidecar              as on disk (:mod:`cuda_progcache.store.records`), with one version
    data                 the entry, or the manifest

The reader trusts no transport: the lengths have to add up, the sidecar has to be of the name that was asked for, and
the bytes have to have its checksum.
"""

from __future__ import annotations

import struct

from cuda_progcache.store.judge import judge
from cuda_progcache.store.records import Version, encode

_MAGIC = b"CPCO\x01\0\0\0"
_HEAD = struct.Struct("<8sII")


class DamagedObjectError(ValueError):
    """Not the object that was asked for. Never leaves the room: a lookup that meets it is a miss."""


def pack(digest: str, data: bytes, version: Version) -> bytes:
    """The object of an entry.

    Parameters
    ----------
    digest : str
        The name that it is asked for by, 64 hex digits.
    data : bytes
    version : Version
        Vouches for ``data``.
    """
    sidecar = encode(digest, [version])
    return b"%b%b%b" % (_HEAD.pack(_MAGIC, len(sidecar), len(data)), sidecar, data)


def unpack(digest: str, packed: bytes) -> tuple[bytes, Version]:
    """The entry in an object, and the version that vouches for it.

    Raises
    ------
    DamagedObjectError
        It is cut short, altered, of another name, or something else altogether.
    """
    if len(packed) < _HEAD.size:
        raise DamagedObjectError(f"it has {len(packed)} bytes, fewer than a header")
    magic, sidecar_length, length = _HEAD.unpack_from(packed)
    if magic != _MAGIC:
        raise DamagedObjectError("it doesn't start with the header of a program cache object")
    start = _HEAD.size + sidecar_length
    if len(packed) != start + length:
        raise DamagedObjectError(f"it has {len(packed)} bytes instead of {start + length}")
    data = packed[start:]
    verdict = judge(digest, data, packed[_HEAD.size : start])
    if isinstance(verdict, str):
        raise DamagedObjectError(verdict)
    return data, verdict
