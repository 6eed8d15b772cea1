# SPDX-License-Identifier: Apache-2.0
"""Verification of everything in a cache directory: what is intact, what isn't, and what to do about it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.files import identity
from cuda_progcache.store import pairs, removal
from cuda_progcache.store.judge import CORRUPT, DAMAGED_RECORD, NO_ENTRY, NO_RECORD, NOTHING, Look, look

if TYPE_CHECKING:
    from cuda_progcache.store.root import Root

#: What can be wrong, and what to do.
ADVICE = {
    "corrupt": "not the bytes that were published; repair moves it to the quarantine, and the next compile replaces it",
    "damaged-record": "the entry can't be verified without it; repair moves both to the quarantine",
    "no-record": "never a hit: left by a crash, or stored by hand; adopt it under its key, or repair moves it away",
    "no-entry": "a record without an entry, left by a crash; repair removes it",
    "unreadable": "the system can't read it (no permission, a failing disk); it is a miss, and stays in place",
    "foreign": "not a file of this cache; repair moves it to the quarantine",
    "stale-staging": "left behind by a process that is gone; repair removes it, or puts back what it had moved",
}

#: Seconds that active writers are given to finish.
_PATIENCE = 10.0
_WRONG = frozenset({CORRUPT, DAMAGED_RECORD, NO_RECORD, NO_ENTRY})


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
    """The result of :meth:`FileStreamProgramCache.verify`.

    Attributes
    ----------
    ok : int
        The number of entries whose bytes are all as published.
    bytes : int
        The sum of their sizes.
    findings : tuple of Finding
        Everything that is wrong, sorted by path.
    """

    ok: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, or is still wrong after a repair."""
        return all(finding.repaired for finding in self.findings)


def verify(root: Root, *, repair: bool, removed: Callable[[str, int], object]) -> Verification:
    """Check every file under ``entries``, ``records``, ``tmp`` and ``leases``.

    Parameters
    ----------
    repair : bool
        Move or remove what is wrong.
    removed : callable
        Called with the digest and charged bytes of each entry that a repair moves away.

    Raises
    ------
    OSError
        The directory can't be read.
    """
    ok = size = 0
    findings = []
    stuck: set[str] = set()
    for digest in _digests(root):
        try:
            seen = _look(root, digest, stuck)
        except OSError:
            findings.append(Finding("unreadable", root.entry_path(digest), digest, 0))
            continue
        if seen.data is not None and seen.version is not None:
            ok, size = ok + 1, size + len(seen.data)
        elif isinstance(seen.verdict, str) and seen.verdict != NOTHING:
            findings.append(_finding(root, digest, seen, seen.verdict, repair and _repair(root, digest, seen, removed)))
    for path, identified in removal.foreign(root):
        repaired = repair and removal.set_aside(root, path, identified)
        findings.append(Finding("foreign", path, None, identified[1], repaired))
    dead = [(path, status.st_size) for path, status, dead in removal.left_behind(root) if dead]
    if dead and repair:
        removal.reclaim(root)
    for path, length in dead:
        findings.append(Finding("stale-staging", path, None, length, repair and not os.path.lexists(path)))
    return Verification(ok, size, tuple(sorted(findings, key=lambda finding: finding.path)))


def _look(root: Root, digest: str, stuck: set[str]) -> Look:
    """Check a pair; if it doesn't match, check again once all writers active at that time have finished.

    Files of writers that take longer than is waited for are added to ``stuck``, and not waited for again.
    """
    latest, before = time.monotonic() + _PATIENCE, None
    while True:
        seen = look(root, digest, quietly=True, patient_with=_WRONG, despite_writers=True)
        files = tuple(None if status is None else identity(status) for status in (seen.entry, seen.record))
        if seen.version is not None or not any(files) or (files == before and seen.verdict in _WRONG):
            return seen
        before = files
        if time.monotonic() > latest:
            return seen
        at_work, pause = removal.at_work(root) - stuck, 0.001
        while at_work := at_work & removal.at_work(root):
            if time.monotonic() > latest:
                stuck |= at_work
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def _finding(root: Root, digest: str, seen: Look, kind: str, repaired: bool) -> Finding:  # noqa: FBT001
    of_record = kind in {DAMAGED_RECORD, NO_ENTRY}
    path = root.record_path(digest) if of_record else root.entry_path(digest)
    status = seen.record if of_record else seen.entry
    return Finding(kind, path, digest, 0 if status is None else status.st_size, repaired)


def _repair(root: Root, digest: str, seen: Look, removed: Callable[[str, int], object]) -> bool:
    try:
        if seen.entry is None:
            return removal.take_record(root, digest)
        if not removal.take_away(root, digest, identity(seen.entry), keep=True):
            return False
    except OSError:
        return False
    removed(digest, pairs.charged(seen.entry, seen.record))
    return True


def _digests(root: Root) -> Iterator[str]:
    """The digests of everything that is named like an entry or a record, whatever it is."""
    for shard in root.shards():
        names = root.names(root.entries, shard) | root.names(root.records, shard)
        yield from (shard + name for name in sorted(names) if is_digest(shard + name))
