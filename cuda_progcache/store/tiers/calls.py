# SPDX-License-Identifier: Apache-2.0
"""Calls to an engine: each has a deadline, none is made while the service is down, and trouble is reported once."""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache._util.warning import warn
from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store.breaker import CircuitBreaker
from cuda_progcache.store.tiers.deadline import aside, within
from cuda_progcache.store.tiers.engine import NotInstalledError, TooLargeError, reason

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.engine import Engine

R = TypeVar("R")

#: After this many wrong answers in a row, a service is left alone.
_MOST_RUBBISH = 3


class OutOfUseError(StoreError):
    """The call wasn't made: the service is out of order, or can't be used in this process."""


class Calls:
    """Calls one engine, for all threads.

    Parameters
    ----------
    engine : Engine
    probe : callable
        Calls the service with :meth:`attempt` to find out whether it works again. It runs on another thread.
    in_trouble : callable
        Called after each call that failed.
    patience : float
        Seconds. While a lookup has been waiting for longer than this, others fail at once.

    Attributes
    ----------
    breaker : CircuitBreaker
    made, errors, timeouts, skipped : int
        Calls that were answered; that failed; that failed by time-out; and that weren't made.
    seconds : float
        The total time of the answered calls.
    error : str
        The latest trouble.
    late : bool
        Whether the latest trouble was a time-out.
    """

    def __init__(
        self, engine: Engine, probe: Callable[[], object], in_trouble: Callable[[], object], *, patience: float
    ) -> None:
        self._engine = engine
        self._probe = probe
        self._in_trouble = in_trouble
        self.breaker = CircuitBreaker(patience=patience)
        self._lock = ForkSafeLock()
        self._is_prepared = self._is_lacking = False
        self._pid: int | None = None  # the first process that used the engine
        self._untold: list[str] = []
        self._told: set[str] = set()  # kinds of trouble that were reported
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        """Count from zero, as a forked child does."""
        self.made = self.errors = self.timeouts = self.skipped = 0
        self._rubbish = 0  # wrong answers in a row
        self.seconds = 0.0
        self.error = ""
        self.late = False

    def make(self, seconds: float, operation: Callable[..., R], *args: Any, **named: Any) -> R:
        """Call a method of the engine for writes, listings or many objects, which may take long even if all is well.

        Parameters
        ----------
        seconds : float
            The time limit of the whole call.
        operation : callable
            Takes these arguments and ``until``.

        Raises
        ------
        OutOfUseError
            The call wasn't made.
        TooLargeError
            The object is larger than the limit. This isn't trouble with the service.
        OSError
            The call failed.
        """
        self._admit()
        return self.attempt(seconds, operation, *args, **named)

    def look_up(self, seconds: float, operation: Callable[..., R], *args: Any, **named: Any) -> R:
        """As :meth:`make`, for one object. While another lookup has been waiting for long, the call isn't made."""
        self._admit()
        if not self.breaker.allows():
            raise self._spared()
        return self.attempt(seconds, operation, *args, **named)

    def _admit(self) -> None:
        """Let a call through, or raise an error with the reason."""
        if not self.is_usable():
            raise OutOfUseError(errno.ENOTSUP, "can't be used in this process", self._engine.name)
        state = self.breaker.state
        if state != "closed":
            if state == "half-open":
                aside(self._try_again)
            raise self._spared()
        self._prepare()

    def _spared(self) -> OutOfUseError:
        with self._lock:
            self.skipped += 1
        return OutOfUseError(errno.EIO, "not tried again yet after an error", self._engine.name)

    def attempt(self, seconds: float, operation: Callable[..., R], *args: Any, **named: Any) -> R:
        """As :meth:`make`, for a call that the breaker has let through."""
        if self._pid is None:
            self._pid = os.getpid()
        started = time.monotonic()
        until = started + seconds
        try:
            if self._engine.keeps_time:
                value = operation(*args, **named, until=until)
            else:
                value = within(until, functools.partial(operation, *args, **named, until=until))
        except TooLargeError:
            self._answered(started)
            raise
        except OSError as exc:
            self._failed(exc)
            raise
        except Exception as exc:  # a client's own error, which the engine should have translated
            self._failed(exc)
            raise StoreError(errno.EIO, reason(exc), self._engine.name) from exc
        except BaseException:
            self.breaker.failed()  # interrupted: the outcome is unknown, but the breaker must not wait for it
            raise
        self._answered(started)
        return value

    def _answered(self, started: float) -> None:
        self.breaker.succeeded()
        with self._lock:
            self.made += 1
            self.seconds += time.monotonic() - started

    def judge(self, *, is_sound: bool) -> None:
        """Note whether an answer was valid. A service that keeps sending wrong ones, as a proxy may, counts as down."""
        self._rubbish = 0 if is_sound else self._rubbish + 1
        if self._rubbish >= _MOST_RUBBISH:
            self._rubbish = 0
            self.breaker.failed(timed_out=True)
            with self._lock:
                self.errors += 1
                self.error = "the server sends something other than what was asked for"
            self._in_trouble()

    def _failed(self, exc: Exception) -> None:
        late = isinstance(exc, TimeoutError)
        self.breaker.failed(timed_out=late)
        said = reason(exc)
        with self._lock:
            self.errors += 1
            self.timeouts += late
            self.late = late
            self.error = said
        self._in_trouble()
        self.note("late" if late else "trouble", f"failed ({said}); it isn't used for now")

    def _try_again(self) -> None:
        if self.breaker.allows():
            try:
                self._probe()
            except OSError:
                return  # still out of order

    def is_usable(self) -> bool:
        """Whether the engine can be used: what it needs is installed, as far as is known."""
        if self._is_lacking:  # the user has been told
            with self._lock:
                self.skipped += 1
        return not self._is_lacking

    def is_ready(self) -> bool:
        """Whether calls can be made later, by another thread."""
        if not self.is_usable() or not (self._is_prepared or self.breaker.state == "closed"):
            return False
        try:
            self._prepare()
        except OSError:
            return False
        return True

    def _prepare(self) -> None:
        if not self._is_prepared:
            try:
                self._engine.prepare()
            except NotInstalledError as exc:
                self._is_lacking = True
                self.breaker.failed(timed_out=True)  # for callers that check the breaker
                with self._lock:
                    self.errors += 1
                    self.error = reason(exc)
                self.note("lacking", f"isn't used: {reason(exc)}")
                raise
            except OSError as exc:
                self._failed(exc)
                raise
            self._is_prepared = True

    @property
    def is_its_own(self) -> bool:
        """Whether no other process shares the engine's connections."""
        return self._pid in {None, os.getpid()}

    def note(self, kind: str, said: str) -> None:
        """Keep a warning, one per kind of trouble, for the next caller: a background thread can't warn anybody."""
        with self._lock:
            if kind not in self._told:
                self._told.add(kind)
                self._untold.append(said)

    def tell(self) -> None:
        """Issue the warnings that were kept."""
        while self._untold:
            try:
                said = self._untold.pop(0)
            except IndexError:
                return
            warn(f"the tier {self._engine.name} {said}", ProgCacheWarning)
