# SPDX-License-Identifier: Apache-2.0
"""The directory under a store: where it is, its tree, its staging area and its quarantine."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import time
from collections.abc import Iterable, Iterator

from cuda_progcache._util.files import (
    Identity,
    identity,
    is_missing,
    remove_if_same,
    replace,
    sync_directory,
    unlink_quietly,
    write_new,
)
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache._util.parallel import for_each
from cuda_progcache._util.user_dirs import user_cache_dir
from cuda_progcache.store.sharing import Sharing

#: A staging file is written and renamed within seconds. Where its owner can't be asked after, this age (in seconds)
#: says that it was left behind; also the age from which a record without an entry is litter.
LITTER_AGE = 3600.0
#: Tries of a write, or an opening, whose directories are removed under it (``rm -rf`` or ``clear()`` beside it).
WRITE_TRIES = 40
#: What other rooms derive from compiles and keep beside the entries (``sharing.write_beside``); it goes with them.
DERIVED = ("failures", "latest", "manifests", "steps", "toolchains", "unkept")
#: Damaged files kept for a look at them; the oldest go first.
QUARANTINE_KEEP = 16

_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag: what lies here can be made again, backups may leave it out.
# For information about cache directory tags see https://bford.info/cachedir/
"""

_serial = itertools.count()


@functools.lru_cache(maxsize=1)
def _owner_name(_pid: int) -> str:
    return str(current_owner())


