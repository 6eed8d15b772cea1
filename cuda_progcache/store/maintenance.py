# SPDX-License-Identifier: Apache-2.0
"""Pinning and pruning of a cache directory."""

from __future__ import annotations

import heapq
import math
import os
import time

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import WINDOWS, unlink, unlink_quietly, write_new
from cuda_progcache.store import judge, pairs, removal
from cuda_progcache.store.base import ORDERS, entry_digest
from cuda_progcache.store.eviction import Candidate, choose_victims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cuda_progcache.store.base import EntryInfo, Key
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.size_cap import SizeCap


#: Seconds by which a file's time stamp may be behind its writer's clock: time stamps come from the last clock tick.
_SLACK = 1.0
#: Seconds that a pin waits for an entry that another process has moved aside and may put back.
_MOMENT = 1.0


class PruneReport(NamedTuple):
    """What a prune removed and left.

    Attributes
    ----------
    removed, bytes : int
        Entries that were removed, or would be, and their bytes without records, as in ``stats``.
    left, left_bytes : int
        Entries that stay, and their bytes.
    pinned : int
        The number of pinned entries.
    """

    removed: int
    bytes: int
    left: int
    left_bytes: int
    pinned: int


def pin(root: Root, key_or_digest: Key) -> str:
    """Keep an entry; see :meth:`~cuda_progcache.store.FileStreamProgramCache.pin`."""
    digest = _named(key_or_digest)
    path = root.pinned + digest
    for attempt in range(2):
        try:
            write_new(path, b"", mode=root.file_mode, sync=False)
        except FileExistsError:
            pass
        except FileNotFoundError:
            if attempt:
                raise
            root.mkdir(root.pinned.rstrip(os.sep))
            continue
        break
    # Checked after pinning: an entry that is in place now is safe, since removers ask for pins after moving it aside.
    # A remover that moved it aside before, and puts it back because of the pin, takes a moment.
    latest = time.monotonic() + _MOMENT
    while removal.is_there(root, digest):
        if os.path.lexists(root.entry_path(digest)):
            return digest
        if time.monotonic() > latest:
            break
        time.sleep(0.001)
    unlink_quietly(path)
    raise KeyError(key_or_digest)


def unpin(root: Root, key_or_digest: Key) -> str:
    """Unpin an entry; see :meth:`~cuda_progcache.store.FileStreamProgramCache.unpin`."""
    digest = _named(key_or_digest)
    try:
        unlink(root.pinned + digest)
    except FileNotFoundError:
        raise KeyError(key_or_digest) from None
    return digest


def prune(
    root: Root, cap: SizeCap, max_size_bytes: int | None, older_than: float | None, *, dry_run: bool
) -> PruneReport:
    """Remove the least recently used entries; see :meth:`~cuda_progcache.store.FileStreamProgramCache.prune`."""
    pins = root.pins()
    found = [item for shard in root.shards() for item in pairs.survey(root, shard, cap.last_use).candidates]
    victims = _victims(found, pins, max_size_bytes, older_than, time.time_ns())
    removed = victims if dry_run else cap.remove(victims)
    freed = sum(victim.size for victim in removed)
    return PruneReport(
        removed=len(removed),
        bytes=freed,
        left=len(found) - len(removed),
        left_bytes=sum(item.size for item in found) - freed,
        pinned=sum(item.digest in pins for item in found),
    )


def first(
    root: Root,
    count: int,
    by: str,
    matches: Callable[[EntryInfo], bool],
    info: Callable[[str], EntryInfo | None],
    last_use: Mapping[str, int],
) -> list[EntryInfo]:
    """The first entries in an order; see :meth:`~cuda_progcache.store.ProgramCacheResource.first`.

    A file's status bounds what its record can say: the entry was created when the file was written, or earlier (if it
    was imported, or copied with its times). So records are read in the order of their bounds, until no other entry can
    come before those that were read. The time of a shard directory's last change bounds all its entries, so shards that
    changed earlier are skipped.
    """
    bounds: dict[str, Callable[[pairs.Glimpse], float]] = {
        "used": lambda seen: max(seen.used, last_use.get(seen.digest, 0) / 1e9),
        "created": lambda seen: seen.written + _SLACK,
        "size": lambda seen: seen.size,
    }
    bound, order = bounds[by], ORDERS[by]
    found: list[EntryInfo] = []
    ahead: list[float] = []  # a heap of the sort keys of the best entries so far, smallest first

    def done(at_most: float) -> bool:
        return len(ahead) >= count and (not ahead or at_most <= ahead[0])

    by_change = by == "created" and not WINDOWS  # on Windows, a directory's ctime is its creation time
    groups = _by_change(root) if by_change else [(root.shards(), math.inf)]
    for seen in _in_order(root, groups, bound, done):
        entry = info(seen.digest)
        if entry is not None and matches(entry):
            found.append(entry)
            (heapq.heappush if len(ahead) < count else heapq.heappushpop)(ahead, order(entry))
    return sorted(found, key=order, reverse=True)[:count]


def _in_order(
    root: Root,
    groups: list[tuple[list[str], float]],
    bound: Callable[[pairs.Glimpse], float],
    done: Callable[[float], bool],
) -> Iterator[pairs.Glimpse]:
    """The entries of groups of shards, the highest bound first, until no remaining entry can matter.

    Each group has a bound of its own, and comes after those with a higher one. ``done`` tells whether entries within a
    bound no longer matter.
    """
    waiting: list[tuple[float, pairs.Glimpse]] = []  # a heap
    for shards, at_most in [*groups, ([], -math.inf)]:
        while waiting and -waiting[0][0] >= at_most:
            negative, seen = heapq.heappop(waiting)
            if done(-negative):
                return
            yield seen
        if done(at_most):
            return
        for seen in pairs.glimpses(root, shards):
            heapq.heappush(waiting, (-bound(seen), seen))


def _by_change(root: Root) -> list[tuple[list[str], float]]:
    """Each shard, with the time after which nothing in it was created; the last changed first.

    This uses ctime, which can't be set: copying a cache over another may set a directory's mtime back.
    """
    changed = [([shard], judge.lstat(root.entries + shard)) for shard in root.shards()]
    bounds = [(shards, 0.0 if status is None else status.st_ctime + _SLACK) for shards, status in changed]
    return sorted(bounds, key=lambda one: one[1], reverse=True)


def _named(key_or_digest: Key) -> str:
    if isinstance(key_or_digest, str) and is_digest(key_or_digest):
        return key_or_digest
    return entry_digest(key_or_digest)


def _victims(
    found: list[Candidate], pins: set[str], cap: int | None, older_than: float | None, now: int
) -> list[Candidate]:
    free = [item for item in found if item.digest not in pins]
    limit = None if older_than is None else now - int(older_than * 1e9)
    victims = [item for item in free if limit is not None and item.last_used < limit]
    if cap is not None:
        old = {victim.digest for victim in victims}
        rest = [item for item in free if item.digest not in old]
        excess = sum(item.charged for item in found) - sum(victim.charged for victim in victims) - cap
        victims += choose_victims(rest, excess=excess, at_most=None, now=now)
    return victims
