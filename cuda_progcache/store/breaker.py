# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: what keeps failing is left alone for a while, then tried again by one caller."""

from __future__ import annotations

import time
from collections.abc import Callable

from cuda_progcache._util.locks import ForkSafeLock


class CircuitBreaker:
    """Decides whether a thing that may be out of order is to be called.

    Closed, it lets every call through. After ``threshold`` failures in a row it opens: no call for ``rest`` seconds.
    Then it is half-open: one call is let through, and its outcome closes it or opens it again. A call that never
    reports back is given up after another ``rest``.

    Parameters
    ----------
    threshold : int
        Failures in a row that open it.
    rest : float
        Seconds that it stays open.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, *, threshold: int = 3, rest: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        if threshold < 1:
            raise ValueError(f"a breaker opens after 1 failure or more, not {threshold}")
        if rest < 0:
            raise ValueError(f"a breaker's rest is in seconds, not {rest}")
        self._threshold = threshold
        self._rest = rest
        self._clock = clock
        self._lock = ForkSafeLock()
        self._failures = 0
        self._resting_until = 0.0  # by the clock: no call before

    @property
    def state(self) -> str:
        """``"closed"``, ``"open"``, or ``"half-open"`` (the next call is let through)."""
        if self._failures < self._threshold:
            return "closed"
        return "open" if self._clock() < self._resting_until else "half-open"

    def allows(self) -> bool:
        """Whether to call now; who is told so reports with :meth:`succeeded` or :meth:`failed`."""
        if self._failures < self._threshold:
            return True
        with self._lock:
            now = self._clock()
            if self._failures < self._threshold:
                return True
            if now < self._resting_until:
                return False
            self._resting_until = now + self._rest  # for the others, while this one tries
            return True

    def succeeded(self) -> None:
        """A call did what it should."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self) -> None:
        """A call raised, or took too long."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._threshold:
                self._resting_until = self._clock() + self._rest
