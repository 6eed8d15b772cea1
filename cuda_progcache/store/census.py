# SPDX-License-Identifier: Apache-2.0
"""Sums over the programs of a store, kept in a file so that statistics don't read every record.

``<root>/census`` has, for each shard, the modification times of its two directories, and the sums over its entries at
that time. Adding, removing or replacing a file changes its directory's time, so a shard whose times are the same is not
read again. The file is disposable; it is recreated if it is missing or damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.files import is_settled, read_regular
from cuda_progcache.store import judge, pairs
from cuda_progcache.store.compile_record import CompileRecord

if TYPE_CHECKING:
    from cuda_progcache.store.root import Root

NAME = "census"
_FORMAT = 1


class Census(NamedTuple):
    """Sums over the entries that have a matching record.

    Attributes
    ----------
    entries, bytes : int
        Their number, and the sum of their sizes.
    seconds : float
        The time that compiling them took.
    targets, archs : Counter
        The number of each kind of binary, and for each architecture, according to their records.
    """

    entries: int
    bytes: int
    seconds: float
    targets: Counter[str]
    archs: Counter[str]

    def plus(self, other: Census) -> Census:
        """The sums of two censuses."""
        return Census(
            self.entries + other.entries,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.targets + other.targets,
            self.archs + other.archs,
        )


_NONE = Census(0, 0, 0.0, Counter(), Counter())


def take(root: Root) -> Census:
    """Take a census of a directory; reads only the shards that have changed since the last one.

    Raises
    ------
    OSError
        The directory can't be read.
    """
    known = _read(root)
    shards: dict[str, Any] = {}
    total = _NONE
    for shard in root.shards():
        stamp = _stamp(root, shard)
        counted = known.get(shard)
        if stamp is None or counted is None or counted["stamp"] != stamp:
            found = _count(root, shard)
            if stamp is not None:
                shards[shard] = {"stamp": stamp, "sums": found}
        else:
            found = Census(*counted["sums"][:3], *map(Counter, counted["sums"][3:]))
            shards[shard] = counted
        total = total.plus(found)
    if shards != known and not root.read_only:
        with contextlib.suppress(OSError):  # a read-only directory is read each time
            encoded = json.dumps({"format": _FORMAT, "shards": shards}, separators=(",", ":")).encode()
            root.place(os.path.join(root.path, NAME), encoded)
    return total


def _read(root: Root) -> dict[str, Any]:
    try:
        data, _ = read_regular(os.path.join(root.path, NAME))
        read = json.loads(data or b"{}")
        if read.get("format") != _FORMAT:
            return {}
        shards = read["shards"]
        for counted in shards.values():
            entries, size, seconds, targets, archs = counted["sums"]
            _ = (entries + size + seconds, sum(targets.values()) + sum(archs.values()), counted["stamp"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return dict(shards)


def _stamp(root: Root, shard: str) -> list[int] | None:
    """When the shard's directories changed; ``None`` if so recently that a further change might not show."""
    stamp: list[int] = []
    now = time.time_ns()
    for tree in (root.entries, root.records):
        status = judge.lstat(tree + shard)
        if status is None or not is_settled(status, now):
            return None
        stamp += [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    return stamp


def _count(root: Root, shard: str) -> Census:
    entries = size = 0
    seconds = 0.0
    targets: Counter[str] = Counter()
    archs: Counter[str] = Counter()
    for digest in pairs.digests(root, shard):
        seen = judge.glance(root, digest)
        if seen is None:
            continue
        version, status = seen
        about = CompileRecord(version.record())
        entries, size = entries + 1, size + status.st_size
        seconds += about.seconds
        targets[about.target_type or "unknown"] += 1
        archs[about.arch or "unknown"] += 1
    return Census(entries, size, seconds, targets, archs)
