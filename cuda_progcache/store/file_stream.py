# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in a directory: raw binaries, a sidecar record beside each."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext

from cuda_progcache._util.files import (
    READ_FLAGS,
    identity,
    is_missing,
    is_sharing_violation,
    read_descriptor,
    read_regular,
)
from cuda_progcache.errors import ProgCacheWarning, StoreError, UnsafeRootError
from cuda_progcache.store import pairs
from cuda_progcache.store.base import (
    Entry,
    charged_size,
    check_size_cap,
    entry_digest,
    is_digest,
    program_bytes,
)
from cuda_progcache.store.counters import Tally
from cuda_progcache.store.eviction import use_is_due
from cuda_progcache.store.listing import ListedDirectory
from cuda_progcache.store.maintenance import MaintainedDirectory
from cuda_progcache.store.recent_records import CLOCK_TICK_NS, RecentRecords, Signature, signature
from cuda_progcache.store.records import DamagedRecordError, Version, checksum, decode, encode_record
from cuda_progcache.store.root import DERIVED, Root, default_root
from cuda_progcache.store.size_cap import SizeCap
from cuda_progcache.store.stats import Counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, overload

    from cuda_progcache.store.base import Key, T, Value
    from cuda_progcache.store.in_memory import InMemoryProgramCache
    from cuda_progcache.store.stack import ProgramCacheStack

DURABILITIES = ("fsync", "full", "none")

#: Seconds before each look at an entry that doesn't fit its record. Two writers of one key, each between its two
#: renames, look like damage until the slower one goes on; only young files (in seconds) can be that.
_LOOKS = (0.0, 0.0, 0.001, 0.004, 0.015, 0.030, 0.050)
_YOUNG = 2.0
#: Verified files remembered per store object; 100 bytes each.
_REMEMBERED = 65_536


