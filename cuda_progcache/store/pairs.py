# SPDX-License-Identifier: Apache-2.0
"""Publishing and listing pairs of files: an entry and its record.

The record is put in place first (it vouches for what it replaces, see :mod:`~cuda_progcache.store.records`), the
entry second. A crash between the two leaves a record without its entry, a miss; or the old entry, still vouched for.
Removal goes the other way round (:mod:`~cuda_progcache.store.removal`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import (
    identity,
    is_missing,
    put_in_place,
    replace,
    unlink_quietly,
    write_new,
)
from cuda_progcache._util.liveness import LITTER_AGE
from cuda_progcache.store.base import EntryInfo, charged_size
from cuda_progcache.store.eviction import USE_RESOLUTION_NS, Candidate
from cuda_progcache.store.judge import glance, lstat, versions
from cuda_progcache.store.records import FRAME_SIZE, Version, encode, replacing
from cuda_progcache.store.root import WRITE_TRIES, Root

#: Don't follow links where that is supported: a dangling link exists, but isn't an entry.
_FOLLOW = os.access not in os.supports_follow_symlinks
_ASKS_EFFECTIVE = os.access in os.supports_effective_ids


def exists(path: str) -> bool:
    """Whether anything exists at ``path``. If not, this takes a third of the time of an exception from ``lstat``."""
    if _ASKS_EFFECTIVE and os.getuid() != os.geteuid():  # set-uid: access() would check the caller's rights
        return os.path.lexists(path)
    return os.access(path, os.F_OK, follow_symlinks=_FOLLOW)


def publish(root: Root, digest: str, data: bytes, version: Version, *, durability: str) -> int:
    """Write an entry and its record. When this returns, readers find them, or what has replaced them.

    Parameters
    ----------
    version : Version
        The version of ``data``.
    durability : {"fsync", "full", "none"}
        See :class:`~cuda_progcache.store.FileStreamProgramCache`.

    Returns
    -------
    int
        Bytes that the entry takes of the size cap.

    Raises
    ------
    OSError
        Nothing was published, or (after the renames) a directory couldn't be synced.
    """
    for attempt in range(WRITE_TRIES):
        try:
            if attempt:
                from cuda_progcache.store.removal import make_way

                time.sleep(min(0.001 * (attempt - 1), 0.010))
                make_way(root, digest)
            charged = _publish(root, digest, data, version, durability)
            if charged is not None:
                return charged
        except OSError as exc:
            in_the_way = is_missing(exc) or isinstance(exc, (FileExistsError, IsADirectoryError))
            if not in_the_way or attempt == WRITE_TRIES - 1:
                raise
    raise OSError(errno.EAGAIN, "other processes keep replacing its record", root.record_path(digest))


def _publish(root: Root, digest: str, data: bytes, version: Version, durability: str) -> int | None:
    """One attempt of :func:`publish`; ``None`` if another writer or a removal interfered: try again."""
    staged = root.stage_path()
    try:
        # The slow step comes first, so that the two renames follow closely on each other.
        entry = write_new(staged, data, mode=root.file_mode, sync=durability != "none", at_least=root.sure_bits)
        try:
            record = _publish_record(root, digest, version, sync=durability == "full")
        except FileNotFoundError:  # the first entry of a shard; checking before each write would cost more
            root.make_shard(digest)
            record = _publish_record(root, digest, version, sync=durability == "full")
        replace(staged, root.entry_path(digest))
    except BaseException:
        unlink_quietly(staged)
        raise
    if not _stands(root, digest, version, entry, record):
        return None
    if durability == "full":
        root.make_durable(digest)
    return charged_size(len(data), record.st_size - FRAME_SIZE)


def _publish_record(root: Root, digest: str, version: Version, *, sync: bool) -> os.stat_result:
    """Write the record that vouches for ``version`` and for what it replaces; return the file's status."""
    path, mode, sure = root.record_path(digest), root.file_mode, root.sure_bits

    def remove(_: str) -> None:
        from cuda_progcache.store.removal import take_record

        take_record(root, digest)  # checked by identity: another writer's may be there by now

    # A new key: a record without an entry isn't read, so it may be written in place.
    with contextlib.suppress(FileExistsError):
        encoded = encode(digest, [version])
        return write_new(path, encoded, mode=mode, sync=sync, at_least=sure, on_failure=remove)
    encoded = encode(digest, replacing(version, versions(root, digest)))
    return put_in_place(path, encoded, staged=root.stage_path(), mode=mode, sync=sync, at_least=sure)


def _stands(root: Root, digest: str, version: Version, entry: os.stat_result, record: os.stat_result) -> bool:
    """Whether a record vouches for the entry that was just renamed, or another entry has replaced it.

    Each record that is put in place is followed by its entry. So a writer whose record was replaced by one that doesn't
    include its version writes both again: the record alone would hide what a third writer has published meanwhile.
    """
    there = lstat(root.record_path(digest))
    if there is not None and identity(there) == identity(record):
        return True
    if any(other.checksum == version.checksum for other in versions(root, digest)):
        return True
    there = lstat(root.entry_path(digest))
    return there is not None and identity(there) != identity(entry)


