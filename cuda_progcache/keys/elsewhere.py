# SPDX-License-Identifier: Apache-2.0
"""Header manifests on their way between machines: what is sent there, and what of another's is believed.

Whoever can write to a tier can write such a manifest. What isn't one, and a set that no compile made, is left out.
"""

from __future__ import annotations

import os

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.fields import replace
from cuda_progcache.keys.headers import MAX_SETS, HeaderManifest, HeaderSet, content_of, sets_in
from cuda_progcache.keys.include_text import FOLDED, NO_PATH

#: Places of a set; CUTLASS has some thousands.
_MOST_PLACES = 1 << 15


def for_elsewhere(headers: HeaderSet) -> bytes:
    """A manifest with one set, for other machines: without the stamps of this one's files."""
    return content_of([replace(headers, stamps=())])


def from_elsewhere(content: bytes) -> HeaderManifest:
    """A manifest of another machine, whose files' stamps say nothing here; without sets that no compile made."""
    return HeaderManifest(None, [replace(one, stamps=()) for one in sets_in(content)[:MAX_SETS] if _makes_sense(one)])


def _makes_sense(headers: HeaderSet) -> bool:
    """Whether a set from elsewhere is one that can be looked up: its numbers in range, its names names of files."""
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
        headers.source.encode()  # as a key does it
    except UnicodeEncodeError:
        return False
    return True
