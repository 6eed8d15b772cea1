# SPDX-License-Identifier: Apache-2.0
"""What the cache does, as it does it: events to subscribe to, and lines for logs.

>>> import cuda_progcache
>>> unsubscribe = cuda_progcache.subscribe(lambda event: print(event))
>>> unsubscribe()

The stdlib logger ``cuda_progcache`` gets misses with their reasons at INFO, what
was dropped at WARNING, a hit that proved wrong at ERROR, and the rest at DEBUG. ``CUDA_PROGCACHE_LOG=explain``
prints each miss on stderr, with process and time, ``CUDA_PROGCACHE_LOG=all`` every event, with no
logging set up at all; it is read once, at the first event.
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
        ``miss`` comes after the compile that it led to, when what was read is known, or instead of it, where the cache
        is frozen; ``compile`` is any run of a compiler that gave a program, without a cache, too; ``refused`` one that
        failed, now or as it is remembered; ``drop`` is a result that was not kept; ``evict`` an entry removed to keep
        the size cap (only its digest is known); ``mismatch`` a hit that a fresh compile didn't confirm.
    name : str
        The program's name.
    target_type, arch : str
    digest : str or None
        Of the entry (64 hex digits), where there is one.
    reasons : tuple of str
        Of a miss: what differs from the nearest earlier compile. Of a drop, a refusal or a mismatch: why.
    seconds : float
        Time of a compile; of a hit, the time that its compile took, where that is known; 0 otherwise.
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
#: What ``CUDA_PROGCACHE_LOG`` may be.
LOGS = ("", "explain", "all")


def subscribe(callback: Subscriber) -> Callable[[], None]:
    """Have ``callback(event)`` called for every event of this process, in the thread that caused it.

    Parameters
    ----------
    callback : callable
        Should be quick. What it raises is logged and goes no further: a listener never fails a compile.

    Returns
    -------
    callable
        Ends the subscription; calling it twice does no harm.
    """
    subscription = [callback]  # told apart from others of the same callback
    _subscribers.append(subscription)

    def unsubscribe() -> None:
        _subscribers[:] = [other for other in _subscribers if other is not subscription]

    return unsubscribe


def wanted(kind: str) -> bool:
    """Whether anyone would hear an event of this kind; spares the trouble of making it."""
    if _subscribers or _asked():
        return True
    # Not imported: then nobody has set it up to listen.
    return "logging" in sys.modules and _logger().isEnabledFor(_level(kind))


@functools.cache
def _asked() -> str:
    """What the environment asks for; looked up once, since that takes a microsecond of every hit."""
    told = os.environ.get("CUDA_PROGCACHE_LOG", "")
    if told not in LOGS:
        import warnings

        from cuda_progcache.errors import ProgCacheWarning

        message = f"CUDA_PROGCACHE_LOG={told!r} is neither explain nor all: nothing is printed"
        warnings.warn(message, ProgCacheWarning, stacklevel=2)
    return told


@functools.cache
def _logger() -> logging.Logger:
    import logging

    return logging.getLogger("cuda_progcache")


def _level(kind: str) -> int:
    return {"miss": 20, "drop": 30, "mismatch": 40}.get(kind, 10)  # logging.INFO, WARNING, ERROR, DEBUG


def emit(event: Event) -> None:
    """Tell subscribers, the logger and, if the environment asks for it, stderr."""
    relay(event)
    asked = _asked()
    if asked == "all" or (asked == "explain" and event.kind in {"miss", "drop"}):
        try:
            sys.stderr.write(f"cuda_progcache[{os.getpid()}] {_now()}: {event}\n")
        except (AttributeError, OSError, ValueError):
            return  # no stderr, or a closed one: nobody is there to be told


def _now() -> str:
    """The time, UTC, to the millisecond: ``2026-01-31T23:59:59.123Z``."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1_000_000:03}Z"


def emit_evicted(digest: str) -> None:
    """Tell that an entry was removed to keep a store's size cap, if anyone would hear it."""
    if wanted("evict"):
        event = Event("evict", "", "", "", digest)
        held = getattr(_held, "events", None)
        if held is None:
            emit(event)
        else:
            held.append(event)


class held:  # noqa: N801 - used as a function
    """Keep back what this thread would tell of evictions until the block ends: ``with held():`` around a lock.

    A subscriber may do anything, clear the store that evicts, too.
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
    """Tell subscribers and the logger what happened in another process, which has written to stderr itself."""
    logger = _logger()
    for (callback,) in tuple(_subscribers):
        try:
            callback(event)
        except Exception:
            logger.exception("a subscriber failed over %s", event)
    logger.log(_level(event.kind), "%s", event)