def default_root() -> str:
    """``CUDA_PROGCACHE_DIR``, else the user's cache directory + ``cuda-progcache``; the environment is read now."""
    chosen = os.environ.get("CUDA_PROGCACHE_DIR")
    if chosen:
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
        self.quarantine = os.path.join(path, "quarantine") + os.sep
        self.pinned = os.path.join(path, "pins") + os.sep
        self._durable: set[str] = set()

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

    def writable(self) -> bool:
        """Whether this process may stage files here."""
        return os.access(self.staging, os.W_OK | os.X_OK)

    def make_shard(self, digest: str) -> None:
        """Make the two directories that hold ``digest``, unless they are there."""
        shard = digest[:2]
        self.mkdir(self.entries + shard)
        self.mkdir(self.records + shard)

    def make_durable(self, digest: str) -> None:
        """Sync the names in the two directories that hold ``digest``; the first time, those of the directories, too."""
        shard = digest[:2]
        sync_directory(self.records + shard)
        sync_directory(self.entries + shard)
        if shard in self._durable:
            return
        sync_directory(self.records)
        sync_directory(self.entries)
        if not self._durable:
            sync_directory(self.path)
            with contextlib.suppress(OSError):  # may be closed to us
                sync_directory(os.path.dirname(self.path))
        self._durable.add(shard)

    def rebuild(self, digest: str) -> None:
        """Make everything again that a write of ``digest`` needs, and move out of the way what blocks it.

        For a write that ran into a ``rm -rf``, a ``clear()`` or a directory where a file should be.
        """
        self._durable.clear()
        self._make_root()
        self.check()
        self._clear_way(self.staging.rstrip(os.sep), directory=True)
        self._make_staging()
        for directory in (self.entries, self.records):
            self._clear_way(directory.rstrip(os.sep), directory=True)
            self.mkdir(directory)
            self._clear_way(directory + digest[:2], directory=True)
        self.make_shard(digest)
        self._clear_way(self.entry_path(digest), directory=False)
        self._clear_way(self.record_path(digest), directory=False)

    def _clear_way(self, path: str, *, directory: bool) -> None:
        try:
            status = os.lstat(path)
        except OSError:
            return  # nothing there
        # A link to a directory is someone's choice of another place; one that leads nowhere is in the way.
        blocks = not os.path.isdir(path) if directory else stat.S_ISDIR(status.st_mode)
        if blocks:
            self.set_aside(path, identity(status))

    def _make_root(self) -> None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            os.mkdir(self.path, 0o777 if self.said_shared else 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(self.path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", self.path) from None
        else:
            if (lost := self._sharing.root) is not None:  # removed under us: as it was, for those who shared it
                self._sharing.open_to_group(self.path, stat.S_IMODE(lost.st_mode) & ~stat.S_IRWXG)

    def _make_staging(self) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.staging, self._sharing.directory_mode)
            # Sticky where it is shared: nobody can swap a file that another user is about to publish.
            self._sharing.open_to_group(self.staging, stat.S_ISVTX if self.shared else 0)

    def mkdir(self, path: str) -> None:
        """Make a directory of the tree, open to those who share it, unless it is there."""
        if self._sharing.root is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, self._sharing.directory_mode)
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

    def reclaim(self) -> int:
        """Remove the staging files of dead writers.

        Returns
        -------
        int
            Bytes of the staging files that are left.
        """
        live = 0
        try:
            items = _scan(self.staging)
        except PermissionError:
            return 0  # another user's cache, that we may only read
        for item in items:
            try:
                status = item.stat(follow_symlinks=False)
            except OSError:
                continue  # its writer renamed it just now
            owner = Owner.parse(item.name.rpartition("-")[0])
            alive = None if owner is None else owner.is_alive()
            if alive is None:
                alive = abs(time.time() - status.st_mtime) < LITTER_AGE
            if not alive and stat.S_ISDIR(status.st_mode):
                with contextlib.suppress(OSError):  # another user's, or not empty and no staging file at all
                    os.rmdir(item.path)
            elif alive or not unlink_quietly(item.path):
                live += status.st_size
        return live

    # Quarantine

    def set_aside(self, path: str, seen: Identity) -> bool:
        """Move what lies at ``path`` into the quarantine, if it is still what was ``seen``.

        Returns
        -------
        bool
            ``False``: something else lies there by now, or the directory can't be written.
        """
        name = os.path.basename(os.path.dirname(path)) + os.path.basename(path)
        target = f"{self.quarantine}{name}-{os.getpid()}-{next(_serial)}"
        try:
            if identity(os.lstat(path)) != seen:
                return False
            self.mkdir(self.quarantine)
            if not os.path.isdir(self.quarantine):
                unlink_quietly(self.quarantine.rstrip(os.sep))
                self.mkdir(self.quarantine)
            replace(path, target)
            self.empty_quarantine(keep=QUARANTINE_KEEP)
        except OSError:
            return False
        return True

    def empty_quarantine(self, *, keep: int = 0) -> None:
        """Remove all but the ``keep`` youngest things in the quarantine."""
        items = [item.path for item in _scan(self.quarantine)]
        if len(items) <= keep:
            return
        items.sort(key=_mtime)
        for path in items[: len(items) - keep]:
            if not unlink_quietly(path):
                import shutil

                shutil.rmtree(path, ignore_errors=True)  # a directory that lay in an entry's place

    # Listing and emptying

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
        names = self.names(self.entries, "") | self.names(self.records, "")
        return sorted(name for name in names if len(name) == 2 and not name.strip("0123456789abcdef"))

    def files(self, tree: str, shard: str) -> Iterator[os.DirEntry[str]]:
        """The regular files of one shard of ``entries`` or ``records``; of another user's closed one, none."""
        try:
            items = _scan(tree + shard)
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

    def clear(self, *, spared: frozenset[str] = frozenset()) -> None:
        """Remove the entries and records, sparing these digests, and what is published meanwhile.

        Raises
        ------
        OSError
            The directory can't be written.
        """
        shards = self.shards()
        looked: Iterable[tuple[str, os.stat_result]] = itertools.chain.from_iterable(map(self._look_at_shard, shards))
        if spared:
            looked = filter(lambda item: "".join(item[0].split(os.sep)[-2:]) not in spared, looked)
        for_each(looked, self._clear_path)
        for shard in shards:
            self._forget_shard(shard)

    def clear_derived(self, *, names: Iterable[str] = DERIVED) -> None:
        """Remove what was derived from compiles; what is written meanwhile stays (OSError: it can't be removed)."""
        for name in names:
            for folder, _, files in os.walk(os.path.join(self.path, name), topdown=False):
                for file in files:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, file))
                with contextlib.suppress(OSError):  # not empty: a writer has just come
                    os.rmdir(folder)

    def _look_at_shard(self, shard: str) -> list[tuple[str, os.stat_result]]:
        # The records are looked at before the first entry goes: one that arrives later belongs to a later entry.
        records = _look(self.records + shard)
        return [*_look(self.entries + shard), *records]

    def _clear_path(self, looked: tuple[str, os.stat_result]) -> None:
        path, status = looked
        if stat.S_ISDIR(status.st_mode):
            self.set_aside(path, identity(status))
        else:
            remove_if_same(path, identity(status))

    def _forget_shard(self, shard: str) -> None:
        self._durable.discard(shard)
        for tree in (self.entries, self.records):
            try:
                os.rmdir(tree + shard)
            except OSError:
                continue  # not empty: a writer has just published there


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as items:
            return list(items)
    except OSError as exc:
        if is_missing(exc):
            return []
        raise


def _look(path: str) -> list[tuple[str, os.stat_result]]:
    looked = []
    for item in _scan(path):
        try:
            looked.append((item.path, item.stat(follow_symlinks=False)))
        except FileNotFoundError:
            continue
    return looked


def _mtime(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0
