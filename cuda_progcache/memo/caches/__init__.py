# SPDX-License-Identifier: Apache-2.0
"""A hierarchy of caches for calls.

:class:`Cache` combines a value storage and a call storage. Other caches restrict one (:class:`ReadOnlyCache`,
:class:`FilteredCache`), make its calls run again (:class:`RefreshingCache`), limit its size
(:class:`SizeLimitedCache`, :class:`LRUCache`), or combine several caches (:class:`CacheStack`, :class:`CachePool`).

>>> from cuda_progcache.memo.caches import Cache
>>> from cuda_progcache.memo.call import Call
>>> from cuda_progcache.memo.storage import CallMemory, ValueMemory
>>> cache = Cache(ValueMemory({}), CallMemory({}))
>>> key = cache.save(Call("area", {"r": 2}, result=12.5))
>>> cache.load(key).result
12.5
>>> [call.arguments["r"] for call in cache.query(name="area")]
[2]
"""

from __future__ import annotations

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.memo.caches.base import (
    BaseCache,
    CachePool,
    CacheStack,
    CacheWrapper,
    FilteredCache,
    FilteringMixin,
    ReadOnlyCache,
    ReadOnlyMixin,
    RefreshingCache,
    Rejected,
)
from cuda_progcache.memo.caches.base import _logger as logger
from cuda_progcache.memo.caches.cache import Cache
from cuda_progcache.memo.caches.limited import LRUCache, SizeLimitedCache, SizeLimitedMixin
from cuda_progcache.memo.storage.base import _combine_expand, _combine_shrink
from cuda_progcache.memo.storage.destructuring import (
    DestructuringMixin,
    DigestedDict,
    DigestedIterable,
    HasChildDigests,
)

__all__ = [
    "AmbiguousDigestError",
    "BaseCache",
    "Cache",
    "CachePool",
    "CacheStack",
    "CacheWrapper",
    "DestructuringMixin",
    "DigestedDict",
    "DigestedIterable",
    "FilteredCache",
    "FilteringMixin",
    "HasChildDigests",
    "LRUCache",
    "ReadOnlyCache",
    "ReadOnlyMixin",
    "RefreshingCache",
    "Rejected",
    "SizeLimitedCache",
    "SizeLimitedMixin",
    "_combine_expand",
    "_combine_shrink",
    "logger",
]
