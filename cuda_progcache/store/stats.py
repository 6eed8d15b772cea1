# SPDX-License-Identifier: Apache-2.0
"""Counters and statistics of stores."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping

from cuda_progcache._util import forks
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.locks import ForkSafeLock


class Totals(NamedTuple):
    """Counts; the fields are those of :class:`StoreStats`."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    evicted: int = 0
    dropped: int = 0
    refused: int = 0
    read_errors: int = 0
    stored: int = 0
    unkeyed: int = 0

    def plus(self, other: Totals) -> Totals:
        """The sum, field by field."""
        return Totals(*map(operator.add, self, other))

    def minus(self, other: Totals) -> Totals:
        """The difference, field by field."""
        return Totals(*map(operator.sub, self, other))


NOTHING = Totals()


class Span(NamedTuple):
    """The counts of one hour (of the last two days) or of one day (before).

    Attributes
    ----------
    start : float
        Seconds since the epoch; 0.0 for everything before the days that are kept apart.
    counted : Totals
    """

    start: float
    counted: Totals


def total(spans: Iterable[Span]) -> Totals:
    """The sum of all spans."""
    return functools.reduce(Totals.plus, (span.counted for span in spans), NOTHING)


class LevelStats(NamedTuple):
    """The stack's counters for one level of a :class:`~cuda_progcache.store.ProgramCacheStack`.

    Attributes
    ----------
    name : str
        Class of the level, and its directory if it has one.
    policy : {"through", "skip", "read-only"}
        Whether writes go there.
    hits, misses : int
        Lookups that reached it, and their results.
    stored : int
        Writes that it stored.
    store_failed : int
        Writes that it dropped, or raised on.
    backfilled, backfill_failed : int
        Entries that were found in a slower level and copied here; copies that failed.
    errors : int
        Calls that raised, or that took longer than the stack's ``timeout``.
    skipped : int
        Calls that weren't made because its breaker was open.
    state : {"closed", "open", "half-open"}
        Its circuit breaker: in use; out of use for a while; being tried again.
    """

    name: str
    policy: str
    hits: int
    misses: int
    stored: int
    store_failed: int
    backfilled: int
    backfill_failed: int
    errors: int
    skipped: int
    state: str


class StoreStats(NamedTuple):
    """Contents of a store, and what this store object has counted since it was made (in a forked child: since then).

    Attributes
    ----------
    entries, bytes, record_bytes : int
        Entries, the sum of their sizes, and the sum of their records' sizes.
    hits, misses : int
        Lookups; they add up to all lookups.
    corrupt : int
        Damaged entries or records found by lookups; each such lookup is also a miss.
    evicted : int
        Entries removed to keep the size cap.
    dropped : int
        Writes that were lost to trouble in the cache.
    refused : int
        Writes of a value larger than the size cap.
    read_errors : int
        Lookups that failed for another reason than absence or damage (permission, I/O error, stale handle).
    stored : int
        Writes that succeeded.
    failed : int
        Removals, clears and eviction passes that trouble in the cache prevented; not kept in ``all_time``.
    unkeyed : int
        Programs that were compiled but not kept, because a hit could differ from a fresh compile.
    unkeyed_by : Mapping of str to int
        The same by kind of reason (:data:`cuda_progcache.compile.unkept.KINDS`).
    all_time : Totals or None
        The same counters over all processes that have used this directory, including those of this process that aren't
        written down yet. They are written at ``close()``, at exit and every few seconds of use; a process that is
        killed loses the counts since then. ``None`` in a store that doesn't outlive its process.
    levels : tuple of LevelStats
        The levels of a stack, fastest first.
    """

    entries: int
    bytes: int
    hits: int
    misses: int
    corrupt: int
    evicted: int
    dropped: int
    refused: int = 0
    read_errors: int = 0
    record_bytes: int = 0
    stored: int = 0
    failed: int = 0
    unkeyed: int = 0
    unkeyed_by: Mapping[str, int] = {}
    all_time: Totals | None = None
    levels: tuple[LevelStats, ...] = ()


class Counters:
    """Counters of one store object, read and written under ``lock``. In a forked child they start at zero."""

    __slots__ = ("__weakref__", "_written", "failed", "lock", "unkeyed_by", *Totals._fields)

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.reset()
        forks.in_child(self.reset)  # the parent reports its own counts

    def reset(self) -> None:
        """Start at zero."""
        self.hits = self.misses = self.corrupt = self.evicted = 0
        self.dropped = self.refused = self.read_errors = self.stored = self.failed = self.unkeyed = 0
        self.unkeyed_by: dict[str, int] = {}
        self._written = Totals()

    def count(self, name: str, by: int = 1) -> None:
        """Add to one counter."""
        with self.lock:
            setattr(self, name, getattr(self, name) + by)

    def count_unkeyed(self, kind: str) -> None:
        """Count a program that can't be kept."""
        with self.lock:
            self.unkeyed += 1
            self.unkeyed_by[kind] = self.unkeyed_by.get(kind, 0) + 1

    def totals(self) -> Totals:
        """A consistent copy of all counters."""
        with self.lock:
            return Totals(
                self.hits, self.misses, self.corrupt, self.evicted, self.dropped, self.refused, self.read_errors,
                self.stored, self.unkeyed,
            )  # fmt: skip

    def unwritten(self) -> Totals:
        """The counts that aren't written down yet."""
        with self.lock:
            return self.totals().minus(self._written)

    def take_unwritten(self) -> Totals:
        """Return the same, and mark them as written down."""
        with self.lock:
            counted, self._written = self.unwritten(), self.totals()
            return counted

    def give_back(self, counted: Totals) -> None:
        """Take counts back that couldn't be written down."""
        with self.lock:
            self._written = self._written.minus(counted)

    def stats(self, *, entries: int, size: int, record_size: int, all_time: Totals | None = None) -> StoreStats:
        """The counters, with the store's contents in numbers."""
        with self.lock:
            counted, by_kind = self.totals(), dict(self.unkeyed_by)
        return StoreStats(
            entries=entries,
            bytes=size,
            record_bytes=record_size,
            failed=self.failed,
            all_time=all_time,
            unkeyed_by=by_kind,
            **counted._asdict(),
        )
