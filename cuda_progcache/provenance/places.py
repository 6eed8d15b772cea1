# SPDX-License-Identifier: Apache-2.0
"""Directories in which calls are recorded: those of program stores, :func:`memoize` and :func:`cache_file`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo import cache_dir

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache


def holds_programs(directory: str | os.PathLike[str]) -> bool:
    """Return whether a directory holds a store of compiled programs."""
    return os.path.isdir(os.path.join(directory, "entries"))


def memoized_calls(directory: str | os.PathLike[str]) -> list[BaseCache]:
    """Return the caches of memoized calls in a directory; none if it doesn't exist or holds none."""
    from cuda_progcache.memo.memoize import file_cache

    found: list[BaseCache] = []
    if os.path.isdir(os.path.join(directory, "calls")):
        found.append(file_cache(directory))
    if next(cache_dir.rows(os.fspath(directory)), None) is not None:
        found.append(cache_dir.directory_cache(directory))
    return found


def recorded_calls(directory: str | os.PathLike[str]) -> list[BaseCache]:
    """Return the caches of calls of every kind in a directory.

    Raises
    ------
    ProgCacheError
        The directory has no recorded calls.
    """
    found = memoized_calls(directory)
    if holds_programs(directory):
        from cuda_progcache.provenance.programs import program_cache
        from cuda_progcache.store.readonly import ReadOnlyProgramCache

        found.append(program_cache(ReadOnlyProgramCache(directory)))
    if not found:
        raise ProgCacheError(
            f"no calls are recorded in {os.fspath(directory)}: give a directory written by memoize, "
            "cache_file or a program cache"
        )
    return found
