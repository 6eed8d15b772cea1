# SPDX-License-Identifier: Apache-2.0
"""Statistics of a tier: for this process, and for all processes on a directory, in one file there for each tier.

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
    """Statistics of a tier in this process.

    Attributes
    ----------
    name : str
        Its URL without secrets.
    state : {"closed", "open", "half-open"}
        The state of its circuit breaker: in use; out of use for a while; about to be tried again.
    hits, misses : int
        Lookups of programs; those that weren't made while it was out of use count as misses.
    corrupt, untrusted : int
        Objects other than those requested, and objects without a trusted signature.
    errors, timeouts : int
        Calls that failed, and how many of those were time-outs.
    skipped : int
        Calls that weren't made while it was out of use.
    stored, dropped, waiting : int
        Objects written, dropped, and still queued.
    bytes_in, bytes_out : int
        Bytes of objects read and written.
    calls : int
        Calls that it answered.
    seconds : float
        The total time of these calls.
    error : str
        The latest error, without secrets; empty if there was none.
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
    """The part of a tier's store that counts."""

    @property
    def name(self) -> str:
        """Its URL without secrets."""

    def tier(self) -> TierStats:
        """Its statistics."""


class TierTotals(NamedTuple):
    """Counts; the fields are those of :class:`TierStats`."""

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
    """Writes the counts of a tier's store in this process to a directory's file.

    If several directories share a tier, each count is written only once, by the first tally that writes.
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
    """The counts for a tier that the processes on a directory have written down."""
    return functools.reduce(TierTotals.plus, _Log(root, url).spans().values(), TierTotals())


#: The counts of each tier that are already written down.
_written: weakref.WeakKeyDictionary[_Tier, TierTotals] = weakref.WeakKeyDictionary()
_lock = ForkSafeLock()

forks.in_child(_written.clear)  # in a child the counts start at zero
