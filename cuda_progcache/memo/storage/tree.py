# SPDX-License-Identifier: Apache-2.0
"""A tree of files named by digests, in directories named by the digests' first two digits.

A file is written under a name that starts with a dot and then renamed, so readers see all of it or nothing.
:meth:`FileTree.sweep` removes such files after a crash. A damaged file is moved to ``quarantine/`` and counted. There
are no file locks and no database, so a tree works on NFS, and two trees with the same suffix can be merged by copying
one over the other.
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
#: Nanoseconds within which two changes may give a directory the same mtime (the kernel's clock ticks every 1 to 10 ms).
_TICK = 50_000_000
#: Seconds after which a file under a dot name is taken for a crashed writer's.
_ABANDONED = 3600.0

_serial = itertools.count()


class Signature(NamedTuple):
    """The properties that distinguish a file from one that replaced it."""

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        """Return the signature of a file; the inode number is cut to 63 bits to fit SQLite's integers."""
        return cls(status.st_ino & _SIGNED, status.st_mtime_ns, status.st_size)


class FileTree:
    """Files by key below a directory, which the first write creates; file names end in ``suffix``."""

    def __init__(self, root: str, suffix: str) -> None:
        self.root = os.path.abspath(root)
        self.suffix = suffix
        #: Counts of failures by kind: ``corrupt``, ``refused`` (not signed, or not trusted), ``read_errors``.
        self.counters: Counter[str] = Counter()
        self._listed: dict[str, tuple[int, tuple[Digest, ...]]] = {}

    def path(self, key: str) -> str:
        """Return the path of a key's file; KeyError if the text isn't a key."""
        if len(key) != DIGEST_LENGTH or not key.isalnum() or not key.isascii():
            raise KeyError(key)
        return f"{self.root}/{key[:2]}/{key}{self.suffix}"

    def read(self, key: str) -> bytes:
        """Return the content of a key's file; KeyError if it is missing or can't be read."""
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
        """Create or replace the file of a key; OSError if that isn't possible."""
        path = self.path(key)
        staged = f"{self.root}/{key[:2]}/.{os.getpid()}-{threading.get_ident()}-{next(_serial)}"
        try:
            files.put_in_place(path, data, staged=staged, mode=0o644)
        except FileNotFoundError:
            self.make_root()
            shared = os.stat(self.root).st_mode & 0o020  # a group's cache, whose shards the group can write too
            os.makedirs(os.path.dirname(path), mode=0o777 if shared else 0o755, exist_ok=True)
            files.put_in_place(path, data, staged=staged, mode=0o644)

    def make_root(self) -> None:
        """Create the directory if it is missing, for this user only; OSError if that isn't possible."""
        os.makedirs(self.root, mode=0o700, exist_ok=True)

    def contains(self, key: str) -> bool:
        """Return whether there is a file for a key."""
        return os.path.exists(self.path(key))

    def remove(self, key: str) -> bool:
        """Remove the file of a key; return False if there was none. OSError if that isn't possible."""
        try:
            files.unlink(self.path(key))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def set_aside(self, key: str) -> None:
        """Count a damaged file and, if the mode is ``rw``, move it to ``quarantine/``."""
        self.counters["corrupt"] += 1
        if modes.current() != "rw":
            return
        path = self.path(key)
        target = f"{self.root}/quarantine/{os.path.basename(path)}.{time.time_ns():x}"
        try:
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            files.replace(path, target)
        except OSError:
            files.unlink_quietly(path)  # in a read-only directory it stays, and is a miss again

    # Listing

    def shards(self) -> dict[str, int]:
        """Return the shard directories, each with its mtime (ns), which changes when its content does."""
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
                    continue  # just removed
        return found

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Return the keys of a shard's present files, each with the file's signature."""
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
            pass  # the shard is missing or can't be read
        return found

    @staticmethod
    def settled(mtime_ns: int) -> bool:
        """Return whether the next change will change a directory's mtime; not certain within a tick of the last one."""
        return time.time_ns() - mtime_ns > _TICK

    def _key(self, name: str) -> Digest | None:
        key = name.removesuffix(self.suffix)
        return Digest(key) if len(key) == DIGEST_LENGTH and len(name) == len(key) + len(self.suffix) else None

    def keys_of(self, shard: str, mtime: int | None = None) -> tuple[Digest, ...]:
        """Return the sorted keys of a shard; cached as long as its mtime (ns; read if not given) is the same."""
        directory = f"{self.root}/{shard}"
        try:
            mtime = os.stat(directory).st_mtime_ns if mtime is None else mtime
        except OSError:
            return ()
        known = self._listed.get(shard)
        if known is not None and known[0] == mtime:
            return known[1]
        settled = self.settled(mtime)  # must precede the listing
        try:
            names = os.listdir(directory)
        except OSError:
            return ()
        keys = tuple(sorted(key for name in names if (key := self._key(name)) is not None))
        if settled:
            self._listed[shard] = (mtime, keys)
        return keys

    def keys(self) -> Iterator[Digest]:
        """Return an iterator over every key."""
        return itertools.chain.from_iterable(self.keys_of(shard, mtime) for shard, mtime in self.shards().items())

    def with_prefix(self, prefix: str) -> list[Digest]:
        """Return the keys with a prefix of at least 2 characters, at most two of them."""
        keys = self.keys_of(prefix[:2])
        place = bisect.bisect_left(keys, prefix)
        return [key for key in keys[place : place + 2] if key.startswith(prefix)]

    def sweep(self) -> int:
        """Remove the files that crashed writers left; return how many."""
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
            last = max(status.st_mtime, status.st_ctime)  # a rename changes only the ctime
            return time.time() - last > _ABANDONED and files.unlink_quietly(path)
        except OSError:
            return False

    def is_private(self, key: str) -> bool:
        """Return whether nobody but this user and root can have created or changed the file of a key."""
        path = self.path(key)
        try:
            return all(is_private(os.lstat(place)) for place in (self.root, os.path.dirname(path), path))
        except OSError:
            return False


def is_private(status: os.stat_result) -> bool:
    """Return whether nobody but this user and root can have written a file or directory."""
    if not hasattr(os, "getuid"):
        return True  # on Windows, where a user's directories are taken to be private
    return status.st_uid in {os.getuid(), 0} and not status.st_mode & 0o022
