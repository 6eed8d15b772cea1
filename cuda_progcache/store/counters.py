# SPDX-License-Identifier: Apache-2.0
"""Counters that outlive the process: what the store objects of all processes on one directory have counted.

A lookup counts in memory. What was counted since is appended to ``<root>/counters.log`` (an
:class:`~cuda_progcache.store.append_log.AppendLog`) at ``close()``, when a store object goes, at exit and every
:data:`INTERVAL` of use, one line each; a lookup counts its hit or miss in one step, so that what is there adds up.
Each line has a number of its own, and counts once however often it is there. It also has the hour in which it was
written: hours are kept apart for two days, days for two months, and what is older is one sum.

Lost are the counts of a process that is killed, or ends by ``os._exit``, since its last line.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import weakref

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store.append_log import AppendLog, Line, new_ref
from cuda_progcache.store.stats import NOTHING, Span, Totals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from cuda_progcache.store.root import Root

    class Countable(Protocol):
        """What counts: the counters of a store, or what a tier did."""

        def unwritten(self) -> Any:
            """What was counted since it was last written down."""

        def take_unwritten(self) -> Any:
            """The same, for who writes it down."""

        def give_back(self, counted: Any, /) -> None:
            """It could not be written down."""


#: Seconds of use after which the counters are written down, too.
INTERVAL = 5.0
#: A store looks at the clock for that at hits whose number has none of these bits: one in sixteen.
LOOK = 15
#: Seconds for which a reader waits for lines that are being handed on.
_MOMENT = 0.1

_COUNTED, _SEEN = 1, 2
_FIELDS = 12  # of a line: the counters, room for those to come, and the hour
_HOUR = 3600
#: Hours that are kept apart, and hours for which days are.
_HOURS, _DAYS = 48, 24 * 60
#: Sums that are kept at most, whatever the clocks of the writers say.
_SPANS = 128


def _span(hour: int, now: int) -> int:
    """The hour in which the span begins that this hour is counted in; 0: what is older than all of them."""
    if hour > now - _HOURS:
        return hour
    day = hour - hour % 24
    return day if day > now - _DAYS else 0


class _Log(AppendLog):
    """The file: the sums of its lines, by the hour or day in which they were written."""

    NAME = "counters.log"
    MAGIC = b"cpcount\x01"
    TOTALS: Any = Totals  # what a line counts
    PAYLOAD = struct.Struct(f"<{_FIELDS}q")

    def forget(self) -> None:
        self._sums: dict[int, list[int]] = {}  # by the hour since the epoch
        self._own: list[int] = []  # refs of the lines of this file
        self._refs: set[int] = set()  # those, and the refs of lines that are in its sum

    def take(self, line: Line, at: int) -> None:  # noqa: ARG002 - where it lies is no matter
        kind, ref, *counts = line
        if kind == _SEEN:
            self._refs.update(filter(None, [one & 0xFFFF_FFFF_FFFF_FFFF for one in counts]))
        elif kind == _COUNTED and ref not in self._refs:
            self._refs.add(ref)
            self._own.append(ref)
            self._count(self._sums, counts.pop(), counts)

    def _count(self, sums: dict[int, list[int]], hour: int, counts: list[int]) -> None:
        before = sums.get(hour)
        sums[hour] = counts if before is None else [one + more for one, more in zip(before, counts, strict=True)]

    def _spans(self) -> dict[int, list[int]]:
        """The sums by hour, by day or older, in order of time."""
        now = _this_hour()
        sums: dict[int, list[int]] = {}
        for hour, counts in self._sums.items():
            self._count(sums, _span(hour, now), counts)
        for hour in sorted(sums)[1:-_SPANS]:
            self._count(sums, 0, sums.pop(hour))
        return dict(sorted(sums.items()))

    def summary(self) -> list[Line]:
        refs = [ref - (1 << 64) if ref >> 63 else ref for ref in self._own]
        refs += [0] * (-len(refs) % _FIELDS)
        seen: list[Line] = [(_SEEN, 0, *refs[at : at + _FIELDS]) for at in range(0, len(refs), _FIELDS)]
        return [*[(_COUNTED, new_ref(), *counts, hour) for hour, counts in self._spans().items()], *seen]

    def too_late(self, line: Line, generations: int) -> Line | None:
        """As it was, as long as the file knows what the one before it has counted."""
        return line if generations <= 1 else None

    def damaged(self) -> None:
        """What is no line counts nothing; those behind it do."""

    def add(self, counted: tuple[int, ...]) -> bool:
        """Write counts down; whether that could be done."""
        line: Line = (_COUNTED, new_ref(), *counted, *[0] * (_FIELDS - 1 - len(counted)), _this_hour())
        return self.exchange(lambda _: [line], read=False)

    def spans(self) -> dict[int, Any]:
        """What is written down, by the hour since the epoch in which its span begins.

        Where the file has just been written anew, the process that did so is given a moment to hand on the last lines;
        if it was killed, they are lost.
        """
        latest = time.monotonic() + _MOMENT
        while self.exchange(lambda _: (), make=False) and not self.is_whole and time.monotonic() < latest:
            time.sleep(0.001)
        with self._lock:
            return {hour: self.TOTALS(*counts[: len(self.TOTALS._fields)]) for hour, counts in self._spans().items()}


def _this_hour() -> int:
    return int(time.time()) // _HOUR


class Tally:
    """What one store object counts, on its way to the file.

    Parameters
    ----------
    root : Root
        The store's directory.
    counters : Countable
        The store object's.
    """

    def __init__(self, root: Root, counters: Countable) -> None:
        self._root = root
        self._counters = counters
        self._log: _Log | None = None
        self._due = time.monotonic() + INTERVAL
        with _adding:
            _living.add(self)
        _write_at_end_of_worker()

    def write_if_due(self) -> None:
        """Write the counters down, if that is long ago."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write down what was counted. Where that can't be done, it is counted in memory, and tried again later."""
        self._due = time.monotonic() + INTERVAL
        counted = self._counters.take_unwritten()
        if any(counted) and not self._file().add(counted):
            self._counters.give_back(counted)
            self._due = time.monotonic() + 12 * INTERVAL  # read-only, full or gone

    def over_time(self) -> tuple[Span, ...]:
        """What every process has written down, and what the store objects of this one have yet to."""
        beside = [tally for tally in _all_living() if tally is not self and tally._is_beside(self)]
        for tally in (self, *beside):
            tally.write()
        spans = self._file().spans()
        for tally in (self, *beside):
            _add(spans, tally._counters.unwritten())
        return _in_order(spans)

    def _is_beside(self, other: Tally) -> bool:
        """Whether both count the same on one directory, by whatever names."""
        if type(other) is not type(self):  # what a tier did there
            return False
        try:
            return os.path.samefile(self._root.path, other._root.path)
        except OSError:
            return self._root.path == other._root.path

    def _file(self) -> _Log:
        if self._log is None:
            self._log = _Log(self._root)
        return self._log


