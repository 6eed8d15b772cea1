# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: what keeps failing is left alone for a while, then tried again by one caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock


class CircuitBreaker:
    """Decides whether a thing that may be out of order is to be called.

    Closed, it lets every call through. After ``threshold`` failures in a row it opens, and after one that ran out of
    time at once: no call for ``rest`` seconds. Then it is half-open: one call is let through, and its outcome closes it
    or opens it again, for twice as long as before. A call that never reports back is given up after another rest.

    Parameters
    ----------
    threshold : int
        Failures in a row that open it.
    rest : float
        Seconds that it stays open the first time.
    longest_rest : float
        Seconds that it stays open at most.
    patience : float, optional
        Seconds after which a call that was let through by :meth:`allows` keeps others from joining it in its wait.
        Default: never.
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
        self._rest = rest  # the next one
        self._resting_until = 0.0  # by the clock: no call before
        self._under_way: dict[int, float] = {}  # since when, by thread
        self._tries = 0  # the thread that was let through while it was half-open
        forks.in_child(self.forget_threads)

    @property
    def state(self) -> str:
        """``"closed"``, ``"open"``, or ``"half-open"`` (the next call is let through)."""
        if self._failures < self._threshold:
            return "closed"
        return "open" if self._clock() < self._resting_until else "half-open"

    def allows(self) -> bool:
        """Whether to call now; whoever does reports from that thread, by :meth:`succeeded` or :meth:`failed`."""
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
        """Whether nobody has been waiting for long; then this one is under way, too."""
        under_way = self._under_way
        if any(now - since > patience for since in under_way.values()):
            return False
        under_way[threading.get_ident()] = now
        return True

    def succeeded(self) -> None:
        """A call did what it should."""
        if self._failures or self._under_way:
            with self._lock:
                self._failures = 0
                self._rest = self._first_rest
                self._under_way.pop(threading.get_ident(), None)

    def failed(self, *, timed_out: bool = False) -> None:
        """A call raised, or took too long."""
        with self._lock:
            me = threading.get_ident()
            self._under_way.pop(me, None)
            if self._failures < self._threshold:
                self._failures = self._threshold if timed_out else self._failures + 1
                if self._failures >= self._threshold:
                    self._resting_until = self._clock() + self._rest
            elif self._tries == me:  # else it was under way when others found out
                self._rest = min(2 * self._rest, self._longest_rest)
                self._resting_until = self._clock() + self._rest

    def forget_threads(self) -> None:
        """Nobody is under way, as in a forked child, which has none of the threads that were waiting."""
        self._under_way.clear()
