# SPDX-License-Identifier: Apache-2.0
"""A look at everything in a cache directory: what is whole, what isn't, and what to do about it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cuda_progcache._util.files import Identity, identity, read_regular, remove_if_same, unlink_quietly
from cuda_progcache._util.liveness import Owner
from cuda_progcache.store import pairs
from cuda_progcache.store.base import is_digest
from cuda_progcache.store.records import DamagedRecordError, Version, checksum, decode
from cuda_progcache.store.root import LITTER_AGE, Root

#: What can be wrong, and what helps.
ADVICE = {
    "corrupt": "not the bytes that were published; repair moves it to the quarantine, the next compile heals it",
    "damaged-record": "the entry can't be verified without it; repair moves both to the quarantine",
    "no-record": "never a hit: left by a crash, or put there by hand; adopt it under its key, or repair moves it away",
    "no-entry": "a record alone, left by a crash; repair removes it",
    "unreadable": "the system refuses to read it (permission, a disk in trouble); it is a miss, and stays",
    "foreign": "nothing that this cache puts there; repair moves it to the quarantine",
    "stale-staging": "left behind by a writer that is gone; repair removes it",
}

#: Seconds before each look at what seems wrong: a writer between its two renames is done within them.
_LOOKS = (0.0, 0.002, 0.020, 0.080)


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes
    ----------
    kind : str
        One of :data:`ADVICE`.
    path : str
        The file.
    digest : str or None
        Of the entry it belongs to.
    size : int
        Bytes.
    repaired : bool
        Whether it was moved or removed.
    """

    kind: str
    path: str
    digest: str | None
    size: int
    repaired: bool = False

    @property
    def advice(self) -> str:
        """What it means, and what to do."""
        return ADVICE[self.kind]


class Verification(NamedTuple):
    """What :meth:`FileStreamProgramCache.verify` saw.

    Attributes
    ----------
    ok : int
        Entries whose every byte is as it was published.
    bytes : int
        Bytes of these.
    findings : tuple of Finding
        The rest, in order of their paths.
    """

    ok: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong (any more, after a repair)."""
        return all(finding.repaired for finding in self.findings)


class Pair(NamedTuple):
    """An entry's bytes with the version of its record that vouches for them."""

    data: bytes
    version: Version


class _Wrong(NamedTuple):
    kind: str
    path: str
    seen: Identity


def read_pair(root: Root, digest: str) -> Pair | None:
    """An entry, verified, without counting a lookup or moving anything; ``None`` if it isn't there or isn't whole."""
    found = _look(root, digest)
    return found if isinstance(found, Pair) else None


def _look(root: Root, digest: str) -> Pair | _Wrong | None:
    before: _Wrong | None = None
    for pause in _LOOKS:
        if pause:
            time.sleep(pause)
        found = _judge(root, digest)
        if not isinstance(found, _Wrong):
            return found
        if found == before and abs(time.time() - found.seen[2] / 1e9) > 2.0:
            break  # nobody is at work here
        before = found
    return before


def _judge(root: Root, digest: str) -> Pair | _Wrong | None:
    """One look: a pair, what is wrong with it, or nothing where nothing is."""
    entry_path, record_path = root.entry_path(digest), root.record_path(digest)
    entry, record = pairs.lstat(entry_path), pairs.lstat(record_path)
    if entry is None:
        return None if record is None else _Wrong("no-entry", record_path, identity(record))
    try:
        data, entry = read_regular(entry_path)
        if data is None:
            return _Wrong("corrupt", entry_path, identity(entry))
        if record is None:
            return _Wrong("no-record", entry_path, identity(entry))
        raw, record = read_regular(record_path)
    except (FileNotFoundError, NotADirectoryError):
        return None  # removed just now; the next look says what is left
    except OSError:
        return _Wrong("unreadable", entry_path, identity(entry))
    try:
        digest_of_data = checksum(data)
        for version in decode(raw or b"", digest):
            if (version.length, version.checksum) == (len(data), digest_of_data):
                version.record()
                return Pair(data, version)
    except DamagedRecordError:
        return _Wrong("damaged-record", record_path, identity(record))
    return _Wrong("corrupt", entry_path, identity(entry))


def verify(root: Root, *, repair: bool, removed: Callable[[str, int], object]) -> Verification:
    """Look at every file under ``entries``, ``records`` and ``tmp``.

    Parameters
    ----------
    repair : bool
        Move and remove what is wrong.
    removed : callable
        Told digest and charged bytes of each entry that a repair moves away.

    Raises
    ------
    OSError
        The directory can't be read.
    """
    ok = size = 0
    findings = []
    for digest in _digests(root):
        found = _look(root, digest)
        if isinstance(found, Pair):
            ok, size = ok + 1, size + len(found.data)
        elif found is not None:
            charged = pairs.charged_on_disk(root, digest) if repair else None
            repaired = repair and _repair(root, digest, found)
            if repaired and charged is not None:
                removed(digest, charged)
            findings.append(Finding(found.kind, found.path, digest, found.seen[1], repaired))
    for path, seen in _foreign(root):
        findings.append(Finding("foreign", path, None, seen[1], repair and root.set_aside(path, seen)))
    for path, length in _stale(root):
        findings.append(Finding("stale-staging", path, None, length, repair and unlink_quietly(path)))
    return Verification(ok, size, tuple(sorted(findings, key=lambda finding: finding.path)))


def _repair(root: Root, digest: str, wrong: _Wrong) -> bool:
    try:
        if wrong.kind == "unreadable":
            return False
        if wrong.kind == "no-entry":
            return remove_if_same(wrong.path, wrong.seen)
        if not root.set_aside(wrong.path, wrong.seen):
            return False
        for path in (root.entry_path(digest), root.record_path(digest)):  # the other half says nothing alone
            rest = pairs.lstat(path)
            if rest is not None and _judge(root, digest) is not None:
                root.set_aside(path, identity(rest))
    except OSError:
        return False
    return True


def _digests(root: Root) -> Iterator[str]:
    """Of all that bears the name of an entry or a record, whatever it is."""
    for shard in root.shards():
        names = root.names(root.entries, shard) | root.names(root.records, shard)
        yield from (shard + name for name in sorted(names) if is_digest(shard + name))


def _foreign(root: Root) -> Iterator[tuple[str, Identity]]:
    shards = set(root.shards())
    for tree in (root.entries, root.records):
        for shard in sorted(root.names(tree, "")):
            status = pairs.lstat(tree + shard)
            if status is None:
                continue
            if shard not in shards or not stat.S_ISDIR(status.st_mode):
                yield tree + shard, identity(status)
                continue
            for name in sorted(root.names(tree, shard)):
                path = tree + shard + os.sep + name
                inner = None if is_digest(shard + name) else pairs.lstat(path)
                if inner is not None:
                    yield path, identity(inner)


def _stale(root: Root) -> Iterator[tuple[str, int]]:
    for name in sorted(root.names(root.staging, "")):
        status = pairs.lstat(root.staging + name)
        if status is None:
            continue
        owner = Owner.parse(name.rpartition("-")[0])
        alive = None if owner is None else owner.is_alive()
        if alive is False or (alive is None and time.time() - status.st_mtime > LITTER_AGE):
            yield root.staging + name, status.st_size
