# SPDX-License-Identifier: Apache-2.0
r"""A tier's objects: their names, and the one format of programs and header manifests.

``v1/programs/`` and ``v1/manifests/`` have one object for each digest, with its sidecar and its bytes; ``packs/`` has
bundles.

::

    "CPCO\x01\0\0\0"    8 bytes: format 1
    u32, u32             lengths of what follows, little-endian
    sidecar              as on disk (:mod:`cuda_progcache.store.records`), with one version
    data                 the entry, or the manifest

The reader doesn't trust the transport: the lengths must add up, the sidecar must belong to the requested name, and the
bytes must have the sidecar's checksum.
"""

from __future__ import annotations

import struct

from cuda_progcache.store.judge import judge
from cuda_progcache.store.records import Version, encode

PROGRAMS, MANIFESTS, PACKS = "v1/programs/", "v1/manifests/", "packs/"
#: The maximum size of a header manifest's object, in bytes.
MOST_OF_MANIFEST = 4 << 20
_MAGIC = b"CPCO\x01\0\0\0"
_HEAD = struct.Struct("<8sII")


class DamagedObjectError(ValueError):
    """The data isn't the requested object. It is caught where objects are read: such a lookup is a miss."""


def object_name(tree: str, digest: str) -> str:
    """The name of the object of a program or header manifest."""
    return f"{tree}{digest[:2]}/{digest[2:]}"


def digest_in(name: str) -> str:
    """The digest in an object's name, if it is one."""
    return "".join(name.rsplit("/", 2)[-2:])


def most_bytes(name: str, limit: int) -> int:
    """The maximum size of an object of this name, or in this tree, on a tier with this limit."""
    return min(limit, MOST_OF_MANIFEST) if name.startswith(MANIFESTS) else limit


def pack(digest: str, data: bytes, version: Version) -> bytes:
    """The object of an entry.

    Parameters
    ----------
    digest : str
        The requested name, 64 hex digits.
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
        It is truncated, altered, of another name, or something else altogether.
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
