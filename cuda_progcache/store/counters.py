# SPDX-License-Identifier: Apache-2.0
"""Counters that outlive the process: what the store objects of all processes on one directory have counted.

A lookup counts in memory. What was counted since is appended to ``<root>/counters.log`` (an
:class:`~cuda_progcache.store.append_log.AppendLog`) at ``close()``, when a store object goes, at exit and every
:data:`INTERVAL` of writing, one line each; a lookup counts its hit or miss in one step, so that what is there adds up.
Each line has a number of its own, and counts once however often it is there.

Lost are the counts of a process that is killed, or ends by ``os._exit``, since its last line.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import weakref

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store.append_log import AppendLog, Line, new_ref
from cuda_progcache.store.stats import Totals

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


#: Seconds of writing after which the counters are written down, too.
INTERVAL = 5.0
#: Seconds for which a reader waits for lines that are being handed on.
_MOMENT = 0.1

_COUNTED, _SEEN = 1, 2
_FIELDS = 12  # of a line: room for counters to come


class _Log(AppendLog):
    """The file: the sum of its lines."""

    NAME = "counters.log"
    MAGIC = b"cpcount\x01"
    TOTALS: Any = Totals  # what a line counts
    PAYLOAD = struct.Struct(f"<{_FIELDS}q")

    def forget(self) -> None:
        self._sum = [0] * _FIELDS
        self._own: list[int] = []  # refs of the lines of this file
        self._refs: set[int] = set()  # those, and the refs of lines that are in its sum

    def take(self, line: Line, at: int) -> None:  # noqa: ARG002 - where it lies is no matter
        kind, ref, *counts = line
        if kind == _SEEN:
            self._refs.update(filter(None, [one & 0xFFFF_FFFF_FFFF_FFFF for one in counts]))
        elif kind == _COUNTED and ref not in self._refs:
            self._refs.add(ref)
            self._own.append(ref)
            self._sum = [before + more for before, more in zip(self._sum, counts, strict=True)]

    def summary(self) -> list[Line]:
        refs = [ref - (1 << 64) if ref >> 63 else ref for ref in self._own]
        refs += [0] * (-len(refs) % _FIELDS)
        seen: list[Line] = [(_SEEN, 0, *refs[at : at + _FIELDS]) for at in range(0, len(refs), _FIELDS)]
        return [(_COUNTED, new_ref(), *self._sum), *seen]

    def too_late(self, line: Line, generations: int) -> Line | None:
        """As it was, as long as the file knows what the one before it has counted."""
        return line if generations <= 1 else None

    def damaged(self) -> None:
        """What is no line counts nothing; those behind it do."""

    def add(self, counted: tuple[int, ...]) -> bool:
        """Write counts down; whether that could be done."""
        line: Line = (_COUNTED, new_ref(), *counted, *[0] * (_FIELDS - len(counted)))
        return self.exchange(lambda _: [line], read=False)

    def total(self) -> Any:
        """What is written down.

        Where the file has just been written anew, the process that did so is given a moment to hand on the last lines;
        if it was killed, they are lost.
        """
        latest = time.monotonic() + _MOMENT
        while self.exchange(lambda _: (), make=False) and not self.is_whole and time.monotonic() < latest:
            time.sleep(0.001)
        with self._lock:
            return self.TOTALS(*self._sum[: len(self.TOTALS._fields)])


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
        """After a write: write the counters down, if that is long ago."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write down what was counted. Where that can't be done, it is counted in memory, and tried again later."""
        self._due = time.monotonic() + INTERVAL
        counted = self._counters.take_unwritten()
        if any(counted) and not self._file().add(counted):
            self._counters.give_back(counted)
            self._due = time.monotonic() + 12 * INTERVAL  # read-only, full or gone

    def all_time(self) -> Totals:
        """What every process has written down, and what the store objects of this one have yet to."""
        beside = [tally for tally in _all_living() if tally is not self and tally._is_beside(self)]
        for tally in (self, *beside):
            tally.write()
        total: Totals = self._file().total()
        for tally in (self, *beside):
            total = total.plus(tally._counters.unwritten())
        return total

    def _is_beside(self, other: Tally) -> bool:
        """Whether both count on one directory, by whatever names."""
        try:
            return os.path.samefile(self._root.path, other._root.path)
        except OSError:
            return self._root.path == other._root.path

    def _file(self) -> _Log:
        if self._log is None:
            self._log = _Log(self._root)
        return self._log


def persisted(root: Root) -> Totals:
    """What the processes on a directory have written down."""
    found: Totals = _Log(root).total()
    return found


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
