# SPDX-License-Identifier: Apache-2.0
"""The directory under a store: where it is, its tree, its staging area, and what its names are."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import time

from cuda_progcache._util import modes
from cuda_progcache._util.digest import is_hex
from cuda_progcache._util.files import (
    Signature,
    is_missing,
    is_settled,
    put_in_place,
    signature,
    sync_directory,
    write_new,
)
from cuda_progcache._util.liveness import current_owner
from cuda_progcache._util.user_dirs import user_cache_dir
from cuda_progcache.errors import ModeError
from cuda_progcache.store.sharing import Sharing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Tries of a write, or an opening, whose directories are removed under it (``rm -rf`` or ``clear()`` beside it).
WRITE_TRIES = 40

_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag: what lies here can be made again, backups may leave it out.
# For information about cache directory tags see https://bford.info/cachedir/
"""

_serial = itertools.count()


@functools.lru_cache(maxsize=1)
def _owner_name(_pid: int) -> str:
    return str(current_owner())


def default_root() -> str:
    """``CUDA_PROGCACHE_DIR``, else the user's cache directory + ``cuda-progcache``; the environment is read now.

    Raises
    ------
    OSError
        No home directory is known of this user.
    ModeError
        The variable names a mode, as ``off``, where a directory belongs.
    """
    chosen = os.environ.get("CUDA_PROGCACHE_DIR")
    if chosen:
        if chosen in modes.MODES:
            raise ModeError(
                f"CUDA_PROGCACHE_DIR={chosen} would make a directory so named: set {modes.VARIABLE}={chosen} for the "
                f"mode, or CUDA_PROGCACHE_DIR=./{chosen} for the directory"
            )
        return os.path.abspath(os.path.expanduser(chosen))
    return os.path.join(user_cache_dir(), "cuda-progcache")


