# SPDX-License-Identifier: Apache-2.0
"""Where programs live: :class:`FileStreamProgramCache` on disk, :class:`InMemoryProgramCache` in this process.

:class:`ReadOnlyProgramCache` is a read-only view of another store; :class:`ProgramCacheStack` combines several.
"""

from __future__ import annotations

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.base import Entry as Entry
    from cuda_progcache.store.base import EntryInfo as EntryInfo
    from cuda_progcache.store.base import ProgramCacheResource as ProgramCacheResource
    from cuda_progcache.store.base import entry_digest as entry_digest
    from cuda_progcache.store.base import register_with_cuda_core as register_with_cuda_core
    from cuda_progcache.store.file_stream import FileStreamProgramCache as FileStreamProgramCache
    from cuda_progcache.store.in_memory import InMemoryProgramCache as InMemoryProgramCache
    from cuda_progcache.store.in_mode import FrozenProgramCache as FrozenProgramCache
    from cuda_progcache.store.readonly import ReadOnlyProgramCache as ReadOnlyProgramCache
    from cuda_progcache.store.stack import ProgramCacheStack as ProgramCacheStack
    from cuda_progcache.store.stats import LevelStats as LevelStats
    from cuda_progcache.store.stats import StoreStats as StoreStats
    from cuda_progcache.store.stats import Totals as Totals

# Each is imported on first use: a hit in a new process needs one kind of store and nothing else.
_HOME = {
    "Entry": "base",
    "EntryInfo": "base",
    "FileStreamProgramCache": "file_stream",
    "FrozenProgramCache": "in_mode",
    "InMemoryProgramCache": "in_memory",
    "LevelStats": "stats",
    "ProgramCacheResource": "base",
    "ProgramCacheStack": "stack",
    "ReadOnlyProgramCache": "readonly",
    "StoreStats": "stats",
    "Totals": "stats",
    "entry_digest": "base",
    "register_with_cuda_core": "base",
}

__all__ = [
    "Entry",
    "EntryInfo",
    "FileStreamProgramCache",
    "FrozenProgramCache",
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


def __getattr__(name: str) -> Any:
    return take(globals(), _HOME, name)
