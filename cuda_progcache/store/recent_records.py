# SPDX-License-Identifier: Apache-2.0
"""Records that this process has read and verified, so that a warm lookup need not read and parse the sidecar again."""

from __future__ import annotations

import marshal
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Records kept per store object, and the size up to which one is, in bytes.
_KEPT, _LONG = 4096, 65_536
#: A file changed this recently (ns) could change again without its time stamp showing it: verified, not remembered.
CLOCK_TICK_NS = 20_000_000

Signature = tuple[int, int, int, int]


def signature(st: os.stat_result) -> Signature:
    """Inode, size, mtime and ctime (ns): while they stay, the file's content does."""
    return (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class _Kept(NamedTuple):
    signature: Signature  # of the sidecar
    entry_checksum: str  # of the version whose record it is
    # A copy for each caller, who may alter it, in a third of the time that JSON takes. It never leaves the process.
    marshalled: bytes


class RecentRecords:
    """Verified records by digest."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def keep(self, digest: str, sidecar: os.stat_result, entry_checksum: str, record: Mapping[str, Any]) -> None:
        """Remember a record, if its sidecar is old enough for a change to show, and the record isn't huge."""
        if time.time_ns() - sidecar.st_mtime_ns <= CLOCK_TICK_NS:
            return
        marshalled = marshal.dumps(dict(record))
        if len(marshalled) <= _LONG:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[digest] = _Kept(signature(sidecar), entry_checksum, marshalled)

    def find(self, digest: str, sidecar_path: str, entry_checksum: str) -> dict[str, Any] | None:
        """The record of the entry with that checksum, if its sidecar is the file that was read."""
        kept = self._kept.get(digest)
        if kept is None or kept.entry_checksum != entry_checksum:
            return None
        try:
            if signature(os.lstat(sidecar_path)) != kept.signature:
                return None
        except OSError:
            return None
        record: dict[str, Any] = marshal.loads(kept.marshalled)  # noqa: S302  made by this process
        return record

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
