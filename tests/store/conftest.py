# SPDX-License-Identifier: Apache-2.0
"""The store's tests with real faults share a few modules: faults_values, faults_worker, faults_injector."""

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
    """On a busy machine a test can take longer than the interval; what is written then is tested by moving the date."""
    monkeypatch.setattr(counters, "INTERVAL", 3600.0)


class Hang(BaseException):
    """No OSError and no Exception, so that nothing on the way can take it for trouble in the cache."""


@pytest.fixture
def watchdog():
    """Ends a test that hangs (in open() of a FIFO, say) with :class:`Hang`; calling it gives another 5 minutes."""

    def bark(*_):
        raise Hang

    def feed():
        signal.setitimer(signal.ITIMER_REAL, 300)

    before = signal.signal(signal.SIGALRM, bark)
    feed()
    yield feed
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
