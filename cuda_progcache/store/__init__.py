# SPDX-License-Identifier: Apache-2.0
"""Where programs live: :class:`FileStreamProgramCache` on disk, :class:`InMemoryProgramCache` in this process.

:class:`ReadOnlyProgramCache` looks at another store, :class:`ProgramCacheStack` puts several behind each other.
"""

from __future__ import annotations

from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    entry_digest,
    register_with_cuda_core,
)
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.in_memory import InMemoryProgramCache
from cuda_progcache.store.readonly import ReadOnlyProgramCache
from cuda_progcache.store.stack import ProgramCacheStack
from cuda_progcache.store.stats import LevelStats, StoreStats, Totals

__all__ = [
    "Entry",
    "EntryInfo",
    "FileStreamProgramCache",
    "InMemoryProgramCache",
    "LevelStats",
    "ProgramCacheResource",
    "ProgramCacheStack",
    "ReadOnlyProgramCache",
    "StoreStats",
    "Totals",
    "entry_digest",
    "register_with_cuda_core",
]
