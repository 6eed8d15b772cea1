# SPDX-License-Identifier: Apache-2.0
"""How much lies in a store, by shard, in one file that every process with a size cap adds to.

``<root>/ledger`` is a row of 16-byte lines. The first names this ledger; each further one says of a shard (the first
byte of a digest) that entries and bytes came or went, or how many there are, counted::

    "cpledgr" 0x01 nonce:8
    shard:u8 kind:u8 entries:i32 bytes:i64 check:u16          little endian; check: CRC-32 of the 14 bytes before, cut

A line is written with one append, and each process reads what the others appended since it last looked: a put costs
an open, a write and a read however many entries there are. When the file is long, one of the processes writes it again
as 256 counts and renames it into place; the new nonce tells the others to start over from there.

Nothing depends on it being right. It is a copy of what a scan would find: where it is missing or damaged it is begun
anew with no shard known, and every count of a shard, by an eviction or by the way (see
:mod:`~cuda_progcache.store.size_cap`), puts right what got lost: a line of a writer that was killed after its rename,
an append that a network file system let another one overwrite, files copied in by hand.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING

from cuda_progcache._util.files import WINDOWS, identity, replace, unlink_quietly, write_new
from cuda_progcache._util.locks import ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_progcache.store.root import Root

SHARDS = 256
#: Written anew as counts when it is longer than this, in bytes: reading it from the start then takes 2 ms.
LONG = 64 * 1024

_MAGIC = b"cpledgr\x01"
_LINE = struct.Struct("<BBiq")
_CHECK = struct.Struct("<H")
_SIZE = _LINE.size + _CHECK.size
_CHANGE, _COUNT = 1, 2

_FLAGS = os.O_RDWR | os.O_APPEND
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _flag, 0)


class _DamagedError(Exception):
    """Not a ledger, or no longer one."""


def _line(shard: int, kind: int, entries: int, size: int) -> bytes:
    line = _LINE.pack(shard, kind, entries, size)
    return line + _CHECK.pack(zlib.crc32(line) & 0xFFFF)


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
        self._forget(b"")

    def _forget(self, header: bytes) -> None:
        self._header = header
        self._offset = _SIZE
        self._entries = [0] * SHARDS
        self._sizes = [0] * SHARDS
        self._counted = [False] * SHARDS
        self._known = self._total_entries = self._total_size = 0

    # What it says

    @property
    def entries(self) -> int:
        """Entries in the store; while shards are uncounted, as many more as there would be if all were alike."""
        return max(0, self._total_entries) * SHARDS // max(1, self._known)

    @property
    def size(self) -> int:
        """Bytes charged to the cap, with uncounted shards guessed as in :attr:`entries`; 0 if none is counted.

        A digest is as good as random: 8 shards of 400 entries tell the whole to a few percent.
        """
        return max(0, self._total_size) * SHARDS // max(1, self._known)

    @property
    def complete(self) -> bool:
        """Whether every shard has been counted."""
        return self._known == SHARDS

    def uncounted(self) -> list[int]:
        """The shards that have not been counted."""
        return [shard for shard in range(SHARDS) if not self._counted[shard]]

    def is_empty(self, shard: int) -> bool:
        """Whether that shard was counted and holds nothing."""
        return self._counted[shard] and not (self._entries[shard] or self._sizes[shard])

    # What it is told

    def change(self, changes: Iterable[tuple[int, int, int]]) -> None:
        """Entries came or went: ``(shard, entries, bytes)``, negative for what went. Takes in others' changes, too."""
        self._exchange(b"".join(_line(shard, _CHANGE, entries, size) for shard, entries, size in changes))

    def count(self, counts: Iterable[tuple[int, int, int]]) -> None:
        """Shards were counted: ``(shard, entries, bytes)``. Takes in others' changes, too."""
        self._exchange(b"".join(_line(shard, _COUNT, entries, size) for shard, entries, size in counts))

    def exists(self) -> bool:
        """Whether somebody keeps an account of this store."""
        return os.access(self._path, os.F_OK)

    def discard(self) -> None:
        """Begin anew: nothing is known, to no process."""
        unlink_quietly(self._path)
        with self._lock:
            self._forget(b"")

    # The file

    def _exchange(self, lines: bytes) -> None:
        for _ in range(3):
            try:
                if self._append_and_read(lines):
                    return
                self._put_in_place([])  # and begin anew: what was removed with it, we don't know
            except _DamagedError:
                self.discard()
            except OSError:
                if not self._clear_way():
                    break
        with self._lock:  # a read-only directory, another user's ledger, a full disk: what we know is ours alone
            self._take(lines)

    def _append_and_read(self, lines: bytes) -> bool:
        try:
            fd = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > 16 * LONG:
                raise _DamagedError
            header = os.read(fd, _SIZE)
            if len(header) != _SIZE or not header.startswith(_MAGIC):
                raise _DamagedError
            if lines and os.write(fd, lines) != len(lines):
                raise _DamagedError  # a disk that is just full has taken a part
            self._read(fd, header)
            if status.st_size > LONG:
                with contextlib.suppress(OSError):  # the next one tries again
                    self._shorten(fd, header)
        finally:
            os.close(fd)
        return True

    def _read(self, fd: int, header: bytes) -> None:
        with self._lock:
            if header != self._header:
                self._forget(header)
            start = self._offset
        os.lseek(fd, start, os.SEEK_SET)
        tail = os.read(fd, LONG)
        while tail and (part := os.read(fd, LONG)):
            tail += part
        tail = tail[: len(tail) - len(tail) % _SIZE]  # what was cut short by a full disk shows at the next line
        with self._lock:
            if header == self._header:
                self._take(tail[self._offset - start :])  # another thread may have read a part of it meanwhile
                self._offset = max(self._offset, start + len(tail))

    def _take(self, lines: bytes) -> None:
        for at in range(0, len(lines), _SIZE):
            shard, kind, entries, size = _LINE.unpack_from(lines, at)
            if zlib.crc32(lines[at : at + _LINE.size]) & 0xFFFF != _CHECK.unpack_from(lines, at + _LINE.size)[0]:
                raise _DamagedError
            if kind == _COUNT:
                self._known += not self._counted[shard]
                self._counted[shard] = True
                entries, size = entries - self._entries[shard], size - self._sizes[shard]
            elif not self._counted[shard]:
                continue  # its count will contain it
            self._entries[shard] += entries
            self._sizes[shard] += size
            self._total_entries += entries
            self._total_size += size

    def _put_in_place(self, counts: list[bytes]) -> None:
        header = _MAGIC + os.urandom(_SIZE - len(_MAGIC))
        staged = self._root.stage_path()
        write_new(staged, header + b"".join(counts), mode=self._root.file_mode, sync=False)
        try:
            replace(staged, self._path)
        except OSError:
            unlink_quietly(staged)
            raise

    def _shorten(self, fd: int, header: bytes) -> None:
        """Replace the open ledger by one of counts alone, and hand on what is appended to it meanwhile."""
        with self._lock:
            if header != self._header:
                return
            seen = self._offset
            counts = [
                _line(shard, _COUNT, self._entries[shard], self._sizes[shard])
                for shard in range(SHARDS)
                if self._counted[shard]
            ]
        # Windows lets nobody replace what is open: there it grows until it is too long, and is begun anew.
        if WINDOWS or self._first_line() != header:  # or another process was faster
            return
        self._put_in_place(counts)
        os.lseek(fd, seen, os.SEEK_SET)
        late = os.read(fd, LONG)
        self._append_and_read(late[: len(late) - len(late) % _SIZE])

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
