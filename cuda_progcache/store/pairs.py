# SPDX-License-Identifier: Apache-2.0
"""An entry and its record on disk: two files that are published, removed and listed together.

The record is put in place first (it vouches for what it replaces, see :mod:`~cuda_progcache.store.records`), the
entry second. A crash between the two leaves a record without its entry, a miss; or the old entry, still vouched for.
Removal goes the other way round.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Mapping

from cuda_progcache._util.files import (
    Identity,
    identity,
    is_missing,
    read_regular,
    remove_if_same,
    replace,
    unlink,
    unlink_quietly,
    write_new,
    write_new_seen,
)
from cuda_progcache.store.base import charged_size
from cuda_progcache.store.eviction import USE_RESOLUTION_NS, Candidate
from cuda_progcache.store.records import (
    FRAME_SIZE,
    DamagedRecordError,
    Version,
    decode,
    encode,
    replacing,
)
from cuda_progcache.store.root import LITTER_AGE, WRITE_TRIES, Root

#: Where it can be had, no: a dangling link is something, and not an entry.
_FOLLOW = os.access not in os.supports_follow_symlinks


def exists(path: str) -> bool:
    """Whether anything lies at ``path``; where nothing does, in a third of the time of a failed call's exception."""
    return os.access(path, os.F_OK, follow_symlinks=_FOLLOW)


def lstat(path: str) -> os.stat_result | None:
    """``os.lstat``, ``None`` where nothing is."""
    try:
        return os.lstat(path)
    except OSError as exc:
        if is_missing(exc):
            return None
        raise


def versions(root: Root, digest: str) -> list[Version]:
    """What the record on disk vouches for, newest first; nothing if it is missing or damaged."""
    try:
        raw, _ = read_regular(root.record_path(digest))
        return [] if raw is None else decode(raw, digest)
    except (FileNotFoundError, NotADirectoryError, PermissionError, DamagedRecordError):
        return []


