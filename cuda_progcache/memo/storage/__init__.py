# SPDX-License-Identifier: Apache-2.0
"""Where values and calls are kept.

A *value storage* keeps values under their digests, a *call storage* keeps calls under their keys; a
:class:`~cuda_progcache.memo.caches.Cache` has one of each. Ready-made: in memory (:class:`ValueMemory`,
:class:`CallMemory`), as files (:class:`FileValueStorage`, :class:`FileCallStorage`), and over a store of compiled
programs (:class:`ProgramValueStorage`, :class:`ProgramCallStorage`).

One of your own has a backend (``put``, ``get``, ``list``, ``_evict``) under :class:`ValueMixin` or :class:`CallMixin`,
with :class:`PerKeyLockMixin` and :class:`DestructuringMixin` in front if wanted.
"""

from __future__ import annotations

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.memo.storage.base import (
    CallMixin,
    CallStorage,
    Intent,
    KeyManagement,
    OperationContext,
    SaveError,
    StorageBackend,
    ValueMixin,
    ValueStorage,
)
from cuda_progcache.memo.storage.destructuring import (
    DestructuringMixin,
    Digested,
    DigestedDict,
    DigestedIterable,
    HasChildDigests,
)
from cuda_progcache.memo.storage.files import FileCallStorage, FileValueStorage
from cuda_progcache.memo.storage.locking import PerKeyLockMixin, SerializingMixin
from cuda_progcache.memo.storage.memory import CallMemory, MemoryBackend, ValueMemory
from cuda_progcache.memo.storage.programs import ProgramCallStorage, ProgramValueStorage, program_cache

__all__ = [
    "AmbiguousDigestError",
    "CallMemory",
    "CallMixin",
    "CallStorage",
    "DestructuringMixin",
    "Digested",
    "DigestedDict",
    "DigestedIterable",
    "FileCallStorage",
    "FileValueStorage",
    "HasChildDigests",
    "Intent",
    "KeyManagement",
    "MemoryBackend",
    "OperationContext",
    "PerKeyLockMixin",
    "ProgramCallStorage",
    "ProgramValueStorage",
    "SaveError",
    "SerializingMixin",
    "StorageBackend",
    "ValueMemory",
    "ValueMixin",
    "ValueStorage",
    "program_cache",
]