class FileStreamProgramCache(ListedDirectory, MaintainedDirectory):
    """A persistent store that any number of processes share.

    Each entry is the compiled binary, verbatim, in ``entries/<2>/<62 hex digits of SHA-256(key)>``: cuobjdump, nvdisasm
    and cuda-gdb open it as it lies. Its record, with the checksum of the entry, lies under the same name in
    ``records/``.

    A lookup gives bytes that were published under this key, or it is a miss. Entries that are cut short, altered,
    swapped, or no regular file are moved to ``quarantine/`` and healed by the next write; each file is checked against
    its checksum once per process and change. An entry without a record is a miss and stays where it is.

    Parameters
    ----------
    path : str or os.PathLike, optional
        The directory; made if missing, with mode 0700. Default: ``CUDA_PROGCACHE_DIR`` or the user's cache directory +
        ``cuda-progcache``. If the default can't be made or written, there is one warning and programs are kept in
        memory, before those that can be read there.
    max_size_bytes : int, optional
        Soft cap on the bytes of entries, staging files and long records (beyond 512 bytes each). When a write passes
        it, the least recently used entries are evicted; in a store of more than 64 entries down to 90 % of the cap, of
        more than 4096 entries from a sample of them (:mod:`~cuda_progcache.store.size_cap`). A value larger than the
        cap is refused and counted, and evicts nothing. Processes share one account of what lies there.
    durability : {"fsync", "full", "none"}
        ``"fsync"``: an entry's bytes are on the disk before its name is. ``"full"``: the record and the names, too,
        when a write returns. ``"none"``: as the system likes; what a crash tears, the checksum catches.
    shared : bool
        Other users write here, too: permissions follow the umask. A directory that is group-writable, or setgid, is
        shared by its group without this being said. Any other root that belongs to another user, and one that everyone
        can write to, is refused (:mod:`~cuda_progcache.store.sharing`).

    Raises
    ------
    UnsafeRootError
        The root isn't ours alone and ``shared`` wasn't said.
    StoreError
        ``path`` was given and can't be made or isn't a directory.
    ValueError
        ``max_size_bytes`` or ``durability`` makes no sense.
    """

    _ROOT = Root

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_size_bytes: int | None = None,
        durability: str = "fsync",
        shared: bool = False,
    ) -> None:
        check_size_cap(max_size_bytes)
        if durability not in DURABILITIES:
            raise ValueError(f"durability must be one of {', '.join(DURABILITIES)}, got {durability!r}")
        # Absolute: a later chdir must not move the cache.
        root = self._ROOT(default_root() if path is None else os.path.abspath(os.fspath(path)), shared=shared)
        self._root = root
        self._max_size_bytes = max_size_bytes
        self._durability = durability
        self._counters = Counters()
        self._lock = self._counters.lock
        self._cap = SizeCap(root, max_size_bytes, self._counters)
        self._verified: dict[str, tuple[Signature, str]] = {}  # digest: file that was checked, its checksum
        self._recent = RecentRecords()
        self._writes_uses = True
        self._warned = False
        self._fallback: InMemoryProgramCache | ProgramCacheStack | None = None
        self._tally: Tally | None = None
        try:
            root.open()
            if path is None and not root.writable():
                raise PermissionError(errno.EACCES, "no permission, or a read-only file system", root.staging)
            root.reclaim()
        except UnsafeRootError:
            raise
        except OSError as exc:
            if path is not None:
                raise StoreError(
                    exc.errno, f"can't open a program cache here ({exc.strerror or exc})", root.path
                ) from exc
            self._fall_back(exc)
            return
        if not root.read_only:
            self._tally = Tally.of(root, self, self._counters)

    def _fall_back(self, exc: OSError) -> None:
        """Keep programs in memory, and read those that lie in the root, where that can be done."""
        from cuda_progcache.store.in_memory import InMemoryProgramCache

        memory, root = InMemoryProgramCache(max_size_bytes=self._max_size_bytes), self._root.path
        self._fallback = memory
        reason = exc.strerror or exc
        trouble = f"compiled programs are kept in memory only: {root} can't be made or written ({reason})"
        if os.access(self._root.entries, os.R_OK | os.X_OK):
            from cuda_progcache.store.readonly import ReadOnlyProgramCache
            from cuda_progcache.store.stack import ProgramCacheStack

            self._fallback = ProgramCacheStack((memory, ReadOnlyProgramCache(root, shared=self._root.said_shared)))
            trouble = (
                f"{root} can't be written ({reason}): what lies there is used, "
                "and what is compiled now is kept in memory only"
            )
        warnings.warn(f"{trouble}; set CUDA_PROGCACHE_DIR to a directory of yours", ProgCacheWarning, stacklevel=3)

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
        # What scripts written for cuda.core's store call to hand an entry to cuobjdump.
        return self.path.joinpath("entries", (digest := entry_digest(key))[:2], digest[2:])

    @property
    def roots(self) -> tuple[Path, ...]:
        """The root directory, alone."""
        return (self.path,)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What another process has to pass to the constructor to share this cache; None while it is kept in memory."""
        if self._fallback is not None:
            return None
        return {
            "path": self._root.path,
            "max_size_bytes": self._max_size_bytes,
            "durability": self._durability,
            "shared": self._root.said_shared,
        }

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
        # The path of a warm hit: open, fstat, read, close; no more than that. And of a miss: one question.
        if self._fallback is not None:
            return self._fallback.get(key)
        digest = entry_digest(key)
        path = f"{self._root.entries}{digest[:2]}{os.sep}{digest[2:]}"
        remembered = self._verified.get(digest)
        if remembered is not None:
            data = self._read_again(digest, path, remembered[0])
            if data is not None:
                with self._lock:
                    self._counters.hits += 1
                return data
        elif not pairs.exists(path):
            with self._lock:
                self._counters.misses += 1
            return None
        found = self._examine(digest, with_record=False)
        return None if found is None else found.data

    def _read_again(self, digest: str, path: str, verified: Signature) -> bytes | None:
        """The bytes of the file that was verified; ``None`` if another one lies there, or none."""
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
            return None  # gone or in trouble: the long way says which, and counts it

    def load(self, key: Key) -> Entry | None:
        """The entry with its record, both verified; ``None`` on a miss, and any trouble in the cache is one."""
        if self._fallback is not None:
            return self._fallback.load(key)
        digest = entry_digest(key)
        remembered = self._verified.get(digest)
        if remembered is not None:
            record = self._recent.find(digest, self._root.record_path(digest), remembered[1])
            if record is not None:
                data = self._read_again(digest, self._root.entry_path(digest), remembered[0])
                if data is not None:
                    with self._lock:
                        self._counters.hits += 1
                    return Entry(data, record)
        return self._examine(digest, with_record=True)

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        if self._fallback is not None:
            return self._fallback.load_again(key)
        entry = self.load(key)
        if entry is None:
            self._counters.count("misses", -1)
        return entry

    def _examine(self, digest: str, *, with_record: bool) -> Entry | None:
        """Look an entry up and verify it against its record; counts the lookup."""
        entry_path, record_path = self._root.entry_path(digest), self._root.record_path(digest)
        looked: list[tuple[Signature, Signature]] = []
        for pause in _LOOKS:
            if pause:
                time.sleep(pause)
            try:
                data, st = self._read_entry(digest, entry_path)
                if data is None:
                    self._damaged(entry_path, st)
                    return None
                raw, record_st = read_regular(record_path)
                if raw is None:
                    self._damaged(record_path, record_st)
                    return None
            except OSError as exc:
                if not is_missing(exc):
                    self._counters.count("read_errors")
                self._missed()
                return None
            remembered = self._verified.get(digest)
            if remembered is not None and remembered[0] == signature(st) and len(data) == st.st_size:
                digest_of_data = remembered[1]
            else:
                digest_of_data = checksum(data)
            culprit = (record_path, record_st)
            try:
                for version in decode(raw, digest):
                    if version.checksum == digest_of_data and version.length == len(data):
                        if with_record:
                            version.check()
                        self._remember(digest, st, digest_of_data)
                        record: Any = self._recent.keep(digest, record_st, version) if with_record else {}
                        with self._lock:
                            self._counters.hits += 1
                        return Entry(data, record)
                culprit = (entry_path, st)
            except DamagedRecordError:
                pass  # the record is the culprit, unless a writer is just replacing it
            del data  # not held while it is read again
            looked.append((signature(st), signature(record_st)))
            if len(looked) > 1 and time.time() - max(st.st_mtime, record_st.st_mtime) > _YOUNG:
                break
        if looked[-1] == looked[-2]:
            self._damaged(*culprit)
            return None
        self._missed()
        return None  # replaced faster than it can be looked at

    def _read_entry(self, digest: str, path: str) -> tuple[bytes | None, os.stat_result]:
        data, st = read_regular(path)
        if data is None and any(version.length == st.st_size for version in pairs.versions(self._root, digest)):
            return read_regular(path, largest=None)  # a large one, as its record says
        return data, st

    def _remember(self, digest: str, st: os.stat_result, digest_of_data: str) -> None:
        now = time.time_ns()
        if now - st.st_mtime_ns > CLOCK_TICK_NS:
            if len(self._verified) >= _REMEMBERED:
                self._verified.clear()
            self._verified[digest] = (signature(st), digest_of_data)
        if self._max_size_bytes is not None and self._note_use(digest, st):
            try:
                fd = os.open(self._root.entry_path(digest), READ_FLAGS)
                try:
                    self._write_use(digest, fd, os.fstat(fd))
                finally:
                    os.close(fd)
            except OSError:
                return  # removed since, or in trouble: the bytes are read already

    def _note_use(self, digest: str, st: os.stat_result) -> bool:
        """Note that an entry of this status is read now; whether that is to be written down, too."""
        now = time.time_ns()
        self._cap.used(digest, now)
        return self._writes_uses and use_is_due(st.st_atime_ns, st.st_mtime_ns, now)

    def _write_use(self, digest: str, fd: int, st: os.stat_result) -> None:
        now = time.time_ns()
        try:
            os.utime(
                fd if os.utime in os.supports_fd else self._root.entry_path(digest), ns=(now, min(st.st_mtime_ns, now))
            )
        except OSError:
            # Read-only, or another user's file: from here on the order of use is this process's and the kernel's.
            self._writes_uses = False
            return
        remembered = self._verified.get(digest)
        if remembered is not None and remembered[0] == signature(st):
            self._verified[digest] = (signature(os.fstat(fd)), remembered[1])  # utime moves ctime

    def _missed(self) -> None:
        with self._lock:
            self._counters.misses += 1

    def _damaged(self, path: str, st: os.stat_result) -> None:
        self._root.set_aside(path, identity(st))
        with self._lock:
            self._counters.corrupt += 1
            self._counters.misses += 1

    # Writes

    def __setitem__(self, key: Key, value: Value) -> None:
        if self._fallback is not None:
            self._fallback[key] = value
            return
        digest, data = entry_digest(key), program_bytes(value)
        try:
            self._wrote(self._put(digest, data, b"{}"))
        except OSError as exc:
            self._counters.count("dropped")
            if not is_sharing_violation(exc):
                raise self._write_error(digest, exc) from exc

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Store an entry with its record; see :meth:`ProgramCacheResource.publish`."""
        if self._fallback is not None:
            return self._fallback.publish(key, data, record)
        digest, payload, record_json = entry_digest(key), program_bytes(data), encode_record(record)
        try:
            return self._wrote(self._put(digest, payload, record_json))
        except OSError as exc:
            self._counters.count("dropped")
            self._warn_once(f"{self._write_error(digest, exc)}; compiled programs are used but not kept")
            return False

    def _wrote(self, stored: bool) -> bool:  # noqa: FBT001 - passed on
        if stored:
            with self._lock:
                self._counters.stored += 1
        if self._tally is not None:
            self._tally.flush_if_due()
        return stored

    def _warn_once(self, message: str) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(message, ProgCacheWarning, stacklevel=3)

    def _write_error(self, digest: str, exc: OSError) -> StoreError:
        if isinstance(exc, StoreError):
            return exc
        # Raised by Python code without a number (a wrapped os, a test): it stays the error that callers catch.
        number = errno.EACCES if exc.errno is None and isinstance(exc, PermissionError) else exc.errno
        reason = exc.strerror or str(exc)
        return StoreError(
            number, f"can't store a program in the cache: {reason}", exc.filename or self._root.entry_path(digest)
        )

    def _put(self, digest: str, data: bytes, record_json: bytes, created: float | None = None) -> bool:
        cap = self._max_size_bytes
        charged = charged_size(len(data), len(record_json))
        if cap is not None and charged > cap:
            self._counters.count("refused")
            self._discard(digest)  # a later read must not give the value before
            return False
        version = Version.of(data, record_json, time.time() if created is None else created)
        operation = self._cap.operation(digest, charged)
        if operation is None:
            pairs.publish(self._root, digest, data, version, durability=self._durability)
            self._cap.unannounced([(digest, 0, 0)])  # somebody may have begun one meanwhile
            return True
        with operation:
            before = pairs.charged_on_disk(self._root, digest)
            charged = pairs.publish(self._root, digest, data, version, durability=self._durability)
            operation.done(int(before is None), charged - (before or 0))
        self._cap.wrote(digest)
        return True

    def __delitem__(self, key: Key) -> None:
        if self._fallback is not None:
            del self._fallback[key]
        elif not self._delete(entry_digest(key)):
            raise KeyError(key)

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        if self._fallback is not None:
            self._fallback.remove(digest)
        elif not is_digest(digest) or not self._delete(digest):
            raise KeyError(digest)

    def quarantine(self, digest: str) -> None:
        """Move an entry that proved wrong, and its record, to the quarantine, and count it as corrupt."""
        if self._fallback is not None:
            self._fallback.quarantine(digest)
            return
        entry = pairs.lstat(self._root.entry_path(digest)) if is_digest(digest) else None
        if entry is None:
            raise KeyError(digest)
        charged = pairs.charged_on_disk(self._root, digest) or 0
        if not self._root.set_aside(self._root.entry_path(digest), identity(entry)):
            self.remove(digest)  # no quarantine can be had: gone is safe, too
        else:
            record = pairs.lstat(self._root.record_path(digest))
            if record is not None:
                self._root.set_aside(self._root.record_path(digest), identity(record))
            self._cap.unannounced([(digest, -1, -charged)])
            self._unpin_removed(digest)
        self._counters.count("corrupt")

    def _delete(self, digest: str) -> bool:
        try:
            return self._discard(digest)
        except OSError as exc:
            reason = exc.strerror or exc
            raise StoreError(exc.errno, f"can't remove a program: {reason}", self._root.entry_path(digest)) from exc

    def _discard(self, digest: str) -> bool:
        with self._cap.operation(digest) or nullcontext() as operation:
            charged = operation and pairs.charged_on_disk(self._root, digest)
            if not pairs.remove(self._root, digest):
                return False
            if operation is not None:
                operation.done(-1, -(charged or 0))
        self._cap.last_use.pop(digest, None)
        self._unpin_removed(digest)
        return True

    def clear(self, *, pinned: bool = True) -> None:
        """Remove every entry, record and quarantined file, and what was derived from compiles.

        What is published meanwhile stays.

        Parameters
        ----------
        pinned : bool
            Remove pinned entries, and their pins, too: an emptied cache is empty. ``False`` spares them, and the header
            manifests by which they are found.

        Raises
        ------
        StoreError
            The directory can't be written.
        """
        if self._fallback is not None:
            self._fallback.clear()
            return
        root = self._root
        spared = frozenset() if pinned else self.pins()
        try:
            root.clear(spared=spared)
            for digest in self.pins() - spared:
                self._unpin_removed(digest)
            root.clear_derived(names=("failures",) if spared else DERIVED)
            root.empty_quarantine()
            root.reclaim()
        except OSError as exc:
            raise StoreError(exc.errno, f"can't clear the program cache: {exc.strerror or exc}", root.path) from exc
        self._verified.clear()
        self._recent.clear()
        self._cap.cleared()

    def close(self) -> None:
        """Write down what was counted; the store can be used afterwards."""
        if self._tally is not None:
            self._tally.flush()
