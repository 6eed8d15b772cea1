# SPDX-License-Identifier: Apache-2.0
"""Decides which entries to evict when a store is over its size cap. No I/O here: size_cap lists and unlinks.

Why a small store is scanned as a whole, and a large one by samples
-------------------------------------------------------------------
Puts of 1 kB at the cap, ``durability="none"``, on a 2-core machine with ext4 (5,000 puts, under other load)::

                       all, down to 90 % of the cap          a sample of 2048, an eighth of it goes
    entries            looks/put    mean    slowest put      looks/put    mean    p99      slowest put
    1,000              10          0.5 ms     0.07 s         (all: up to 4096 entries)
    10,000             12          0.6 ms     0.38 s         10          0.7 ms   11 ms    0.18 s
    100,000            21          0.9 ms     3.3 s          12          0.8 ms   10 ms    0.21 s
    1,000,000           -            -         30 s          10          0.6 ms    5 ms    0.21 s

Looking at an entry (the status of two files) takes 12 to 25 µs, removing it 0.1 ms or more. A low-water mark alone
makes the mean cost of a put independent of the number of entries, but one put in 10,000 takes seconds, since it looks
at all entries and removes a tenth. A sample bounds that put as well, and evicts nearly the same entries: the oldest
eighth of 2048 entries, chosen at random by their digests, lies within the oldest 15 % of all. The smallest unit that
can be listed is a shard: from 524,288 entries on, a pass looks at one (3,900 of 1,000,000). With up to 4096 entries, a
pass over all of them costs no more than that, and evicts in the exact order of use.

Alternatives: looking at all entries on each put, as ``cuda.core`` does, takes 10 ms, 0.1 s and 1.6 s per put at 1,000,
10,000 and 100,000 entries. An index in the order of use would have to be written on each read, by all processes.
"""

from __future__ import annotations

from collections.abc import Iterable

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache._util.files import Identity

#: Up to this many entries, a scan is cheaper than the programs that a low-water mark would evict: evict to the cap.
SMALL_STORE = 64
#: Above that, evict down to this share of the cap, so that many puts share the cost of one scan.
LOW_WATER = 0.9
#: Up to this many entries a pass looks at all of them.
EXACT_STORE = 4096
#: Above that it looks at about this many, in shards chosen at random.
SAMPLE = 2048
#: One in this many entries of a sample is evicted.
SAMPLE_SHARE = 8
#: A last use is written down again when the one on disk is older than this, in nanoseconds (5 minutes).
USE_RESOLUTION_NS = 300 * 10**9
#: The number of last uses that a process remembers; 170 bytes each, including their keys.
REMEMBERED = 131_072


class LastUse(dict[str, int]):
    """The latest uses of entries by this process: digest to nanoseconds since the epoch.

    They are exact, while those on the disk are accurate to minutes. Their order survives a clock that is set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest = 0

    def note(self, digest: str, now: int) -> None:
        """Note that an entry is used now."""
        self.latest = self[digest] = max(now, self.latest + 1)
        if len(self) > REMEMBERED:
            oldest = sorted(self.items(), key=lambda item: item[1])[: REMEMBERED // 2]
            for forgotten, _ in oldest:
                self.pop(forgotten, None)


class Candidate(NamedTuple):
    """An entry as an eviction scan saw it.

    Attributes
    ----------
    digest : str
        The entry's name.
    charged : int
        Bytes that it counts towards the cap.
    last_used : int
        Nanoseconds since the epoch.
    seen : (int, int, int)
        Inode, size and mtime (ns): evict this file, not one that has replaced it.
    """

    digest: str
    charged: int
    last_used: int
    seen: Identity

    @property
    def size(self) -> int:
        """Bytes of the entry, without its record."""
        return self.seen[1]


def excess(size: int, entries: int, cap: int) -> int:
    """Bytes to evict: none while ``size`` is within the cap, else those above the low-water mark."""
    if size <= cap:
        return 0
    return size - (int(cap * LOW_WATER) if entries > SMALL_STORE else cap)


def shards_to_look_at(entries: int, shards: int) -> int:
    """The number of shards that a pass looks at in a store of this many entries."""
    return shards if entries <= EXACT_STORE else max(1, SAMPLE * shards // entries)


def passes_at_most(size: int, cap: int) -> int:
    """The number of passes that one put may run: one, plus one for each 2 % that the store is above its cap."""
    return 1 + max(0, size - cap) * 50 // cap


def choose_victims(candidates: Iterable[Candidate], *, excess: int, at_most: int | None, now: int) -> list[Candidate]:
    """The least recently used entries that take ``excess`` bytes.

    Parameters
    ----------
    candidates : iterable of Candidate
        Those that may be evicted.
    excess : int
        Bytes to free.
    at_most : int or None
        The maximum number to evict.
    now : int
        Nanoseconds since the epoch. Later time stamps (another machine's clock) count as ``now``.

    Returns
    -------
    list of Candidate
        Oldest first.
    """
    ranked = sorted(candidates, key=lambda candidate: min(candidate.last_used, now))
    victims = []
    for candidate in ranked[:at_most]:
        if excess <= 0:
            break
        victims.append(candidate)
        excess -= candidate.charged
    return victims


def use_is_due(last_used: int, written: int, now: int) -> bool:
    """Whether to write a read to the disk: it is the first after a write, or the last one on disk is minutes old.

    Parameters
    ----------
    last_used, written, now : int
        Nanoseconds since the epoch: the entry's atime and mtime, and the clock.
    """
    return last_used <= written or not 0 <= now - last_used <= USE_RESOLUTION_NS
