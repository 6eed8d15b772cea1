# SPDX-License-Identifier: Apache-2.0
"""Header manifests exchanged between machines: what is sent, and what is accepted from another machine.

Anyone who can write to a tier can write a manifest there. Invalid manifests, and header sets that no compile can have
made, are ignored.
"""

from __future__ import annotations

import os

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.fields import replace
from cuda_progcache.keys.headers import MAX_SETS, HeaderManifest, HeaderSet, content_of, sets_in
from cuda_progcache.keys.include_text import FOLDED, NO_PATH

#: The maximum number of places in a set; sets of CUTLASS have several thousand.
_MOST_PLACES = 1 << 15


def for_elsewhere(headers: HeaderSet) -> bytes:
    """Return a manifest with one set for other machines, without the stamps of this machine's files."""
    return content_of([replace(headers, stamps=())])


def from_elsewhere(content: bytes) -> HeaderManifest:
    """Parse another machine's manifest, leaving out file stamps and sets that no compile can have made."""
    return HeaderManifest(None, [replace(one, stamps=()) for one in sets_in(content)[:MAX_SETS] if _makes_sense(one)])


def _makes_sense(headers: HeaderSet) -> bool:
    """Return whether a set from another machine is valid: its indices are in range and its names are file names."""
    known = len(headers.headers)
    roots = (*headers.paths, *headers.linked_paths)
    places = (*headers.absent, *headers.present, *(place for place, _ in headers.perhaps))
    if known + len(places) + len(headers.probes) + len(roots) > _MOST_PLACES or len(headers.plain) not in {0, known}:
        return False
    numbers = (*(at for _, at in headers.perhaps), *(at for pair in headers.links for at in pair))
    if len(headers.links) > known or not all(0 <= number < known for number in numbers):
        return False
    if not NO_PATH <= headers.mentions_file <= FOLDED:
        return False
    digests = (*(header.digest for header in headers.headers), *headers.plain)
    if not all(map(is_digest, (*digests, *filter(None, (headers.entry, headers.stands_for))))):
        return False
    names = (*(place[2] for place in places), *(header.name for header in headers.headers), *headers.probes)
    try:
        for name in names:
            if b"\0" in os.fsencode(name):
                return False
        headers.source.encode()  # as the key encodes it
    except UnicodeEncodeError:
        return False
    return True
