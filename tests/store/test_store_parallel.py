# SPDX-License-Identifier: Apache-2.0
"""``for_each``: quick calls stay in one thread; calls that wait get helper threads."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from cuda_progcache._util import parallel
from cuda_progcache._util.parallel import THREADS, for_each


def slow(seconds=0.001):
    threads = set()
    done = []

    def action(item):
        threads.add(threading.current_thread())
        time.sleep(seconds)
        done.append(item)

    return action, done, threads


def has_left(thread):
    """Return whether a thread has left for_each; an error that it met is recorded by then."""
    frame = sys._current_frames().get(thread.ident) if thread.is_alive() else None
    while frame is not None:
        if (frame.f_code.co_filename, frame.f_code.co_name) == (parallel.__file__, "run"):
            return False
        frame = frame.f_back
    return True


def wait_for(failing):
    """Wait until the first thread of the list exists and its error is recorded, however slow the thread is."""
    end = time.monotonic() + 300
    while not failing or not has_left(failing[0]):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_quick_calls_stay_in_this_thread(monkeypatch):
    monkeypatch.setattr(parallel, "_SLOW", 60)  # seconds, so that no call looks slow on a busy machine
    threads = set()
    for_each(range(200), lambda _: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


def test_slow_calls_get_help_and_all_are_made_once():
    action, done, threads = slow()
    for_each(range(300), action)
    assert sorted(done) == list(range(300))
    assert 1 < len(threads) <= THREADS
    assert not any(thread.is_alive() for thread in threads - {threading.current_thread()})


def test_items_are_drawn_as_they_are_needed():
    action, done, _ = slow()
    ahead = []

    def items():
        for i in range(100):
            ahead.append(i - len(done))
            yield i

    for_each(items(), action)
    assert sorted(done) == list(range(100))
    assert max(ahead) <= THREADS


@pytest.mark.parametrize("bad", [0, 50])
def test_an_error_stops_the_rest(bad):
    action, done, _ = slow()
    stopped = []

    def failing(item):
        if item == bad:
            stopped.append(threading.current_thread())
            raise PermissionError(13, "Permission denied", str(item))
        if item > bad:
            wait_for(stopped)
        action(item)

    with pytest.raises(PermissionError, match=str(bad)):
        for_each(range(1000), failing)
    assert len(done) < bad + THREADS


def test_an_error_in_a_helper_stops_all():
    action, done, _ = slow()
    here = threading.current_thread()

    stopped = []

    def failing(item):
        if threading.current_thread() is not here:
            stopped.append(threading.current_thread())
            raise PermissionError(13, "Permission denied")
        if item >= parallel._TRIED:
            wait_for(stopped)
        action(item)

    with pytest.raises(PermissionError):
        for_each(range(1000), failing)
    assert len(done) <= parallel._TRIED + 1


def test_an_error_of_what_gives_the_items():
    action, done, _ = slow()

    def items():
        yield from range(50)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        for_each(items(), action)
    assert len(done) == 50


def test_an_interrupt_stops_the_helpers():
    action, done, threads = slow()
    here, stopped = threading.current_thread(), []

    def interrupted(item):
        if item > 50:
            if threading.current_thread() is here:
                stopped.append(here)
                raise KeyboardInterrupt
            wait_for(stopped)
        action(item)

    with pytest.raises(KeyboardInterrupt):
        for_each(range(100_000), interrupted)
    assert not any(thread.is_alive() for thread in threads - {here})
    assert len(done) <= 50 + THREADS


def test_without_threads_it_goes_on_alone(monkeypatch):
    """Python refuses new threads while it shuts down."""

    def refuse(_thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(parallel.threading.Thread, "start", refuse)
    action, done, threads = slow()
    for_each(range(40), action)
    assert done == list(range(40))
    assert threads == {threading.current_thread()}