class Root:
    """The directory tree of a store.

    Parameters
    ----------
    path : str
        Absolute.
    shared : bool
        Other users write here, too; see :mod:`~cuda_progcache.store.sharing`.

    Attributes
    ----------
    read_only : bool
        Whether nothing may be written under it, not even a time stamp.
    said_shared : bool
        What ``shared`` was.
    """

    read_only = False

    def __init__(self, path: str, *, shared: bool) -> None:
        self.path = path
        self.said_shared = shared
        self._sharing = Sharing(shared)
        self.entries = os.path.join(path, "entries") + os.sep
        self.records = os.path.join(path, "records") + os.sep
        self.staging = os.path.join(path, "tmp") + os.sep
        # What is being removed. Not in tmp/: there, in a shared root, nobody may remove another user's files.
        self.removed = os.path.join(path, "removed") + os.sep
        self.quarantine = os.path.join(path, "quarantine") + os.sep
        self.pinned = os.path.join(path, "pins") + os.sep
        self._durable: dict[str, Signature] = {}  # directories whose names are on the disk, as they were then

    def entry_path(self, digest: str) -> str:
        """Where the binary lies."""
        return f"{self.entries}{digest[:2]}{os.sep}{digest[2:]}"

    def record_path(self, digest: str) -> str:
        """Where its record lies."""
        return f"{self.records}{digest[:2]}{os.sep}{digest[2:]}"

    # Making the tree

    def open(self) -> None:
        """Make the tree, or what is missing of it, and check it. A tree that can only be read is fine.

        Raises
        ------
        UnsafeRootError
            See :meth:`check`.
        OSError
            There is no such directory and it can't be made.
        """
        for attempt in range(WRITE_TRIES):
            try:
                self._make_root()
                self.check()
                break
            except FileNotFoundError:  # removed again (`rm -rf` beside it)
                if attempt == WRITE_TRIES - 1:
                    raise
        try:
            self._make_staging()
            for directory in (self.entries, self.records):
                self.mkdir(directory)
            write_new(self.path + os.sep + "CACHEDIR.TAG", _TAG, mode=0o666 if self.shared else 0o644, sync=False)
        except OSError:
            return  # the tag is there; or all is read-only: lookups don't mind, and a write will say what is the matter

    def check(self) -> None:
        """Find out who shares the root, and refuse one where others decide what runs on the GPU.

        Raises
        ------
        UnsafeRootError
            See :meth:`Sharing.of <cuda_progcache.store.sharing.Sharing.of>`.
        """
        self._sharing = Sharing.of(self.path, shared=self.said_shared)

    @property
    def shared(self) -> bool:
        """Whether others write here, too: as was said, or as the directory was marked when it was last checked."""
        return self._sharing.shared

    @property
    def file_mode(self) -> int:
        """Permission bits of a new file, before the umask."""
        return self._sharing.file_mode

    @property
    def sure_bits(self) -> int:
        """Those that the umask doesn't take away."""
        return self._sharing.sure_bits

    def writable(self) -> bool:
        """Whether this process may stage files here."""
        return os.access(self.staging, os.W_OK | os.X_OK)

    def make_shard(self, digest: str) -> None:
        """Make the two directories that hold ``digest``, unless they are there."""
        shard = digest[:2]
        self.mkdir(self.entries + shard)
        self.mkdir(self.records + shard)

    def make_durable(self, digest: str) -> None:
        """Sync the names in the two directories that hold ``digest``, and theirs if these may be new."""
        shard = digest[:2]
        sync_directory(self.records + shard)
        sync_directory(self.entries + shard)
        for parent in (self.records, self.entries, self.path):
            self._sync_if_new(parent)
        with contextlib.suppress(OSError):  # may be closed to us
            self._sync_if_new(os.path.dirname(self.path))

    def _sync_if_new(self, directory: str) -> None:
        """Sync a directory unless it is as it was when this store last did: another process may make its names anew."""
        before = os.stat(directory)
        if self._durable.get(directory) != signature(before):
            sync_directory(directory)
            if is_settled(before, time.time_ns()):
                self._durable[directory] = signature(before)

    def rebuild(self, digest: str) -> None:
        """Make everything again that a write of ``digest`` needs, after a ``rm -rf`` or a ``clear()`` beside it."""
        self._make_root()
        self.check()
        self._make_staging()
        for directory in (self.entries, self.records):
            self.mkdir(directory)
        self.make_shard(digest)

    def _make_root(self) -> None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            os.mkdir(self.path, 0o777 if self.said_shared else 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(self.path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", self.path) from None
        else:
            # Removed under us: as it was, for those who shared it.
            lost = self._sharing.root
            self._sharing.open_to_group(self.path, 0 if lost is None else stat.S_IMODE(lost.st_mode) & ~stat.S_IRWXG)

    def _make_staging(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.staging, self._sharing.directory_mode)
            # Sticky where it is shared: nobody can swap a file that another user is about to publish.
            self._sharing.open_to_group(self.staging, stat.S_ISVTX if self.shared else 0)

    def mkdir(self, path: str) -> None:
        """Make a directory of the tree, open to those who share it, unless it is there."""
        if self._sharing.root is None:
            # FileNotFoundError: made, and removed again at once by another's clear().
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, self._sharing.directory_mode)
                with contextlib.suppress(FileNotFoundError):
                    self._sharing.open_to_group(path)
        elif not os.path.lexists(path):
            # Under a name of ours first: another user's write must not meet it before it is open to that user.
            staged = self.stage_path()
            os.mkdir(staged, self._sharing.directory_mode)
            try:
                self._sharing.open_to_group(staged)
                os.rename(staged, path)  # onto another's that is still empty, too
            except OSError:
                os.rmdir(staged)
                if not os.path.lexists(path):
                    raise

    # Staging

    def stage_path(self) -> str:
        """A new name in the staging area that says whose it is."""
        return f"{self.staging}{_owner_name(os.getpid())}-{next(_serial)}"

    def place(self, path: str, data: bytes, *, new: bool = False) -> None:
        """Put a file of accounts in place, in one step; all who share the root can append to it.

        Parameters
        ----------
        new : bool
            Leave what lies there, if something does.

        Raises
        ------
        OSError
            Nothing has changed.
        """
        bits = self._sharing.account_bits
        with contextlib.suppress(FileExistsError):
            put_in_place(path, data, staged=self.stage_path(), mode=bits, at_least=bits, new=new)

    def aside_path(self) -> str:
        """A new name for what is being removed, that says by whom."""
        return f"{self.removed}{_owner_name(os.getpid())}-{next(_serial)}"

    def has_litter(self) -> bool:
        """Whether there may be something that dead processes have left."""
        return self.has_staged() or _holds_something(self.removed)

    def has_staged(self) -> bool:
        """Whether a writer is at work, or was when it died."""
        return _holds_something(self.staging)

    # Listing

    def is_pinned(self, digest: str) -> bool:
        """Whether eviction spares that entry."""
        return os.path.lexists(self.pinned + digest)

    def pins(self) -> set[str]:
        """The digests of the entries that eviction spares."""
        try:
            return set(os.listdir(self.pinned))
        except OSError as exc:
            if is_missing(exc):
                return set()
            raise

    def shards(self) -> list[str]:
        """The two-digit directories that there are."""
        return sorted(filter(is_shard, self.names(self.entries, "") | self.names(self.records, "")))

    def files(self, tree: str, shard: str) -> Iterator[os.DirEntry[str]]:
        """The regular files of one shard of ``entries`` or ``records``; of another user's closed one, none."""
        try:
            items = scan(tree + shard)
        except PermissionError:
            return
        yield from (item for item in items if len(item.name) == 62 and item.is_file(follow_symlinks=False))

    def names(self, tree: str, shard: str) -> set[str]:
        """What lies in one shard of ``entries`` or ``records``, files or not."""
        try:
            return set(os.listdir(tree + shard))
        except OSError as exc:
            if is_missing(exc) or (shard and isinstance(exc, PermissionError)):
                return set()
            raise


def _holds_something(directory: str) -> bool:
    try:
        return bool(os.listdir(directory))
    except OSError:
        return False


def is_shard(name: str) -> bool:
    """Whether a directory of that name belongs in ``entries`` and ``records``."""
    return len(name) == 2 and is_hex(name)


def scan(path: str) -> list[os.DirEntry[str]]:
    """What lies in a directory; nothing where there is none."""
    try:
        with os.scandir(path) as items:
            return list(items)
    except OSError as exc:
        if is_missing(exc):
            return []
        raise
