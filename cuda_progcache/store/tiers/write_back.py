# SPDX-License-Identifier: Apache-2.0
"""Writes in the background: a bounded queue, and one daemon thread that empties it.

Each tier has a queue for its writes, and a stack with tiers has one for copies from the tiers to its disk. Queued items
can be looked up. A write that fails is tried again, with pauses that differ between processes. Then it is dropped and
counted or, while the service is out of use, postponed until that works again. At the end of the process, the threads
get :data:`AT_EXIT` seconds. A forked child starts with an empty queue, since its parent does the queued writes.
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

#: The maximum of queued items and bytes; beyond that, writes are dropped.
MOST_ITEMS, MOST_BYTES = 4096, 256 << 20
#: The maximum of postponed bytes, and how often in a row postponed writes may fail again.
MOST_PUT_OFF, MOST_VAIN = 32 << 20, 3
#: The number of attempts of a batch, and the first pause between them, in seconds; each further one is twice as long.
_TRIES, _PAUSE = 3, 0.25
#: Seconds that the end of a process waits for the writes.
AT_EXIT = 2.0


class WriteBack(Generic[T]):
    """A queue of writes.

    Parameters
    ----------
    write : callable
        Writes a batch, a mapping by name; raises OSError if that isn't possible now.
    dropped : callable
        Called with the number of dropped writes, on any thread.
    puts_off : callable, optional
        Whether to keep failed writes for :meth:`again`; by default they aren't kept.
    delay : float
        Seconds that the thread waits before it begins, unless a caller is waiting for it. Without a delay it would
        compete for the interpreter with a caller that requests many programs in a row.

    Attributes
    ----------
    delayed : int
        How many writes have been postponed in all, whatever became of them.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, T]], None],
        dropped: Callable[[int], None],
        puts_off: Callable[[], bool] = lambda: False,
        *,
        delay: float = 0.0,
    ) -> None:
        self._write = write
        self._dropped = dropped
        self._puts_off = puts_off
        self._delay = delay
        self._lock = ForkSafeLock()
        self.renew()
        forks.in_child(self.renew)
        _all.add(self)

    def renew(self) -> None:
        """Start with an empty queue and no thread, as in a forked child, whose parent does the queued writes."""
        self._waiting: dict[str, tuple[T, int]] = {}  # items with their sizes
        self._under_way: Mapping[str, tuple[T, int]] = {}
        self._later: dict[str, tuple[T, int]] = {}  # postponed
        self.delayed = 0
        self._turns = 0  # how often the service started to work again
        self._vain = 0  # how often postponed writes were tried again since the last success
        self._calls: list[Callable[[], object]] = []
        self._due: list[Callable[[], object]] = []
        self._bytes = 0
        self._has_thread = False
        self._more = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._hurry = threading.Event()  # a caller is waiting
        self._ending = threading.Event()

    def put(self, name: str, item: T, size: int) -> bool:
        """Queue a write, replacing one of the same name; False if there is no room (the old one then stays)."""
        with self._lock:
            before = self._waiting.get(name, (None, 0))[1]
            count = len(self._waiting) - (name in self._waiting)
            fits = count < MOST_ITEMS and self._bytes - before + size <= MOST_BYTES
            if fits:
                self._waiting.pop(name, None)  # the new one goes to the end
                self._waiting[name] = (item, size)
                self._later.pop(name, None)
                self._bytes += size - before
                if self._idle.is_set():
                    self._idle.clear()
        if not fits:
            self._dropped(1)
            return False
        if not (self._has_thread or self._at_work()):
            return False
        if not self._more.is_set():
            self._more.set()
        return True

    def _at_work(self) -> bool:
        """Start the thread if there is none. If it can't be started, drop the queue and return ``False``."""
        with self._lock:
            start, self._has_thread = not self._has_thread, True
        if start:
            try:
                threading.Thread(target=self._work, name="progcache-write-back", daemon=True).start()
            except RuntimeError:  # the interpreter is shutting down, or the thread limit is reached
                with self._lock:
                    self._has_thread = False
                    count = len(self._waiting)
                    self._waiting.clear()
                    self._bytes = 0
                    self._idle.set()
                self._dropped(count)
                return False
            _write_at_end_of_worker()
        return True

    def find(self, name: str) -> T | None:
        """The queued item of a name."""
        found = self._waiting.get(name) or self._under_way.get(name) or self._later.get(name)
        return None if found is None else found[0]

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._under_way or self._calls or self._due)

    def then(self, call: Callable[[], object]) -> None:
        """Call a function once everything now queued is written or dropped: on the thread, or at once."""
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
        """The number of queued and postponed writes."""
        return len(self._waiting) + len(self._under_way) + len(self._later)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Remove writes from the queue: those of these names, or all."""
        with self._lock:
            for name in [*self._waiting, *self._later] if names is None else names:
                self._bytes -= self._waiting.pop(name, (None, 0))[1]
                self._later.pop(name, None)
            if not self._is_busy():
                self._idle.set()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, dropped or postponed; False if that takes longer."""
        if not self._idle.is_set():
            self._hurry.set()
        return self._idle.wait(seconds)

    def again(self) -> None:
        """Queue the postponed writes again."""
        with self._lock:
            self._turns += 1  # for a batch that is being given up right now
            if not self._later:
                return
            # Queued items are newer.
            self._bytes += sum(size for name, (_, size) in self._later.items() if name not in self._waiting)
            self._waiting = self._later | self._waiting
            self._later = {}
            self._vain += 1
            self._idle.clear()
        self._more.set()

    def end(self, until: float) -> None:
        """Write what can be written until then; a batch that fails isn't tried again."""
        self._ending.set()
        self.flush(max(until - time.monotonic(), 0.0))
        if count := self.count:
            self._dropped(count)

    # The thread

    def _work(self) -> None:
        more, idle = self._more, self._idle  # those of this process; a forked child has its own
        while True:
            more.wait()
            more.clear()
            if self._delay and not self._ending.is_set():
                self._hurry.wait(self._delay)
            while self._take():
                if self._under_way:
                    self._do(self._under_way)
                with self._lock:
                    self._under_way = {}
                for call in self._due:
                    try:
                        call()
                    except Exception:  # noqa: BLE001, S112 - a caller's function failed; the thread must survive
                        continue
                with self._lock:
                    self._due = []
                    if not self._is_busy():
                        self._hurry.clear()
                        idle.set()

    def _take(self) -> bool:
        with self._lock:
            names = next(batches(self._waiting, lambda name: self._waiting[name][1]), [])
            batch = self._under_way = {name: self._waiting[name] for name in names}  # first: find() takes no lock
            for name in names:
                del self._waiting[name]
            self._bytes -= sum(size for _, size in batch.values())
            if not self._waiting:
                self._due, self._calls = self._calls, []
        return bool(batch or self._due)

    def _do(self, batch: Mapping[str, tuple[T, int]]) -> None:
        items = {name: item for name, (item, _) in batch.items()}
        pause, turns, keep = _PAUSE, self._turns, False
        for attempt in range(_TRIES):
            if attempt:
                self._ending.wait(pause * (0.5 + os.urandom(1)[0] / 256))
                if self._ending.is_set():
                    break
                pause *= 2
            try:
                self._write(items)
            except OSError:
                keep = self._puts_off()
                continue
            except Exception:  # noqa: BLE001 - such as a warning raised as an error; counted, and the thread survives
                break
            self.again()
            self._vain = 0
            return
        dropped = self._put_off(batch) if keep and self._vain < MOST_VAIN else len(batch)
        if dropped:
            self._dropped(dropped)
        if turns != self._turns:  # the service works again since then
            self.again()

    def _put_off(self, batch: Mapping[str, tuple[T, int]]) -> int:
        """Postpone a batch, except items with newer ones queued; return how many there is no room for."""
        dropped = 0
        with self._lock:
            room = MOST_PUT_OFF - sum(size for _, size in self._later.values())
            for name, (item, size) in batch.items():
                if size > room or len(self._later) >= MOST_ITEMS:
                    dropped += 1
                elif name not in self._waiting:
                    self._later[name] = (item, size)
                    self.delayed += 1
                    room -= size
        return dropped


_all: weakref.WeakSet[WriteBack[Any]] = weakref.WeakSet()
_finalizers: list[object] = []


def _end_all() -> None:
    until = time.monotonic() + AT_EXIT
    for one in list(_all):
        one.end(until)


def _write_at_end_of_worker() -> None:
    """Make a worker of :mod:`multiprocessing`, which ends by ``os._exit``, also finish its writes."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _end_all, exitpriority=0))


atexit.register(_end_all)
forks.in_child(_finalizers.clear)
