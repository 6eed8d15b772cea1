# SPDX-License-Identifier: Apache-2.0
"""A level of a stack: a store that may fail and is then left alone, how it is written, and the order of writes."""

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
    """In place of an answer: the level raised, or its breaker is open."""


TROUBLE: Final = Trouble()


class Level:
    """A store with its policy, its breakers and what the stack has counted about it.

    Reads and writes have a breaker each: a full disk can be read. A level that can't be read is not written, either.
    A store with a breaker of its own is asked always, and sees to the rest itself.
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
        self.above: Sequence[Level] = ()  # the faster ones that take writes
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
        """Its class, and where it lies."""
        where = getattr(self.store, "path", None) or getattr(self.store, "name", None)
        return type(self.store).__name__ + (f" at {where}" if where else "")

    def write(self, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None = None) -> R | Trouble:
        """:meth:`ask` for what changes the level."""
        if self.reads.state != "closed" and not self.minds_itself:
            self.count("skipped")
            return TROUBLE
        return self._ask(self.writes, operation, *args, answer=answer)

    def ask(self, operation: Callable[[*Ts], R], *args: *Ts, answer: type[Exception] | None = None) -> R | Trouble:
        """What a call of the level answers, unless it is out of order.

        Parameters
        ----------
        operation : callable
            A method of the store.
        *args
            Its arguments.
        answer : type of exception, optional
            One that is an answer, and raised: the KeyError of a removal.
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
        except NotImplementedError as exc:  # a plain store that can't list, say: told where no level answers
            breaker.succeeded()
            self.error = exc
            return TROUBLE
        except Exception as exc:  # a level may be anyone's code, and none may fail a lookup
            if answer is not None and isinstance(exc, answer):
                breaker.succeeded()
                raise
            self._failed(breaker, exc, timed_out=isinstance(exc, TimeoutError))
            return TROUBLE
        except BaseException:
            breaker.failed()  # interrupted: nobody knows, but the breaker must not wait for an outcome
            raise
        if self._timeout is not None and self._clock() - started > self._timeout:
            late = TimeoutError(errno.ETIMEDOUT, f"took longer than {self._timeout} s", self.name)
            self._failed(breaker, late, timed_out=False)  # it was of use
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
        """What a look at the level says; nothing is tried while it is out of order, and nothing learnt about that."""
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
        """Of all its entries with this prefix."""
        return list(self.store._digests(prefix))

    def sizes(self) -> list[tuple[str, int, int]]:
        """Digest, size and record's size of all its entries."""
        return list(self.store._sizes())

    def stats(self) -> LevelStats:
        """What the stack has counted about it."""
        with self._lock:
            return LevelStats(name=self.name, policy=self.policy, state=self.state, **self._counts)

    @property
    def state(self) -> str:
        """The worse of its breakers' states."""
        return max(self.reads.state, self.writes.state, key=("closed", "half-open", "open").index)

    def close(self) -> None:
        """Close the store, in whatever state it is."""
        try:
            self.store.close()
        except Exception as exc:  # noqa: BLE001 - as above
            self.count("errors")
            self.error = exc


def publish_to(store: ProgramCacheResource, name: bytes, data: bytes, record: Mapping[str, Any]) -> bool:
    """Write an entry to a store, by the method of its class that raises in trouble; False: it wasn't taken."""
    if type(store).publish is not ProgramCacheResource.publish:
        return store.publish(name, data, record)
    return assign_to(store, name, data)


def copy_to(store: ProgramCacheResource, name: bytes, entry: Entry) -> bool:
    """Copy an entry of another store to a store; False: it wasn't taken."""
    kind = type(store)
    owner = next(cls for cls in kind.__mro__ if "copy" in vars(cls) or "publish" in vars(cls))
    if "copy" in vars(owner) and owner is not ProgramCacheResource:
        return store.copy(name, entry)
    return publish_to(store, name, entry.data, entry.record)  # of a class that knows nothing of copies


def assign_to(store: ProgramCacheResource, name: bytes, data: bytes) -> bool:
    """Write bytes without a record to a store; False: they weren't taken."""
    owner = next(cls for cls in type(store).__mro__ if "__setitem__" in vars(cls))
    if "_assign" in vars(owner):
        return store._assign(name, data)
    store[name] = data  # of a class that knows nothing of _assign
    return True


class Stripes:
    """Locks that order the writes of a key; held while levels write, so a forked child gets new ones."""

    def __init__(self) -> None:
        self.renew()
        forks.in_child(self.renew)

    def renew(self) -> None:
        """Make them anew: nobody holds one."""
        self.locks = [threading.Lock() for _ in range(64)]

    def of(self, digest: str) -> threading.Lock:
        """The lock of an entry, and of others."""
        return self.locks[int(digest[:2], 16) % len(self.locks)]