def publish(root: Root, digest: str, data: bytes, version: Version, *, durability: str) -> int:
    """Write an entry and its record; when this returns, a reader finds them or what replaced them.

    Parameters
    ----------
    version : Version
        That of ``data``.
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
                time.sleep(min(0.001 * (attempt - 1), 0.010))
                root.rebuild(digest)
            return _publish(root, digest, data, version, durability)
        except OSError as exc:
            in_the_way = is_missing(exc) or isinstance(exc, (FileExistsError, IsADirectoryError))
            if not in_the_way or attempt == WRITE_TRIES - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _publish(root: Root, digest: str, data: bytes, version: Version, durability: str) -> int:
    staged = root.stage_path()
    try:
        # The slow step first: the two names then change right after each other.
        write_new(staged, data, mode=root.file_mode, sync=durability != "none")
        try:
            record = _publish_record(root, digest, version, sync=durability == "full")
        except FileNotFoundError:  # the first entry of a shard: rarer than asking at each write would be
            root.make_shard(digest)
            record = _publish_record(root, digest, version, sync=durability == "full")
        replace(staged, root.entry_path(digest))
        _settle(root, digest, version, record, sync=durability == "full")
    except BaseException:
        unlink_quietly(staged)
        raise
    if durability == "full":
        root.make_durable(digest)
    return charged_size(len(data), record[1] - FRAME_SIZE)


def _publish_record(root: Root, digest: str, version: Version, *, sync: bool) -> Identity:
    """Write the record that vouches for ``version`` and what it replaces; returns the identity of the file."""
    path = root.record_path(digest)
    # A new key: nobody reads a record without an entry beside it, so it may be written in place.
    with contextlib.suppress(FileExistsError):
        return write_new_seen(path, encode(digest, [version]), mode=root.file_mode, sync=sync)
    staged = root.stage_path()
    try:
        encoded = encode(digest, replacing(version, versions(root, digest)))
        written = write_new_seen(staged, encoded, mode=root.file_mode, sync=sync)
        replace(staged, path)
    except BaseException:
        unlink_quietly(staged)
        raise
    return written


def _settle(root: Root, digest: str, version: Version, ours: Identity, *, sync: bool) -> None:
    """See to it that the record on disk vouches for the entry just renamed.

    Another writer of this key, or a ``clear()``, may have come between the two renames.
    """
    record_path = root.record_path(digest)
    for _ in range(WRITE_TRIES):
        record = lstat(record_path)
        if record is not None and identity(record) == ours:
            return
        if record is None and lstat(root.entry_path(digest)) is None:
            return  # both gone: cleared right after we published
        if any(other.checksum == version.checksum for other in versions(root, digest)):
            return
        ours = _publish_record(root, digest, version, sync=sync)


def remove(root: Root, digest: str) -> bool:
    """Remove an entry and its record; ``False`` if there is no entry.

    Raises
    ------
    OSError
        The directory can't be written.
    """
    entry_path, record_path = root.entry_path(digest), root.record_path(digest)
    record, entry = lstat(record_path), lstat(entry_path)
    if entry is None:
        return False
    if stat.S_ISDIR(entry.st_mode):
        root.set_aside(entry_path, identity(entry))
        return False
    try:
        unlink(entry_path)
    except FileNotFoundError:
        return False
    if record is not None:
        remove_if_same(record_path, identity(record))
    return True


def evict(root: Root, victim: Candidate) -> bool:
    """Remove a victim and its record if they are still what the scan saw; ``False`` where they aren't.

    Raises
    ------
    OSError
        The directory can't be written.
    """
    entry_path, record_path = root.entry_path(victim.digest), root.record_path(victim.digest)
    raw: bytes | None = None
    try:
        raw, status = read_regular(record_path)
        record: os.stat_result | None = status
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        record = lstat(record_path)
    if not remove_if_same(entry_path, victim.seen):
        return False
    if record is not None and remove_if_same(record_path, identity(record)) and lstat(entry_path) is not None:
        _put_back(root, record_path, raw or b"")  # the record was a writer's, whose entry has come just now
    return True


def _put_back(root: Root, record_path: str, raw: bytes) -> None:
    staged = root.stage_path()
    with contextlib.suppress(OSError):  # a newer one lies there, or no links are to be had: the entry is a miss
        write_new(staged, raw, mode=root.file_mode, sync=False)
        os.link(staged, record_path)
    unlink_quietly(staged)


def charged_on_disk(root: Root, digest: str) -> int | None:
    """Bytes that an entry takes of the size cap; ``None`` if there is no entry."""
    path = root.entry_path(digest)
    if not exists(path):
        return None
    entry = lstat(path)
    return None if entry is None else _charged(entry, lstat(root.record_path(digest)))


def _charged(entry: os.stat_result, record: os.stat_result | None) -> int:
    return charged_size(entry.st_size, 0 if record is None else record.st_size - FRAME_SIZE)


def count(root: Root, shard: str) -> int:
    """How many entries of a shard have a record."""
    records = root.names(root.records, shard)
    return sum(item.name in records for item in root.files(root.entries, shard))


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


def _brought_back(path: str, moment: int) -> os.stat_result:
    """Give a file of the future (a clock was wrong) a recent time, so that it ages from now on; its status."""
    with contextlib.suppress(OSError):  # another user's, or gone
        os.utime(path, ns=(moment, moment), follow_symlinks=os.utime not in os.supports_follow_symlinks)
    return os.lstat(path)


def candidates(root: Root, shard: str, last_use: Mapping[str, int]) -> Iterator[Candidate]:
    """A shard's entries, with record or not, as eviction wants them; removes old records without an entry on the way.

    Parameters
    ----------
    last_use : Mapping of str to int
        Digest to nanoseconds since the epoch: what this process knows better than the time stamps do.
    """
    records = {item.name: item for item in root.files(root.records, shard)}
    for item in root.files(root.entries, shard):
        digest = shard + item.name
        record = records.pop(item.name, None)
        try:
            st = item.stat(follow_symlinks=False)
            now = time.time_ns()
            if max(st.st_atime_ns, st.st_mtime_ns) > now + USE_RESOLUTION_NS:
                st = _brought_back(item.path, now - USE_RESOLUTION_NS)
            size = _charged(st, None if record is None else record.stat(follow_symlinks=False))
        except (FileNotFoundError, PermissionError):  # gone, or another user's
            continue
        yield Candidate(digest, size, max(st.st_atime_ns, st.st_mtime_ns, last_use.get(digest, 0)), identity(st))
    for record in records.values():  # left by a crash, or their entry comes in a moment
        st_or_none = lstat(record.path)
        if st_or_none is not None and st_or_none.st_mtime < time.time() - LITTER_AGE:
            remove_if_same(record.path, identity(st_or_none))
