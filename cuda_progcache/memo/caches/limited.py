# SPDX-License-Identifier: Apache-2.0
"""Caches with a limited number of calls.

The limit applies to the storage, not to the calls saved by one cache object: several caches on the same directory, in
any processes, share it. Values are removed after their calls, once no other call reaches them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.chance import chance
from cuda_progcache.memo.caches.base import BaseCache
from cuda_progcache.memo.caches.cache import Cache
from cuda_progcache.memo.storage.locking import locks_of

if TYPE_CHECKING:
    from cuda_progcache.memo.call import Call, DigestedCall, LazyCall, Metadata, PreparedCall
    from cuda_progcache.memo.digest import Digest

#: The share of the limit that may be evicted before a garbage collection; a collection reads every call.
_COLLECTED = 1 / 16


class SizeLimitedMixin(BaseCache):
    """A mixin that evicts calls when there are more than ``max_size``; list it before the cache in the bases.

    A class that uses it must be a frozen dataclass, like :class:`Cache`.

    Attributes
    ----------
    max_size : int
        The most calls that are kept.
    """

    max_size: int

    @property
    def _keys(self) -> set[str]:
        return set(self.calls.list())  # type: ignore[attr-defined]

    def _pick_eviction_target(self, keys: list[str]) -> str:
        """Choose the call to evict, at random; subclasses may override this."""
        return chance.choice(keys)

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call, and evict others until there are at most ``max_size``."""
        key = super().save(call)  # type: ignore[safe-super]
        self._enforce_size_limit(key)
        return key

    def _enforce_size_limit(self, spared: str | None = None) -> None:
        locks = locks_of(self)
        locks.acquire("")
        try:
            kept = self._keys
            evicted = 0
            while len(kept) > self.max_size:
                others = list(kept - {spared} or kept)
                target = self._pick_eviction_target(others)
                self.evict(target)
                kept.discard(target)
                evicted += 1
            self._collect_after(evicted)
        finally:
            locks.release("")

    def _collect_after(self, evicted: int) -> None:
        if not evicted:
            return
        due = self.__dict__.get("_uncollected", 0) + evicted
        if due >= max(1, int(self.max_size * _COLLECTED)):
            due = 0
            self.gc()  # type: ignore[attr-defined]
        self.__dict__["_uncollected"] = due


@dataclass(frozen=True)
class SizeLimitedCache(SizeLimitedMixin, Cache):
    """A cache of at most ``max_size`` calls, which evicts at random.

    Attributes
    ----------
    values, calls
        See :class:`Cache`.
    max_size : int
    """

    max_size: int


class _Order:
    """Keys ordered by their last use in this process, oldest first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.keys: OrderedDict[str, None] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())

    def used(self, key: str) -> None:
        with self.lock:
            self.keys[key] = None
            self.keys.move_to_end(key)


@dataclass(frozen=True)
class LRUCache(SizeLimitedCache):
    """A cache of at most ``max_size`` calls, which evicts the least recently used.

    Only uses in this process count; calls that it never used are evicted first, in no particular order.
    """

    def _order(self) -> _Order:
        found = self.__dict__.get("_used")
        if found is None:
            found = self.__dict__.setdefault("_used", _Order())
        return found  # type: ignore[no-any-return]

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call, and evict the least recently used until there are at most ``max_size``."""
        self._order().used(call.to_lookup_key())
        return super().save(call)

    def load(self, key: str) -> LazyCall:
        """Return the call with this key, which counts as a use."""
        call = super().load(key)
        self._order().used(call.to_lookup_key())
        return call

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """Return the result and metadata of the call with this key, which counts as a use."""
        found = super().find(key)
        self._order().used(key)
        return found

    def _pick_eviction_target(self, keys: list[str]) -> str:
        order = self._order()
        present = set(keys)
        with order.lock:
            never = present.difference(order.keys)
            if never:
                return next(iter(never))
            while (oldest := next(iter(order.keys))) not in present:
                del order.keys[oldest]  # evicted by another cache
            return oldest
