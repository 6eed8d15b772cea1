# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in a directory: raw binaries, each with a sidecar record."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping

from cuda_progcache._util import modes
from cuda_progcache._util.digest import is_digest
from cuda_progcache.errors import BundleError, StoreError, UnsafeRootError
from cuda_progcache.store.base import check_size_cap, entry_digest
from cuda_progcache.store.disk_store import DiskStore
from cuda_progcache.store.records import encode_record
from cuda_progcache.store.root import default_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, Self

    from cuda_progcache.store.arrivals import Arrivals
    from cuda_progcache.store.base import Entry, EntryInfo, Key, Value
    from cuda_progcache.store.bundle import ExportReport, ImportReport
    from cuda_progcache.store.census import Census
    from cuda_progcache.store.counters import Tally
    from cuda_progcache.store.maintenance import PruneReport
    from cuda_progcache.store.stack import ProgramCacheStack
    from cuda_progcache.store.stats import StoreStats
    from cuda_progcache.store.tiers.leases import FleetLeases
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.verification import Verification

DURABILITIES = ("fsync", "full", "none")
#: The value of ``tiers`` that means the configured ones.
_CONFIGURED = "configured"


class FileStreamProgramCache(DiskStore):
    """A persistent store that any number of processes share.

    Each entry is the compiled binary, verbatim, in ``entries/<2>/<62 hex digits of SHA-256(key)>``; cuobjdump, nvdisasm
    and cuda-gdb open it directly. Its record, with the checksum of the entry, has the same name in ``records/``.

    A lookup returns bytes that were published under this key, or it is a miss. Entries that are truncated, altered,
    swapped, or not regular files are moved to ``quarantine/``, and the next write replaces them. Each file is checked
    against its checksum once per process and change. An entry without a record is a miss, and is left in place.

    During a compile, trouble with the disk never raises an error: a lookup is a miss, and failed writes and removals
    are counted (``dropped``, ``failed``), with one warning. ``strict`` raises instead. Maintenance (:meth:`verify`,
    :meth:`prune`, :meth:`pin`, :meth:`export` and so on) always raises if it fails.

    Parameters
    ----------
    path : str or os.PathLike, optional
        The directory; created with mode 0700 if missing. Default: ``CUDA_PROGCACHE_DIR``, or ``cuda-progcache`` in the
        user's cache directory. If the default can't be created or written, there is one warning, and new programs are
        kept in memory; those in the directory are still read. Programs that the default directory lacks are looked up
        in the layers of installed packages (:mod:`~cuda_progcache.store.layers`).
    max_size_bytes : int, optional
        Soft cap on the bytes of entries, staging files, quarantine and long records (beyond 512 bytes each). When a
        write exceeds it, the least recently used entries are evicted; with more than 64 entries, down to 90 % of the
        cap; with more than 4096, from a sample of them (:mod:`~cuda_progcache.store.size_cap`). A value larger than the
        cap is refused and counted, and evicts nothing. Processes share one account of the size. Default: no cap if a
        ``path`` is given, else ``CUDA_PROGCACHE_MAX_SIZE`` (such as ``20GB``; ``0`` for no cap), or 5 GB.
    durability : {"fsync", "full", "none"}
        ``"fsync"``: an entry's bytes are on the disk before its name is. ``"full"``: when a write returns, the record
        and the names are on the disk as well. ``"none"``: the system decides; the checksum detects what a crash
        damages.
    shared : bool
        Other users write here as well: permissions follow the umask. A directory that is group-writable or setgid is
        shared by its group even without this option. Without it, any other root is refused if it belongs to another
        user or if everyone can write to it (:mod:`~cuda_progcache.store.sharing`).
    strict : bool
        The mapping (``cache[key] = value``, ``del``, ``update``) and ``clear`` raise
        :class:`~cuda_progcache.errors.StoreError` if the disk is in trouble.
    mode : {"rw", "ro", "off", "frozen"}, optional
        How it is used (:mod:`cuda_progcache._util.modes`). None: as ``CUDA_PROGCACHE`` says at construction. In every
        mode except ``rw``, nothing is created or written in the directory: writes are dropped, and ``clear``, ``prune``
        and the like raise :class:`~cuda_progcache.errors.ReadOnlyError`.
    tiers : sequence of str, mapping or TierSettings, or "configured", optional
        Stores on other machines (:func:`~cuda_progcache.store.tiers.settings.parse_tier`), the fastest first. Programs
        that the directory lacks are looked up there and kept here, and those written here are sent there. None: the
        configured tiers (:mod:`~cuda_progcache.store.tiers.configuration`) for the default directory, and none for a
        ``path``. ``"configured"``: the configured tiers, also for a ``path``. Tiers are opened on the first miss or
        write.

    Raises
    ------
    ConfigError
        One of ``tiers`` has invalid settings.
    UnsafeRootError
        Other users own or can write to the root, and ``shared`` wasn't given.
    StoreError
        ``path`` was given and can't be a directory; with ``strict``, also if it can't be created for another reason.
    ValueError
        ``max_size_bytes``, ``durability`` or ``CUDA_PROGCACHE_MAX_SIZE`` is invalid.
    """

    def __new__(cls, path: str | os.PathLike[str] | None = None, **options: Any) -> Self:
        """Make a store on the directory, in its mode; in memory if the default directory can't be used."""
        # Only __init__ lists the options, but an unknown one is refused here, before a directory is made.
        known = FileStreamProgramCache.__init__.__kwdefaults__ or {}
        if unknown := options.keys() - known.keys():
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {min(unknown)!r}")
        told = {**known, **options}
        shared, max_size_bytes, durability = told["shared"], told["max_size_bytes"], told["durability"]
        if cls is FileStreamProgramCache and (wanted := modes.chosen(told["mode"])) != "rw":
            from cuda_progcache.store.in_mode import blank

            return blank(wanted, path, shared=shared)  # type: ignore[return-value]
        check_size_cap(max_size_bytes)
        if durability not in DURABILITIES:
            raise ValueError(f"durability must be one of {', '.join(DURABILITIES)}, got {durability!r}")
        made = super().__new__(cls)
        if path is not None:
            made._root = cls._ROOT(os.path.abspath(os.fspath(path)), shared=shared)  # a later chdir must not move it
            return made
        where = ""
        try:
            where = default_root()
            made._root = cls._ROOT(where, shared=shared)
            made._root.open()
            if not made._root.writable():
                raise PermissionError(errno.EACCES, "no permission, or a read-only file system", made._root.staging)
        except UnsafeRootError:
            raise
        except OSError as exc:
            from cuda_progcache.store.fallback import KeptInMemory

            return KeptInMemory.instead_of(  # type: ignore[return-value]
                where, exc, shared=shared, max_size_bytes=max_size_bytes, tiers=told["tiers"]
            )
        return made

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_size_bytes: int | None = None,
        durability: str = "fsync",
        shared: bool = False,
        strict: bool = False,
        mode: str | None = None,
        tiers: Any = None,
    ) -> None:
        if self.mode is None:
            self.mode = mode
        if path is None and max_size_bytes is None:
            from cuda_progcache.store.default_cap import default_max_size

            max_size_bytes = default_max_size()
        self._max_size_bytes = max_size_bytes
        self._durability = durability
        self._strict = strict
        self._said_shared = shared
        self._begin(default=path is None)
        self._stand_before(layers=path is None, tiers=tiers)

    # The levels behind it: layers of installed packages, and tiers

    _has_layers = False
    _told_tiers: Any = ()
    _known_stack: tuple[tuple[TierSettings, ...], ProgramCacheStack | None] | None = None
    _tier_tallies: tuple[Tally, ...] = ()

    def _stand_before(self, *, layers: bool, tiers: Any) -> None:
        """Set the levels behind the directory."""
        self._has_layers = layers
        if tiers is None:
            self._told_tiers = _CONFIGURED if layers else ()
        elif tiers == _CONFIGURED:
            self._told_tiers = _CONFIGURED
        else:
            from cuda_progcache.store.tiers.configuration import given

            self._told_tiers = given(tiers)
        self._alone = not layers and not self._told_tiers

    def _stand_as(self, other: FileStreamProgramCache) -> None:
        """Use the levels behind another store."""
        self._stand_before(layers=other._has_layers, tiers=other._told_tiers)

    @property
    def tiers(self) -> tuple[TierSettings, ...]:
        """The tiers behind it, the fastest first (ConfigError if the configured ones are invalid)."""
        if self._told_tiers == _CONFIGURED:
            from cuda_progcache.store.tiers.configuration import configured

            return configured().tiers
        found: tuple[TierSettings, ...] = self._told_tiers
        return found

    @property
    def _stack(self) -> ProgramCacheStack | None:
        """The stack of the directory and its tiers, for misses and writes; None if there are no tiers."""
        if self._alone or not (tiers := self.tiers):
            return None
        if self._known_stack is None or self._known_stack[0] != tiers:
            from cuda_progcache.store.tiers import behind

            writes = modes.of(self) == "rw" and not self._root.read_only
            self._known_stack = (tiers, behind.stack(self, tiers, writes=writes))
            if writes:
                self._tier_tallies = behind.tallies(self, self._root, tiers)
        return self._known_stack[1]

    @property
    def roots(self) -> tuple[Path, ...]:
        """The root directory, and those of the layers behind it."""
        if self._alone:
            return super().roots
        found = list(super().roots)
        if self._has_layers:
            from pathlib import Path

            from cuda_progcache.store import layers

            found += map(Path, layers.directories())
        stack = self._stack
        return tuple(dict.fromkeys([*found, *(() if stack is None else stack.roots)]))

    def info(self, digest: str) -> EntryInfo:
        """One entry, of the directory or a layer; :class:`KeyError` if there is none of that digest."""
        if self._has_layers and is_digest(digest) and (info := self._info(digest)) is None:
            from cuda_progcache.store import layers

            if (info := layers.info(digest)) is not None:
                return info
        return super().info(digest)

    def _examine(self, digest: str, key: Key = b"", *, with_record: bool) -> Entry | None:
        found = super()._examine(digest, key, with_record=with_record)
        if found is None and not self._alone and (found := self._look_behind(digest, key, with_record)) is not None:
            self._counters.count("misses", -1)
            self._counters.count("hits")
        return found

    def _look_behind(self, digest: str, key: Key, with_record: bool) -> Entry | None:  # noqa: FBT001
        if self._has_layers:
            from cuda_progcache.store import layers

            if (found := layers.look(digest, with_record=with_record)) is not None:
                return found
        stack = self._stack
        return None if stack is None else stack.load(key)

    @property
    def fleet(self) -> FleetLeases | None:  # type: ignore[override]  # a class attribute in the base class
        """The leases of the hosts that publish to one of its tiers."""
        stack = self._stack
        return None if stack is None else stack.fleet

    @property
    def reaches_beyond(self) -> bool:
        """Whether a tier behind it is on another machine."""
        stack = self._stack
        return stack is not None and stack.reaches_beyond

    def fetch(self, keys: Iterable[bytes]) -> int:
        """Fetch these programs from the tiers; return how many came."""
        stack = self._stack
        return 0 if stack is None else stack.fetch(keys)

    def has_published(self) -> bool:
        """Whether at least one writable tier has stored everything that was published."""
        stack = self._stack
        return stack is None or stack.has_published()

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Header manifests from other machines, by name; missing ones are left out."""
        stack = self._stack
        return {} if stack is None else stack.find_manifests(names)

    def keep_manifest(self, name: str, content: bytes) -> None:
        """Add the sets of a header manifest to those of the tiers."""
        stack = self._stack
        if stack is not None:
            stack.keep_manifest(name, content)

    def _assign(self, key: Key, value: Value) -> bool:
        stack = self._stack
        return super()._assign(key, value) if stack is None else stack.publish(key, value, {})

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Store an entry with its record, here and in the tiers; see :meth:`ProgramCacheResource.publish`."""
        stack = self._stack
        return super().publish(key, data, record) if stack is None else stack.publish(key, data, record)

    def _delete(self, digest: str, asked: object) -> None:
        stack = self._stack
        if stack is None:
            super()._delete(digest, asked)
            return
        try:
            stack.remove(digest)
        except KeyError:
            raise KeyError(asked) from None

    def _delete_here(self, digest: str) -> None:
        super()._delete(digest, digest)

    def quarantine(self, digest: str) -> None:
        """Move an entry that proved wrong, and its record, to the quarantine, and count it as corrupt.

        Tiers have no quarantine: the entry is removed from the writable ones.
        """
        stack = self._stack
        if stack is None:
            self._quarantine_here(digest)
        else:
            stack.quarantine(digest)

    def stats(self) -> StoreStats:
        """The directory's contents in numbers, this store object's counters, and those of its tiers (``levels``)."""
        told = super().stats()
        stack = None if self._known_stack is None else self._known_stack[1]
        return told if stack is None else told._replace(levels=stack.stats().levels[1:])

    def close(self) -> None:
        """Save the counters, and send what is queued for the tiers. The store can be used afterwards.

        This doesn't wait for a tier that is out of order: its thread tries the writes again.
        """
        super().close()
        stack = None if self._known_stack is None else self._known_stack[1]
        for store in () if stack is None else stack.levels[1:]:
            if store.breaker is None or store.breaker.state == "closed":
                store.close()
        for tally in self._tier_tallies:
            tally.write()

    # Maintenance

    def first(
        self, count: int, *, by: str = "used", matches: Callable[[EntryInfo], bool] = lambda _: True
    ) -> list[EntryInfo]:
        """The first entries in an order; see :meth:`ProgramCacheResource.first`."""
        from cuda_progcache.store import maintenance

        return maintenance.first(self._root, count, by, matches, self._info, self._last_use)

    def census(self) -> Census:
        """Sums over the programs that it holds. Only what has changed since the last census is read.

        Raises
        ------
        StoreError
            The directory can't be read.
        """
        from cuda_progcache.store import census

        return self._asked("sum up the cache", lambda: census.take(self._root))

    def arrivals(self) -> Arrivals:
        """Start watching for entries that are added from now on."""
        from cuda_progcache.store.arrivals import Arrivals

        return Arrivals(self._root)

    def _quarantine_here(self, digest: str) -> None:
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
        """Keep an entry from eviction and :meth:`prune`. It stays pinned if it is replaced, but not if it is removed.

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
        """Let an entry be evicted again. Arguments and result are those of :meth:`pin`.

        Raises
        ------
        KeyError
            It isn't pinned.
        """
        from cuda_progcache.store import maintenance

        return self._asked("unpin a program", lambda: maintenance.unpin(self._root, key_or_digest))

    def verify(self, *, repair: bool = False) -> Verification:
        """Read every byte and report what is wrong. Safe while others read and write; no lookup is counted.

        Parameters
        ----------
        repair : bool
            Move files that are damaged, foreign or without a record to the quarantine, and remove what killed writers
            left.

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
        """Remove the least recently used entries; pinned ones stay.

        Parameters
        ----------
        max_size_bytes : int, optional
            Remove entries until the cache is no larger than this; 0 removes everything that isn't pinned.
        older_than : float, optional
            Remove entries that weren't used for this many seconds. A store without a size cap doesn't record last uses:
            if the file system keeps no access times either, the time since publication counts.
        dry_run : bool
            Remove nothing; report what would be removed.

        Raises
        ------
        ValueError
            Neither limit was given, or one is negative.
        StoreError
            The directory can't be written.
        """
        from cuda_progcache.store import maintenance

        if max_size_bytes is None and older_than is None:
            raise ValueError("give prune max_size_bytes, older_than or both")
        if (max_size_bytes or 0) < 0 or (older_than or 0) < 0:
            raise ValueError("max_size_bytes and older_than can't be negative")
        return self._asked(
            "prune the cache",
            lambda: maintenance.prune(self._root, self._cap, max_size_bytes, older_than, dry_run=dry_run),
        )

    def adopt(self, path: str | os.PathLike[str], key: Key, record: Mapping[str, Any] | None = None) -> EntryInfo:
        """Add a binary that was made elsewhere; from now on it is a hit for ``key``.

        Parameters
        ----------
        path : str or os.PathLike
            The binary. It may be an entry of this cache that has lost its record.
        key : bytes or str
            Its key. You vouch that the binary belongs to this key: it will be used as that program.
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
            Only programs compiled for these architectures, as recorded (``"sm_90"``).
        filter : callable, optional
            Only entries for which it is true.

        Raises
        ------
        StoreError
            The bundle can't be written, or the cache can't be read.
        """
        from cuda_progcache.store.bundle import export

        target, chosen = os.fspath(path), None if archs is None else frozenset(archs)
        return self._asked(
            f"export the cache to {target}", lambda: export(self, self._root, target, chosen, filter), target
        )

    def import_(self, path: str | os.PathLike[str], *, archs: Iterable[str] | None = None) -> ImportReport:
        """Add a bundle's entries; those that are already here stay unchanged.

        The whole bundle is checked before the first entry is written, and no name in it is used as a path. The
        checksums detect damage, but don't say who made the bundle: import only what you would run.

        Parameters
        ----------
        path : str or os.PathLike
            The bundle.
        archs : iterable of str, optional
            Only programs compiled for these.

        Raises
        ------
        BundleError
            The file is truncated, altered or not a bundle; nothing was imported.
        StoreError
            An entry can't be written. Those before it have been imported; import again to continue.
        OSError
            The bundle can't be read.
        """
        from cuda_progcache.store.bundle import import_bundle

        def put(digest: str, data: bytes, record_json: bytes, created: float) -> bool:
            return self._asked("import a program", lambda: self._wrote(self._put(digest, data, record_json, created)))

        try:
            return import_bundle(self._root, os.fspath(path), None if archs is None else frozenset(archs), put)
        except BundleError as error:
            raise BundleError(f"{error}; nothing was imported") from error
