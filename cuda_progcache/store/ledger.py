# SPDX-License-Identifier: Apache-2.0
"""How much lies in a store, by shard, in one file that every process with a size cap adds to.

``<root>/ledger`` is a row of 24-byte lines. The first names this ledger; each further one is about a shard (the first
byte of a digest)::

    "cpledgr" 0x02 nonce:16
    shard:u8 kind:u8 entries:i32 bytes:i64 ref:u64 check:u16     little endian; check: CRC-32 of the 22 bytes, cut

    BEGIN   an operation begins to move files of that shard, and may add so many bytes; ref names the operation
    END     it has moved so many entries and bytes
    COUNT   a scan found so many; ref: how far its process had read this file when it began to look, 0 if not this file
    DOUBT   something has moved that was not announced; entries and bytes are a guess of how much
    CLAIM   the process that ref names will write the file anew, the first one that claims it; ref 0: the file is
            whole, what came while it was written anew has been handed on

A line is written with one append, and each process reads what the others appended since it last looked: a put costs
two opens and writes and a read however many entries there are. When the file is long, one of the processes writes it
again as counts, renames it into place and hands on what came meanwhile; the new nonce tells the others to start over
from there, and who appends looks whether it still was the right file.

The order of the lines says whether a number can be trusted. A count is exact if no operation on its shard was open
when its scan began, and none began or ended before its line: who appends the last END of all can therefore make every
shard exact, and the store's size is then known to the byte. A number that may be wrong is in doubt until an exact
count: two operations on one shard at a time (of the same key, perhaps), a writer that was killed, a line that got lost.
Until an operation ends, or is given up after some seconds, the bytes that it may add count as there.

Nothing depends on it being right. It is a copy of what a scan would find: where it is missing or damaged it is begun
anew with no shard known, and counts by the way (see :mod:`~cuda_progcache.store.size_cap`) find what came by hand.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import WINDOWS, identity, replace, unlink_quietly, write_new
from cuda_progcache._util.locks import ForkSafeLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_progcache.store.root import Root

SHARDS = 256
#: Written anew as counts when it is longer than this, in bytes: reading it from the start then takes 2 ms.
LONG = 32 * 1024
#: An operation or claim that has not ended for so many seconds is taken for dead, and its shard is counted again.
GIVE_UP_AFTER = 5.0

_MAGIC = b"cpledgr\x02"
_LINE = struct.Struct("<BBiqQ")
_CHECK = struct.Struct("<H")
_SIZE = _LINE.size + _CHECK.size
_BEGIN, _END, _COUNT, _DOUBT, _CLAIM = 1, 2, 3, 4, 5

_FLAGS = os.O_RDWR | os.O_APPEND
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _flag, 0)


class _DamagedError(Exception):
    """Not a ledger, or no longer one."""


class Mark(NamedTuple):
    """How far a process had read a ledger, and which one it was."""

    header: bytes
    offset: int


class _Operation(NamedTuple):
    """One that has begun and not ended."""

    size: int
    seen: float  # time.monotonic(), when this process read of it


class _Claim(NamedTuple):
    ref: int
    seen: float


def _line(shard: int, kind: int, entries: int = 0, size: int = 0, ref: int = 0) -> bytes:
    line = _LINE.pack(shard, kind, entries, size, ref)
    return line + _CHECK.pack(zlib.crc32(line) & 0xFFFF)


_WHOLE = _line(0, _CLAIM)


class Ledger:
    """The account of one store's shards, as this process knows it.

    A write to it never raises :class:`OSError`: where the file can't be had, the account is this process's alone.

    Parameters
    ----------
    root : Root
        The store's directory.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._path = os.path.join(root.path, "ledger")
        self._lock = ForkSafeLock()
        self._unsaid: set[int] = set()  # shards of lines that could not be appended
        self._header = b""
        self._operations: dict[tuple[int, int], _Operation] = {}  # by ref and shard
        self._forget(b"")

    def _forget(self, header: bytes) -> None:
        self._header = header
        self._offset = _SIZE
        self._entries = [0] * SHARDS
        self._sizes = [0] * SHARDS
        self._counted = [False] * SHARDS
        self._doubted: set[int] = set()
        self._open = [0] * SHARDS  # operations
        self._moved = [0] * SHARDS  # where the last line of an operation lies
        self._seen = {which: operation.seen for which, operation in self._operations.items()}
        self._operations = {}
        self._ended: set[tuple[int, int]] = set()  # a shortening may hand a line on that was appended again
        self._given_up: set[tuple[int, int]] = set()
        self._claim = _Claim(0, time.monotonic())
        self._known = self._total_entries = self._total_size = self._announced = 0

    # What it says

    @property
    def entries(self) -> int:
        """Entries in the store; while shards are uncounted, as many more as there would be if all were alike."""
        return max(0, self._total_entries) * SHARDS // max(1, self._known)

    @property
    def size(self) -> int:
        """Bytes charged to the cap, and those on their way; uncounted shards are guessed as in :attr:`entries`.

        A digest is as good as random: 8 shards of 400 entries tell the whole to a few percent.
        """
        return max(0, self._total_size) * SHARDS // max(1, self._known) + self._announced

    @property
    def announced(self) -> int:
        """The bytes of :attr:`size` that are on their way."""
        return self._announced

    @property
    def complete(self) -> bool:
        """Whether every shard has been counted."""
        return self._known == SHARDS

    @property
    def doubts(self) -> int:
        """How many shards are in doubt."""
        return len(self._doubted)

    def uncounted(self) -> list[int]:
        """The shards that have not been counted."""
        return [shard for shard in range(SHARDS) if not self._counted[shard]]

    def doubtful(self) -> list[int]:
        """The shards in doubt that a count can make sure of: where nothing moves, or what did is taken for dead."""
        with self._lock:
            given_up = time.monotonic() - GIVE_UP_AFTER if self._operations else 0.0
            for (ref, shard), operation in list(self._operations.items()):
                if operation.seen < given_up:
                    self._close(ref, shard)
                    self._given_up.add((ref, shard))
                    self._doubted.add(shard)
            return sorted(shard for shard in self._doubted if not self._open[shard])

    def is_empty(self, shard: int) -> bool:
        """Whether that shard was counted and holds nothing."""
        return self._counted[shard] and not (self._entries[shard] or self._sizes[shard] or shard in self._doubted)

    # What it is told

    def begin(self, shards: Iterable[int], size: int = 0) -> int:
        """Announce an operation on the files of some shards, before any of them moves.

        Parameters
        ----------
        shards : iterable of int
            Those that it touches.
        size : int
            Bytes that it may add to each.

        Returns
        -------
        int
            What names it, for :meth:`end`.
        """
        ref = _new_ref()
        lines = b"".join(_line(shard, _BEGIN, 0, size, ref) for shard in shards)
        self._exchange(lambda _: lines, read=False)
        return ref

    def end(self, ref: int, changes: Iterable[tuple[int, int, int]], *, sure: bool = True) -> None:
        """Tell what an operation has done, of every shard that it was announced for; takes in others' lines, too.

        Parameters
        ----------
        ref : int
            Which.
        changes : iterable of (int, int, int)
            Shard, and entries and bytes more than before, negative for what went.
        sure : bool
            ``False`` if it failed on the way: the shards are then in doubt.
        """
        told = list(changes)
        lines = b"".join(_line(shard, _END, entries, size, ref) for shard, entries, size in told)
        if not sure:
            lines += b"".join(_line(shard, _DOUBT) for shard, _, _ in told)
        self._exchange(lambda _: lines)

    def doubt(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Something moved unannounced, about so much: ``(shard, entries, bytes)``. Takes in others' lines, too."""
        lines = b"".join(_line(shard, _DOUBT, entries, size) for shard, entries, size in changes)
        self._exchange(lambda _: lines)

    def mark(self) -> Mark:
        """Take in others' lines and note where that was; a scan begins with it."""
        self._exchange(_nothing)
        with self._lock:
            return Mark(self._header, self._offset)

    def count(self, counts: Iterable[tuple[int, int, int]], since: Mark) -> None:
        """Shards were counted: ``(shard, entries, bytes)``. Takes in others' lines, too."""
        told = [count for count in counts if not self._agrees(*count)]

        def lines(header: bytes) -> bytes:
            ref = since.offset if header == since.header else 0
            return b"".join(_line(shard, _COUNT, entries, size, ref) for shard, entries, size in told)

        self._exchange(lines)

    def _agrees(self, shard: int, entries: int, size: int) -> bool:
        known = self._counted[shard] and shard not in self._doubted
        return known and (self._entries[shard], self._sizes[shard]) == (entries, size)

    def exists(self) -> bool:
        """Whether somebody keeps an account of this store."""
        return os.access(self._path, os.F_OK)

    def discard(self) -> None:
        """Begin anew: nothing is known, to no process."""
        unlink_quietly(self._path)
        with self._lock:
            self._forget(b"")

    # The file

    def _exchange(self, lines: Callable[[bytes], bytes], *, read: bool = True) -> None:
        said = False
        for _ in range(6):
            try:
                appended, heard = self._append_and_read(_nothing if said else lines, read=read)
                said = said or appended
                if said and heard:
                    return
                if not os.path.lexists(self._path):
                    self._put_in_place([_WHOLE])  # and begin anew: what was removed with it, we don't know
            except _DamagedError:
                self.discard()
            except OSError:
                if not self._clear_way():
                    break
        if said:
            return
        with self._lock:  # a read-only directory, another user's ledger, a full disk: what we know is ours alone
            self._header = b""  # with the file back, begin with what it says
            alone = lines(b"")
            self._unsaid.update(alone[::_SIZE])
            self._take(alone, self._offset)
            self._offset += len(alone)

    def _append_and_read(self, lines: Callable[[bytes], bytes], *, read: bool) -> tuple[bool, bool]:
        """Append to the file and take in what is new in it; whether each was done, as it may be replaced meanwhile."""
        try:
            fd = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            return False, False
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > 16 * LONG:
                raise _DamagedError
            header = os.read(fd, _SIZE)
            if len(header) != _SIZE or not header.startswith(_MAGIC):
                raise _DamagedError
            unsaid = tuple(self._unsaid)
            appended = b"".join(_line(shard, _DOUBT) for shard in unsaid) + lines(header)
            if appended:
                if os.write(fd, appended) != len(appended):
                    raise _DamagedError  # a disk that is just full has taken a part
                if not self._is(status):
                    return False, False  # shortened: what we appended may have come too late to be handed on
                self._unsaid.difference_update(unsaid)
            if (read or status.st_size > LONG) and not self._read(fd, status, header):
                return True, False
            if status.st_size > LONG and self._claim.seen < time.monotonic() - GIVE_UP_AFTER:
                with contextlib.suppress(OSError):  # in some seconds another one tries
                    self._shorten(fd, status, header)
        finally:
            os.close(fd)
        return True, True

    def _is(self, status: os.stat_result) -> bool:
        try:
            return os.lstat(self._path).st_ino == status.st_ino
        except FileNotFoundError:
            return False

    def _read(self, fd: int, status: os.stat_result, header: bytes) -> bool:
        """Take in what is new in the open file; ``False``: it was replaced, and what is known may be newer."""
        with self._lock:
            if header != self._header:
                if not self._is(status):
                    return False
                self._forget(header)
            start = self._offset
        os.lseek(fd, start, os.SEEK_SET)
        tail = _read_on(fd)
        tail = tail[: len(tail) - len(tail) % _SIZE]  # what was cut short by a full disk shows at the next line
        with self._lock:
            if header == self._header:
                new = tail[self._offset - start :]  # another thread may have read a part of it meanwhile
                self._take(new, self._offset)
                self._offset += len(new)
        return True

    def _take(self, lines: bytes, offset: int) -> None:
        for at in range(0, len(lines), _SIZE):
            shard, kind, entries, size, ref = _LINE.unpack_from(lines, at)
            if zlib.crc32(lines[at : at + _LINE.size]) & 0xFFFF != _CHECK.unpack_from(lines, at + _LINE.size)[0]:
                raise _DamagedError
            if kind == _COUNT:
                self._take_count(shard, entries, size, ref)
                continue
            if kind == _CLAIM:
                if not ref:
                    self._claim = _Claim(0, -GIVE_UP_AFTER)
                elif self._claim.seen < time.monotonic() - GIVE_UP_AFTER:
                    self._claim = _Claim(ref, time.monotonic())
                continue
            if kind == _DOUBT:
                self._doubted.add(shard)
            else:
                self._moved[shard] = offset + at
                if kind == _BEGIN:
                    self._begun(shard, size, ref)
                    continue
                if (ref, shard) in self._ended:
                    continue
                self._ended.add((ref, shard))
                if not self._close(ref, shard):  # its announcement got lost, or comes later
                    self._doubted.add(shard)
                    if (ref, shard) in self._given_up:  # and counted, perhaps
                        continue
            if self._counted[shard]:  # else its count will contain it
                self._add(shard, entries, size)

    def _take_count(self, shard: int, entries: int, size: int, ref: int) -> None:
        exact = ref > self._moved[shard] and not self._open[shard]
        if self._counted[shard] and not exact and shard not in self._doubted:
            return  # what is known is better
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

    def _put_in_place(self, lines: list[bytes]) -> bytes:
        header = _MAGIC + os.urandom(_SIZE - len(_MAGIC))
        staged = self._root.stage_path()
        write_new(staged, header + b"".join(lines), mode=self._root.file_mode, sync=False)
        try:
            replace(staged, self._path)
        except OSError:
            unlink_quietly(staged)
            raise
        return header

    def _shorten(self, fd: int, status: os.stat_result, header: bytes) -> None:
        """Replace the open ledger by one of counts alone, and hand on what is appended to it meanwhile."""
        if WINDOWS:  # nobody can replace what is open there: it grows until it is too long, and is begun anew
            return
        claim = _new_ref()
        os.write(fd, _line(0, _CLAIM, 0, 0, claim))
        self._read(fd, status, header)
        with self._lock:
            if header != self._header or self._claim.ref != claim:
                return  # another one does it, or has done it
            seen = self._offset
            shards = [shard for shard in range(SHARDS) if self._counted[shard]]
            lines = [_line(shard, _COUNT, self._entries[shard], self._sizes[shard], _SIZE) for shard in shards]
            lines += [_line(shard, _DOUBT) for shard in self._doubted]
            lines += [_line(shard, _BEGIN, 0, op.size, ref) for (ref, shard), op in self._operations.items()]
        if self._first_line() != header:
            return
        new = self._put_in_place(lines)
        os.lseek(fd, seen, os.SEEK_SET)
        late = _read_on(fd)
        handed_on = [late[at : at + _SIZE] for at in range(0, len(late) - _SIZE + 1, _SIZE)]

        def hand_on(header: bytes) -> bytes:
            if header == new:
                return b"".join(map(_of_another_ledger, handed_on)) + _WHOLE
            return b"".join(_line(line[0], _DOUBT) for line in handed_on)  # it took too long

        self._exchange(hand_on)

    def _first_line(self) -> bytes:
        with open(self._path, "rb") as file:
            return file.read(_SIZE)

    def _clear_way(self) -> bool:
        """Move away what isn't a file and can't be opened as one; whether that was the trouble and is done."""
        try:
            status = os.lstat(self._path)
        except OSError:
            return False
        return not stat.S_ISREG(status.st_mode) and self._root.set_aside(self._path, identity(status))


def _nothing(_: bytes) -> bytes:
    return b""


def _new_ref() -> int:
    return int.from_bytes(os.urandom(8), "little") | 1


def _read_on(fd: int) -> bytes:
    tail = os.read(fd, LONG)
    while tail and (part := os.read(fd, LONG)):
        tail += part
    return tail


def _of_another_ledger(line: bytes) -> bytes:
    """The same line where a count's place in this file means nothing."""
    shard, kind, entries, size, ref = _LINE.unpack_from(line)
    return _line(shard, kind, entries, size, 0 if kind == _COUNT else ref)
