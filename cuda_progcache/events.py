# SPDX-License-Identifier: Apache-2.0
"""Events of the cache: subscriptions and log lines.

>>> import cuda_progcache
>>> unsubscribe = cuda_progcache.subscribe(lambda event: print(event))
>>> unsubscribe()

The logger ``cuda_progcache`` of the standard library gets misses with their reasons at INFO, dropped results at
WARNING, wrong hits at ERROR, and everything else at DEBUG. ``CUDA_PROGCACHE_LOG=explain`` prints each miss and drop on
stderr, with process id and time, and ``CUDA_PROGCACHE_LOG=all`` prints every event; neither needs logging to be
configured. The variable is read once, at the first event.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging


class Event(NamedTuple):
    """Something the cache did.

    Attributes
    ----------
    kind : {"hit", "miss", "compile", "refused", "store", "drop", "evict", "mismatch"}
        ``miss`` follows the compile that it caused, since only then the files read are known; if the cache is frozen,
        there is no compile. ``compile`` is a successful run of a compiler, with or without a cache. ``refused`` is a
        compile that failed, now or earlier (a remembered failure). ``drop`` is a result that wasn't kept. ``evict`` is
        an entry removed to keep the size cap (only its digest is known). ``mismatch`` is a hit that a fresh compile
        didn't confirm.
    name : str
        The program's name.
    target_type, arch : str
    digest : str or None
        Digest of the entry (64 hex digits), if there is one.
    reasons : tuple of str
        For a miss, the differences from the nearest earlier compile; for a drop, a refusal or a mismatch, the reason.
    seconds : float
        Duration of a compile; for a hit, the duration of the original compile, if known. Otherwise 0.
    """

    kind: str
    name: str
    target_type: str
    arch: str
    digest: str | None = None
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        about = f" {self.name} ({self.target_type}, {self.arch})" if self.name else ""
        head = f"{self.kind}:{about}"
        if self.digest:
            head += f" {self.digest[:12]}"
        if self.seconds and self.kind != "hit":
            head += f" in {self.seconds * 1e3:.0f} ms"
        return head + (f": {'; '.join(self.reasons)}" if self.reasons else "")


Subscriber = Callable[[Event], object]

_subscribers: list[list[Subscriber]] = []
#: The valid values of ``CUDA_PROGCACHE_LOG``.
LOGS = ("", "explain", "all")


def subscribe(callback: Subscriber) -> Callable[[], None]:
    """Call ``callback(event)`` for every event of this process, in the thread that caused the event.

    Parameters
    ----------
    callback : callable
        The function to call; it should be quick. Its exceptions are logged and not raised: a subscriber can't make a
        compile fail.

    Returns
    -------
    callable
        A function that ends the subscription; further calls of it have no effect.
    """
    subscription = [callback]  # a list, to be distinct from other subscriptions of the same callback
    _subscribers.append(subscription)

    def unsubscribe() -> None:
        _subscribers[:] = [other for other in _subscribers if other is not subscription]

    return unsubscribe


def wanted(kind: str) -> bool:
    """Return whether an event of this kind would reach anyone; if not, it needn't be created."""
    if _subscribers or _asked():
        return True
    # If logging isn't imported, nobody has configured it.
    return "logging" in sys.modules and _logger().isEnabledFor(_level(kind))


@functools.cache
def _asked() -> str:
    """Return the value of ``CUDA_PROGCACHE_LOG``; cached, since reading it would add a microsecond to every hit."""
    told = os.environ.get("CUDA_PROGCACHE_LOG", "")
    if told not in LOGS:
        import warnings

        from cuda_progcache.errors import ProgCacheWarning

        message = f"CUDA_PROGCACHE_LOG={told!r} is neither explain nor all, so nothing is printed"
        warnings.warn(message, ProgCacheWarning, stacklevel=2)
    return told


@functools.cache
def _logger() -> logging.Logger:
    import logging

    return logging.getLogger("cuda_progcache")


def _level(kind: str) -> int:
    return {"miss": 20, "drop": 30, "mismatch": 40}.get(kind, 10)  # logging.INFO, WARNING, ERROR, DEBUG


def emit(event: Event) -> None:
    """Send an event to subscribers, to the logger and, if ``CUDA_PROGCACHE_LOG`` says so, to stderr."""
    relay(event)
    asked = _asked()
    if asked == "all" or (asked == "explain" and event.kind in {"miss", "drop"}):
        try:
            sys.stderr.write(f"cuda_progcache[{os.getpid()}] {_now()}: {event}\n")
        except (AttributeError, OSError, ValueError):
            return  # there is no stderr, or it is closed


def _now() -> str:
    """Return the time in UTC, to the millisecond: ``2026-01-31T23:59:59.123Z``."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1_000_000:03}Z"


def emit_evicted(digest: str) -> None:
    """Emit the event of an entry removed to keep a store's size cap, if anyone would hear it."""
    if wanted("evict"):
        event = Event("evict", "", "", "", digest)
        held = getattr(_held, "events", None)
        if held is None:
            emit(event)
        else:
            held.append(event)


class held:  # noqa: N801 - used as a function
    """Hold back this thread's eviction events until the block ends: ``with held():`` around a lock.

    A subscriber may do anything, including clearing the store that evicts, so it must not be called under the lock.
    """

    def __enter__(self) -> None:
        self._outermost = getattr(_held, "events", None) is None
        if self._outermost:
            _held.events = []

    def __exit__(self, *_: object) -> None:
        if self._outermost:
            events, _held.events = _held.events, None
            for event in events:
                emit(event)


_held = threading.local()


def relay(event: Event) -> None:
    """Send an event to subscribers and the logger, but not to stderr.

    Events of other processes, which have written them to stderr themselves, are passed on with this function.
    """
    logger = _logger()
    for (callback,) in tuple(_subscribers):
        try:
            callback(event)
        except Exception:
            logger.exception("a subscriber failed over %s", event)
    logger.log(_level(event.kind), "%s", event)
