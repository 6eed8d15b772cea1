# SPDX-License-Identifier: Apache-2.0
"""Watching a cache while processes use it: the programs they store, the programs they can't store, and their hits.

The processes don't take part. Stored programs are seen at the next look; one that was just compiled, once its process
has noted that it compiled it, or after a minute. Lookups are seen when a process writes its counters: after a lookup or
write at least five seconds after it last wrote them, and when the process ends.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cuda_progcache.compile.history import Makers
    from cuda_progcache.compile.unkept import Unkept
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.stats import Totals


#: Seconds after a compile within which its process notes that it made the entry; until then, the entry isn't returned.
_PATIENCE = 60.0


class Stored(NamedTuple):
    """A program that was stored.

    Attributes
    ----------
    entry : EntryInfo
    made_by : dict or None
        The process that compiled it (:class:`cuda_progcache.compile.history.Makers`); None if that isn't known, as for
        an imported program.
    reasons : tuple of str
        Why it was compiled; empty for programs that were stored by hand or imported.
    """

    entry: EntryInfo
    made_by: dict[str, Any] | None
    reasons: tuple[str, ...]


class Seen(NamedTuple):
    """The changes since the previous look.

    Attributes
    ----------
    stored : tuple of Stored
        Programs that were stored, in order of time.
    unkept : tuple of Unkept
        Programs that were compiled but not stored, in order of time.
    counted : Totals
        The counts of lookups, writes and evictions that processes wrote in the meantime.
    """

    stored: tuple[Stored, ...]
    unkept: tuple[Unkept, ...]
    counted: Totals


class Watch:
    """A watch on a cache: each look returns the changes since the previous one.

    Parameters
    ----------
    cache : FileStreamProgramCache
    """

    def __init__(self, cache: FileStreamProgramCache) -> None:
        self._cache = cache
        self._arrivals = cache.arrivals()
        self._early: set[str] = set()  # entries whose process hasn't noted them yet
        self._unkept = self._unkept_now()
        self._counted = cache.all_time()

    def look(self, *, last: bool = False) -> Seen:
        """Return the changes since the previous look, or since the watch was made.

        A program that has just been compiled is returned once its process has noted that it compiled it.

        Parameters
        ----------
        last : bool
            Return every program that was stored, since this is the last look.

        Raises
        ------
        StoreError
            If the cache can no longer be read.
        """
        from cuda_progcache.compile.history import Makers

        before, self._counted = self._counted, self._cache.all_time()  # first: programs it counts are seen below
        counted = self._counted.minus(before)
        makers = Makers(self._cache)
        arrived, self._early = {*self._early, *self._arrivals.look()}, set()
        stored = [one for digest in arrived if (one := self._stored(digest, makers, last=last)) is not None]
        known, self._unkept = self._unkept, self._unkept_now()
        unkept = [one for one in self._unkept if one not in known]
        return Seen(
            tuple(sorted(stored, key=lambda one: one.entry.created)),
            tuple(sorted(unkept, key=lambda one: one.when)),
            counted,
        )

    def _unkept_now(self) -> list[Unkept]:
        from cuda_progcache.compile.unkept import listed

        return listed(self._cache)

    def _stored(self, digest: str, makers: Makers, *, last: bool) -> Stored | None:
        from cuda_progcache.compile.history import explain_entry, is_compiled

        try:
            entry = self._cache.info(digest)
        except KeyError:
            return None  # already removed
        is_new = is_compiled(entry) and abs(time.time() - entry.created) < _PATIENCE
        if is_new and not last and not makers.know(entry):
            self._early.add(digest)
            return None
        made_by = makers.of(entry)
        try:
            reasons = explain_entry(self._cache, digest) if made_by else ()
        except KeyError:
            reasons = ()
        return Stored(entry, made_by, reasons)
