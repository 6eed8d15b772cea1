# SPDX-License-Identifier: Apache-2.0
"""A store's size cap: how writes update the account, and the eviction that they may have to run.

A write announces itself in the account that all processes share (:mod:`~cuda_progcache.store.ledger`) and reports when
it is done. If the store is then above its cap, it runs an eviction pass; :mod:`~cuda_progcache.store.eviction` decides
which entries to evict, and gives the figures. Opening a store scans nothing. Shards that the account doesn't know yet
are counted by the puts, a few each, and estimated from the known shards until then.

In a store small enough for a pass over all entries, each put recounts the shards that concurrent writers have put in
doubt. So the last writer knows the size to the byte, and leaves the store within its cap. In a larger store, the doubts
are a few entries in thousands: a margin is kept free for them, and they are counted one by one. Each pass counts the
shards that it scans, and from time to time a put counts a shard anyway, so that the account follows manual changes to
the directory.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque

from cuda_progcache import events
from cuda_progcache._util.parallel import for_each
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.store import pairs, removal
from cuda_progcache.store.eviction import (
    SAMPLE_SHARE,
    Candidate,
    choose_victims,
    excess,
    passes_at_most,
    shards_to_look_at,
)
from cuda_progcache.store.ledger import SHARDS, Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from cuda_progcache.store.eviction import LastUse
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.stats import Counters

#: Entries that one put counts at most while shards are uncounted, but at least one shard: 5 ms.
COUNT_SLICE = 512
#: One put in this many entries of a shard recounts a shard, so that the account heals at a cost independent of size.
AUDIT_LOOKS = 4
#: Entries evicted or scanned before this is written to the account. Until then, other processes evict as well.
TELL_EVERY = 64
#: Puts between two scans of the staging files of other writers, live or dead.
LOOK_AT_STAGING_EVERY = 64


class SizeCap:
    """The size cap of one store object, and its account of a directory that others write to as well.

    Parameters
    ----------
    root : Root
        The directory.
    cap : int or None
        Bytes allowed. ``None``: no limit, and writes are accounted only if other store objects keep an account.
    counters : Counters
        Evictions are counted there.
    last_use : LastUse
        The store object's.
    """

    def __init__(self, root: Root, cap: int | None, counters: Counters, last_use: LastUse) -> None:
        self.cap = cap
        self.ledger = Ledger(root)
        self.last_use = last_use
        self._root = root
        self._counters = counters
        self._warned: set[str] = set()
        self._enforcing = 0  # the process that runs a pass
        self._written_meanwhile = False
        self._puts = 0
        self._staged = 0  # bytes of staging files at the last scan
        self._rest = 0  # puts to skip before the next pass, after one that found nothing to evict

    def operation(self, digest: str, size: int = 0) -> Operation:
        """Announce that an entry will be added, changed or removed.

        Parameters
        ----------
        digest : str
            The entry's name.
        size : int
            Bytes that may be added.
        """
        return Operation(self.ledger, int(digest[:2], 16), size)

    def wrote(self, digest: str) -> None:
        """Evict, after an entry was published, if the store is above its cap."""
        if self.cap is None:
            return
        self.last_use.note(digest, time.time_ns())
        while True:
            with self._counters.lock:
                # By process: a child forked in the middle of a pass isn't in one.
                self._written_meanwhile = self._enforcing == os.getpid()
                if self._written_meanwhile:
                    return  # the other thread checks again
                self._enforcing = os.getpid()
            try:
                self._enforce(self.cap, digest)
            except OSError as exc:  # the write itself is done
                self._counters.count("failed")
                self._rest = self.ledger.entries // 64
                self._warn_once("eviction", f"can't evict programs from {self._root.path}: {exc.strerror or exc}")
            finally:
                with self._counters.lock:
                    self._enforcing = 0
            if not self._written_meanwhile:
                return

    def unannounced(self, changes: Iterable[tuple[str, int, int]]) -> None:
        """Account for unannounced changes: digest, and the entries and bytes added."""
        shards: dict[int, tuple[int, int]] = {}
        for digest, entries, size in changes:
            if entries < 0:
                self.last_use.pop(digest, None)
            before = shards.get(int(digest[:2], 16), (0, 0))
            shards[int(digest[:2], 16)] = before[0] + entries, before[1] + size
        if shards and (self.cap is not None or self.ledger.exists()):
            self.ledger.doubt((shard, *change) for shard, change in shards.items())

    def damaged(self) -> None:
        """Account for a file that was moved to the quarantine, which has a share of the cap."""
        if self.cap is not None:
            self._look_at_staging(self.cap)

    def cleared(self) -> None:
        """Discard the account: everything was removed, or an unknown part of it."""
        self.last_use.clear()
        self.ledger.discard()

    # The account

    def _enforce(self, cap: int, digest: str) -> None:
        if not self.ledger.complete:
            self._count_some()
        elif self._audit_is_due(digest):
            self._count(self.ledger.doubtful()[:1] or [int(digest[4:6], 16)])
        if self._rest:
            self._rest -= 1
            return
        self._puts += 1
        if self._puts % LOOK_AT_STAGING_EVERY == 1:
            self._look_at_staging(cap)
        for _ in range(passes_at_most(self._size, cap)):
            self._make_sure()
            if self._size > cap:
                self._look_at_staging(cap)
            if self._size <= cap or self._rest:
                return
            if not self._evict(cap):
                break
        self._make_sure()

    def _look_at_staging(self, cap: int) -> None:
        quarantined = removal.trim_quarantine(
            self._root, keep=removal.QUARANTINE_KEEP, at_most=cap // removal.QUARANTINE_SHARE
        )
        self._staged = removal.reclaim(self._root) + quarantined

    def _make_sure(self) -> None:
        """Count the shards in doubt, if the store is small enough."""
        if self._looked_at_whole and self.ledger.complete and (doubtful := self.ledger.doubtful()):
            self._count(doubtful)

    @property
    def _looked_at_whole(self) -> bool:
        return shards_to_look_at(self.ledger.entries, SHARDS) == SHARDS

    @property
    def _size(self) -> int:
        """An upper bound of the bytes charged."""
        size = self.ledger.size + self._unannounced
        if self._looked_at_whole or not self.ledger.doubts:
            return size
        return size + self.ledger.doubts * size // self.ledger.entries

    @property
    def _unannounced(self) -> int:
        """Bytes not in the account: in the quarantine, and in staging files without an operation."""
        return max(0, self._staged - self.ledger.announced)

    def _audit_is_due(self, digest: str) -> bool:
        # A digest serves as a random number.
        entries = max(AUDIT_LOOKS * 16, self.ledger.entries // SHARDS)
        return int(digest[6:14], 16) * entries < AUDIT_LOOKS << 32

    def _count_some(self) -> None:
        present = set(self._shards_with_entries())
        looked = 0
        for shard in self.ledger.uncounted():
            if shard in present:
                looked += len(self._count([shard]))
            if looked >= COUNT_SLICE:
                break

    def _count(self, shards: Iterable[int]) -> list[Candidate]:
        found: list[Candidate] = []
        counts: list[tuple[int, int, int]] = []
        untold = 0
        since = self.ledger.mark()
        for shard in shards:
            present, forsaken = pairs.survey(self._root, f"{shard:02x}", self.last_use)
            for digest in forsaken:
                removal.take_record(self._root, digest)
            found += present
            counts.append((shard, len(present), sum(candidate.charged for candidate in present)))
            untold += len(present)
            if untold >= TELL_EVERY:  # soon: a change by others since the scan causes a doubt
                self.ledger.count(counts, since)
                counts, untold = [], 0
                since = self.ledger.mark()
        self.ledger.count(counts, since)
        return found

    def _shards_with_entries(self) -> list[int]:
        """The shards that have a directory; the others are recorded as empty."""
        since = self.ledger.mark()
        present = {int(shard, 16) for shard in self._root.shards()}
        self.ledger.count(
            [(shard, 0, 0) for shard in range(SHARDS) if shard not in present and not self.ledger.is_empty(shard)],
            since,
        )
        return sorted(present)

    # Eviction

    def _evict(self, cap: int) -> bool:
        """Run a pass; ``False`` if it scanned everything and nothing has to be evicted, whatever the account says."""
        looked_at = shards_to_look_at(self.ledger.entries, SHARDS)
        exact = looked_at == SHARDS
        candidates = self._count(self._shards_with_entries() if exact else sorted(_some_shards(looked_at)))
        # If everything was scanned, the account isn't used: on a full disk, it may be an estimate from one shard.
        on_its_way = self.ledger.announced + self._unannounced
        size = on_its_way + sum(candidate.charged for candidate in candidates) if exact else self._size
        to_free = excess(size, len(candidates) if exact else self.ledger.entries, cap)
        if not to_free:
            return False
        pins = self._root.pins()
        free = [candidate for candidate in candidates if candidate.digest not in pins]
        at_most = None if exact else max(1, len(candidates) // SAMPLE_SHARE)
        victims = choose_victims(free, excess=to_free, at_most=at_most, now=max(time.time_ns(), self.last_use.latest))
        self.remove(victims, evicted=True)
        if pins and len(victims) == len(free):
            self._only_pins_left(pins, len(candidates), cap)
        return True

    def remove(self, victims: list[Candidate], *, evicted: bool = False) -> list[Candidate]:
        """Remove entries that are unchanged and not pinned; return those that were removed.

        Parameters
        ----------
        victims : list of Candidate
        evicted : bool
            Whether to count and report this as an eviction.

        Raises
        ------
        OSError
            The directory can't be written. What was removed before is accounted for.
        """
        gone: list[Candidate] = []
        for start in range(0, len(victims), TELL_EVERY):
            gone += self._remove(victims[start : start + TELL_EVERY], evicted=evicted)
        return gone

    def _remove(self, victims: list[Candidate], *, evicted: bool) -> Iterable[Candidate]:
        gone: deque[Candidate] = deque()  # appended to by several threads

        def evict(victim: Candidate) -> None:
            if removal.take_away(self._root, victim.digest, victim.seen, unless_pinned=True):
                gone.append(victim)

        accounted = self.cap is not None or self.ledger.exists()
        changes = {int(victim.digest[:2], 16): (0, 0) for victim in victims}
        operation = self.ledger.begin(changes) if accounted else 0
        sure = False
        try:
            for_each(victims, evict)
            sure = True
        finally:
            for victim in gone:
                self.last_use.pop(victim.digest, None)
                entries, size = changes[int(victim.digest[:2], 16)]
                changes[int(victim.digest[:2], 16)] = entries - 1, size - victim.charged
            if accounted:
                self.ledger.end(operation, [(shard, *change) for shard, change in changes.items()], sure=sure)
            if evicted:
                self._counters.count("evicted", len(gone))
                for victim in gone:
                    events.emit_evicted(victim.digest)
        return gone

    def _only_pins_left(self, pins: set[str], looked_at: int, cap: int) -> None:
        self._rest = looked_at // 64
        pinned = sum(pairs.charged_on_disk(self._root, digest) or 0 for digest in pins)
        if pinned > cap:
            self._warn_once(
                "pins",
                f"pinned programs take {pinned} bytes of {self._root.path}, more than its size cap of {cap} bytes",
            )

    def _warn_once(self, about: str, message: str) -> None:
        with self._counters.lock:
            warned = about in self._warned
            self._warned.add(about)
        if not warned:
            warnings.warn(message, ProgCacheWarning, stacklevel=3)


class Operation:
    """A context manager for a change of one entry, from its announcement to its end.

    Parameters
    ----------
    ledger : Ledger
        The account.
    shard : int
        The entry's.
    size : int
        Bytes that may be added.
    """

    __slots__ = ("_change", "_ledger", "_ref", "_shard")

    def __init__(self, ledger: Ledger, shard: int, size: int) -> None:
        self._ledger = ledger
        self._shard = shard
        self._change = (0, 0)
        self._ref = ledger.begin([shard], size)

    def done(self, entries: int, size: int) -> None:
        """Report the entries and bytes added; negative if removed."""
        self._change = entries, size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._ledger.end(self._ref, [(self._shard, *self._change)], sure=failure is None)


def _some_shards(count: int) -> set[int]:
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.update(os.urandom(count - len(chosen)))
    return chosen
