# SPDX-License-Identifier: Apache-2.0
"""What a tier has cost and given: in this process, and in all that use a directory, in a file there for each tier.

The file is that of :mod:`~cuda_progcache.store.counters` under another name: ``tier-<16 hex digits>.log``, from the
SHA-256 of the tier's URL.
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cuda_progcache._util import forks
from cuda_progcache._util.digest import sha256
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store import counters
from cuda_progcache.store.counters import Tally

if TYPE_CHECKING:
    from cuda_progcache.store.root import Root


class TierStats(NamedTuple):
    """What a tier has cost and given in this process.

    Attributes
    ----------
    name : str
        Its URL without secrets.
    state : {"closed", "open", "half-open"}
        Of its circuit breaker: in use; out of use for a while; about to be tried again.
    hits, misses : int
        Look-ups of programs; those that it was spared are misses.
    corrupt, untrusted : int
        Objects that weren't what was asked for, and those that nobody who is trusted has signed.
    errors, timeouts : int
        Calls that failed, and those of them that ran out of time.
    skipped : int
        Calls that it was spared while it was out of use.
    stored, dropped, waiting : int
        Objects written, given up, and on their way.
    bytes_in, bytes_out : int
        Of objects.
    calls : int
        Calls that it answered.
    seconds : float
        That these took in all.
    error : str
        The latest, without secrets; empty where there was none.
    """

    name: str
    state: str
    hits: int
    misses: int
    corrupt: int
    untrusted: int
    errors: int
    timeouts: int
    skipped: int
    stored: int
    dropped: int
    waiting: int
    bytes_in: int
    bytes_out: int
    calls: int
    seconds: float
    error: str


class _Tier(Protocol):
    """The store on a tier, as far as its counts go."""

    @property
    def name(self) -> str:
        """Its URL without secrets."""

    def tier(self) -> TierStats:
        """What it has cost and given."""


class TierTotals(NamedTuple):
    """What was counted; the fields are those of :class:`TierStats`."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    untrusted: int = 0
    errors: int = 0
    timeouts: int = 0
    stored: int = 0
    dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    calls: int = 0

    def plus(self, other: TierTotals) -> TierTotals:
        """The sum, field by field."""
        return TierTotals(*map(operator.add, self, other))

    def minus(self, other: TierTotals) -> TierTotals:
        """The difference, field by field."""
        return TierTotals(*map(operator.sub, self, other))


class _Log(counters._Log):
    TOTALS = TierTotals

    def __init__(self, root: Root, url: str) -> None:
        self.NAME = f"tier-{sha256(url.encode()).hexdigest()[:16]}.log"
        super().__init__(root)


class TierTally(Tally):
    """What a tier's store counts in this process, on its way to the file of a directory.

    A tier may lie behind several directories: what it counts is written down once, by the first that does.
    """

    def __init__(self, root: Root, remote: _Tier) -> None:
        super().__init__(root, _Counters(remote))
        self._log = _Log(root, remote.name)


class _Counters:
    def __init__(self, remote: _Tier) -> None:
        self._remote = remote

    def _counted(self) -> TierTotals:
        told = self._remote.tier()
        return TierTotals(*[getattr(told, name) for name in TierTotals._fields])

    def unwritten(self) -> TierTotals:
        counted = self._counted()
        with _lock:
            return counted.minus(_written.get(self._remote, TierTotals()))

    def take_unwritten(self) -> TierTotals:
        counted = self._counted()
        with _lock:
            before = _written.get(self._remote, TierTotals())
            _written[self._remote] = counted
        return counted.minus(before)

    def give_back(self, counted: TierTotals) -> None:
        with _lock:
            _written[self._remote] = _written.get(self._remote, TierTotals()).minus(counted)


def counted(root: Root, url: str) -> TierTotals:
    """What the processes on a directory have written down of a tier."""
    return functools.reduce(TierTotals.plus, _Log(root, url).spans().values(), TierTotals())


#: What of a tier's counts is in a file.
_written: weakref.WeakKeyDictionary[_Tier, TierTotals] = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()

forks.in_child(_written.clear)  # where the counts start at zero
