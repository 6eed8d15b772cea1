# SPDX-License-Identifier: Apache-2.0
"""Counters that outlive the process: the sums over all store objects, in all processes, on one directory.

A lookup counts in memory. New counts are appended to ``<root>/counters.log`` (an
:class:`~cuda_progcache.store.append_log.AppendLog`), one line each time, at ``close()``, when a store object is
collected, at exit, and every :data:`INTERVAL` seconds of use. A lookup counts its hit or miss in one step, so the
numbers always add up. Each line has a unique number, and is counted once even if the file has it twice. It also has the
hour in which it was written: hours are kept apart for two days, days for two months, and older counts are one sum.

If a process is killed, or ends by ``os._exit``, the counts since its last line are lost.
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
        """A source of counts: the counters of a store or of a tier."""

        def unwritten(self) -> Any:
            """The counts that aren't written down yet."""

        def take_unwritten(self) -> Any:
            """Return the same, and mark them as written down."""

        def give_back(self, counted: Any, /) -> None:
            """Take counts back that couldn't be written down."""


#: Seconds of use after which the counters are written down.
INTERVAL = 5.0
#: A store checks the clock for that on hits whose number has none of these bits set: one in sixteen.
LOOK = 15
#: Seconds for which a reader waits for lines that are being copied to a new file.
_MOMENT = 0.1

_COUNTED, _SEEN = 1, 2
_FIELDS = 12  # of a line: the counters, room for future ones, and the hour
_HOUR = 3600
#: The number of hours for which hours are kept apart, and that for which days are.
_HOURS, _DAYS = 48, 24 * 60
#: The maximum number of sums, whatever the writers' clocks say.
_SPANS = 128


def _span(hour: int, now: int) -> int:
    """The first hour of the span that an hour is counted in; 0 if it is older than all spans."""
    if hour > now - _HOURS:
        return hour
    day = hour - hour % 24
    return day if day > now - _DAYS else 0


class _Log(AppendLog):
    """The file: the sums of its lines, by the hour or day in which they were written."""

    NAME = "counters.log"
    MAGIC = b"cpcount\x01"
    TOTALS: Any = Totals  # the type of a line's counts
    PAYLOAD = struct.Struct(f"<{_FIELDS}q")

    def forget(self) -> None:
        self._sums: dict[int, list[int]] = {}  # by hours since the epoch
        self._own: list[int] = []  # refs of the lines of this file
        self._refs: set[int] = set()  # these, and the refs of lines that its summary includes

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
        """The line itself, as long as the file knows which lines the one before it has counted."""
        return line if generations <= 1 else None

    def damaged(self) -> None:
        """Skip the damaged bytes; the lines after them still count."""

    def add(self, counted: tuple[int, ...]) -> bool:
        """Write counts down; return whether that succeeded."""
        line: Line = (_COUNTED, new_ref(), *counted, *[0] * (_FIELDS - 1 - len(counted)), _this_hour())
        return self.exchange(lambda _: [line], read=False)

    def spans(self) -> dict[int, Any]:
        """The counts in the file, by the first hour of each span, in hours since the epoch.

        If the file has just been rewritten, this waits briefly for the process that did so to copy the last lines. If
        that process was killed, they are lost.
        """
        latest = time.monotonic() + _MOMENT
        while self.exchange(lambda _: (), make=False) and not self.is_whole and time.monotonic() < latest:
            time.sleep(0.001)
        with self._lock:
            return {hour: self.TOTALS(*counts[: len(self.TOTALS._fields)]) for hour, counts in self._spans().items()}


def _this_hour() -> int:
    return int(time.time()) // _HOUR


class Tally:
    """Writes the counts of one store object to the file.

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
        """Write the counters down if the last time was long ago."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write the counts down. If that fails, they are kept in memory and tried again later."""
        self._due = time.monotonic() + INTERVAL
        counted = self._counters.take_unwritten()
        if any(counted) and not self._file().add(counted):
            self._counters.give_back(counted)
            self._due = time.monotonic() + 12 * INTERVAL  # the directory is read-only, full or gone

    def over_time(self) -> tuple[Span, ...]:
        """What every process has written down, and what the store objects of this process haven't yet."""
        beside = [tally for tally in _all_living() if tally is not self and tally._is_beside(self)]
        for tally in (self, *beside):
            tally.write()
        spans = self._file().spans()
        for tally in (self, *beside):
            _add(spans, tally._counters.unwritten())
        return _in_order(spans)

    def _is_beside(self, other: Tally) -> bool:
        """Whether both count the same things for the same directory, whatever its path is called."""
        if type(other) is not type(self):  # the tally of a tier
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
    """What the processes on a directory have written down, and the counts of one that writes nothing."""
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
#: Held while the set is changed or copied: it can't be iterated over while another thread adds to it.
_adding = ForkSafeLock()
_finalizers: list[object] = []


def _all_living() -> list[Tally]:
    with _adding:
        return list(_living)


def _write_all() -> None:
    for tally in _all_living():
        tally.write()


def _start_anew() -> None:
    """Register again in a forked child, where the counters start at zero and exit handlers are lost."""
    _finalizers.clear()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # Its children end by os._exit after running its finalizers, and it clears those when a child starts.
        util.register_after_fork(_start_anew, lambda _: _write_at_end_of_worker())


def _write_at_end_of_worker() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _write_all, exitpriority=0))


forks.in_child(_start_anew)