def charged_on_disk(root: Root, digest: str) -> int | None:
    """Bytes that an entry counts towards the size cap; ``None`` if there is no entry."""
    path = root.entry_path(digest)
    if not exists(path):
        return None
    entry = lstat(path)
    return None if entry is None else charged(entry, lstat(root.record_path(digest)))


def charged(entry: os.stat_result, record: os.stat_result | None) -> int:
    """Bytes that files of this status count towards the size cap."""
    return charged_size(entry.st_size, 0 if record is None else record.st_size - FRAME_SIZE)


def count(root: Root, shard: str) -> int:
    """The number of entries of a shard that have a record."""
    records = root.names(root.records, shard)
    return sum(item.name in records for item in root.files(root.entries, shard))


def info(root: Root, digest: str, last_use: float) -> EntryInfo | None:
    """The description of an entry whose record matches its size; ``None`` if there is none.

    Parameters
    ----------
    last_use : float
        The last use that this process remembers, in seconds since the epoch; the files' time stamps may be later.
    """
    seen = glance(root, digest)
    if seen is None:
        return None
    from pathlib import Path

    version, st = seen
    used = min(max(st.st_atime, st.st_mtime, last_use), time.time())
    path = Path(root.entry_path(digest))
    return EntryInfo(digest, st.st_size, version.created, used, version.checksum, path, version.record())


def digests(root: Root, shard: str) -> list[str]:
    """The entries of a shard that have a record."""
    records = root.names(root.records, shard)
    return [shard + item.name for item in root.files(root.entries, shard) if item.name in records]


def sizes(root: Root) -> Iterator[tuple[str, int, int]]:
    """Digest, bytes of the entry and bytes of the record of every pair."""
    for shard in root.shards():
        records = {item.name: item for item in root.files(root.records, shard)}
        for item in root.files(root.entries, shard):
            record = records.get(item.name)
            if record is not None:
                try:
                    size, record_size = (
                        item.stat(follow_symlinks=False).st_size,
                        record.stat(follow_symlinks=False).st_size,
                    )
                except (FileNotFoundError, PermissionError):  # gone, or another user's
                    continue
                yield shard + item.name, size, record_size


class Glimpse(NamedTuple):
    """What the directories say of an entry that has a record, no file opened.

    Attributes
    ----------
    digest : str
    size : int
        Bytes of the entry.
    written, used : float
        When it was last written, and last written or read, seconds since the epoch.
    """

    digest: str
    size: int
    written: float
    used: float


def glimpses(root: Root, shards: Iterable[str]) -> Iterator[Glimpse]:
    """Every entry of these shards that has a record."""
    for shard in shards:
        records = root.names(root.records, shard)
        for item in root.files(root.entries, shard):
            if item.name not in records:
                continue
            try:
                st = item.stat(follow_symlinks=False)
            except (FileNotFoundError, PermissionError):  # gone, or another user's
                continue
            yield Glimpse(shard + item.name, st.st_size, st.st_mtime, max(st.st_atime, st.st_mtime))


def _brought_back(path: str, moment: int) -> os.stat_result:
    """Give a file of the future (a clock was wrong) a recent time, so that it ages from now on; its status."""
    with contextlib.suppress(OSError):  # another user's, or gone
        os.utime(path, ns=(moment, moment), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    return os.lstat(path)


class Survey(NamedTuple):
    """What lies in a shard, as eviction wants it.

    Attributes
    ----------
    candidates : list of Candidate
        The entries, with record or not.
    forsaken : list of str
        Digests of old records without an entry: a crash has left them.
    """

    candidates: list[Candidate]
    forsaken: list[str]


def survey(root: Root, shard: str, last_use: Mapping[str, int]) -> Survey:
    """Look at a shard.

    Parameters
    ----------
    last_use : Mapping of str to int
        Digest to nanoseconds since the epoch: what this process knows better than the time stamps do.
    """
    records = {item.name: item for item in root.files(root.records, shard)}
    found = []
    for item in root.files(root.entries, shard):
        digest = shard + item.name
        record = records.pop(item.name, None)
        try:
            st = item.stat(follow_symlinks=False)
            now = time.time_ns()
            if max(st.st_atime_ns, st.st_mtime_ns) > now + USE_RESOLUTION_NS:
                st = _brought_back(item.path, now - USE_RESOLUTION_NS)
            size = charged(st, None if record is None else record.stat(follow_symlinks=False))
        except (FileNotFoundError, PermissionError):  # gone, or another user's
            continue
        used = max(st.st_atime_ns, st.st_mtime_ns, last_use.get(digest, 0))
        found.append(Candidate(digest, size, used, identity(st)))
    forsaken = []
    for item in records.values():  # left by a crash, or their entry comes in a moment
        status = lstat(item.path)
        if status is not None and status.st_mtime < time.time() - LITTER_AGE:
            forsaken.append(shard + item.name)
    return Survey(found, forsaken)
