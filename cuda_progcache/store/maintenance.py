# SPDX-License-Identifier: Apache-2.0
"""Pins, and pruning: what the owner of a cache directory keeps and lets go."""

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


#: Seconds by which a file's time stamp may lie before the clock that its writer read: it comes from the last tick.
_SLACK = 1.0
#: Seconds that a pin waits for an entry that another process has moved aside, and may put back.
_MOMENT = 1.0


class PruneReport(NamedTuple):
    """What a prune removed and left.

    Attributes
    ----------
    removed, bytes : int
        Entries that went, or would go, and their bytes, without their records: as ``stats`` counts them.
    left, left_bytes : int
        Entries that stay, and theirs.
    pinned : int
        Of those that stayed: spared because they are pinned.
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
    # Now, and not before: what is there once it is pinned, nobody takes who asks for pins after having moved it aside.
    # Who moved it aside before, and puts it back for the pin, takes a moment.
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
    """Let an entry go; see :meth:`~cuda_progcache.store.FileStreamProgramCache.unpin`."""
    digest = _named(key_or_digest)
    try:
        unlink(root.pinned + digest)
    except FileNotFoundError:
        raise KeyError(key_or_digest) from None
    return digest


def prune(
    root: Root, cap: SizeCap, max_size_bytes: int | None, older_than: float | None, *, dry_run: bool
) -> PruneReport:
    """Remove the least recently used; see :meth:`~cuda_progcache.store.FileStreamProgramCache.prune`."""
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
    """The entries that come first in an order; see :meth:`~cuda_progcache.store.ProgramCacheResource.first`.

    A file's status bounds what its record can say: it was created when it was written, or before (imported, copied with
    its times). So records are read in the order of their bounds, until no other can come before those that were read.
    When the directory of a shard changed last bounds them all: the shards that changed before aren't looked at.
    """
    bounds: dict[str, Callable[[pairs.Glimpse], float]] = {
        "used": lambda seen: max(seen.used, last_use.get(seen.digest, 0) / 1e9),
        "created": lambda seen: seen.written + _SLACK,
        "size": lambda seen: seen.size,
    }
    bound, order = bounds[by], ORDERS[by]
    found: list[EntryInfo] = []
    ahead: list[float] = []  # a heap: what the best so far are ordered by, the least of them first

    def done(at_most: float) -> bool:
        return len(ahead) >= count and (not ahead or at_most <= ahead[0])

    by_change = by == "created" and not WINDOWS  # there a directory's ctime is when it was made
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
    """The entries of groups of shards, the highest bound first, until none that is left can matter.

    Each group has a bound of its own, and comes after those with a higher one. ``done`` says of a bound that nothing
    within it matters any more.
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
    """Each shard, the one that changed last first, and when nothing in it was created later.

    By the time that nobody can set: who copies a cache over another may set the directory's other one back.
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
