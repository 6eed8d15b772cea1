# SPDX-License-Identifier: Apache-2.0
"""Whether an entry and its record match: one verdict for lookups, listings, verify, export and import.

:func:`judge` decides from the bytes alone. :func:`look` reads them, and reads again if they don't match: while two
writers of one key are each between their two renames, the pair looks damaged.
"""

from __future__ import annotations

import os
import stat
import time

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import LARGE, identity, is_missing, read_regular
from cuda_progcache.store.records import DamagedRecordError, Version, checksum, decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cuda_progcache.store.root import Root

#: Seconds before each look at a pair that doesn't match; from the third on, only while a file is young or changing.
LOOKS = (0.0, 0.0, 0.001, 0.004, 0.015, 0.030, 0.050)
YOUNG = 2.0
#: A file younger than this many seconds may be half of a pair that a writer is still publishing: on a busy machine, a
#: writer may stay between its two renames for longer than a reader waits.
MAY_BE_HALF_DONE = 60.0

#: What can be wrong. The first two are damage; a crash or a user can cause the others.
CORRUPT, DAMAGED_RECORD, NO_RECORD, NO_ENTRY, NOTHING = "corrupt", "damaged-record", "no-record", "no-entry", "nothing"
DAMAGE = frozenset({CORRUPT, DAMAGED_RECORD})


def judge(
    digest: str, data: bytes | None, record: bytes | None, *, checksum_of_data: str | None = None
) -> Version | str:
    """The version of the record that vouches for the entry, or what is wrong.

    Parameters
    ----------
    digest : str
        The entry's name.
    data, record : bytes or None
        The contents of the files; ``None`` for something that isn't a regular file, or is too large.
    checksum_of_data : str, optional
        The checksum of ``data``, if known.
    """
    if data is None:
        return CORRUPT
    try:
        for version in decode(record or b"", digest):
            if version.length == len(data):
                checksum_of_data = checksum_of_data or checksum(data)
                if version.checksum == checksum_of_data:
                    version.check()
                    return version
    except DamagedRecordError:
        return DAMAGED_RECORD
    return CORRUPT


class Look(NamedTuple):
    """What was found of an entry and its record.

    Attributes
    ----------
    verdict : Version or str
        The version that vouches for the entry, or what is wrong.
    data : bytes or None
        The entry's bytes.
    entry, record : os.stat_result or None
        The status of the files; ``None`` if missing.
    """

    verdict: Version | str
    data: bytes | None
    entry: os.stat_result | None
    record: os.stat_result | None

    @property
    def version(self) -> Version | None:
        """The version that vouches for the entry; ``None`` if there is none."""
        return None if isinstance(self.verdict, str) else self.verdict


def look(
    root: Root,
    digest: str,
    *,
    quietly: bool = False,
    known: Callable[[os.stat_result], str | None] = lambda _: None,
    patient_with: frozenset[str] = DAMAGE,
    despite_writers: bool = False,
) -> Look:
    """Read a pair and judge it, repeatedly if it doesn't match.

    Parameters
    ----------
    quietly : bool
        Leave the access time alone: this isn't a use of the entry.
    known : callable
        Returns the checksum of the file with that status, if known.
    patient_with : frozenset of str
        The verdicts after which to look again.
    despite_writers : bool
        Report what is wrong even if a writer may be in the middle of publishing.

    Raises
    ------
    OSError
        A file exists and can't be read.
    """
    before: object = None
    seen = Look(NOTHING, None, None, None)
    same = False
    for pause in LOOKS:
        seen = seen._replace(data=None)  # freed before it is read again
        if pause:
            time.sleep(pause)
        seen = _look(root, digest, quietly, known)
        if seen.verdict not in patient_with:
            return seen
        files = tuple(None if status is None else identity(status) for status in (seen.entry, seen.record))
        same, before = files == before, files
        if same and not _is_young(seen, YOUNG):
            break
    if same and (despite_writers or not (_is_young(seen, MAY_BE_HALF_DONE) and root.has_staged())):
        return seen
    return seen._replace(verdict=NOTHING)  # or replaced faster than it can be read


def _is_young(seen: Look, seconds: float) -> bool:
    now = time.time()
    return any(status is not None and abs(now - status.st_mtime) <= seconds for status in (seen.entry, seen.record))


def _look(root: Root, digest: str, quietly: bool, known: Callable[[os.stat_result], str | None]) -> Look:  # noqa: FBT001
    entry_path, record_path = root.entry_path(digest), root.record_path(digest)
    try:
        data, entry = read_regular(entry_path, quietly=quietly)
    except OSError as exc:
        if not is_missing(exc):
            raise
        record = lstat(record_path)
        return Look(NOTHING if record is None else NO_ENTRY, None, None, record)
    try:
        raw, record = read_regular(record_path)
    except OSError as exc:
        if not is_missing(exc):
            raise
        return Look(CORRUPT if data is None and entry.st_size <= LARGE else NO_RECORD, data, entry, None)
    if data is None and stat.S_ISREG(entry.st_mode) and _vouched(raw, digest, entry.st_size):
        try:
            data, entry = read_regular(entry_path, largest=None, quietly=quietly)  # large, according to its record
        except OSError as exc:
            if not is_missing(exc):
                raise
            return Look(NO_ENTRY, None, None, record)
    return Look(judge(digest, data, raw, checksum_of_data=known(entry)), data, entry, record)


def _vouched(raw: bytes | None, digest: str, size: int) -> bool:
    try:
        return any(version.length == size for version in decode(raw or b"", digest))
    except DamagedRecordError:
        return False


def glance(root: Root, digest: str) -> tuple[Version, os.stat_result] | None:
    """An entry judged by its size and record, without reading its bytes; ``None`` if none matches."""
    entry = lstat(root.entry_path(digest))
    if entry is None or not stat.S_ISREG(entry.st_mode):
        return None
    try:
        fitting = [version for version in versions(root, digest) if version.length == entry.st_size]
        if len(fitting) > 1:  # replaced by other bytes of the same length: the bytes must tell which version this is
            seen = look(root, digest, quietly=True)
            return None if seen.version is None or seen.entry is None else (seen.version, seen.entry)
        for version in fitting:
            version.record()
            return version, entry
    except (OSError, DamagedRecordError):
        pass
    return None


def versions(root: Root, digest: str) -> list[Version]:
    """The versions that the record on disk vouches for, newest first; none if it is missing or damaged."""
    try:
        raw, _ = read_regular(root.record_path(digest))
        return [] if raw is None else decode(raw, digest)
    except (FileNotFoundError, NotADirectoryError, PermissionError, DamagedRecordError):
        return []


def lstat(path: str) -> os.stat_result | None:
    """``os.lstat``; ``None`` if there is no such file."""
    try:
        return os.lstat(path)
    except OSError as exc:
        if is_missing(exc):
            return None
        raise
