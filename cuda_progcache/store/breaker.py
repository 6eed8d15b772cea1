# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: a service that keeps failing is left alone for a while, then tried again by one caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock


class CircuitBreaker:
    """Decides whether a service that may be out of order is to be called.

    When closed, it lets every call through. It opens after ``threshold`` failures in a row, or at once after a
    time-out, and then lets no call through for ``rest`` seconds. After that it is half-open: it lets one call through,
    whose outcome closes it, or opens it again for twice as long as before. A call that never reports its outcome is
    given up after another rest.

    Parameters
    ----------
    threshold : int
        Failures in a row that open it.
    rest : float
        Seconds that it stays open the first time.
    longest_rest : float
        The maximum of seconds that it stays open.
    patience : float, optional
        If a call that :meth:`allows` let through has been waiting for this many seconds, no others are let through.
        Default: no limit.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        threshold: int = 3,
        rest: float = 30.0,
        longest_rest: float = 600.0,
        patience: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if threshold < 1:
            raise ValueError(f"threshold must be 1 or more failures, got {threshold}")
        if rest < 0:
            raise ValueError(f"rest must be a number of seconds, got {rest}")
        self._threshold = threshold
        self._first_rest = rest
        self._longest_rest = max(rest, longest_rest)
        self._patience = patience
        self._clock = clock
        self._lock = ForkSafeLock()
        self._failures = 0
        self._rest = rest  # the next rest
        self._resting_until = 0.0  # no call before this time
        self._under_way: dict[int, float] = {}  # start of the call, by thread
        self._tries = 0  # the thread that was let through in the half-open state
        forks.in_child(self.forget_threads)

    @property
    def state(self) -> str:
        """``"closed"``, ``"open"``, or ``"half-open"`` (the next call is let through)."""
        if self._failures < self._threshold:
            return "closed"
        return "open" if self._clock() < self._resting_until else "half-open"

    def allows(self) -> bool:
        """Whether to call now. If so, report the outcome from the same thread: :meth:`succeeded` or :meth:`failed`."""
        if self._failures < self._threshold and self._patience is None:
            return True
        with self._lock:
            now = self._clock()
            if self._failures < self._threshold:
                return self._patience is None or self._joins(now, self._patience)
            if now < self._resting_until:
                return False
            self._resting_until = now + self._rest  # for the others, while this one tries
            self._tries = threading.get_ident()
            return True

    def _joins(self, now: float, patience: float) -> bool:
        """Whether no call has been waiting for long; if so, count this one as under way."""
        under_way = self._under_way
        if any(now - since > patience for since in under_way.values()):
            return False
        under_way[threading.get_ident()] = now
        return True

    def succeeded(self) -> None:
        """Report that a call succeeded."""
        if self._failures or self._under_way:
            with self._lock:
                self._failures = 0
                self._rest = self._first_rest
                self._under_way.pop(threading.get_ident(), None)

    def failed(self, *, timed_out: bool = False) -> None:
        """Report that a call raised an error or took too long."""
        with self._lock:
            me = threading.get_ident()
            self._under_way.pop(me, None)
            if self._failures < self._threshold:
                self._failures = self._threshold if timed_out else self._failures + 1
                if self._failures >= self._threshold:
                    self._resting_until = self._clock() + self._rest
            elif self._tries == me:  # otherwise it was already under way when the breaker opened
                self._rest = min(2 * self._rest, self._longest_rest)
                self._resting_until = self._clock() + self._rest

    def forget_threads(self) -> None:
        """Forget the calls under way: a forked child has none of the threads that made them."""
        self._under_way.clear()
