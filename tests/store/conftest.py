# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the store's tests, which also share the modules faults_values, faults_worker and faults_injector."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from cuda_progcache.store import counters

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True)
def _counters_are_not_written_by_the_clock(monkeypatch):
    """Keep the timer from writing counters during slow tests; tests of the timer move the date themselves."""
    monkeypatch.setattr(counters, "INTERVAL", 3600.0)


class Hang(BaseException):
    """Raised by the watchdog; not an Exception, so that no handler in the package catches it."""


@pytest.fixture
def watchdog():
    """Raise :class:`Hang` in a test that hangs, say in open() of a FIFO; calling the fixture allows 300 s more."""

    def bark(*_):
        raise Hang

    def feed():
        signal.setitimer(signal.ITIMER_REAL, 300)

    before = signal.signal(signal.SIGALRM, bark)
    feed()
    yield feed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
