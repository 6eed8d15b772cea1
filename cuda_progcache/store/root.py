# SPDX-License-Identifier: Apache-2.0
"""The directory of a store: its location, its tree, its staging area, and its file names."""

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

#: Attempts of a write, or of opening, whose directories are removed by a concurrent ``rm -rf`` or ``clear()``.
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
    """The default directory: ``CUDA_PROGCACHE_DIR``, or ``cuda-progcache`` in the user's cache directory.

    The environment is read on each call.

    Raises
    ------
    OSError
        The user's home directory isn't known.
    ModeError
        The variable is set to a mode, such as ``off``, instead of a directory.
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
        Other users write here as well; see :mod:`~cuda_progcache.store.sharing`.

    Attributes
    ----------
    read_only : bool
        Whether nothing may be written under it, not even a time stamp.
    said_shared : bool
        The ``shared`` argument.
    """

    read_only = False

    def __init__(self, path: str, *, shared: bool) -> None:
        self.path = path
        self.said_shared = shared
        self._sharing = Sharing(shared)
        self.entries = os.path.join(path, "entries") + os.sep
        self.records = os.path.join(path, "records") + os.sep
        self.staging = os.path.join(path, "tmp") + os.sep
        # Files that are being removed. Not in tmp/, where users of a shared root can't remove each other's files.
        self.removed = os.path.join(path, "removed") + os.sep
        self.quarantine = os.path.join(path, "quarantine") + os.sep
        self.pinned = os.path.join(path, "pins") + os.sep
        self._durable: dict[str, Signature] = {}  # directories that were synced, with their signature at that time

    def entry_path(self, digest: str) -> str:
        """The path of an entry's binary."""
        return f"{self.entries}{digest[:2]}{os.sep}{digest[2:]}"

    def record_path(self, digest: str) -> str:
        """The path of an entry's record."""
        return f"{self.records}{digest[:2]}{os.sep}{digest[2:]}"

    # Creating the tree

    def open(self) -> None:
        """Create what is missing of the tree, and check it. A read-only tree is accepted.

        Raises
        ------
        UnsafeRootError
            See :meth:`check`.
        OSError
            The directory doesn't exist and can't be created.
        """
        for attempt in range(WRITE_TRIES):
            try:
                self._make_root()
                self.check()
                break
            except FileNotFoundError:  # removed again by a concurrent `rm -rf`
                if attempt == WRITE_TRIES - 1:
                    raise
        try:
            self._make_staging()
            for directory in (self.entries, self.records):
                self.mkdir(directory)
            write_new(self.path + os.sep + "CACHEDIR.TAG", _TAG, mode=0o666 if self.shared else 0o644, sync=False)
        except OSError:
            return  # the tag exists, or the tree is read-only: lookups still work, and a write reports the error

    def check(self) -> None:
        """Determine who shares the root, and refuse one where others choose what runs on the GPU.

        Raises
        ------
        UnsafeRootError
            See :meth:`Sharing.of <cuda_progcache.store.sharing.Sharing.of>`.
        """
        self._sharing = Sharing.of(self.path, shared=self.said_shared)

    @property
    def shared(self) -> bool:
        """Whether others write here, by the ``shared`` argument or by the directory's permissions."""
        return self._sharing.shared

    @property
    def file_mode(self) -> int:
        """Permission bits of a new file, before the umask."""
        return self._sharing.file_mode

    @property
    def sure_bits(self) -> int:
        """Permission bits that are set whatever the umask."""
        return self._sharing.sure_bits

    def writable(self) -> bool:
        """Whether this process may stage files here."""
        return os.access(self.staging, os.W_OK | os.X_OK)

    def make_shard(self, digest: str) -> None:
        """Create the two directories that hold ``digest``, if missing."""
        shard = digest[:2]
        self.mkdir(self.entries + shard)
        self.mkdir(self.records + shard)

    def make_durable(self, digest: str) -> None:
        """Sync the two directories that hold ``digest``, and their parents if they may be new."""
        shard = digest[:2]
        sync_directory(self.records + shard)
        sync_directory(self.entries + shard)
        for parent in (self.records, self.entries, self.path):
            self._sync_if_new(parent)
        with contextlib.suppress(OSError):  # may not be readable
            self._sync_if_new(os.path.dirname(self.path))

    def _sync_if_new(self, directory: str) -> None:
        """Sync a directory, unless it is unchanged from when this store last did: others may recreate its names."""
        before = os.stat(directory)
        if self._durable.get(directory) != signature(before):
            sync_directory(directory)
            if is_settled(before, time.time_ns()):
                self._durable[directory] = signature(before)

    def rebuild(self, digest: str) -> None:
        """Recreate the directories that a write of ``digest`` needs, after a concurrent ``rm -rf`` or ``clear()``."""
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
            # Removed by others: recreate it with the same sharing.
            lost = self._sharing.root
            self._sharing.open_to_group(self.path, 0 if lost is None else stat.S_IMODE(lost.st_mode) & ~stat.S_IRWXG)

    def _make_staging(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.staging, self._sharing.directory_mode)
            # Sticky if shared, so that nobody can swap a file that another user is about to publish.
            self._sharing.open_to_group(self.staging, stat.S_ISVTX if self.shared else 0)

    def mkdir(self, path: str) -> None:
        """Create a directory of the tree, open to those who share it, if missing."""
        if self._sharing.root is None:
            # FileNotFoundError: it was created, and at once removed by another process's clear().
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, self._sharing.directory_mode)
                with contextlib.suppress(FileNotFoundError):
                    self._sharing.open_to_group(path)
        elif not os.path.lexists(path):
            # Under a name of ours first, so that another user's write doesn't find it before that user may write to it.
            staged = self.stage_path()
            os.mkdir(staged, self._sharing.directory_mode)
            try:
                self._sharing.open_to_group(staged)
                os.rename(staged, path)  # also onto another process's, while that is empty
            except OSError:
                os.rmdir(staged)
                if not os.path.lexists(path):
                    raise

    # Staging

    def stage_path(self) -> str:
        """A new name in the staging area that identifies this process."""
        return f"{self.staging}{_owner_name(os.getpid())}-{next(_serial)}"

    def place(self, path: str, data: bytes, *, new: bool = False) -> None:
        """Put a log file in place atomically; all who share the root can append to it.

        Parameters
        ----------
        new : bool
            Leave an existing file alone.

        Raises
        ------
        OSError
            Nothing has changed.
        """
        bits = self._sharing.account_bits
        with contextlib.suppress(FileExistsError):
            put_in_place(path, data, staged=self.stage_path(), mode=bits, at_least=bits, new=new)

    def aside_path(self) -> str:
        """A new name for a file that is being removed; it identifies this process."""
        return f"{self.removed}{_owner_name(os.getpid())}-{next(_serial)}"

    def has_litter(self) -> bool:
        """Whether there may be files that dead processes left behind."""
        return self.has_staged() or _holds_something(self.removed)

    def has_staged(self) -> bool:
        """Whether there are staged files, of a live or a dead writer."""
        return _holds_something(self.staging)

    # Listing

    def is_pinned(self, digest: str) -> bool:
        """Whether an entry is pinned."""
        return os.path.lexists(self.pinned + digest)

    def pins(self) -> set[str]:
        """The digests of the pinned entries."""
        try:
            return set(os.listdir(self.pinned))
        except OSError as exc:
            if is_missing(exc):
                return set()
            raise

    def shards(self) -> list[str]:
        """The names of the existing shards: two hex digits."""
        return sorted(filter(is_shard, self.names(self.entries, "") | self.names(self.records, "")))

    def files(self, tree: str, shard: str) -> Iterator[os.DirEntry[str]]:
        """The regular files of one shard of ``entries`` or ``records``; none if another user has closed it."""
        try:
            items = scan(tree + shard)
        except PermissionError:
            return
        yield from (item for item in items if len(item.name) == 62 and item.is_file(follow_symlinks=False))

    def names(self, tree: str, shard: str) -> set[str]:
        """All names in one shard of ``entries`` or ``records``, files or not."""
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
    """The contents of a directory; empty if there is none."""
    try:
        with os.scandir(path) as items:
            return list(items)
    except OSError as exc:
        if is_missing(exc):
            return []
        raise
