# SPDX-License-Identifier: Apache-2.0
"""A stack of stores: for instance memory, then disk, then a layer of an image or a remote store."""

from __future__ import annotations

import errno
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from cuda_progcache._util import modes
from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.errors import FrozenMissError, ReadOnlyError, StoreError
from cuda_progcache.events import held
from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    entry_digest,
    frozen_miss,
    key_bytes,
    program_bytes,
)
from cuda_progcache.store.breaker import CircuitBreaker
from cuda_progcache.store.derived import forget_derived
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.in_memory import InMemoryProgramCache
from cuda_progcache.store.level import Level, Stripes, Trouble, assign_to, copy_to, publish_to
from cuda_progcache.store.readonly import ReadOnlyProgramCache
from cuda_progcache.store.records import encode_record
from cuda_progcache.store.stats import Counters, StoreStats

if TYPE_CHECKING:
    from pathlib import Path

    from cuda_progcache.store.base import Key, T, Value
    from cuda_progcache.store.tiers.leases import FleetLeases
    from cuda_progcache.store.tiers.write_back import WriteBack

#: Whether a level takes writes: puts, removals, and copies from slower levels.
WRITE_POLICIES = ("through", "skip")
_READ_ONLY = "read-only"
#: The number of keys whose last write is remembered, so that a slow lookup doesn't overwrite a later write.
_REMEMBERED = 4096
#: Seconds after which a remote entry is copied to a disk: a burst of lookups is over by then.
_CALM = 0.02
#: Seconds that closing waits for pending copies to a disk.
_CLOSING = 2.0


