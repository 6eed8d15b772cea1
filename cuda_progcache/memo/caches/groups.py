# SPDX-License-Identifier: Apache-2.0
"""Several caches as one."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache.memo.caches.base import BaseCache, Rejected, _logger, made_by
from cuda_progcache.memo.caches.views import ReadOnlyMixin
from cuda_progcache.memo.storage.base import Intent, _combine_expand, _combine_shrink
from cuda_progcache.memo.storage.locking import PerKeyLockMixin

if TYPE_CHECKING:
    from cuda_progcache.memo.call import Call, DigestedCall, LazyCall, Metadata, PreparedCall, QueryCall
    from cuda_progcache.memo.digest import Digest

T = TypeVar("T")


class _MultiCache(BaseCache):
    """Reads over several caches, by three ways of going through them."""

    @property
    @abc.abstractmethod
    def _members(self) -> tuple[BaseCache, ...]: ...

    def _first_hit(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError, key: Any = None) -> T:
        """What the first member gives that doesn't raise ``exc``; ``exc(key)`` if all do."""
        for cache in self._members:
            try:
                return op(cache)
            except exc as error:
                key = error.args[0] if key is None and error.args else key
        raise exc(key) if key is not None else exc

    def _collect(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError) -> list[T]:
        """What all members give that don't raise ``exc``."""
        found = []
        for cache in self._members:
            with contextlib.suppress(exc):
                found.append(op(cache))
        return found

    def _foreach(
        self, op: Callable[[BaseCache], object], *,
        exc: type[BaseException] | tuple[type[BaseException], ...] = (Rejected, KeyError),
    ) -> None:  # fmt: skip
        """Do it with every member; that one refuses, or has nothing, is fine."""
        for cache in self._members:
            with contextlib.suppress(*(exc if isinstance(exc, tuple) else (exc,))):
                op(cache)

    def load_value(self, key: str) -> Any:
        """The value of the first member that has it."""
        return self._first_hit(lambda cache: cache.load_value(key), key=key)

    def contains(self, key: str) -> bool:
        """Whether a member has the call."""
        return any(cache.contains(key) for cache in self._members)

    def expand(self, prefix: str) -> Digest:
        """The full digest in whichever member; AmbiguousDigestError if they don't agree."""
        return _combine_expand(prefix, self._collect(lambda cache: cache.expand(prefix)))

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        found: dict[str, list[Digest]] = {key: [] for key in keys}
        for cache in self._members:
            present = [key for key in keys if cache.contains(key)]
            for key, short in zip(present, cache._shrink(*present) if present else (), strict=True):
                found[key].append(short)
        # The key of no call is a value's, or nobody's.
        return tuple(_combine_shrink(key, found[key] or self._shorts(key)) for key in keys)

    def _shorts(self, key: str) -> list[Digest]:
        return self._collect(lambda cache: cache._shrink(key)[0])

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        seen = set()
        for cache in self._members:
            for call in cache.query(template):
                key = call.to_lookup_key()
                if key not in seen:
                    seen.add(key)
                    yield call

    def _children(self, value: Digest) -> set[Digest]:
        return set().union(*(cache._children(value) for cache in self._members))


@dataclass(frozen=True)
class CacheStack(PerKeyLockMixin, _MultiCache):
    """Caches from the nearest to the farthest.

    A call is saved in the first one. A hit is copied into every level below the one that had it, once however many
    threads load it; that a level refuses, or fails, is logged, and the hit is a hit.

    Attributes
    ----------
    stack : tuple of BaseCache
        None of them a stack.
    """

    stack: tuple[BaseCache, ...]

    def __post_init__(self) -> None:
        if any(isinstance(cache, CacheStack) for cache in self.stack):
            raise ValueError("a CacheStack cannot be nested in another one: give their caches in one stack")

    @property
    def _members(self) -> tuple[BaseCache, ...]:
        return self.stack

    @property
    def leases(self) -> str | None:
        """The first cache's: it is where calls are saved."""
        return self.stack[0].leases

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call in the first cache."""
        return self.stack[0].save(call)

    def prepare(self, call: Call) -> PreparedCall:
        """As the first cache does."""
        return self.stack[0].prepare(call)

    def load(self, key: str) -> LazyCall:
        """The call of the first cache that has it, copied into those before it; KeyError with the key on a miss."""
        for level, cache in enumerate(self.stack):
            try:
                call = cache.load(key)
            except KeyError:
                continue
            if level:
                self._backfill(key, call, self.stack[:level])
            return call
        raise KeyError(key)

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """The result and metadata of the call with this key; the nearest cache is asked the short way."""
        try:
            return self.stack[0].find(key)
        except KeyError:
            return super().find(key)

    def _backfill(self, key: str, lc: LazyCall, levels: tuple[BaseCache, ...] | None = None) -> None:
        """Copy a hit into levels, as a rule all but the last, that don't have it."""
        try:
            key = lc.to_lookup_key()  # of a prefix the whole
            with super()._operation_context(key):
                missing = [
                    cache for cache in (self.stack[:-1] if levels is None else levels) if not cache.contains(key)
                ]
                live = lc.fetch() if missing else None
                for cache in missing:
                    self._fill(cache, key, live)
        except Exception as error:  # noqa: BLE001 - a level may be anyone's code, and none may fail a load
            _logger.warning("Failed to transfer the hit %s to the caches below: %s", lc, error)

    @staticmethod
    def _fill(cache: BaseCache, key: str, call: Any) -> None:
        try:
            cache.save(call)
        except Exception as error:  # noqa: BLE001 - as above
            _logger.warning("Failed to transfer the hit %s to %s: %s", key, type(cache).__name__, error)

    def push(self, cache: BaseCache) -> CacheStack:
        """The same stack with another cache in front."""
        return CacheStack((cache, *self.stack))

    def evict(self, key: str) -> None:
        """Remove a call from every cache that allows it."""
        self._foreach(lambda cache: cache.evict(key))

    @contextlib.contextmanager
    def _operation_context(self, key: Digest | str, *, intent: Intent = Intent.WRITE) -> Iterator[None]:
        with super()._operation_context(key, intent=intent), self.stack[0]._operation_context(key, intent=intent):
            yield


@dataclass(frozen=True)
class CachePool(ReadOnlyMixin, _MultiCache):
    """Caches side by side, read-only: the first that has a call gives it, nothing is copied.

    Attributes
    ----------
    caches : tuple of BaseCache
    """

    caches: tuple[BaseCache, ...]

    @property
    def _members(self) -> tuple[BaseCache, ...]:
        return self.caches

    def load(self, key: str) -> LazyCall:
        """The call of the first cache that has it; KeyError on a miss."""
        return self._first_hit(lambda cache: cache.load(key), key=key)


made_by["push"] = CacheStack
