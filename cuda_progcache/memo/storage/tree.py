# SPDX-License-Identifier: Apache-2.0
"""Files named by digests, in directories by their first two digits.

Each is written whole under a name that starts with a dot and then renamed, so readers see all of it or nothing; what
a crash left under such a name is swept up by :meth:`FileTree.sweep`. A file that isn't what was written is moved to
``quarantine/`` and counted. No locks of the file system, no database: it works on NFS, and two trees of a kind are
merged by copying one over the other.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from cuda_progcache._util import files, modes
from cuda_progcache._util.digest import is_hex
from cuda_progcache.memo.digest import DIGEST_LENGTH, Digest

_SIGNED = (1 << 63) - 1
#: Nanoseconds within which two changes of a directory may have one mtime (the kernel's clock ticks every 1 to 10 ms).
_TICK = 50_000_000
#: Seconds after which a file under a dot name is a crashed writer's.
_ABANDONED = 3600.0

_serial = itertools.count()


class Signature(NamedTuple):
    """Tells a file from one that replaced it."""

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """The signature of a file; of its inode number 63 bits, as many as SQLite's integers have."""
        return cls(status.st_ino & _SIGNED, status.st_mtime_ns, status.st_size)


class FileTree:
    """Files by key below a directory, which is made when the first one is written; their names end in ``suffix``."""

    def __init__(self, root: str, suffix: str) -> None:
        self.root = os.path.abspath(root)
        self.suffix = suffix
        #: What went wrong, by kind: ``corrupt``, ``refused`` (not signed, or by another), ``read_errors``.
        self.counters: Counter[str] = Counter()
        self._listed: dict[str, tuple[int, tuple[Digest, ...]]] = {}

    def path(self, key: str) -> str:
        """Where the file of a key lies; KeyError for what is no key."""
        if len(key) != DIGEST_LENGTH or not key.isalnum() or not key.isascii():
            raise KeyError(key)
        return f"{self.root}/{key[:2]}/{key}{self.suffix}"

    def read(self, key: str) -> bytes:
        """The file of a key; KeyError if there is none that can be read."""
        path = self.path(key)
        try:
            data, status = files.read_regular(path)
            if data is None and status.st_size > files.LARGE:
                data, _ = files.read_regular(path, largest=None)
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError as error:
            if not files.is_missing(error):
                self.counters["read_errors"] += 1
            raise KeyError(key) from None
        if data is None:
            raise KeyError(key)
        return data

    def write(self, key: str, data: bytes) -> None:
        """Make, or replace, the file of a key; OSError where that can't be done."""
        path = self.path(key)
        staged = f"{self.root}/{key[:2]}/.{os.getpid()}-{threading.get_ident()}-{next(_serial)}"
        try:
            files.put_in_place(path, data, staged=staged, mode=0o644)
        except FileNotFoundError:
            self.make_root()
            shared = os.stat(self.root).st_mode & 0o020  # a group's cache: its shards are the group's too
            os.makedirs(os.path.dirname(path), mode=0o777 if shared else 0o755, exist_ok=True)
            files.put_in_place(path, data, staged=staged, mode=0o644)

    def make_root(self) -> None:
        """Make the directory, for this user alone, if it isn't there; OSError where that can't be done."""
        os.makedirs(self.root, mode=0o700, exist_ok=True)

    def contains(self, key: str) -> bool:
        """Whether there is a file for a key."""
        return os.path.exists(self.path(key))

    def remove(self, key: str) -> bool:
        """Remove the file of a key; False if there was none. OSError where that can't be done."""
        try:
            files.unlink(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def set_aside(self, key: str) -> None:
        """Move a file that isn't what was written to ``quarantine/``, and count it; in mode ``rw`` alone it moves."""
        self.counters["corrupt"] += 1
        if modes.current() != "rw":
            return
        path = self.path(key)
        target = f"{self.root}/quarantine/{os.path.basename(path)}.{time.time_ns():x}"
        try:
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            files.replace(path, target)
        except OSError:
            files.unlink_quietly(path)  # read-only: it stays, is counted, and misses again

    # Listing

    def shards(self) -> dict[str, int]:
        """Directories that hold files, with the mtime (ns) that tells whether something in them changed."""
        found: dict[str, int] = {}
        try:
            names = os.listdir(self.root)
        except OSError:
            return found
        for name in names:
            if len(name) == 2 and is_hex(name):
                try:
                    found[name] = os.stat(f"{self.root}/{name}").st_mtime_ns
                except OSError:
                    continue  # removed just now
        return found

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Files of a shard as they are now."""
        found: dict[Digest, Signature] = {}
        try:
            with os.scandir(f"{self.root}/{shard}") as entries:
                for entry in entries:
                    key = self._key(entry.name)
                    if key is None:
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    found[key] = Signature.of(status)
        except OSError:
            pass  # no such shard, or not readable: nothing in it can be had
        return found

    @staticmethod
    def settled(mtime_ns: int) -> bool:
        """Whether a directory's mtime will move with the next change: not when it moved within this tick."""
        return time.time_ns() - mtime_ns > _TICK

    def _key(self, name: str) -> Digest | None:
        key = name.removesuffix(self.suffix)
        return Digest(key) if len(key) == DIGEST_LENGTH and len(name) == len(key) + len(self.suffix) else None

    def keys_of(self, shard: str, mtime: int | None = None) -> tuple[Digest, ...]:
        """Sorted keys of a shard; remembered as long as its mtime (ns; asked for if it isn't given) stays."""
        directory = f"{self.root}/{shard}"
        try:
            mtime = os.stat(directory).st_mtime_ns if mtime is None else mtime
        except OSError:
            return ()
        known = self._listed.get(shard)
        if known is not None and known[0] == mtime:
            return known[1]
        settled = self.settled(mtime)  # asked before it is listed
        try:
            names = os.listdir(directory)
        except OSError:
            return ()
        keys = tuple(sorted(key for name in names if (key := self._key(name)) is not None))
        if settled:
            self._listed[shard] = (mtime, keys)
        return keys

    def keys(self) -> Iterator[Digest]:
        """Every key."""
        return itertools.chain.from_iterable(self.keys_of(shard, mtime) for shard, mtime in self.shards().items())

    def with_prefix(self, prefix: str) -> list[Digest]:
        """Keys with a prefix of 2 characters at least, two if there are several."""
        keys = self.keys_of(prefix[:2])
        place = bisect.bisect_left(keys, prefix)
        return [key for key in keys[place : place + 2] if key.startswith(prefix)]

    def sweep(self) -> int:
        """Remove what crashed writers left; gives how many files."""
        removed = 0
        for shard in self.shards():
            directory = f"{self.root}/{shard}"
            try:
                names = [name for name in os.listdir(directory) if name.startswith(".")]
            except OSError:
                continue
            removed += sum(self._remove_abandoned(f"{directory}/{name}") for name in names)
        return removed

    @staticmethod
    def _remove_abandoned(path: str) -> bool:
        try:
            status = os.stat(path)
            last = max(status.st_mtime, status.st_ctime)  # a rename moves the ctime alone
            return time.time() - last > _ABANDONED and files.unlink_quietly(path)
        except OSError:
            return False

    def is_private(self, key: str) -> bool:
        """Whether nobody but this user (and root) can have put this file there, or changed it."""
        path = self.path(key)
        try:
            return all(is_private(os.lstat(place)) for place in (self.root, os.path.dirname(path), path))
        except OSError:
            return False


def is_private(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written a file or directory."""
    if not hasattr(os, "getuid"):
        return True  # Windows: a user's directories are theirs
    return status.st_uid in {os.getuid(), 0} and not status.st_mode & 0o022