class ProgramCacheStack(ProgramCacheResource):
    """Several stores as one: a lookup asks the fastest first, and copies what a slower one has to the faster ones.

    A level on another machine (``is_remote``) is only asked for single keys: listings, sizes and :meth:`clear` cover
    the local levels.

    A level that raises an error is skipped and counted, with one warning. After a few failures in a row it is left
    alone for a while, for reads or for writes. A failing level never fails a lookup. A write goes to every writable
    level, and succeeds if one of them has stored it. If none has (it is read-only, refuses the size, or its disk is in
    trouble), the write is dropped and ``publish`` returns ``False``; the mapping raises only if a level raised. The
    mapping contains what any level contains; where two disagree, the faster one counts.

    An entry in a read-only level can't be removed: ``del`` removes it from the writable levels, and it can still be
    read.

    Parameters
    ----------
    levels : sequence of ProgramCacheResource
        Fastest first; closed with the stack.
    write_policy : str or sequence of str, optional
        ``"through"`` (puts, removals and copies go to the level) or ``"skip"`` (none do), for each level or for all.
        Default: ``"through"`` for writable levels. A :class:`ReadOnlyProgramCache` is always skipped.
    failures : int
        Failures in a row after which a level is left alone.
    rest : float
        Seconds before it is tried again, by one caller.
    timeout : float, optional
        Seconds. A call of a level that takes longer counts as a failure, though its answer is used. The stack can't
        interrupt a call: give a remote level a time limit of its own.
    clock : callable
        Seconds, monotonic.

    Raises
    ------
    TypeError
        A level isn't a store of this package's kind.
    ValueError
        No levels, the same level twice, a stack inside the stack, or an invalid write policy.
    """

    def __init__(
        self,
        levels: Sequence[ProgramCacheResource],
        *,
        write_policy: str | Sequence[str] | None = None,
        failures: int = 3,
        rest: float = 30.0,
        timeout: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stores = tuple(levels)
        _check(stores)
        self._levels = tuple(
            Level(store, policy, lambda: CircuitBreaker(threshold=failures, rest=rest, clock=clock), timeout, clock)
            for store, policy in zip(stores, _policies(stores, write_policy), strict=True)
        )
        for number, level in enumerate(self._levels):
            level.above = [faster for faster in self._levels[:number] if faster.writable]
        self._clock = clock
        self._has_copied = False
        self._sought: dict[str, None] = {}  # digests of recent misses
        self._demands_signatures = any(store.demands_signatures for store in stores)
        self._here = tuple(level for level in self._levels if not level.is_remote)
        self._counters = Counters()
        self._lock = self._counters.lock
        self._stripes = Stripes()
        self._writes = 0  # numbers the writes
        self._touched: OrderedDict[str, int] = OrderedDict()  # digest: number of its last write
        self._forgotten = 0  # number of the last write that was dropped from it

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(level.name for level in self._levels)}>"

    @property
    def levels(self) -> tuple[ProgramCacheResource, ...]:
        """The stores, fastest first."""
        return tuple(level.store for level in self._levels)

    @property
    def path(self) -> Path | None:
        """The directory of the first writable level on disk, where the compile path keeps derived data."""
        paths = (getattr(level.store, "path", None) for level in self._levels if level.writable)
        return next((path for path in paths if path is not None), None)

    @property
    def fleet(self) -> FleetLeases | None:  # type: ignore[override]  # a class attribute in the base class
        """The leases of the first writable level that keeps leases."""
        return next((level.store.fleet for level in self._levels if level.writable and level.store.fleet), None)

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories of all levels whose header manifests are used."""
        return tuple(root for level in self._levels if self._leads(level) for root in level.store.roots)

    def _leads(self, level: Level) -> bool:
        """Whether a level's header manifests are used.

        A manifest decides which key a program has, and so which signed program is run. If one level demands signatures,
        manifests of a level that doesn't could lead to a stale program of the first.
        """
        is_own = not level.is_remote and not isinstance(level.store, ReadOnlyProgramCache)
        return is_own or level.store.demands_signatures or not self._demands_signatures

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of its directory, with which another process can add to this stack.

        ``None`` if that would leave another level without the new programs: more than one level outlives the process.
        """
        lasting = [
            level.store
            for level in self._levels
            if level.writable and not isinstance(level.store, InMemoryProgramCache)
        ]
        if len(lasting) == 1 and isinstance(lasting[0], FileStreamProgramCache):
            return lasting[0].settings
        return None

    # Lookups

    @overload
    def get(self, key: Key) -> bytes | None: ...
    @overload
    def get(self, key: Key, default: T) -> bytes | T: ...
    def get(self, key: Key, default: Any = None) -> Any:
        """The entry's bytes, or ``default`` on a miss."""
        name = key_bytes(key)
        before = self._writes
        first = self._levels[0]
        try:
            # Cheaper than load; and from the first level, nothing needs to be copied.
            data = first.ask(first.store.get, name, answer=FrozenMissError)
        except FrozenMissError:
            data = None
        if isinstance(data, bytes):
            self._hit(first)
            return data
        if data is None:
            first.count("misses")
        found = self._look(self._levels[1:], name, before)
        if found is None and self._is_frozen():
            raise frozen_miss(repr(self), name)
        return default if found is None else found.data

    def _is_frozen(self) -> bool:
        """Whether a miss is an error in the mapping interface, which cuda.core uses."""
        return modes.current() == "frozen" or any(level.store.mode == "frozen" for level in self._levels)

    def __getitem__(self, key: Key) -> bytes:
        data = self.get(key)
        if data is None:
            raise KeyError(key)
        return data

    def load(self, key: Key) -> Entry | None:
        """The entry with its record; ``None`` if every level misses. Trouble in a level is a miss there."""
        name = key_bytes(key)
        return self._look(self._levels, name, self._writes)

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        name = key_bytes(key)
        return self._look(self._levels, name, self._writes, again=True)

    def _look(self, levels: Sequence[Level], name: bytes, before: int, *, again: bool = False) -> Entry | None:
        for level in levels:
            if level.is_remote and (entry := self._on_its_way(name)) is not None:
                self._hit(level)
                return entry
            found = level.ask(level.store.load_again if again else level.store.load, name)
            if isinstance(found, Trouble):
                continue
            if found is None:
                if not again:
                    level.count("misses")
                continue
            self._hit(level)
            self._copy_up(name, found, level, before)
            return found
        if not again:
            self._counters.count("misses")
        if self.reaches_beyond:
            self._sought[entry_digest(name)] = None
            if len(self._sought) > _REMEMBERED:
                self._sought.clear()
        return None

    def _hit(self, level: Level) -> None:
        level.count("hits")
        with self._lock:
            self._counters.hits += 1

    def _copy_up(self, name: bytes, entry: Entry, source: Level, before: int) -> None:
        """Copy an entry to the levels above its source; a remote one is copied to a disk later, on another thread."""
        if source.is_remote:
            # At once if this process has missed it before: it may hold a lease, and others on this host look on the
            # disk when that ends. Also the first copy, since it imports modules, which a thread must not (see
            # Engine.prepare).
            digest = entry_digest(name)
            at_once = self._sought.pop(digest, 0) is None or not self._has_copied
            self._has_copied = True
            now = [level for level in source.above if at_once or not level.is_disk]
            before = self._copy(name, entry, now, before, wait=at_once)
            disks = [] if at_once else [level for level in source.above if level.is_disk]
            if disks:
                owners = [getattr(level.store, "owner", level.store) for level in disks]
                self._copies.put(digest, _Copy(name, entry, disks, before, owners), len(entry.data))
        else:
            self._copy(name, entry, source.above, before)

    def _copy(self, name: bytes, entry: Entry, targets: Sequence[Level], before: int, *, wait: bool = False) -> int:
        """Copy to some levels, unless another thread has copied or written the key; return the last write's number."""
        if not targets:
            return before
        digest = entry_digest(name)
        lock = self._stripes.of(digest)
        if not lock.acquire(blocking=wait):
            return before
        with held():
            try:
                if self._touched.get(digest, self._forgotten) > before:
                    return before
                for level in targets:
                    kept = level.write(copy_to, level.store, name, entry)
                    level.count("backfilled" if kept is True else "backfill_failed")
                return self._touch(digest)
            finally:
                lock.release()

    @kept_property
    def _copies(self) -> WriteBack[_Copy]:
        """The queue of remote entries to be copied to a disk."""
        from cuda_progcache.store.tiers.write_back import WriteBack

        def write(batch: Mapping[str, _Copy]) -> None:
            for copy in batch.values():
                self._copy(*copy[:4], wait=True)

        return WriteBack(write, lambda _: None, delay=_CALM)  # a lost copy can be fetched again

    def _on_its_way(self, name: bytes) -> Entry | None:
        """A remote entry that isn't on a disk yet, unless it was written or removed since."""
        digest = entry_digest(name)
        copy = self._copies.find(digest)
        if copy is None or self._touched.get(digest, self._forgotten) > copy.before:
            return None
        return copy.entry

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until pending copies are written or given up; False if that takes longer."""
        until = self._clock() + seconds
        done = not self.reaches_beyond or self._copies.flush(seconds)
        for level in self._levels:
            if level.is_remote and (flush := getattr(level.store, "flush", None)) is not None:
                done &= flush(max(until - self._clock(), 0.0))
        return done

    # Levels on other machines

    @property
    def reaches_beyond(self) -> bool:
        """Whether a level is on another machine."""
        return len(self._here) < len(self._levels)

    def fetch(self, keys: Iterable[bytes]) -> int:
        """Copy these programs from remote levels to the local ones, in as few requests as possible."""
        missing, before, came = dict.fromkeys(keys), self._writes, 0
        for level in self._levels:
            if not level.is_remote:
                for name in list(missing):
                    if self._has(level, entry_digest(name)):
                        del missing[name]
            elif missing:
                found = iter(level.store.load_many(list(missing)))
                while (pair := level.ask(next, found, None)) is not None and not isinstance(pair, Trouble):
                    level.count("hits")
                    self._copy(*pair, level.above, before)
                    del missing[pair[0]]
                    came += 1
        return came

    def has_published(self) -> bool:
        """Whether a remote level has stored everything that was published; see the base class."""
        beyond = [level.store for level in self._levels if level.store.is_remote and level.writable]
        return not beyond or any([store.has_published() for store in beyond])  # noqa: C419 - all are asked

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Header manifests from remote levels, each from the fastest level that has it.

        If a level demands signatures, those of levels that don't are left out.
        """
        found: dict[str, bytes] = {}
        for level in self._levels:
            wanted = [name for name in names if name not in found]
            if level.is_remote and wanted and self._leads(level):
                theirs = level.ask(level.store.find_manifests, wanted)
                if not isinstance(theirs, Trouble):
                    found.update(theirs)
        return found

    def keep_manifest(self, name: str, content: bytes) -> None:
        """Add the sets of a header manifest to those of the remote levels."""
        for level in self._levels:
            if level.is_remote and level.writable:
                level.write(level.store.keep_manifest, name, content)

    def _touch(self, digest: str) -> int:
        with self._lock:
            self._writes += 1
            self._touched[digest] = self._writes
            self._touched.move_to_end(digest)
            if len(self._touched) > _REMEMBERED:
                self._forgotten = self._touched.popitem(last=False)[1]
            return self._writes

    # Writes

    def _writable(self, what: str) -> list[Level]:
        writable = [level for level in self._levels if level.writable]
        if not writable:
            raise ReadOnlyError(errno.EROFS, f"can't {what}: no level of this stack is writable")
        return writable

    def __setitem__(self, key: Key, value: Value) -> None:
        name, data = key_bytes(key), program_bytes(value)
        del value  # a frame that can raise holds no ObjectCode
        if not self._put(name, lambda store: assign_to(store, name, data)):
            trouble = [level for level in self._levels if level.writable and level.raised]
            if trouble:
                raise self._none_did("store a program", trouble)

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Store an entry with its record in every writable level; ``True`` if one of them has stored it."""
        name, payload = key_bytes(key), program_bytes(data)
        del data  # as above
        encode_record(record)  # a record that isn't a JSON object is the caller's error, not trouble in a level
        return self._put(name, lambda store: publish_to(store, name, payload, record))

    def _put(self, name: bytes, put: Callable[[ProgramCacheResource], bool]) -> bool:
        digest = entry_digest(name)
        writable = [level for level in self._levels if level.writable]
        stored = False
        with held(), self._stripes.of(digest):
            for level in writable:
                done = level.write(put, level.store)
                level.raised = isinstance(done, Trouble)
                level.count("stored" if done is True else "store_failed")
                stored |= done is True
            self._touch(digest)
        if stored:
            self._counters.count("stored")
        return stored

    def _none_did(self, what: str, levels: Iterable[Level]) -> StoreError:
        errors = [level.error for level in levels if level.error is not None]
        reasons = "; ".join(f"{level.name}: {level.error or 'out of use for a while'}" for level in levels)
        code = next((exc.errno for exc in errors if isinstance(exc, OSError) and exc.errno), errno.EIO)
        return StoreError(code, f"can't {what} in any level of the stack ({reasons})")

    def __delitem__(self, key: Key) -> None:
        name = key_bytes(key)
        self._remove(entry_digest(name), key, lambda store: store.__delitem__(name))

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest from the writable levels; :class:`KeyError` if no level has it."""
        if not is_digest(digest):
            raise KeyError(digest)
        self._remove(digest, digest, lambda store: store.remove(digest))

    def quarantine(self, digest: str) -> None:
        """Quarantine an entry that proved wrong in the writable levels; see :meth:`remove`."""
        if not is_digest(digest):
            raise KeyError(digest)
        self._remove(digest, digest, lambda store: store.quarantine(digest))

    def _remove(self, digest: str, asked: object, remove: Callable[[ProgramCacheResource], None]) -> None:
        removed, trouble = False, []
        with held(), self._stripes.of(digest):
            for level in reversed(self._levels):  # so that a level never has an entry that those below have lost
                if level.writable:
                    try:
                        done = level.write(remove, level.store, answer=KeyError)
                    except KeyError:
                        continue
                    if isinstance(done, Trouble):
                        trouble.append(level)
                    else:
                        removed = True
            self._touch(digest)
        if trouble:
            raise self._none_did("remove a program", trouble)
        if removed:
            return
        for level in self._levels:
            if not level.writable and self._has(level, digest):
                raise ReadOnlyError(
                    errno.EROFS, "can't remove a program: it is in a level that isn't writable", level.name
                )
        raise KeyError(asked)

    @staticmethod
    def _has(level: Level, digest: str) -> bool:
        try:
            return not isinstance(level.ask(level.store.info, digest, answer=KeyError), Trouble)
        except KeyError:
            return False

    def clear(self) -> None:
        """Remove every entry from the writable local levels; entries in other levels can still be read."""
        forget_derived(self)
        with ExitStack() as taken:
            for lock in self._stripes.locks:
                taken.enter_context(lock)
            writable = [level for level in self._writable("clear the program cache") if not level.is_remote]
            trouble = [level for level in reversed(writable) if isinstance(level.write(level.store.clear), Trouble)]
            with self._lock:
                self._writes += 1
                self._forgotten = self._writes
                self._touched.clear()
        if trouble:
            raise self._none_did("clear the program cache", trouble)

    # Contents

    def __len__(self) -> int:
        return len(set(self._digests("")))

    def _digests(self, prefix: str) -> Iterable[str]:
        found: set[str] = set()
        for level in self._here:
            digests = level.ask(level.digests, prefix)
            if not isinstance(digests, Trouble):
                found.update(digests)
        return found

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry once, from the fastest level that has it."""
        seen: set[str] = set()
        for level in self._here:
            found = level.ask(level.store.entries)
            while not isinstance(found, Trouble):
                info = level.ask(next, found, None)
                if info is None or isinstance(info, Trouble):
                    break
                if info.digest not in seen:
                    seen.add(info.digest)
                    yield info

    def info(self, digest: str) -> EntryInfo:
        """One entry, of the fastest level that holds it; :class:`KeyError` if none does."""
        for level in self._levels:
            try:
                info = level.ask(level.store.info, digest, answer=KeyError)
            except KeyError:
                continue
            if not isinstance(info, Trouble):
                return info
        raise KeyError(digest)

    def stats(self) -> StoreStats:
        """The contents of all levels in numbers, the stack's lookups and writes, and each level's share in ``levels``.

        Damage, evictions, dropped writes and failures are sums over the local levels.
        """
        sizes: dict[str, tuple[int, int]] = {}
        sums = dict.fromkeys(("corrupt", "evicted", "dropped", "refused", "read_errors", "failed"), 0)
        for level in self._here:
            held = level.peek(level.sizes)
            if not isinstance(held, Trouble):
                for digest, size, record_size in held:
                    sizes.setdefault(digest, (size, record_size))
            stats = level.peek(level.store.stats)
            if not isinstance(stats, Trouble):
                for name in sums:
                    sums[name] += getattr(stats, name)
        own = self._counters.stats(
            entries=len(sizes),
            size=sum(size for size, _ in sizes.values()),
            record_size=sum(record_size for _, record_size in sizes.values()),
        )
        return own._replace(levels=tuple(level.stats() for level in self._levels))._replace(**sums)  # type: ignore[arg-type]

    def close(self) -> None:
        """Close every level, after waiting for pending copies to a disk."""
        if self.reaches_beyond:
            self._copies.flush(_CLOSING)
        for level in self._levels:
            level.close()


class _Copy(NamedTuple):
    """A pending copy to some levels, made unless the key was written after ``before``.

    ``owners`` are kept alive until it is done, because a level may hold only a weak reference to its directory's store.
    """

    name: bytes
    entry: Entry
    targets: Sequence[Level]
    before: int
    owners: Sequence[object]


def _check(stores: tuple[ProgramCacheResource, ...]) -> None:
    if not stores:
        raise ValueError("a stack needs at least one level")
    for store in stores:
        if isinstance(store, ProgramCacheStack) or isinstance(getattr(store, "_inner", None), ProgramCacheStack):
            raise ValueError("a stack can't contain a stack: pass its levels instead")  # noqa: TRY004 - the type is right
        if not isinstance(store, ProgramCacheResource):
            raise TypeError(f"a level must be one of cuda_progcache's stores, got {type(store).__name__}")
    if len({id(store) for store in stores}) < len(stores):
        raise ValueError("a store can't be two levels of a stack")


def _policies(stores: tuple[ProgramCacheResource, ...], asked: str | Sequence[str] | None) -> list[str]:
    read_only = [isinstance(store, ReadOnlyProgramCache) for store in stores]
    if asked is None or isinstance(asked, str):
        asked = [asked or "through"] * len(stores)
        asked = ["skip" if reads else policy for policy, reads in zip(asked, read_only, strict=True)]
    if len(asked) != len(stores):
        raise ValueError(f"write_policy has {len(asked)} policies for {len(stores)} levels")
    for policy, reads in zip(asked, read_only, strict=True):
        if policy not in WRITE_POLICIES:
            raise ValueError(f"a write policy must be one of {', '.join(WRITE_POLICIES)}, got {policy!r}")
        if reads and policy == "through":
            raise ValueError("a read-only level can't be written through: its policy is 'skip'")
    return [_READ_ONLY if reads else policy for policy, reads in zip(asked, read_only, strict=True)]
