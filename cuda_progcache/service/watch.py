# SPDX-License-Identifier: Apache-2.0
"""What processes do on a cache while one looks on: what they store, what they can't keep, how often they hit.

Nothing is asked of the processes. What they store shows at once. Their lookups show when they write their counters
down: after a lookup or a write that comes five seconds or more after the last time, and when they end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cuda_progcache.compile.unkept import Unkept
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.stats import Totals


class Stored(NamedTuple):
    """A program that was stored.

    Attributes
    ----------
    entry : EntryInfo
    made_by : dict or None
        Who compiled it (:class:`cuda_progcache.compile.history.Makers`); None where that isn't known, as of an import.
    reasons : tuple of str
        Why it was compiled; empty for what was put there by hand or imported.
    """

    entry: EntryInfo
    made_by: dict[str, Any] | None
    reasons: tuple[str, ...]


class Seen(NamedTuple):
    """What has happened since the last look.

    Attributes
    ----------
    stored : tuple of Stored
        In order of time.
    unkept : tuple of Unkept
        Programs that were compiled and not kept, in order of time.
    counted : Totals
        What was written down of lookups, writes and evictions.
    """

    stored: tuple[Stored, ...]
    unkept: tuple[Unkept, ...]
    counted: Totals


class Watch:
    """A cache that is looked at again and again.

    Parameters
    ----------
    cache : FileStreamProgramCache
    """

    def __init__(self, cache: FileStreamProgramCache) -> None:
        self._cache = cache
        self._arrivals = cache.arrivals()
        self._unkept = self._unkept_now()
        self._counted = cache.all_time()

    def look(self) -> Seen:
        """Give what has happened since the last look, or since this was made.

        Raises
        ------
        StoreError
            The cache can't be read any more.
        """
        from cuda_progcache.compile.history import Makers

        before, self._counted = self._counted, self._cache.all_time()  # first: what is counted as stored lies there
        counted = self._counted.minus(before)
        makers = Makers(self._cache)
        stored = [one for digest in self._arrivals.look() if (one := self._stored(digest, makers)) is not None]
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

    def _stored(self, digest: str, makers: Any) -> Stored | None:
        from cuda_progcache.compile.history import explain_entry

        try:
            entry = self._cache.info(digest)
        except KeyError:
            return None  # gone already
        made_by = makers.of(entry)
        try:
            reasons = explain_entry(self._cache, digest) if made_by else ()
        except KeyError:
            reasons = ()
        return Stored(entry, made_by, reasons)
