# SPDX-License-Identifier: Apache-2.0
"""A store's size cap: what a write does to the account, and the eviction that it may have to run.

A write enters its entry in the account that all processes share (:mod:`~cuda_progcache.store.ledger`) and, where that
is then above the cap, runs an eviction pass; which entries go is decided, and its figures are given, in
:mod:`~cuda_progcache.store.eviction`. Opening looks at nothing. What the account doesn't know yet is counted by the
puts, some shards each, and until then guessed from the shards that are known. Each pass counts the shards that it looks
at, and one put in a while counts a shard without being asked, so that the account follows the directory whatever is
done to it by hand.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING

from cuda_progcache._util.parallel import for_each
from cuda_progcache.store import pairs
from cuda_progcache.store.eviction import (
    SAMPLE_SHARE,
    Candidate,
    choose_victims,
    excess,
    passes_at_most,
    shards_to_look_at,
)
from cuda_progcache.store.ledger import SHARDS, Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_progcache.store.root import Root
    from cuda_progcache.store.stats import Counters

#: Entries that one put counts, at most, where shards are uncounted, or one shard: 5 ms.
COUNT_SLICE = 512
#: One put in so many entries of a shard counts a shard again: the account heals, at a cost that knows no size.
AUDIT_LOOKS = 4
#: Evictions told to other processes in one line of the ledger; they evict, too, until they know.
TELL_EVERY = 64
#: Puts between two looks at the staging files of other writers, alive or dead.
LOOK_AT_STAGING_EVERY = 64
#: Last uses remembered in a process; 150 bytes each.
_REMEMBERED = 131_072


class SizeCap:
    """The size cap of one store object, and its account of a directory that others write to as well.

    Parameters
    ----------
    root : Root
        The directory.
    cap : int or None
        Bytes allowed. ``None``: no limit; writes are entered in the account only where other store objects keep one.
    counters : Counters
        Evictions are counted there.
    """

    def __init__(self, root: Root, cap: int | None, counters: Counters) -> None:
        self.cap = cap
        self.ledger = Ledger(root)
        #: Digest to nanoseconds since the epoch: reads and writes of this process, exact; on disk it is to minutes.
        self.last_use: dict[str, int] = {}
        self._latest = 0  # of them; the clock may be set back, their order stays
        self._root = root
        self._counters = counters
        self._warned: set[str] = set()
        self._accounted: bool | None = None if cap is None else True
        self._enforcing = 0  # the process that does
        self._puts = 0
        self._staged = 0  # bytes of staging files when they were last looked at
        self._rest = 0  # puts to let pass before a pass is tried again that would find nothing to evict

    @property
    def accounted(self) -> bool:
        """Whether writes are entered in the account; found out once where this store object has no cap."""
        if self._accounted is None:
            self._accounted = self.ledger.exists()
        return self._accounted

    def used(self, digest: str, now: int) -> None:
        """Note that this process has read or written an entry just now (nanoseconds since the epoch)."""
        self._latest = self.last_use[digest] = max(now, self._latest + 1)

    def wrote(self, digest: str, entries: int, size: int) -> None:
        """An entry was published: so many entries and bytes more than before. Evicts where that is too much."""
        if not self.accounted:
            return
        self.ledger.change([(int(digest[:2], 16), entries, size)])
        if self.cap is None:
            return
        self.used(digest, time.time_ns())
        with self._counters.lock:
            if self._enforcing == os.getpid():  # by process: a child forked in the middle of a pass isn't in one
                return
            self._enforcing = os.getpid()
        try:
            self._enforce(self.cap, digest)
        except OSError as exc:  # the write itself is done
            self._rest = self.ledger.entries // 64
            self._warn_once("eviction", f"can't evict programs from {self._root.path}: {exc.strerror or exc}")
        finally:
            self._enforcing = 0

    def removed(self, digest: str, size: int) -> None:
        """An entry of so many bytes was removed."""
        self.last_use.pop(digest, None)
        if self.accounted:
            self.ledger.change([(int(digest[:2], 16), -1, -size)])

    def cleared(self) -> None:
        """Everything was removed."""
        self.last_use.clear()
        if self.accounted:
            self.ledger.discard()

    # The account

    def _enforce(self, cap: int, digest: str) -> None:
        if not self.ledger.complete:
            self._count_some()
        elif self._audit_is_due(digest):
            self._count([int(digest[4:6], 16)])
        if self._rest:
            self._rest -= 1
            return
        if self._puts % LOOK_AT_STAGING_EVERY == 0:
            self._staged = self._root.reclaim()
        self._puts += 1
        for _ in range(passes_at_most(self._size, cap)):
            if self._size > cap:
                self._staged = self._root.reclaim()
            if self._size <= cap or self._rest:
                return
            self._evict(cap)

    @property
    def _size(self) -> int:
        return self.ledger.size + self._staged

    def _audit_is_due(self, digest: str) -> bool:
        # A digest is as good as dice.
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
        for shard in shards:
            present = list(pairs.candidates(self._root, f"{shard:02x}", self.last_use))
            found += present
            counts.append((shard, len(present), sum(candidate.charged for candidate in present)))
            untold += len(present)
            if untold >= TELL_EVERY:  # soon: a write of another process between scan and line is counted wrongly
                self.ledger.count(counts)
                counts, untold = [], 0
        self.ledger.count(counts)
        return found

    def _shards_with_entries(self) -> list[int]:
        """Those with a directory; the others are entered as empty."""
        present = {int(shard, 16) for shard in self._root.shards()}
        self.ledger.count(
            [(shard, 0, 0) for shard in range(SHARDS) if shard not in present and not self.ledger.is_empty(shard)]
        )
        return sorted(present)

    # Eviction

    def _evict(self, cap: int) -> None:
        looked_at = shards_to_look_at(self.ledger.entries, SHARDS)
        exact = looked_at == SHARDS
        candidates = self._count(self._shards_with_entries() if exact else sorted(_some_shards(looked_at)))
        # Where all was looked at, no account is needed: on a full disk it may be a guess from one shard.
        size = self._staged + sum(candidate.charged for candidate in candidates) if exact else self._size
        to_free = excess(size, len(candidates) if exact else self.ledger.entries, cap)
        if not to_free and self._size > cap:
            self._rest = 1 + len(candidates) // 64
            return
        pins = self._root.pins()
        free = [candidate for candidate in candidates if candidate.digest not in pins]
        at_most = None if exact else max(1, len(candidates) // SAMPLE_SHARE)
        victims = choose_victims(free, excess=to_free, at_most=at_most, now=max(time.time_ns(), self._latest))
        self._remove(victims)
        if pins and len(victims) == len(free):
            self._only_pins_left(pins, len(candidates), cap)
        if len(self.last_use) > _REMEMBERED:
            youngest = sorted(self.last_use.items(), key=lambda item: item[1])[_REMEMBERED // 2 :]
            self.last_use = dict(youngest)

    def _remove(self, victims: list[Candidate]) -> None:
        gone: deque[Candidate] = deque()

        def evict(victim: Candidate) -> None:
            if pairs.evict(self._root, victim):
                self.last_use.pop(victim.digest, None)
                gone.append(victim)
                if len(gone) >= TELL_EVERY:
                    self._tell(gone)

        try:
            for_each(victims, evict)
        finally:
            self._tell(gone)

    def _tell(self, gone: deque[Candidate]) -> None:
        told: list[tuple[int, int, int]] = []
        with contextlib.suppress(IndexError):  # other threads draw from it, too
            while True:
                victim = gone.popleft()
                told.append((int(victim.digest[:2], 16), -1, -victim.charged))
        self._counters.count("evicted", len(told))
        self.ledger.change(told)

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
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _some_shards(count: int) -> set[int]:
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.update(os.urandom(count - len(chosen)))
    return chosen