def persisted(root: Root, more: Totals = NOTHING) -> tuple[Span, ...]:
    """What the processes on a directory have written down, and what one has counted that writes nothing."""
    spans = _Log(root).spans()
    _add(spans, more)
    return _in_order(spans)


def _add(spans: dict[int, Totals], counted: Totals) -> None:
    if any(counted):
        hour = _this_hour()
        spans[hour] = spans.get(hour, NOTHING).plus(counted)


def _in_order(spans: dict[int, Totals]) -> tuple[Span, ...]:
    return tuple(Span(float(hour * _HOUR), counted) for hour, counted in sorted(spans.items()))


# The ends of processes

_living: weakref.WeakSet[Tally] = weakref.WeakSet()
#: A set that another thread adds to can't be looked through.
_adding = ForkSafeLock()
_finalizers: list[object] = []


def _all_living() -> list[Tally]:
    with _adding:
        return list(_living)


def _write_all() -> None:
    for tally in _all_living():
        tally.write()


def _start_anew() -> None:
    """In a forked child, where the counters start at zero: its end is another one."""
    _finalizers.clear()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # Its children end by os._exit, after its own finalizers, which it forgets as they start.
        util.register_after_fork(_start_anew, lambda _: _write_at_end_of_worker())


def _write_at_end_of_worker() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _write_all, exitpriority=0))


forks.in_child(_start_anew)
