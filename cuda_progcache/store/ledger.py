# SPDX-License-Identifier: Apache-2.0
"""The size account of a store, by shard, in one file that every process with a size cap appends to.

``<root>/ledger`` is an :class:`~cuda_progcache.store.append_log.AppendLog` of 26-byte lines, each about a shard (the
first byte of a digest)::

    kind:u8 ref:u64 shard:u8 entries:i32 bytes:i64 check:u32

    BEGIN   an operation begins to change files of that shard, and may add this many bytes; ref identifies it
    END     the operation has added this many entries and bytes (negative: removed)
    COUNT   a scan found this many; ref: how far its process had read this file when the scan began; 0: another file
    DOUBT   an unannounced change; entries and bytes are an estimate

A put costs two opens, two writes and a read, however many entries there are.

The order of the lines says whether a number can be trusted. A count is exact if no operation on its shard was open when
its scan began, and none began or ended before its line. So the process that appends the last END can make every shard
exact, and the store's size is then known to the byte. A shard is in doubt until an exact count if its number may be
wrong: two operations overlapped (perhaps on the same key), a writer was killed, or a line was lost. Until an operation
ends, or is given up after some seconds, the bytes that it may add are counted.

Nothing depends on the account being right. It is a copy of what a scan would find: if it is missing or damaged, it is
recreated with every shard unknown, and occasional counts (see :mod:`~cuda_progcache.store.size_cap`) find files that
were added or removed by hand.
"""

from __future__ import annotations

import struct
import time

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.store.append_log import GIVE_UP_AFTER, AppendLog, Line, new_ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cuda_progcache.store.root import Root

SHARDS = 256

_BEGIN, _END, _COUNT, _DOUBT = 1, 2, 3, 4


class Mark(NamedTuple):
    """The ledger file that a process has read, and how far."""

    header: bytes
    offset: int


class _Operation(NamedTuple):
    """An operation that has begun and not ended."""

    size: int
    seen: float  # time.monotonic() when this process read its BEGIN line


