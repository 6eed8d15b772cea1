# SPDX-License-Identifier: Apache-2.0
"""Locks and forks: while many threads create locks and fork, no child finds a lock held."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cuda_progcache._util.locks import ForkSafeLock

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def fork_and_lock(locks):
    """Fork a child that acquires every lock; return its exit code."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(300)
        status = 1
        try:
            for lock in list(locks):
                with lock:
                    pass
            with ForkSafeLock():
                status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(*targets):
    """Run the targets in threads until all are done; return the exceptions they raised."""
    stop, errors = threading.Event(), []

    def guarded(target):
        try:
            target(stop)
        except BaseException as exc:  # noqa: BLE001 - the test must see whatever it is
            errors.append(exc)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive(), "deadlock"
    return errors


def test_locks_made_and_held_while_others_fork():
    locks = [ForkSafeLock() for _ in range(50)]
    codes = []

    def make(stop):
        while not stop.is_set():
            lock = ForkSafeLock()
            with lock:
                locks[hash(lock) % 50] = lock

    def hold(stop):
        while not stop.is_set():
            for lock in list(locks):
                with lock:
                    pass

    def fork(stop):
        codes.extend(fork_and_lock(locks) for _ in range(60))
        stop.set()

    assert run(make, make, hold, hold, fork) == []
    assert set(codes) == {0}


def test_two_threads_fork_at_once():
    locks = [ForkSafeLock() for _ in range(50)]
    codes = []

    def fork(_):
        for _ in range(60):
            codes.append(fork_and_lock(locks))
            for lock in locks:
                with lock:
                    pass

    assert run(fork, fork, fork) == []
    assert codes == [0] * 180


def test_a_fork_by_the_holder_of_a_lock():
    """The fork may happen in a signal handler that interrupted the holder."""
    lock = ForkSafeLock()
    with lock:
        assert fork_and_lock([lock]) == 0
    with lock:
        pass
