# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in a directory: raw binaries, a sidecar record beside each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping

from cuda_progcache._util import modes
from cuda_progcache.errors import StoreError
from cuda_progcache.store.base import entry_digest, is_digest
from cuda_progcache.store.disk_store import DiskStore
from cuda_progcache.store.records import encode_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, Self

    from cuda_progcache.store.arrivals import Arrivals
    from cuda_progcache.store.base import Entry, EntryInfo, Key
    from cuda_progcache.store.bundle import ExportReport, ImportReport
    from cuda_progcache.store.census import Census
    from cuda_progcache.store.maintenance import PruneReport
    from cuda_progcache.store.verification import Verification


class FileStreamProgramCache(DiskStore):
    """A persistent store that any number of processes share.

    Each entry is the compiled binary, verbatim, in ``entries/<2>/<62 hex digits of SHA-256(key)>``: cuobjdump, nvdisasm
    and cuda-gdb open it as it lies. Its record, with the checksum of the entry, lies under the same name in
    ``records/``.

    A lookup gives bytes that were published under this key, or it is a miss. Entries that are cut short, altered,
    swapped, or no regular file are moved to ``quarantine/`` and healed by the next write; each file is checked against
    its checksum once per process and change. An entry without a record is a miss and stays where it is.

    Trouble with the disk never raises where a compile may pass: a lookup is a miss, and what can't be written or
    removed is counted (``dropped``, ``failed``), with one warning. ``strict`` raises instead. What the owner of a cache
    asks for (:meth:`verify`, :meth:`prune`, :meth:`pin`, :meth:`export` and so on) says if it can't be done.

    Parameters
    ----------
    path : str or os.PathLike, optional
        The directory; made if missing, with mode 0700. Default: ``CUDA_PROGCACHE_DIR`` or the user's cache directory +
        ``cuda-progcache``. If the default can't be made or written, there is one warning and programs are kept in
        memory, before those that can be read there. What the default doesn't hold is looked for in the layers that
        installed packages bring (:mod:`~cuda_progcache.store.layers`).
    max_size_bytes : int, optional
        Soft cap on the bytes of entries, staging files, quarantine and long records (beyond 512 bytes each). When a
        write passes it, the least recently used entries are evicted; in a store of more than 64 entries down to 90 % of
        the cap, of more than 4096 entries from a sample of them (:mod:`~cuda_progcache.store.size_cap`). A value larger
        than the cap is refused and counted, and evicts nothing. Processes share one account of what lies there.
        Default: for a ``path``, no cap; else ``CUDA_PROGCACHE_MAX_SIZE`` (``20GB``; ``0``: no cap), or 5 GB.
    durability : {"fsync", "full", "none"}
        ``"fsync"``: an entry's bytes are on the disk before its name is. ``"full"``: the record and the names, too,
        when a write returns. ``"none"``: as the system likes; what a crash tears, the checksum catches.
    shared : bool
        Other users write here, too: permissions follow the umask. A directory that is group-writable, or setgid, is
        shared by its group without this being said. Any other root that belongs to another user, and one that everyone
        can write to, is refused (:mod:`~cuda_progcache.store.sharing`).
    strict : bool
        The mapping (``cache[key] = value``, ``del``, ``update``) and ``clear`` raise
        :class:`~cuda_progcache.errors.StoreError` where the disk is in trouble.
    mode : {"rw", "ro", "off", "frozen"}, optional
        How it is used (:mod:`cuda_progcache._util.modes`); None: as ``CUDA_PROGCACHE`` says when it is made. In every
        mode but ``rw`` nothing is made or written in the directory: what is put is dropped, and ``clear``, ``prune``
        and the like raise :class:`~cuda_progcache.errors.ReadOnlyError`.

    Raises
    ------
    UnsafeRootError
        The root isn't ours alone and ``shared`` wasn't said.
    StoreError
        ``path`` was given and is no place for a directory; with ``strict``, it can't be made for any reason.
    ValueError
        ``max_size_bytes``, ``durability`` or ``CUDA_PROGCACHE_MAX_SIZE`` makes no sense.
    """

    def __new__(
        cls, path: str | os.PathLike[str] | None = None, *, shared: bool = False, mode: str | None = None, **more: Any
    ) -> Self:
        """Make a store on the directory, in its mode; on memory, where there is no default directory to be had."""
        if cls is FileStreamProgramCache and (wanted := modes.chosen(mode)) != "rw":
            from cuda_progcache.store.in_mode import blank

            return blank(wanted, path, shared=shared)  # type: ignore[return-value]
        return super().__new__(cls, path, shared=shared, **more)

    # The layers under the default cache

    @property
    def roots(self) -> tuple[Path, ...]:
        """The root directory; of the default cache, also those of the layers that packages bring."""
        if self._alone:
            return super().roots
        from pathlib import Path

        from cuda_progcache.store import layers

        return (*super().roots, *map(Path, layers.directories()))

    def info(self, digest: str) -> EntryInfo:
        """One entry; :class:`KeyError` if there is none of that digest."""
        if not self._alone and is_digest(digest) and (info := self._info(digest)) is None:
            from cuda_progcache.store import layers

            if (info := layers.info(digest)) is not None:
                return info
        return super().info(digest)

    def _examine(self, digest: str, *, with_record: bool) -> Entry | None:
        found = super()._examine(digest, with_record=with_record)
        if found is None and not self._alone:
            from cuda_progcache.store import layers

            if (found := layers.look(digest, with_record=with_record)) is not None:
                self._counters.count("misses", -1)
                self._counters.count("hits")
        return found

    # What its owner does with it

    def first(
        self, count: int, *, by: str = "used", matches: Callable[[EntryInfo], bool] = lambda _: True
    ) -> list[EntryInfo]:
        """The entries that come first in an order; see :meth:`ProgramCacheResource.first`."""
        from cuda_progcache.store import maintenance

        return maintenance.first(self._root, count, by, matches, self._info, self._last_use)

    def census(self) -> Census:
        """What programs it holds, summed up; only what has changed since the last time is read.

        Raises
        ------
        StoreError
            The directory can't be read.
        """
        from cuda_progcache.store import census

        return self._asked("sum up the cache", lambda: census.take(self._root))

    def arrivals(self) -> Arrivals:
        """Begin to look for entries that come from now on."""
        from cuda_progcache.store.arrivals import Arrivals

        return Arrivals(self._root)

    def quarantine(self, digest: str) -> None:
        """Move an entry that proved wrong, and its record, to the quarantine, and count it as corrupt."""
        if not is_digest(digest):
            raise KeyError(digest)
        try:
            if not self._discard(digest, keep=True):
                raise KeyError(digest)
        except OSError as exc:
            self._failed("quarantine a program", exc, self._root.entry_path(digest))
        self._counters.count("corrupt")
        if self._accounted():
            self._cap.damaged()

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
        from cuda_progcache.store import maintenance

        return self._asked("pin a program", lambda: maintenance.pin(self._root, key_or_digest))

    def unpin(self, key_or_digest: Key) -> str:
        """Let an entry be evicted again; takes and gives what :meth:`pin` does.

        Raises
        ------
        KeyError
            It isn't pinned.
        """
        from cuda_progcache.store import maintenance

        return self._asked("unpin a program", lambda: maintenance.unpin(self._root, key_or_digest))

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

        def removed(digest: str, size: int) -> None:
            self._cap.unannounced([(digest, -1, -size)])

        return self._asked("verify the cache", lambda: verify(self._root, repair=repair, removed=removed))

    def prune(
        self, *, max_size_bytes: int | None = None, older_than: float | None = None, dry_run: bool = False
    ) -> PruneReport:
        """Remove the entries that were used least recently; pinned ones stay.

        Parameters
        ----------
        max_size_bytes : int, optional
            Until the cache is no larger than this; 0 removes all that isn't pinned.
        older_than : float, optional
            Those not used for so many seconds. A store without a size cap doesn't write last uses down: there it is
            the age of what was published, where the file system keeps no access times.
        dry_run : bool
            Remove nothing; report what would go.

        Raises
        ------
        ValueError
            Neither limit was given, or one is negative.
        StoreError
            The directory can't be written.
        """
        from cuda_progcache.store import maintenance

        if max_size_bytes is None and older_than is None:
            raise ValueError("prune to what? give max_size_bytes, older_than or both")
        if (max_size_bytes or 0) < 0 or (older_than or 0) < 0:
            raise ValueError("max_size_bytes and older_than can't be negative")
        return self._asked(
            "prune the cache",
            lambda: maintenance.prune(self._root, self._cap, max_size_bytes, older_than, dry_run=dry_run),
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
        with open(path, "rb") as file:
            data = file.read()
        digest, record_json = entry_digest(key), encode_record(record or {})
        if not self._asked("adopt a program", lambda: self._wrote(self._put(digest, data, record_json))):
            raise StoreError(errno.EFBIG, "can't adopt a program larger than the size cap", os.fspath(path))
        return self.info(digest)

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

        target, chosen = os.fspath(path), None if archs is None else frozenset(archs)
        return self._asked(
            f"export the cache to {target}", lambda: export(self, self._root, target, chosen, filter), target
        )

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

        def put(digest: str, data: bytes, record_json: bytes, created: float) -> bool:
            return self._asked("import a program", lambda: self._wrote(self._put(digest, data, record_json, created)))

        return import_bundle(self._root, os.fspath(path), None if archs is None else frozenset(archs), put)
