# SPDX-License-Identifier: Apache-2.0
"""What lies in a cache directory: its entries, one by one and in numbers."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable, Iterator

from cuda_progcache._util.files import read_regular
from cuda_progcache.store import pairs
from cuda_progcache.store.base import EntryInfo, ProgramCacheResource, is_digest
from cuda_progcache.store.counters import Tally, persisted
from cuda_progcache.store.records import DamagedRecordError, checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.in_memory import InMemoryProgramCache
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.size_cap import SizeCap
    from cuda_progcache.store.stack import ProgramCacheStack
    from cuda_progcache.store.stats import Counters, StoreStats


class ListedDirectory(ProgramCacheResource):
    """The part of :class:`~cuda_progcache.store.FileStreamProgramCache` that says what there is."""

    _root: Root
    _cap: SizeCap
    _counters: Counters
    _tally: Tally | None
    _fallback: InMemoryProgramCache | ProgramCacheStack | None

    def __len__(self) -> int:
        if self._fallback is not None:
            return len(self._fallback)
        return sum(pairs.count(self._root, shard) for shard in self._root.shards())

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry with a record that fits its size; bytes are not verified, and nothing is counted as a lookup."""
        if self._fallback is not None:
            yield from self._fallback.entries()
            return
        for shard in self._root.shards():
            for digest in pairs.digests(self._root, shard):
                info = self._info(digest)
                if info is not None:
                    yield info

    def info(self, digest: str) -> EntryInfo:
        """One entry, as in :meth:`entries`; :class:`KeyError` if there is none of that digest."""
        if self._fallback is not None:
            return self._fallback.info(digest)
        info = self._info(digest) if is_digest(digest) else None
        if info is None:
            raise KeyError(digest)
        return info

    def _info(self, digest: str) -> EntryInfo | None:
        from pathlib import Path

        path = self._root.entry_path(digest)
        st = pairs.lstat(path)
        if st is None or not stat.S_ISREG(st.st_mode):
            return None
        fitting = [version for version in pairs.versions(self._root, digest) if version.length == st.st_size]
        try:
            if len(fitting) > 1:  # replaced with other bytes of the same length: which of them lie here?
                data, _ = read_regular(path, largest=None)  # of a size that its record names
                fitting = [version for version in fitting if version.checksum == checksum(data or b"")]
            if not fitting:
                return None
            record = fitting[0].record()
        except (OSError, DamagedRecordError):
            return None
        used = max(st.st_atime, st.st_mtime, self._cap.last_use.get(digest, 0) / 1e9)
        return EntryInfo(
            digest, st.st_size, fitting[0].created, min(used, time.time()), fitting[0].checksum, Path(path), record
        )

    def _digests(self, prefix: str) -> Iterable[str]:
        if self._fallback is not None:
            return self._fallback._digests(prefix)
        shards = [prefix[:2]] if len(prefix) >= 2 else [s for s in self._root.shards() if s.startswith(prefix)]
        return [d for shard in shards for d in pairs.digests(self._root, shard) if d.startswith(prefix)]

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        return pairs.sizes(self._root) if self._fallback is None else self._fallback._sizes()

    def stats(self) -> StoreStats:
        """What the directory holds, and what this store object has counted since it was made."""
        if self._fallback is not None:
            return self._fallback.stats()
        entries = size = record_size = 0
        for _, entry_size, sidecar_size in pairs.sizes(self._root):
            entries, size, record_size = entries + 1, size + entry_size, record_size + sidecar_size
        if self._tally is not None:
            all_time = self._tally.all_time()
        else:
            all_time = persisted(self._root).plus(self._counters.totals())
        return self._counters.stats(entries=entries, size=size, record_size=record_size, all_time=all_time)
