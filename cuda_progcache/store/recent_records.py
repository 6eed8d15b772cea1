# SPDX-License-Identifier: Apache-2.0
"""Records that this process has read and verified, so that a warm lookup needn't read and check them again."""

from __future__ import annotations

import marshal
import os
import time

from cuda_progcache._util.files import Signature, is_settled, signature
from cuda_progcache.store.records import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cuda_progcache.store.records import Version

#: The number of records kept per store object, and the size in bytes up to which one is kept.
_KEPT, _LONG = 4096, 65_536


class VerifiedRecord:
    """A record with a verified checksum. Each call returns a copy, which the caller may change.

    It is parsed on first use and then kept marshalled, since unmarshalling takes a third of the time of parsing. The
    marshalled form never leaves the process.
    """

    __slots__ = ("_kept",)

    def __init__(self, record_json: bytes) -> None:
        self._kept: tuple[bool, bytes] = (False, record_json)  # whether it is marshalled

    def __call__(self) -> dict[str, Any]:
        """A copy of the record."""
        marshalled, raw = self._kept
        if marshalled:
            record: dict[str, Any] = marshal.loads(raw)  # noqa: S302  made by this process
            return record
        record = parse(raw)
        self._kept = (True, marshal.dumps(record))
        return record


class RecentRecords:
    """Verified records by digest."""

    def __init__(self) -> None:
        # Each with the sidecar's signature, and the checksum of the version that the record belongs to.
        self._kept: dict[str, tuple[Signature, str, VerifiedRecord]] = {}

    def keep(self, digest: str, sidecar: os.stat_result, version: Version) -> VerifiedRecord:
        """Keep a version's record, if its sidecar is old enough that a change would show, and it isn't huge."""
        record = VerifiedRecord(version.record_json)
        if is_settled(sidecar, time.time_ns()) and len(version.record_json) <= _LONG:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[digest] = (signature(sidecar), version.checksum, record)
        return record

    def find(self, digest: str, sidecar_path: str, entry_checksum: str) -> Callable[[], dict[str, Any]] | None:
        """The record of the entry with that checksum, if its sidecar is the file that was read."""
        kept = self._kept.get(digest)
        if kept is None or kept[1] != entry_checksum:
            return None
        try:
            st = os.lstat(sidecar_path)
            if (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns) != kept[0]:  # its signature, without a call
                return None
        except OSError:
            return None
        return kept[2]

    def clear(self) -> None:
        """Forget all records."""
        self._kept.clear()
