# SPDX-License-Identifier: Apache-2.0
"""Calls with a deadline, whatever they wait for: each runs on a thread that the caller can abandon.

Client libraries don't bound every wait (a dead resolver, a server that sends a byte a second). Such a wait blocks a
thread of this module instead of the caller. There are at most :data:`MOST` of them in a process; while all are stuck, a
call fails at once.
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

#: The maximum number of threads in a process, for all its tiers.
MOST = 8


class _Job:
    """A call and its outcome."""

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
        except BaseException as exc:  # noqa: BLE001 - raised in the caller
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
        """The queue of an idle thread."""
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
        except RuntimeError as exc:  # the interpreter is shutting down, or the thread limit is reached
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
        """Abandon a job; False if it has just ended."""
        with self.lock:
            if job.wait(0.0):
                return False
            job.left_behind = True
            self.stuck += 1
            return True


_threads = _Threads()


def within(until: float, call: Callable[[], R]) -> R:
    """Make a call with a deadline, and return its result.

    Parameters
    ----------
    until : float
        The deadline, on the clock of :func:`time.monotonic`.
    call : callable
        If it takes longer, it continues on its thread, and its outcome is ignored.

    Raises
    ------
    TimeoutError
        It took longer, or all threads are blocked by abandoned calls.
    StoreError
        A thread can't be started.
    """
    job = _Job(call)
    try:
        inbox = _threads.inbox(until)
    except StoreError:
        if threading.current_thread().daemon:
            return call()  # directly at the end of the process, which doesn't wait for daemon threads
        raise
    inbox.put(job)
    if not job.wait(until - time.monotonic()) and _threads.leave(job):
        raise TimeoutError(errno.ETIMEDOUT, "took too long")
    if job.error is not None:
        try:
            raise job.error
        finally:
            del job  # whose error refers to this frame
    value: R = job.value
    return value


def aside(call: Callable[[], object]) -> bool:
    """Start a call without waiting for its outcome; False if no thread is free."""
    try:
        _threads.inbox(0.0).put(_Job(call))
    except OSError:
        return False
    return True
