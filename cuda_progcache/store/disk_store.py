# SPDX-License-Identifier: Apache-2.0
"""Reading, writing and listing a directory of compiled programs. ``file_stream`` adds maintenance and tiers."""

from __future__ import annotations

import errno
import os
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.files import (
    READ_FLAGS,
    Signature,
    identity,
    is_missing,
    is_settled,
    is_sharing_violation,
    read_descriptor,
    signature,
    unlink_quietly,
)
from cuda_progcache.errors import ProgCacheWarning, StoreError, UnsafeRootError
from cuda_progcache.store import judge, pairs
from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    charged_size,
    entry_digest,
    program_bytes,
)
from cuda_progcache.store.counters import LOOK, Tally, persisted
from cuda_progcache.store.eviction import LastUse, use_is_due
from cuda_progcache.store.recent_records import RecentRecords
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.root import Root
from cuda_progcache.store.stats import Counters, total

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, overload

    from cuda_progcache.store.base import Key, T, Value
    from cuda_progcache.store.size_cap import SizeCap
    from cuda_progcache.store.stats import Span, StoreStats, Totals

#: The number of verified files that a store object remembers; half a kilobyte each, including their keys.
_REMEMBERED = 65_536
#: Errors of opening that mean a wrong path rather than trouble with the disk.
_WRONG_PATH = (errno.ENOTDIR, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


class DiskStore(ProgramCacheResource):
    """The directory as a store: lookups, writes, removals, listings and counters.

    Use its subclass :class:`~cuda_progcache.store.FileStreamProgramCache`, which documents the options.
    """

    _ROOT = Root
    _root: Root
    _max_size_bytes: int | None
    _durability: str
    _strict: bool
    _said_shared: bool
    _alone = True  # there are no levels behind it

    def _begin(self, *, default: bool) -> None:
        """Open the directory, except the default one, which was opened already to see whether it is usable."""
        root = self._root
        self._counters = Counters()
        self._lock = self._counters.lock
        self._last_use = LastUse()
        self._cap_: SizeCap | None = None
        self._verified: dict[str, tuple[Signature, str]] = {}  # digest: signature of the verified file, its checksum
        self._recent = RecentRecords()
        self._writes_uses = True
        self._warned = False
        self._tally: Tally | None = None
        if not default:
            try:
                root.open()
            except UnsafeRootError:
                raise
            except OSError as exc:
                error = StoreError(exc.errno, f"can't open a program cache here ({exc.strerror or exc})", root.path)
                if self._strict or exc.errno in _WRONG_PATH:
                    raise error from exc
                self._warn_once(f"{error}; until it can be made, programs are compiled but not kept", level=4)
        if not root.read_only:
            self._tally = Tally(root, self._counters)
            weakref.finalize(self, self._tally.write)
        if not root.read_only and root.has_litter():
            from cuda_progcache.store.removal import reclaim

            reclaim(root)

    @property
    def _cap(self) -> SizeCap:
        """The size account of the directory, made on first use: lookups don't need it."""
        if self._cap_ is None:
            from cuda_progcache.store.size_cap import SizeCap

            self._cap_ = SizeCap(self._root, self._max_size_bytes, self._counters, self._last_use)
        return self._cap_

    @property
    def path(self) -> Path:
        """The root directory."""
        from pathlib import Path

        return Path(self._root.path)

    @property
    def directory(self) -> str:
        """The root directory, as a string."""
        return self._root.path

    def _path_for_key(self, key: Key) -> Path:
        # Scripts written for cuda.core's store call this to get an entry's path for cuobjdump.
        return self.path.joinpath("entries", (digest := entry_digest(key))[:2], digest[2:])

    @property
    def roots(self) -> tuple[Path, ...]:
        """The root directory, alone."""
        return (self.path,)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The constructor arguments for another process to share this cache; None while it is kept in memory."""
        told = {
            "path": self._root.path,
            "max_size_bytes": self._max_size_bytes,
            "durability": self._durability,
            "shared": self._said_shared,
        }
        if self._strict:
            told["strict"] = True
        return told if self.mode is None else {**told, "mode": self.mode}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._root.path}>"

    # Lookups

    if TYPE_CHECKING:

        @overload
        def get(self, key: Key) -> bytes | None: ...
        @overload
        def get(self, key: Key, default: T) -> bytes | T: ...

    def get(self, key: Key, default: Any = None) -> Any:
        """The entry's bytes, or ``default`` on a miss; trouble in the cache is a miss."""
        data = self._get(key)
        return default if data is None else data

    def __getitem__(self, key: Key) -> bytes:
        data = self._get(key)
        if data is None:
            raise KeyError(key)
        return data

    def _get(self, key: Key) -> bytes | None:
        # The path of a warm hit is open, fstat, read, close and nothing else; that of a miss is one system call.
        digest = entry_digest(key)
        path = f"{self._root.entries}{digest[:2]}{os.sep}{digest[2:]}"
        remembered = self._verified.get(digest)
        if remembered is not None:
            data = self._read_again(digest, path, remembered[0])
            if data is not None:
                with self._lock:
                    self._counters.hits += 1
                if not self._counters.hits & LOOK:
                    self._write_counters_if_due()
                return data
        elif self._alone and not pairs.exists(path):
            self._missed()
            return None
        found = self._examine(digest, key, with_record=False)
        return None if found is None else found.data

    def _read_again(self, digest: str, path: str, verified: Signature) -> bytes | None:
        """The bytes of the file that was verified; ``None`` if it was replaced or is gone."""
        try:
            fd = os.open(path, READ_FLAGS)
            try:
                st = os.fstat(fd)
                if (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns) != verified:  # its signature, without a call
                    return None
                data = read_descriptor(fd, st.st_size)
                if len(data) != st.st_size:
                    return None
                if self._max_size_bytes is not None and self._note_use(digest, st):
                    self._write_use(digest, fd, st)
                return data
            finally:
                os.close(fd)
        except OSError:
            return None  # gone or in trouble: the slow path finds out which, and counts it

    def load(self, key: Key) -> Entry | None:
        """Return the entry with its record, both verified; ``None`` on a miss. Any problem with the cache is a miss."""
        digest = entry_digest(key)
        remembered = self._verified.get(digest)
        if remembered is not None:
            record = self._recent.find(digest, self._root.record_path(digest), remembered[1])
            if record is not None:
                data = self._read_again(digest, self._root.entry_path(digest), remembered[0])
                if data is not None:
                    with self._lock:
                        self._counters.hits += 1
                    if not self._counters.hits & LOOK:
                        self._write_counters_if_due()
                    return Entry(data, record)
        return self._examine(digest, key, with_record=True)

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        entry = self.load(key)
        if entry is None:
            self._counters.count("misses", -1)
        return entry

    def _examine(self, digest: str, key: Key = b"", *, with_record: bool) -> Entry | None:  # noqa: ARG002
        """Look an entry up, verify it against its record, and count the lookup. Subclasses may use ``key``."""
        try:
            seen = judge.look(self._root, digest, known=lambda st: self._known_checksum(digest, st))
        except OSError as exc:
            self._counters.count("read_errors")
            if is_missing(exc):
                raise AssertionError("a look says what is missing") from exc
            self._missed()
            return None
        version = seen.version
        if version is None or seen.data is None or seen.entry is None or seen.record is None:
            if seen.verdict in judge.DAMAGE and seen.entry is not None:
                self._damaged(digest, seen.entry, seen.record)
            self._missed()
            return None
        self._remember(digest, seen.entry, version.checksum)
        record: Any = self._recent.keep(digest, seen.record, version) if with_record else {}
        self._counters.count("hits")
        self._write_counters_if_due()
        return Entry(seen.data, record)

    def _known_checksum(self, digest: str, st: os.stat_result) -> str | None:
        remembered = self._verified.get(digest)
        return remembered[1] if remembered is not None and remembered[0] == signature(st) else None

    def _remember(self, digest: str, st: os.stat_result, checksum: str) -> None:
        if is_settled(st, time.time_ns()):
            if len(self._verified) >= _REMEMBERED:
                self._verified.clear()
            self._verified[digest] = (signature(st), checksum)
        if self._max_size_bytes is not None and self._note_use(digest, st):
            try:
                fd = os.open(self._root.entry_path(digest), READ_FLAGS)
                try:
                    self._write_use(digest, fd, os.fstat(fd))
                finally:
                    os.close(fd)
            except OSError:
                return  # removed meanwhile, or in trouble: the bytes are already read

    def _note_use(self, digest: str, st: os.stat_result) -> bool:
        """Note that an entry of this status is read now; return whether to write that to the disk as well."""
        now = time.time_ns()
        self._last_use.note(digest, now)
        return self._writes_uses and use_is_due(st.st_atime_ns, st.st_mtime_ns, now)

    def _write_use(self, digest: str, fd: int, st: os.stat_result) -> None:
        now = time.time_ns()
        try:
            os.utime(
                fd if os.utime in os.supports_fd else self._root.entry_path(digest), ns=(now, min(st.st_mtime_ns, now))
            )
        except OSError:
            # Read-only, or another user's file: from now on only this process and the kernel record the order of use.
            self._writes_uses = False
            return
        remembered = self._verified.get(digest)
        if remembered is not None and remembered[0] == signature(st):
            self._verified[digest] = (signature(os.fstat(fd)), remembered[1])  # utime moves ctime

    def _missed(self) -> None:
        self._counters.count("misses")
        self._write_counters_if_due()

    def _write_counters_if_due(self) -> None:
        if self._tally is not None:
            self._tally.write_if_due()

    def _damaged(self, digest: str, entry: os.stat_result, record: os.stat_result | None) -> None:
        """Move a damaged entry to the quarantine, and update the size account."""
        from cuda_progcache.store import removal

        self._counters.count("corrupt")
        charged = pairs.charged(entry, record)
        try:
            if removal.take_away(self._root, digest, identity(entry), keep=True, keep_record=False):
                self._cap.unannounced([(digest, -1, -charged)])
                self._cap.damaged()
        except OSError:
            self._counters.count("failed")  # for instance read-only: the entry stays, and is a miss

    # Writes

    def __setitem__(self, key: Key, value: Value) -> None:
        data = program_bytes(value)
        del value  # a frame that can raise holds no ObjectCode, whose repr deadlocks without a driver
        self._assign(key, data)

    def _assign(self, key: Key, value: Value) -> bool:
        digest, data = entry_digest(key), program_bytes(value)
        try:
            return self._wrote(self._put(digest, data, b"{}"))
        except OSError as exc:
            self._dropped(digest, exc, strict=self._strict)
            return False

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Store an entry with its record; see :meth:`ProgramCacheResource.publish`."""
        digest, payload, record_json = entry_digest(key), program_bytes(data), encode_record(record)
        del data  # as above
        try:
            return self._wrote(self._put(digest, payload, record_json))
        except OSError as exc:
            self._dropped(digest, exc, strict=False)
            return False

    def copy(self, key: Key, entry: Entry) -> bool:
        """Store what another store has, too; see :meth:`ProgramCacheResource.copy`."""
        return self._copy(entry_digest(key), entry.data, entry.record_json)

    def _copy(self, digest: str, data: bytes, record_json: bytes) -> bool:
        try:
            return self._wrote(self._put(digest, data, record_json, durability="none"))
        except OSError as exc:
            self._dropped(digest, exc, strict=False)
            return False

    def _dropped(self, digest: str, exc: OSError, *, strict: bool) -> None:
        """Count a write that failed; warn, or raise."""
        self._counters.count("dropped")
        error = self._error("store a program in the cache", exc, self._root.entry_path(digest))
        if strict and not is_sharing_violation(exc):
            raise error from exc
        self._warn_once(f"{error}; compiled programs are used but not kept", level=4)

    def _failed(self, what: str, exc: OSError, path: str) -> None:
        """Count a removal that failed; warn, or raise."""
        self._counters.count("failed")
        error = self._error(what, exc, path)
        if self._strict:
            raise error from exc
        self._warn_once(f"{error}; nothing was removed", level=4)

    def _error(self, what: str, exc: OSError, path: str | None = None) -> StoreError:
        if isinstance(exc, StoreError):
            return exc
        # Raised by Python code without a number (a wrapped os, a test): keep the kind that callers catch.
        number = errno.EACCES if exc.errno is None and isinstance(exc, PermissionError) else exc.errno
        return StoreError(number, f"can't {what}: {exc.strerror or exc}", exc.filename or path or self._root.path)

    def _wrote(self, stored: bool) -> bool:  # noqa: FBT001 - passed on
        self._counters.count("stored", int(stored))
        self._write_counters_if_due()
        return stored

    def _warn_once(self, message: str, *, level: int) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(message, ProgCacheWarning, stacklevel=level)

    def _put(
        self,
        digest: str,
        data: bytes,
        record_json: bytes,
        created: float | None = None,
        durability: str | None = None,
    ) -> bool:
        durability = durability or self._durability
        cap = self._max_size_bytes
        charged = charged_size(len(data), len(record_json))
        if cap is not None and charged > cap:
            self._counters.count("refused")
            self._discard(digest)  # a later read must not return the old value
            return False
        version = Version.of(data, record_json, time.time() if created is None else created)
        if cap is None and not self._accounted():
            pairs.publish(self._root, digest, data, version, durability=durability)
            if self._accounted():  # another process has begun an account meanwhile
                self._cap.unannounced([(digest, 0, 0)])
            return True
        with self._cap.operation(digest, charged) as operation:
            before = pairs.charged_on_disk(self._root, digest)
            charged = pairs.publish(self._root, digest, data, version, durability=durability)
            operation.done(int(before is None), charged - (before or 0))
        self._cap.wrote(digest)
        return True

    def _accounted(self) -> bool:
        """Whether any process keeps a size account of this directory."""
        return self._max_size_bytes is not None or os.access(f"{self._root.path}{os.sep}ledger", os.F_OK)

    def __delitem__(self, key: Key) -> None:
        self._delete(entry_digest(key), key)

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        if not is_digest(digest):
            raise KeyError(digest)
        self._delete(digest, digest)

    def _delete(self, digest: str, asked: object) -> None:
        try:
            if not self._discard(digest):
                raise KeyError(asked)
        except OSError as exc:
            self._failed("remove a program", exc, self._root.entry_path(digest))

    def _discard(self, digest: str, *, keep: bool = False) -> bool:
        """Remove an entry; return whether there was one."""
        from cuda_progcache.store import discard

        return discard.discard(self, digest, keep=keep)

    def clear(self, *, pinned: bool = True) -> None:
        """Remove every entry, record and quarantined file, and the data derived from compiles.

        Entries that are published meanwhile stay.

        Parameters
        ----------
        pinned : bool
            Also remove pinned entries and their pins. ``False`` keeps them, and the header manifests that lead to them.

        Raises
        ------
        StoreError
            The directory can't be written, and the store is ``strict``.
        """
        from cuda_progcache.store import discard

        discard.clear(self, pinned=pinned)

    def close(self) -> None:
        """Save the counters. The store can be used afterwards."""
        if self._tally is not None:
            self._tally.write()

    # Contents

    def __len__(self) -> int:
        return sum(pairs.count(self._root, shard) for shard in self._root.shards())

    def entries(self) -> Iterator[EntryInfo]:
        """Iterate over all entries whose record matches their size. Bytes aren't verified, and no lookup is counted."""
        for shard in self._root.shards():
            for info in map(self._info, pairs.digests(self._root, shard)):
                if info is not None:
                    yield info

    def info(self, digest: str) -> EntryInfo:
        """One entry, as in :meth:`entries`; :class:`KeyError` if there is none of that digest."""
        info = self._info(digest) if is_digest(digest) else None
        if info is None:
            raise KeyError(digest)
        return info

    def _info(self, digest: str) -> EntryInfo | None:
        return pairs.info(self._root, digest, self._last_use.get(digest, 0) / 1e9)

    def all_time(self) -> Totals:
        """The counts of every process that has used this directory; see :attr:`StoreStats.all_time`."""
        return total(self.over_time())

    def over_time(self) -> tuple[Span, ...]:
        """The same by the hour or day in which they were written down, in chronological order."""
        return persisted(self._root, self._counters.totals()) if self._tally is None else self._tally.over_time()

    def _digests(self, prefix: str) -> Iterable[str]:
        shards = [prefix[:2]] if len(prefix) >= 2 else [s for s in self._root.shards() if s.startswith(prefix)]
        return [d for shard in shards for d in pairs.digests(self._root, shard) if d.startswith(prefix)]

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        return pairs.sizes(self._root)

    def stats(self) -> StoreStats:
        """What the directory holds, and what this store object has counted since it was made."""
        entries = size = record_size = 0
        for _, entry_size, sidecar_size in self._sizes():
            entries, size, record_size = entries + 1, size + entry_size, record_size + sidecar_size
        return self._counters.stats(entries=entries, size=size, record_size=record_size, all_time=self.all_time())

    def pins(self) -> frozenset[str]:
        """The digests of the pinned entries."""
        return frozenset(filter(is_digest, self._root.pins()))

    def _unpin_removed(self, digest: str) -> None:
        unlink_quietly(self._root.pinned + digest)

    def _asked(self, what: str, do: Callable[[], T], path: str | None = None) -> T:
        """Call ``do`` and return its result; turn an error of the disk into a StoreError."""
        try:
            return do()
        except OSError as exc:
            raise self._error(what, exc, path) from exc
