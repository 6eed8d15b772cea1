# SPDX-License-Identifier: Apache-2.0
"""Caches that show another one in part, or in another light."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from cuda_progcache.memo.caches.base import BaseCache, Rejected, made_by
from cuda_progcache.memo.call import Call, DigestedCall, LazyCall, PreparedCall, QueryCall
from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.storage.base import Intent


@dataclass(frozen=True)
class CacheWrapper(BaseCache):
    """Another cache, unchanged; a base for those that change something.

    Attributes
    ----------
    cache : BaseCache
    """

    cache: BaseCache

    @property
    def leases(self) -> str | None:
        """The wrapped cache's."""
        return self.cache.leases

    def prepare(self, call: Call) -> PreparedCall:
        """As the wrapped cache does; the commit goes through this one's :meth:`save`."""
        prepared = self.cache.prepare(call)
        bound = PreparedCall(prepared.digested, self, prepared.release)
        prepared.release = None  # it is the new one's now
        return bound

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call in the wrapped cache."""
        return self.cache.save(call)

    def load(self, key: str) -> LazyCall:
        """The wrapped cache's call."""
        return self.cache.load(key)

    def load_value(self, key: str) -> Any:
        """The wrapped cache's value."""
        return self.cache.load_value(key)

    def contains(self, key: str) -> bool:
        """Whether the wrapped cache has the call."""
        return self.cache.contains(key)

    def evict(self, key: str) -> None:
        """Remove a call from the wrapped cache."""
        self.cache.evict(key)

    def expand(self, prefix: str) -> Digest:
        """The full digest in the wrapped cache."""
        return self.cache.expand(prefix)

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        return self.cache._shrink(*keys)

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        return self.cache.query(template)

    def _children(self, value: Digest) -> set[Digest]:
        return self.cache._children(value)

    def _operation_context(
        self, key: Digest | str, *, intent: Intent = Intent.WRITE
    ) -> contextlib.AbstractContextManager[None]:
        return self.cache._operation_context(key, intent=intent)


class ReadOnlyMixin:
    """Refuses every write; goes first in the bases. ``isinstance(cache, ReadOnlyMixin)`` tells a read-only cache."""

    def save(self, call: Call | PreparedCall | DigestedCall) -> NoReturn:  # noqa: ARG002
        """Refuse the call."""
        raise Rejected(f"{type(self).__name__} is read-only")

    def evict(self, key: str) -> NoReturn:  # noqa: ARG002
        """Refuse to remove anything."""
        raise Rejected(f"{type(self).__name__} is read-only")

    def prepare(self, call: Call) -> PreparedCall:
        """Seal the key and store nothing; the commit will be refused."""
        return PreparedCall(call.digest(), self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReadOnlyCache(ReadOnlyMixin, CacheWrapper):
    """Another cache, without writes."""


@dataclass(frozen=True)
class FilteringMixin(CacheWrapper):
    """Another cache's calls as far as they fit.

    Attributes
    ----------
    predicate : callable
        Takes a :class:`LazyCall`.
    """

    predicate: Callable[[LazyCall], bool]

    def load(self, key: str) -> LazyCall:
        """The call, if it fits; KeyError if it doesn't, as if it weren't there."""
        call = self.cache.load(key)
        if not self.predicate(call):
            raise KeyError(key)
        return call

    def contains(self, key: str) -> bool:
        """Whether there is a call with this key, and it fits."""
        try:
            self.load(key)
        except KeyError:
            return False
        return True

    def load_value(self, key: str) -> Any:
        """A value that a call which fits reaches; KeyError for others. Looks at the calls one by one."""
        full = self.cache.expand(key)
        if not self._reaches(full):
            raise KeyError(key)
        return self.cache.load_value(full)

    def expand(self, prefix: str) -> Digest:
        """The full digest of a call that fits, or of a value that one reaches."""
        full = self.cache.expand(prefix)
        if not (self.contains(full) or self._reaches(full)):
            raise KeyError(prefix)
        return full

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        for key in keys:
            self.expand(key)
        return self.cache._shrink(*keys)

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        return (call for call in self.cache.query(template) if self.predicate(call))

    def _reaches(self, value: Digest) -> bool:
        seen: set[Digest] = set()
        for call in self.query():
            frontier = {digest for digest in (*call._arguments.values(), call._result) if isinstance(digest, Digest)}
            while frontier := frontier - seen:
                if value in frontier:
                    return True
                seen |= frontier
                frontier = {child for digest in frontier for child in self.cache._children(digest)}
        return False


@dataclass(frozen=True)
class FilteredCache(ReadOnlyMixin, FilteringMixin):
    """Another cache's calls as far as they fit, read-only."""


@dataclass(frozen=True)
class RefreshingCache(CacheWrapper):
    """Another cache that never hits: what is computed replaces what it has. Nested memoized calls run again too."""

    refreshing = True

    def load(self, key: str) -> LazyCall:
        """Miss."""
        raise KeyError(key)

    def contains(self, key: str) -> bool:  # noqa: ARG002
        """Never."""
        return False


made_by.update(readonly=ReadOnlyCache, filter=FilteredCache)
