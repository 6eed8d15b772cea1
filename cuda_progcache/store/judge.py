# SPDX-License-Identifier: Apache-2.0
"""Whether an entry and its record fit: one verdict, for lookups, listings, verify, export and import.

:func:`judge` decides from bytes alone. :func:`look` reads them, and looks again at what doesn't fit: two writers of one
key, each between its two renames, look like damage until the slower one goes on.
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

#: Seconds before each look at a pair that doesn't fit; from the third on while a file is young (in seconds) alone.
LOOKS = (0.0, 0.0, 0.001, 0.004, 0.015, 0.030, 0.050)
YOUNG = 2.0
#: A file that came in the last so many seconds may be half of what a writer is about, if one is at work: on a machine
#: that is busy it stands between its two renames for longer than anybody waits.
MAY_BE_HALF_DONE = 60.0

#: What can be wrong. The first two are damage; the others are left by a crash, or by hand.
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
        What lies there; ``None``: something that is no file, or none that can be so large.
    checksum_of_data : str, optional
        Of ``data``, where it is known.
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
    """What was seen of a pair.

    Attributes
    ----------
    verdict : Version or str
        Who vouches for the entry, or what is wrong.
    data : bytes or None
        The entry's.
    entry, record : os.stat_result or None
        The files; ``None``: not there.
    """

    verdict: Version | str
    data: bytes | None
    entry: os.stat_result | None
    record: os.stat_result | None

    @property
    def version(self) -> Version | None:
        """Who vouches for the entry, if anybody does."""
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
    """Read a pair and judge it, more than once where it doesn't fit.

    Parameters
    ----------
    quietly : bool
        Nobody uses the entry: its time of access stays.
    known : callable
        The checksum of the file with that status, where it is known.
    patient_with : frozenset of str
        The verdicts that are looked at again.
    despite_writers : bool
        Say what is wrong even where it may be what a writer has half done.

    Raises
    ------
    OSError
        A file is there and can't be read.
    """
    before: object = None
    seen = Look(NOTHING, None, None, None)
    same = False
    for pause in LOOKS:
        seen = seen._replace(data=None)  # not held while it is read again
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
    return seen._replace(verdict=NOTHING)  # or replaced faster than it can be looked at


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
            data, entry = read_regular(entry_path, largest=None, quietly=quietly)  # a large one, as its record says
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
    """An entry by its size and record, its bytes unread; ``None`` if there is none that fits."""
    entry = lstat(root.entry_path(digest))
    if entry is None or not stat.S_ISREG(entry.st_mode):
        return None
    try:
        fitting = [version for version in versions(root, digest) if version.length == entry.st_size]
        if len(fitting) > 1:  # replaced with other bytes of the same length: which of them lie here?
            seen = look(root, digest, quietly=True)
            return None if seen.version is None or seen.entry is None else (seen.version, seen.entry)
        for version in fitting:
            version.record()
            return version, entry
    except (OSError, DamagedRecordError):
        pass
    return None


def versions(root: Root, digest: str) -> list[Version]:
    """What the record on disk vouches for, newest first; nothing if it is missing or damaged."""
    try:
        raw, _ = read_regular(root.record_path(digest))
        return [] if raw is None else decode(raw, digest)
    except (FileNotFoundError, NotADirectoryError, PermissionError, DamagedRecordError):
        return []


def lstat(path: str) -> os.stat_result | None:
    """``os.lstat``, ``None`` where nothing is."""
    try:
        return os.lstat(path)
    except OSError as exc:
        if is_missing(exc):
            return None
        raise
