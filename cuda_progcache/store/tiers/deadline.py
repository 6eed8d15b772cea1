# SPDX-License-Identifier: Apache-2.0
"""Calls that end in time, whatever they wait for: they are made on a thread that the caller can leave behind.

What no client library bounds (a dead resolver, a server that sends a byte a second) holds a thread of this module, and
not its caller. There are at most :data:`MOST` of them in a process; while all are stuck, a call fails at once.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError

R = TypeVar("R")

#: Threads of a process, for all its tiers.
MOST = 8


class _Job:
    """A call, and what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._done = threading.Lock()
        self._done.acquire()
        self.left_behind = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._call()
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            self.error = exc
        self._done.release()

    def wait(self, seconds: float) -> bool:
        return self._done.acquire(timeout=max(seconds, 0.0))


class _Threads:
    """The threads of this process; a forked child has its own."""

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.renew()
        forks.in_child(self.renew)

    def renew(self) -> None:
        self.idle: queue.SimpleQueue[queue.SimpleQueue[_Job]] = queue.SimpleQueue()
        self.started = self.stuck = 0

    def inbox(self, until: float) -> queue.SimpleQueue[_Job]:
        """Where to put a job for a thread that has none."""
        try:
            return self.idle.get_nowait()
        except queue.Empty:
            pass
        with self.lock:
            start = self.started < MOST
            self.started += start
        if start:
            return self._start()
        if self.stuck < MOST:
            try:
                return self.idle.get(timeout=max(until - time.monotonic(), 0.0))
            except queue.Empty:
                pass
        raise TimeoutError(errno.ETIMEDOUT, f"all {MOST} tier threads are busy")

    def _start(self) -> queue.SimpleQueue[_Job]:
        inbox: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(inbox, self.idle), name="progcache-tier", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # the interpreter is ending, or there can be no more threads
            with self.lock:
                self.started -= 1
            raise StoreError(errno.EAGAIN, f"can't start a thread to call a tier: {exc}") from exc
        return inbox

    def _work(self, inbox: queue.SimpleQueue[_Job], idle: queue.SimpleQueue[queue.SimpleQueue[_Job]]) -> None:
        while True:
            job = inbox.get()
            job.run()
            with self.lock:
                self.stuck -= job.left_behind
            del job
            idle.put(inbox)

    def leave(self, job: _Job) -> bool:
        """Leave a job behind; False where it has just ended."""
        with self.lock:
            if job.wait(0.0):
                return False
            job.left_behind = True
            self.stuck += 1
            return True


_threads = _Threads()


def within(until: float, call: Callable[[], R]) -> R:
    """What a call returns or raises, if it does so in time.

    Parameters
    ----------
    until : float
        The end of the caller's patience, as :func:`time.monotonic` counts.
    call : callable
        If it takes longer, it goes on by itself, and its outcome is dropped.

    Raises
    ------
    TimeoutError
        It took longer, or all threads are busy with calls that were left behind.
    StoreError
        There can be no more threads.
    """
    job = _Job(call)
    try:
        inbox = _threads.inbox(until)
    except StoreError:
        if threading.current_thread().daemon:
            return call()  # at the end of the process, which waits for no daemon
        raise
    inbox.put(job)
    if not job.wait(until - time.monotonic()) and _threads.leave(job):
        raise TimeoutError(errno.ETIMEDOUT, "took too long")
    if job.error is not None:
        try:
            raise job.error
        finally:
            del job  # in whose error this frame now is
    value: R = job.value
    return value


def aside(call: Callable[[], object]) -> bool:
    """Make a call whose outcome nobody waits for; False where no thread is free for it."""
    try:
        _threads.inbox(0.0).put(_Job(call))
    except OSError:
        return False
    return True
