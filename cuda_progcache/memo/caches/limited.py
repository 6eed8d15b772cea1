# SPDX-License-Identifier: Apache-2.0
"""Caches that keep so many calls and no more.

The limit is on what the storage holds, not on what one object has saved: several of them on one directory, in whatever
processes, keep it together. Values go with the calls, as soon as no other call reaches them.
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

#: Of the limit, how many calls may be evicted before their values are collected: it looks at every call.
_COLLECTED = 1 / 16


class SizeLimitedMixin(BaseCache):
    """Evicts calls when there are more than ``max_size``; goes before the cache in the bases.

    A class of one's own is a frozen dataclass, as :class:`Cache` is.

    Attributes
    ----------
    max_size : int
        Calls that may be kept.
    """

    max_size: int

    @property
    def _keys(self) -> set[str]:
        return set(self.calls.list())  # type: ignore[attr-defined]

    def _pick_eviction_target(self, keys: list[str]) -> str:
        """Which of these calls goes; at random here, to be overridden."""
        return chance.choice(keys)

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call, and evict others until there are ``max_size``."""
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
    """A cache of ``max_size`` calls at most; which ones go is up to chance.

    Attributes
    ----------
    values, calls
        See :class:`Cache`.
    max_size : int
    """

    max_size: int


class _Order:
    """Keys from the one used longest ago to the one used last, as this process saw it."""

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
    """A cache of ``max_size`` calls at most; the one that was not used for the longest time goes.

    Uses of this process count; calls that it never used go first, in no particular order.
    """

    def _order(self) -> _Order:
        found = self.__dict__.get("_used")
        if found is None:
            found = self.__dict__.setdefault("_used", _Order())
        return found  # type: ignore[no-any-return]

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call, and evict those used longest ago until there are ``max_size``."""
        self._order().used(call.to_lookup_key())
        return super().save(call)

    def load(self, key: str) -> LazyCall:
        """The call with this key, which counts as a use."""
        call = super().load(key)
        self._order().used(call.to_lookup_key())
        return call

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """The result and metadata of the call with this key, which counts as a use."""
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
                del order.keys[oldest]  # evicted by another
            return oldest
