# SPDX-License-Identifier: Apache-2.0
"""Storages for values and calls.

A *value storage* keeps values under their digests, and a *call storage* keeps calls under their keys. A
:class:`~cuda_progcache.memo.caches.Cache` has one of each. There are storages in memory (:class:`ValueMemory`,
:class:`CallMemory`) and in files (:class:`FileValueStorage`, :class:`FileCallStorage`). A store of compiled programs
can serve as storage too: :func:`cuda_progcache.provenance.programs.program_cache`.

To write a storage of your own, derive from :class:`ValueMixin` or :class:`CallMixin` and a backend (``put``, ``get``,
``list``, ``_evict``), with :class:`PerKeyLockMixin` and :class:`DestructuringMixin` in front if wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cuda_progcache._util.lazy import take
from cuda_progcache.errors import AmbiguousDigestError

if TYPE_CHECKING:
    from cuda_progcache.memo.storage.base import CallMixin as CallMixin
    from cuda_progcache.memo.storage.base import CallStorage as CallStorage
    from cuda_progcache.memo.storage.base import Intent as Intent
    from cuda_progcache.memo.storage.base import KeyManagement as KeyManagement
    from cuda_progcache.memo.storage.base import OperationContext as OperationContext
    from cuda_progcache.memo.storage.base import StorageBackend as StorageBackend
    from cuda_progcache.memo.storage.base import ValueMixin as ValueMixin
    from cuda_progcache.memo.storage.base import ValueStorage as ValueStorage
    from cuda_progcache.memo.storage.destructuring import DestructuringMixin as DestructuringMixin
    from cuda_progcache.memo.storage.destructuring import Digested as Digested
    from cuda_progcache.memo.storage.destructuring import DigestedDict as DigestedDict
    from cuda_progcache.memo.storage.destructuring import DigestedIterable as DigestedIterable
    from cuda_progcache.memo.storage.destructuring import HasChildDigests as HasChildDigests
    from cuda_progcache.memo.storage.files import FileCallStorage as FileCallStorage
    from cuda_progcache.memo.storage.files import FileValueStorage as FileValueStorage
    from cuda_progcache.memo.storage.locking import PerKeyLockMixin as PerKeyLockMixin
    from cuda_progcache.memo.storage.locking import SerializingMixin as SerializingMixin
    from cuda_progcache.memo.storage.memory import CallMemory as CallMemory
    from cuda_progcache.memo.storage.memory import MemoryBackend as MemoryBackend
    from cuda_progcache.memo.storage.memory import ValueMemory as ValueMemory
    from cuda_progcache.memo.tagged_json import SaveError as SaveError

# Each name is imported at its first use, since a compile that records a call needs none of the storages.
_NAMES = {
    "base": "CallMixin CallStorage Intent KeyManagement OperationContext SaveError StorageBackend "
    "ValueMixin ValueStorage",
    "destructuring": "DestructuringMixin Digested DigestedDict DigestedIterable HasChildDigests",
    "files": "FileCallStorage FileValueStorage",
    "locking": "PerKeyLockMixin SerializingMixin",
    "memory": "CallMemory MemoryBackend ValueMemory",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}

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
    "SaveError",
    "SerializingMixin",
    "StorageBackend",
    "ValueMemory",
    "ValueMixin",
    "ValueStorage",
]


def __getattr__(name: str) -> Any:
    return take(globals(), _HOME, name)