class Ledger(AppendLog):
    """The account of one store's shards, as this process knows it.

    Writing to it never raises :class:`OSError`: if the file can't be used, the account covers only this process.

    Parameters
    ----------
    root : Root
        The store's directory.
    """

    NAME = "ledger"
    MAGIC = b"cpledgr\x03"
    PAYLOAD = struct.Struct("<Biq")

    def __init__(self, root: Root) -> None:
        self._unsaid: set[int] = set()  # shards of lines that could not be appended
        self._operations: dict[tuple[int, int], _Operation] = {}  # by ref and shard
        super().__init__(root)

    def forget(self) -> None:
        """Forget everything."""
        self._entries = [0] * SHARDS
        self._sizes = [0] * SHARDS
        self._counted = [False] * SHARDS
        self._doubted: set[int] = set()
        self._open = [0] * SHARDS  # operations
        self._moved = [0] * SHARDS  # the offset of the last line of an operation
        self._seen = {which: operation.seen for which, operation in self._operations.items()}
        self._operations = {}
        self._ended: set[tuple[int, int]] = set()  # a line that was copied may also have been appended again
        self._given_up: set[tuple[int, int]] = set()
        self._known = self._total_entries = self._total_size = self._announced = 0

    # Reading the account

    @property
    def entries(self) -> int:
        """The number of entries; uncounted shards are estimated from the counted ones."""
        return max(0, self._total_entries) * SHARDS // max(1, self._known)

    @property
    def size(self) -> int:
        """Bytes charged to the cap, including announced ones; uncounted shards are estimated as in :attr:`entries`.

        Digests are as good as random: 8 shards of 400 entries give the total to a few percent.
        """
        return max(0, self._total_size) * SHARDS // max(1, self._known) + self._announced

    @property
    def announced(self) -> int:
        """The bytes of :attr:`size` that operations have announced and may add."""
        return self._announced

    @property
    def complete(self) -> bool:
        """Whether every shard has been counted."""
        return self._known == SHARDS

    @property
    def doubts(self) -> int:
        """The number of shards in doubt."""
        return len(self._doubted)

    def uncounted(self) -> list[int]:
        """The shards that have not been counted."""
        return [shard for shard in range(SHARDS) if not self._counted[shard]]

    def doubtful(self) -> list[int]:
        """The shards in doubt that a count can settle: no operation is open there, or those open count as dead."""
        with self._lock:
            given_up = time.monotonic() - GIVE_UP_AFTER if self._operations else 0.0
            for (ref, shard), operation in list(self._operations.items()):
                if operation.seen < given_up:
                    self._close(ref, shard)
                    self._given_up.add((ref, shard))
                    self._doubted.add(shard)
            return sorted(shard for shard in self._doubted if not self._open[shard])

    def is_empty(self, shard: int) -> bool:
        """Whether the shard was counted and found empty."""
        return self._counted[shard] and not (self._entries[shard] or self._sizes[shard] or shard in self._doubted)

    # Updating the account

    def begin(self, shards: Iterable[int], size: int = 0) -> int:
        """Announce an operation on the files of some shards, before it changes any.

        Parameters
        ----------
        shards : iterable of int
            The shards that it changes.
        size : int
            Bytes that it may add to each.

        Returns
        -------
        int
            The operation's ref, for :meth:`end`.
        """
        ref = new_ref()
        self._tell([(_BEGIN, ref, shard, 0, size) for shard in shards], read=False)
        return ref

    def end(self, ref: int, changes: Iterable[tuple[int, int, int]], *, sure: bool = True) -> None:
        """Record what an operation has done in each shard that it was announced for; also read others' lines.

        Parameters
        ----------
        ref : int
            The operation's ref.
        changes : iterable of (int, int, int)
            Shard, and the entries and bytes added; negative if removed.
        sure : bool
            ``False`` if it failed midway: the shards are then in doubt.
        """
        told = list(changes)
        lines: list[Line] = [(_END, ref, *change) for change in told]
        if not sure:
            lines += [(_DOUBT, 0, shard, 0, 0) for shard, _, _ in told]
        self._tell(lines)

    def doubt(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Record unannounced changes, as estimates ``(shard, entries, bytes)``; also read others' lines."""
        self._tell([(_DOUBT, 0, *change) for change in changes])

    def mark(self) -> Mark:
        """Read others' lines and return the position; a scan begins with this."""
        self._tell([])
        with self._lock:
            return Mark(*self.position)

    def count(self, counts: Iterable[tuple[int, int, int]], since: Mark) -> None:
        """Record counts of shards, ``(shard, entries, bytes)``; also read others' lines."""
        told = [count for count in counts if not self._agrees(*count)]

        def lines(header: bytes) -> list[Line]:
            ref = since.offset if header == since.header else 0
            return [(_COUNT, ref, *count) for count in told]

        self._tell(lines)

    def _agrees(self, shard: int, entries: int, size: int) -> bool:
        known = self._counted[shard] and shard not in self._doubted
        return known and (self._entries[shard], self._sizes[shard]) == (entries, size)

    def _tell(self, lines: list[Line] | Callable[[bytes], list[Line]], *, read: bool = True) -> None:
        """Append lines. If that fails (read-only, another user's file, a full disk), only this process knows them."""
        unsaid: tuple[int, ...] = ()

        def with_unsaid(header: bytes) -> list[Line]:
            nonlocal unsaid
            unsaid = tuple(self._unsaid)
            said = lines(header) if callable(lines) else lines
            return [*[(_DOUBT, 0, shard, 0, 0) for shard in unsaid], *said]

        if self.exchange(with_unsaid, read=read):
            self._unsaid.difference_update(unsaid)
            return
        alone = lines(b"") if callable(lines) else lines
        self._unsaid.update(line[2] for line in alone)
        self.take_alone(alone)
        self._ended.clear()  # nobody copies these
        self._given_up.clear()

    # The log

    def take(self, line: Line, at: int) -> None:
        """Process a line."""
        kind, ref, shard, entries, size = line
        if kind == _COUNT:
            self._take_count(shard, entries, size, ref)
            return
        if kind == _DOUBT:
            self._doubted.add(shard)
        else:
            self._moved[shard] = at
            if kind == _BEGIN:
                self._begun(shard, size, ref)
                return
            if (ref, shard) in self._ended:
                return
            self._ended.add((ref, shard))
            if not self._close(ref, shard):  # its announcement was lost, or comes later
                self._doubted.add(shard)
                if (ref, shard) in self._given_up:  # and counted, perhaps
                    return
        if self._counted[shard]:  # otherwise its count will contain it
            self._add(shard, entries, size)

    def summary(self) -> list[Line]:
        """Counts, doubts and open operations."""
        shards = [shard for shard in range(SHARDS) if self._counted[shard]]
        return [
            *[(_COUNT, 1 << 32, shard, self._entries[shard], self._sizes[shard]) for shard in shards],
            *[(_DOUBT, 0, shard, 0, 0) for shard in self._doubted],
            *[(_BEGIN, ref, shard, 0, op.size) for (ref, shard), op in self._operations.items()],
        ]

    def late(self, line: Line) -> Line:
        """The same line, without a count's position, which means nothing in another file."""
        return (_COUNT, 0, *line[2:]) if line[0] == _COUNT else line

    def too_late(self, line: Line, generations: int) -> Line:  # noqa: ARG002 - a doubt never hurts
        """A doubt about the line's shard: something has changed there."""
        return (_DOUBT, 0, line[2], 0, 0)

    def _take_count(self, shard: int, entries: int, size: int, ref: int) -> None:
        exact = ref > self._moved[shard] and not self._open[shard]
        if self._counted[shard] and not exact and shard not in self._doubted:
            return  # the known number is better
        self._known += not self._counted[shard]
        self._counted[shard] = True
        (self._doubted.discard if exact else self._doubted.add)(shard)
        self._add(shard, entries - self._entries[shard], size - self._sizes[shard])

    def _add(self, shard: int, entries: int, size: int) -> None:
        self._entries[shard] += entries
        self._sizes[shard] += size
        self._total_entries += entries
        self._total_size += size

    def _begun(self, shard: int, size: int, ref: int) -> None:
        if (ref, shard) in self._operations or (ref, shard) in self._ended:
            return
        if self._open[shard]:
            self._doubted.add(shard)
        self._operations[ref, shard] = _Operation(size, self._seen.get((ref, shard)) or time.monotonic())
        self._open[shard] += 1
        self._announced += size

    def _close(self, ref: int, shard: int) -> bool:
        operation = self._operations.pop((ref, shard), None)
        if operation is None:
            return False
        self._open[shard] -= 1
        self._announced -= operation.size
        return True
