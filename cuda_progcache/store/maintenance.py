# SPDX-License-Identifier: Apache-2.0
"""What the owner of a cache directory does with it: pin, verify, prune, adopt, export and import."""

from __future__ import annotations

import abc
import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import unlink, unlink_quietly, write_new
from cuda_progcache.errors import StoreError
from cuda_progcache.store import pairs
from cuda_progcache.store.base import EntryInfo, ProgramCacheResource, entry_digest, is_digest
from cuda_progcache.store.eviction import Candidate, choose_victims
from cuda_progcache.store.records import encode_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.base import Key
    from cuda_progcache.store.bundle import ExportReport, ImportReport
    from cuda_progcache.store.in_memory import InMemoryProgramCache
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.size_cap import SizeCap
    from cuda_progcache.store.stack import ProgramCacheStack
    from cuda_progcache.store.verification import Verification


class PruneReport(NamedTuple):
    """What a prune removed and left.

    Attributes
    ----------
    removed, bytes : int
        Entries that went, and their bytes.
    left, left_bytes : int
        Entries that stayed, and theirs; long records count (beyond 512 bytes each).
    pinned : int
        Of those that stayed: spared because they are pinned.
    """

    removed: int
    bytes: int
    left: int
    left_bytes: int
    pinned: int


class MaintainedDirectory(ProgramCacheResource):
    """The part of :class:`~cuda_progcache.store.FileStreamProgramCache` that its owner uses."""

    _root: Root
    _cap: SizeCap
    _fallback: InMemoryProgramCache | ProgramCacheStack | None

    @abc.abstractmethod
    def _put(self, digest: str, data: bytes, record_json: bytes, created: float | None = None) -> bool: ...

    @abc.abstractmethod
    def _wrote(self, stored: bool) -> bool: ...  # noqa: FBT001 - passed on

    def _directory(self, what: str) -> Root:
        if self._fallback is not None:
            raise StoreError(errno.ENOTSUP, f"can't {what}: the programs are kept in memory only", self._root.path)
        return self._root

    def _error(self, what: str, exc: OSError) -> StoreError:
        if isinstance(exc, StoreError):
            return exc
        return StoreError(exc.errno, f"can't {what}: {exc.strerror or exc}", exc.filename or self._root.path)

    # Pins

    def pin(self, key_or_digest: Key) -> str:
        """Keep an entry: eviction and :meth:`prune` spare it. Replacing it keeps it pinned, removing it doesn't.

        Parameters
        ----------
        key_or_digest : bytes or str
            The key, or the entry's digest (a str of 64 hex digits).

        Returns
        -------
        str
            The digest.

        Raises
        ------
        KeyError
            There is no such entry.
        StoreError
            The directory can't be written.
        """
        root, digest = self._directory("pin a program"), _named(key_or_digest)
        path = root.pinned + digest
        try:
            for attempt in range(2):
                try:
                    write_new(path, b"", mode=root.file_mode, sync=False)
                except FileExistsError:
                    pass
                except FileNotFoundError:
                    if attempt:
                        raise
                    root.mkdir(root.pinned)
                    continue
                break
            # Now, and not before: what is there once it is pinned, no eviction that begins from here on takes.
            present = pairs.lstat(root.entry_path(digest)) is not None
        except OSError as exc:
            raise self._error("pin a program", exc) from exc
        if not present:
            unlink_quietly(path)
            raise KeyError(key_or_digest)
        return digest

    def unpin(self, key_or_digest: Key) -> str:
        """Let an entry be evicted again; takes and gives what :meth:`pin` does.

        Raises
        ------
        KeyError
            It isn't pinned.
        """
        root, digest = self._directory("unpin a program"), _named(key_or_digest)
        try:
            unlink(root.pinned + digest)
        except FileNotFoundError:
            raise KeyError(key_or_digest) from None
        except OSError as exc:
            raise self._error("unpin a program", exc) from exc
        return digest

    def pins(self) -> frozenset[str]:
        """The digests of the pinned entries."""
        return frozenset() if self._fallback is not None else frozenset(filter(is_digest, self._root.pins()))

    def _unpin_removed(self, digest: str) -> None:
        unlink_quietly(self._root.pinned + digest)

    # Care

    def verify(self, *, repair: bool = False) -> Verification:
        """Read every byte, and say what is wrong. Safe beside readers and writers; nothing is counted as a lookup.

        Parameters
        ----------
        repair : bool
            Move what is damaged, foreign or without a record to the quarantine, and remove what writers have left.

        Raises
        ------
        StoreError
            The directory can't be read.
        """
        from cuda_progcache.store.verification import verify

        root = self._directory("verify the cache")
        try:
            return verify(
                root, repair=repair, removed=lambda digest, size: self._cap.unannounced([(digest, -1, -size)])
            )
        except OSError as exc:
            raise self._error("verify the cache", exc) from exc

    def prune(self, *, max_size_bytes: int | None = None, older_than: float | None = None) -> PruneReport:
        """Remove the entries that were used least recently; pinned ones stay.

        Parameters
        ----------
        max_size_bytes : int, optional
            Until the cache is no larger than this; 0 removes all that isn't pinned.
        older_than : float, optional
            Those not used for so many seconds. A store without a size cap doesn't write last uses down: there it is
            the age of what was published, where the file system keeps no access times.

        Raises
        ------
        ValueError
            Neither was given, or one is negative.
        StoreError
            The directory can't be written.
        """
        if max_size_bytes is None and older_than is None:
            raise ValueError("prune to what? give max_size_bytes, older_than or both")
        if (max_size_bytes or 0) < 0 or (older_than or 0) < 0:
            raise ValueError("max_size_bytes and older_than can't be negative")
        root = self._directory("prune the cache")
        try:
            pins = root.pins()
            found = [item for shard in root.shards() for item in pairs.candidates(root, shard, self._cap.last_use)]
            victims = _victims(found, pins, max_size_bytes, older_than, time.time_ns())
            removed = [victim for victim in victims if pairs.evict(root, victim)]
        except OSError as exc:
            raise self._error("prune the cache", exc) from exc
        self._cap.unannounced((victim.digest, -1, -victim.charged) for victim in removed)
        freed = sum(victim.charged for victim in removed)
        return PruneReport(
            removed=len(removed),
            bytes=freed,
            left=len(found) - len(removed),
            left_bytes=sum(item.charged for item in found) - freed,
            pinned=sum(item.digest in pins for item in found),
        )

    def adopt(self, path: str | os.PathLike[str], key: Key, record: Mapping[str, Any] | None = None) -> EntryInfo:
        """Take in a binary that was made elsewhere; it is a hit under ``key`` from now on.

        Parameters
        ----------
        path : str or os.PathLike
            The binary; it may also be an entry of this cache that lies there without its record.
        key : bytes or str
            Its key. Whether the binary is what the key says is yours to know: it will be run in its place.
        record : Mapping, optional
            A JSON object about it.

        Raises
        ------
        OSError
            The file can't be read.
        StoreError
            It can't be stored, or is larger than the size cap.
        """
        self._directory("adopt a program")
        with open(path, "rb") as file:
            data = file.read()
        digest, record_json = entry_digest(key), encode_record(record or {})
        try:
            if not self._wrote(self._put(digest, data, record_json)):
                raise StoreError(errno.EFBIG, "can't adopt a program larger than the size cap", os.fspath(path))
        except OSError as exc:
            raise self._error("adopt a program", exc) from exc
        return self.info(digest)

    # Bundles

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        archs: Iterable[str] | None = None,
        filter: Callable[[EntryInfo], bool] | None = None,  # noqa: A002 - what it is
    ) -> ExportReport:
        """Write entries and their records to a bundle, one file that another cache imports.

        The same entries give the same bytes. Each is verified; a damaged one is left out and counted.

        Parameters
        ----------
        path : str or os.PathLike
            The bundle; replaced, in one step, if it is there.
        archs : iterable of str, optional
            Only programs compiled for these, as in their record (``"sm_90"``).
        filter : callable, optional
            Only entries for which it is true.

        Raises
        ------
        StoreError
            The bundle can't be written, or the cache not be read.
        """
        from cuda_progcache.store.bundle import export

        root = self._directory("export the cache")
        try:
            return export(self, root, os.fspath(path), None if archs is None else frozenset(archs), filter)
        except OSError as exc:
            raise self._error(f"export the cache to {os.fspath(path)}", exc) from exc

    def import_(self, path: str | os.PathLike[str], *, archs: Iterable[str] | None = None) -> ImportReport:
        """Add a bundle's entries; those that are here already stay as they are.

        All of the bundle is checked before the first entry is written, and no name in it is used as a path. The
        checksums show damage, and not who made it: import what you would run.

        Parameters
        ----------
        path : str or os.PathLike
            The bundle.
        archs : iterable of str, optional
            Only programs compiled for these.

        Raises
        ------
        BundleError
            It is truncated, altered or no bundle; nothing was imported.
        StoreError
            An entry can't be written. Those before it are here, whole; import again to go on.
        OSError
            The bundle can't be read.
        """
        from cuda_progcache.store.bundle import import_bundle

        root = self._directory("import a bundle")

        def put(digest: str, data: bytes, record_json: bytes, created: float) -> bool:
            try:
                return self._wrote(self._put(digest, data, record_json, created))
            except OSError as exc:
                raise self._error("import a program", exc) from exc

        return import_bundle(root, os.fspath(path), None if archs is None else frozenset(archs), put)


def _named(key_or_digest: Key) -> str:
    if isinstance(key_or_digest, str) and is_digest(key_or_digest):
        return key_or_digest
    return entry_digest(key_or_digest)


def _victims(
    found: list[Candidate], pins: set[str], cap: int | None, older_than: float | None, now: int
) -> list[Candidate]:
    free = [item for item in found if item.digest not in pins]
    limit = None if older_than is None else now - int(older_than * 1e9)
    victims = [item for item in free if limit is not None and item.last_used < limit]
    if cap is not None:
        old = {victim.digest for victim in victims}
        rest = [item for item in free if item.digest not in old]
        excess = sum(item.charged for item in found) - sum(victim.charged for victim in victims) - cap
        victims += choose_victims(rest, excess=excess, at_most=None, now=now)
    return victims
