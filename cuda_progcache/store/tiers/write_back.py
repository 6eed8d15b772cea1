# SPDX-License-Identifier: Apache-2.0
"""Writes off the caller's path: a bounded queue of objects, and the one daemon thread of a tier that sends them.

What is queued is the tier's own to those who look it up here. A write that can't be sent is tried again, with pauses
that differ from process to process, and then dropped and counted. At the end of the process the thread is given
:data:`AT_EXIT` seconds; a forked child starts with an empty queue, since its parent sends what was in it.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping

from cuda_progcache._util.locks import ForkSafeLock

#: Objects and bytes that may wait; beyond that, writes are dropped.
MOST_OBJECTS, MOST_BYTES = 4096, 256 << 20
#: Objects and bytes of one call.
_BATCH, _BATCH_BYTES = 100, 8 << 20
#: How often a write is tried, and the pause before it is tried again, in seconds; each one is twice as long.
_TRIES, _PAUSE = 3, 0.25
#: Seconds that the end of a process waits for the writes.
AT_EXIT = 2.0


class WriteBack:
    """The writes of one tier that are on their way.

    Parameters
    ----------
    send : callable
        Writes objects; raises OSError where that can't be done.
    dropped : callable
        Told how many objects are dropped, from any thread.
    """

    def __init__(self, send: Callable[[Mapping[str, bytes]], None], dropped: Callable[[int], None]) -> None:
        self._send = send
        self._dropped = dropped
        self._lock = ForkSafeLock()
        self.renew()
        _all.add(self)

    def renew(self) -> None:
        """Start with nothing to send, and no thread."""
        self._waiting: dict[str, bytes] = {}
        self._sending: Mapping[str, bytes] = {}
        self._calls: list[Callable[[], object]] = []
        self._due: list[Callable[[], object]] = []
        self._bytes = 0
        self._has_thread = False
        self._more = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._ending = threading.Event()

    def put(self, name: str, data: bytes) -> bool:
        """Queue an object, in the place of what waits under its name; False where there is no room for it."""
        with self._lock:
            before = self._waiting.pop(name, None)
            self._bytes -= 0 if before is None else len(before)
            if len(self._waiting) >= MOST_OBJECTS or self._bytes + len(data) > MOST_BYTES:
                full = True
            else:
                full = False
                self._waiting[name] = data
                self._bytes += len(data)
                self._idle.clear()
        if full or not self._at_work():
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

    def find(self, name: str) -> bytes | None:
        """An object that is on its way."""
        found = self._waiting.get(name)
        return found if found is not None else self._sending.get(name)

    def then(self, call: Callable[[], object]) -> None:
        """Have something called once all that is queued by now is sent or dropped: by the thread, or at once."""
        with self._lock:
            busy = bool(self._waiting or self._sending or self._calls or self._due)
            if busy:
                self._calls.append(call)
        if busy:
            self._more.set()
        else:
            call()

    @property
    def waiting(self) -> int:
        """How many objects are on their way."""
        return len(self._waiting) + len(self._sending)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Don't send what waits, all of it or what has one of these names."""
        with self._lock:
            for name in list(self._waiting if names is None else names):
                self._bytes -= len(self._waiting.pop(name, b""))
            if not self._waiting and not self._sending and not self._calls and not self._due:
                self._idle.set()
        self._more.set()

    def flush(self, seconds: float) -> bool:
        """Wait until all is sent or dropped; False where that takes longer."""
        return self._idle.wait(seconds)

    def end(self, until: float) -> None:
        """Send what can be sent by then; a write that fails isn't tried again."""
        self._ending.set()
        self._more.set()
        if not self.flush(max(until - time.monotonic(), 0.0)):
            self._dropped(self.waiting)

    # The thread

    def _work(self) -> None:
        while True:
            self._more.wait()
            self._more.clear()
            while self._take():
                if self._sending:
                    self._send_batch(self._sending)
                with self._lock:
                    self._sending = {}
                for call in self._due:
                    call()
                with self._lock:
                    self._due = []
                    if not self._waiting and not self._calls:
                        self._idle.set()

    def _take(self) -> bool:
        with self._lock:
            batch: dict[str, bytes] = {}
            size = 0
            for name, data in self._waiting.items():
                if batch and (len(batch) >= _BATCH or size + len(data) > _BATCH_BYTES):
                    break
                batch[name] = data
                size += len(data)
            for name in batch:
                del self._waiting[name]
            self._bytes -= size
            self._sending = batch
            if not self._waiting:
                self._due, self._calls = self._calls, []
        return bool(batch or self._due)

    def _send_batch(self, batch: Mapping[str, bytes]) -> None:
        pause = _PAUSE
        for attempt in range(_TRIES):
            if attempt:
                self._ending.wait(pause * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                if self._ending.is_set():
                    break
                pause *= 2
            try:
                self._send(batch)
            except OSError:
                continue
            return
        self._dropped(len(batch))


_all: weakref.WeakSet[WriteBack] = weakref.WeakSet()
_finalizers: list[object] = []


def _end_all() -> None:
    until = time.monotonic() + AT_EXIT
    for one in list(_all):
        one.end(until)


def _start_anew() -> None:
    """In a forked child: its parent sends what waits there."""
    _finalizers.clear()
    for one in list(_all):
        one.renew()


def _write_at_end_of_worker() -> None:
    """Have a worker of :mod:`multiprocessing`, which ends by ``os._exit``, end its writes, too."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _end_all, exitpriority=0))


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
