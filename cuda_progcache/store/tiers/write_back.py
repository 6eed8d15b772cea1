# SPDX-License-Identifier: Apache-2.0
"""Writes off the caller's path: a bounded queue, and the one daemon thread that empties it.

A tier has one for what is written there, and a stack before tiers one for what it copies from there to its disk. What
is queued can be found in it. A write that can't be done is tried again, with pauses that differ from process to
process, and then dropped and counted. At the end of the process the threads are given :data:`AT_EXIT` seconds; a forked
child starts with an empty queue, since its parent does what was in it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store.tiers.engine import batches

T = TypeVar("T")

#: Items and bytes that may wait; beyond that, writes are dropped.
MOST_ITEMS, MOST_BYTES = 4096, 256 << 20
#: How often a batch is tried, and the pause before it is tried again, in seconds; each one is twice as long.
_TRIES, _PAUSE = 3, 0.25
#: Seconds that the end of a process waits for the writes.
AT_EXIT = 2.0


class WriteBack(Generic[T]):
    """Writes on their way.

    Parameters
    ----------
    write : callable
        Does a batch, by name; raises OSError where that can't be done now.
    dropped : callable
        Told how many are dropped, from any thread.
    """

    def __init__(self, write: Callable[[Mapping[str, T]], None], dropped: Callable[[int], None]) -> None:
        self._write = write
        self._dropped = dropped
        self._lock = ForkSafeLock()
        self.renew()
        forks.in_child(self.renew)
        _all.add(self)

    def renew(self) -> None:
        """Start with nothing to do, and no thread, as in a forked child: its parent does what waits there."""
        self._waiting: dict[str, tuple[T, int]] = {}  # with their sizes
        self._under_way: Mapping[str, T] = {}
        self._calls: list[Callable[[], object]] = []
        self._due: list[Callable[[], object]] = []
        self._bytes = 0
        self._has_thread = False
        self._more = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._ending = threading.Event()

    def put(self, name: str, item: T, size: int) -> bool:
        """Queue a write, in the place of one that waits under its name; False if there is no room (that one stays)."""
        with self._lock:
            before = self._waiting.get(name, (None, 0))[1]
            count = len(self._waiting) - (name in self._waiting)
            fits = count < MOST_ITEMS and self._bytes - before + size <= MOST_BYTES
            if fits:
                self._waiting.pop(name, None)  # it goes to the end
                self._waiting[name] = (item, size)
                self._bytes += size - before
                self._idle.clear()
        if not fits or not self._at_work():
            self._dropped(1)
            return False
        self._more.set()
        return True

    def _at_work(self) -> bool:
        """Whether there is a thread, which is started if there is none."""
        with self._lock:
            start, self._has_thread = not self._has_thread, True
        if start:
            try:
                threading.Thread(target=self._work, name="progcache-write-back", daemon=True).start()
            except RuntimeError:  # the interpreter is ending, or there can be no more threads
                with self._lock:
                    self._has_thread = False
                    self._waiting.clear()
                    self._bytes = 0
                    self._idle.set()
                return False
            _write_at_end_of_worker()
        return True

    def find(self, name: str) -> T | None:
        """What is on its way under a name."""
        waiting = self._waiting.get(name)
        return waiting[0] if waiting is not None else self._under_way.get(name)

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._under_way or self._calls or self._due)

    def then(self, call: Callable[[], object]) -> None:
        """Have something called once all that is queued by now is sent or dropped: by the thread, or at once."""
        with self._lock:
            busy = self._is_busy()
            if busy:
                self._calls.append(call)
        if busy:
            self._more.set()
        else:
            call()

    @property
    def count(self) -> int:
        """How many are on their way."""
        return len(self._waiting) + len(self._under_way)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Don't do what waits, all of it or what has one of these names."""
        with self._lock:
            for name in list(self._waiting if names is None else names):
                self._bytes -= self._waiting.pop(name, (None, 0))[1]
            if not self._is_busy():
                self._idle.set()
        self._more.set()

    def flush(self, seconds: float) -> bool:
        """Wait until all is done or dropped; False where that takes longer."""
        return self._idle.wait(seconds)

    def end(self, until: float) -> None:
        """Do what can be done by then; a batch that fails isn't tried again."""
        self._ending.set()
        if not self.flush(max(until - time.monotonic(), 0.0)):
            self._dropped(self.count)

    # The thread

    def _work(self) -> None:
        more, idle = self._more, self._idle  # of this process; a forked child has its own
        while True:
            more.wait()
            more.clear()
            while self._take():
                if self._under_way:
                    self._do(self._under_way)
                with self._lock:
                    self._under_way = {}
                for call in self._due:
                    try:
                        call()
                    except Exception:  # noqa: BLE001, S112 - whoever asked for it; the thread must live
                        continue
                with self._lock:
                    self._due = []
                    if not self._is_busy():
                        idle.set()

    def _take(self) -> bool:
        with self._lock:
            names = next(batches(self._waiting, lambda name: self._waiting[name][1]), [])
            taken = {name: self._waiting.pop(name) for name in names}
            self._bytes -= sum(size for _, size in taken.values())
            batch = self._under_way = {name: item for name, (item, _) in taken.items()}
            if not self._waiting:
                self._due, self._calls = self._calls, []
        return bool(batch or self._due)

    def _do(self, batch: Mapping[str, T]) -> None:
        pause = _PAUSE
        for attempt in range(_TRIES):
            if attempt:
                self._ending.wait(pause * (0.5 + os.urandom(1)[0] / 256))
                if self._ending.is_set():
                    break
                pause *= 2
            try:
                self._write(batch)
            except OSError:
                continue
            except Exception:  # noqa: BLE001 - a warning that is an error here: the thread must live, and it is counted
                break
            return
        self._dropped(len(batch))


_all: weakref.WeakSet[WriteBack[Any]] = weakref.WeakSet()
_finalizers: list[object] = []


def _end_all() -> None:
    until = time.monotonic() + AT_EXIT
    for one in list(_all):
        one.end(until)


def _write_at_end_of_worker() -> None:
    """Have a worker of :mod:`multiprocessing`, which ends by ``os._exit``, end its writes, too."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _end_all, exitpriority=0))


atexit.register(_end_all)
forks.in_child(_finalizers.clear)
