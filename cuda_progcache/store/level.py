# SPDX-License-Identifier: Apache-2.0
"""A level of a stack: a store with its write policy and circuit breakers, and the locks that order writes."""

from __future__ import annotations

import errno
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.store.base import ProgramCacheResource
from cuda_progcache.store.stats import LevelStats

if TYPE_CHECKING:
    from cuda_progcache.store.base import Entry
    from cuda_progcache.store.breaker import CircuitBreaker

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Trouble:
    """The result of a call that failed: the level raised an error, or its breaker is open."""


TROUBLE: Final = Trouble()


class Level:
    """A store with its policy, its breakers and the stack's counters for it.

    Reads and writes have separate breakers, since a full disk can still be read. A level that can't be read isn't
    written either. A store with a breaker of its own is always called, and decides for itself.
    """

    def __init__(
        self, store: ProgramCacheResource, policy: str, breaker: Callable[[], CircuitBreaker], timeout: float | None,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.store = store
        self.policy = policy
        own = store.breaker
        self.is_remote = store.is_remote
        self.is_disk = store.directory is not None
        self.above: Sequence[Level] = ()  # the faster writable levels
        self.minds_itself = own is not None
        self.reads, self.writes = (breaker(), breaker()) if own is None else (own, own)
        self._lock = ForkSafeLock()
        self.reset()
        forks.in_child(self.reset)
        self.error: Exception | None = None  # the last one
        self.raised = False  # at the last write
        self._timeout = timeout
        self._clock = clock
        self._warned = False

    def reset(self) -> None:
        """Count from zero, as a forked child does."""
        self._counts = dict.fromkeys(
            ("hits", "misses", "stored", "store_failed", "backfilled", "backfill_failed", "errors", "skipped"), 0
        )

    @property
    def writable(self) -> bool:
        """Whether the stack's writes go there."""
        return self.policy == "through"

    @property
    def name(self) -> str:
        """Its class, and its location."""
        where = getattr(self.store, "path", None) or getattr(self.store, "name", None)
        return type(self.store).__name__ + (f" at {where}" if where else "")

    def write(self, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None = None) -> R | Trouble:
        """Call a method that changes the level; see :meth:`ask`."""
        if self.reads.state != "closed" and not self.minds_itself:
            self.count("skipped")
            return TROUBLE
        return self._ask(self.writes, operation, *args, answer=answer)

    def ask(self, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None = None) -> R | Trouble:
        """Call a method of the level, unless the level is out of order, and return its result.

        Parameters
        ----------
        operation : callable
            A method of the store.
        *args
            Its arguments.
        answer : type of exception, optional
            An exception that isn't a failure, and is raised on: for instance the KeyError of a removal.
        """
        return self._ask(self.reads, operation, *args, answer=answer)

    def _ask(
        self, breaker: CircuitBreaker, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None
    ) -> R | Trouble:
        if self.minds_itself:
            return self._ask_itself(operation, *args, answer=answer)
        if not breaker.allows():
            self.count("skipped")
            return TROUBLE
        started = self._clock() if self._timeout is not None else 0.0
        try:
            value = operation(*args)
        except NotImplementedError as exc:  # for instance a plain store that can't list; reported if no level answers
            breaker.succeeded()
            self.error = exc
            return TROUBLE
        except Exception as exc:  # a level may be anyone's code, and must not fail a lookup
            if answer is not None and isinstance(exc, answer):
                breaker.succeeded()
                raise
            self._failed(breaker, exc, timed_out=isinstance(exc, TimeoutError))
            return TROUBLE
        except BaseException:
            breaker.failed()  # interrupted: the outcome is unknown, but the breaker must not wait for it
            raise
        if self._timeout is not None and self._clock() - started > self._timeout:
            late = TimeoutError(errno.ETIMEDOUT, f"took longer than {self._timeout} s", self.name)
            self._failed(breaker, late, timed_out=False)  # the answer is still used
        else:
            breaker.succeeded()
        return value

    def _ask_itself(self, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None) -> R | Trouble:
        try:
            return operation(*args)
        except Exception as exc:
            if answer is not None and isinstance(exc, answer):
                raise
            self.count("errors")
            self.error = exc
            return TROUBLE

    def peek(self, operation: Callable[[], R]) -> R | Trouble:
        """Read from the level without affecting its breakers; skipped while it is out of order."""
        if self.reads.state != "closed":
            return TROUBLE
        try:
            return operation()
        except Exception as exc:  # noqa: BLE001 - as above
            self.error = exc
            return TROUBLE

    def _failed(self, breaker: CircuitBreaker, exc: Exception, *, timed_out: bool) -> None:
        breaker.failed(timed_out=timed_out)
        self.count("errors")
        self.error = exc
        warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(
                f"{self.name} failed ({type(exc).__name__}: {exc}); the stack continues without it",
                ProgCacheWarning,
                stacklevel=7,
            )

    def count(self, name: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[name] += 1

    def digests(self, prefix: str) -> list[str]:
        """The digests of all its entries with this prefix."""
        return list(self.store._digests(prefix))

    def sizes(self) -> list[tuple[str, int, int]]:
        """Digest, size and record size of all its entries."""
        return list(self.store._sizes())

    def stats(self) -> LevelStats:
        """The stack's counters for this level."""
        with self._lock:
            return LevelStats(name=self.name, policy=self.policy, state=self.state, **self._counts)

    @property
    def state(self) -> str:
        """The worse of its breakers' states."""
        return max(self.reads.state, self.writes.state, key=("closed", "half-open", "open").index)

    def close(self) -> None:
        """Close the store, whatever its state."""
        try:
            self.store.close()
        except Exception as exc:  # noqa: BLE001 - as above
            self.count("errors")
            self.error = exc


def publish_to(store: ProgramCacheResource, name: bytes, data: bytes, record: Mapping[str, Any]) -> bool:
    """Write an entry to a store, with the method of its class that raises on trouble; False if it was refused."""
    if type(store).publish is not ProgramCacheResource.publish:
        return store.publish(name, data, record)
    return assign_to(store, name, data)


def copy_to(store: ProgramCacheResource, name: bytes, entry: Entry) -> bool:
    """Copy another store's entry to a store; False if it was refused."""
    kind = type(store)
    owner = next(cls for cls in kind.__mro__ if "copy" in vars(cls) or "publish" in vars(cls))
    if "copy" in vars(owner) and owner is not ProgramCacheResource:
        return store.copy(name, entry)
    return publish_to(store, name, entry.data, entry.record)  # a class without a copy method of its own


def assign_to(store: ProgramCacheResource, name: bytes, data: bytes) -> bool:
    """Write bytes without a record to a store; False if they were refused."""
    owner = next(cls for cls in type(store).__mro__ if "__setitem__" in vars(cls))
    if "_assign" in vars(owner):
        return store._assign(name, data)
    store[name] = data  # a class without an _assign of its own
    return True


class Stripes:
    """Locks that order the writes of each key. They are held while levels write, so a forked child gets new ones."""

    def __init__(self) -> None:
        self.renew()
        forks.in_child(self.renew)

    def renew(self) -> None:
        """Replace all locks by new ones."""
        self.locks = [threading.Lock() for _ in range(64)]

    def of(self, digest: str) -> threading.Lock:
        """The lock for an entry; entries share locks."""
        return self.locks[int(digest[:2], 16) % len(self.locks)]
