# SPDX-License-Identifier: Apache-2.0
"""A small file that any number of processes append to, and that stays small. The ledger and the counters use it.

The file is a header and lines of one size::

    magic:8 lineage:8 generation:u64         every new file has a new header
    kind:u8 ref:u64 payload check:u32        little-endian; check: CRC-32 of the preceding bytes of the line

A line is written with one append, and each process reads what the others appended since it last looked. When the file
is longer than :data:`LONG`, one process claims it (a line of kind 0), writes a summary of it to a new file, the next
generation, and renames that into place. Then it closes the old file (again by a line of kind 0), and copies to the new
one the lines that were appended meanwhile. After appending, a process checks whether the file is still in place. If
not, it waits for the old one to be closed, and appends again if its line came after that. A line may be in a file
twice, with the same ref.

A line is lost if the process that rewrites the file is killed between the rename and the copying, or if the file system
doesn't append atomically (some network file systems). The checksums show damage.
"""

from __future__ import annotations

import abc
import contextlib
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable

from cuda_progcache._util.files import WINDOWS, identity, read_on, unlink_quietly
from cuda_progcache._util.locks import ForkSafeLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_progcache.store.root import Root

#: A file longer than this, in bytes, is rewritten. Reading one of this length from the start takes 2 ms.
LONG = 32 * 1024
#: Seconds after which a claim without a new file is taken for a dead process's.
GIVE_UP_AFTER = 5.0
#: Seconds between checks for the closing line of a file that was just replaced.
_PAUSES = (0.0, 0.001, 0.004, 0.016, 0.064, 0.256)
CLAIM = 0
#: The ref of the line that closes a file.
_CLOSED = (1 << 64) - 1

_NONCE = 16
_GENERATION = struct.Struct("<Q")
#: The number of generations between two files of different lineage.
BEGUN_ANEW = -1
_FRAME = struct.Struct("<BQ")
_CHECK = struct.Struct("<I")
_FLAGS = os.O_RDWR | os.O_APPEND
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _flag, 0)

#: Kind, ref and the payload's fields.
Line = tuple[int, ...]


class DamagedLogError(Exception):
    """The file isn't an append log, or is damaged."""


def new_ref() -> int:
    """A random number that identifies a line, or an operation, across processes."""
    return int.from_bytes(os.urandom(8), "little") | 1


def _generation(header: bytes) -> int:
    return int(_GENERATION.unpack_from(header, len(header) - _GENERATION.size)[0])


def _generations(one: bytes, other: bytes) -> int:
    """The number of generations from the first header's file to the second's; :data:`BEGUN_ANEW` if not comparable."""
    if one[: -_GENERATION.size] != other[: -_GENERATION.size]:
        return BEGUN_ANEW
    return (_generation(other) - _generation(one)) % (1 << 64)


class AppendLog(abc.ABC):
    """The file, and the state that this process has read from it. Subclasses give the lines their meaning.

    Parameters
    ----------
    root : Root
        The store's directory.
    """

    NAME: str
    MAGIC: bytes  # 8 bytes
    PAYLOAD: struct.Struct

    def __init__(self, root: Root) -> None:
        self._root = root
        self._path = os.path.join(root.path, self.NAME)
        self._lock = ForkSafeLock()
        self._size = _FRAME.size + self.PAYLOAD.size + _CHECK.size
        self._whole: Line = (CLAIM, 0, *self.PAYLOAD.unpack(bytes(self.PAYLOAD.size)))
        self._forget(b"")

    # What a subclass provides

    @abc.abstractmethod
    def forget(self) -> None:
        """Forget everything that was read: another file is in place."""

    @abc.abstractmethod
    def take(self, line: Line, at: int) -> None:
        """Process the line at that offset. The lock is held."""

    @abc.abstractmethod
    def summary(self) -> list[Line]:
        """Lines that represent the current state. The lock is held."""

    def late(self, line: Line) -> Line:
        """The line to write to the new file for one that was appended after the summary."""
        return line

    def too_late(self, line: Line, generations: int) -> Line | None:  # noqa: ARG002 - a subclass may ask
        """As :meth:`late`, if the file now in place is that many generations newer; ``None`` to write nothing."""
        return self.late(line)

    def damaged(self) -> None:
        """Handle bytes that aren't valid lines; by default the whole file counts as damaged."""
        raise DamagedLogError

    # What it provides to the subclass

    @property
    def position(self) -> tuple[bytes, int]:
        """The header of the file that was read last, and the offset up to which it was read."""
        return self._header, self._offset

    @property
    def is_whole(self) -> bool:
        """Whether the late lines of the previous file have been copied here, as far as this one was read."""
        ref, since = self._claim
        return ref != 0 or since == -GIVE_UP_AFTER

    def exists(self) -> bool:
        """Whether the file exists."""
        return os.access(self._path, os.F_OK)

    def discard(self) -> None:
        """Remove the file and forget its contents, for all processes."""
        unlink_quietly(self._path)
        with self._lock:
            self._forget(b"")

    def exchange(self, lines: Callable[[bytes], Iterable[Line]], *, read: bool = True, make: bool = True) -> bool:
        """Append lines, and read what others have appended.

        Parameters
        ----------
        lines : callable
            Returns the lines to append, given the file's header.
        read : bool
            Whether to read others' lines.
        make : bool
            Whether to create the file if there is none.

        Returns
        -------
        bool
            ``False`` if the file can't be opened or created.
        """
        said = False
        for _ in range(6):
            try:
                appended, heard = self._append_and_read((lambda _: ()) if said else lines, read=read)
                said = said or appended
                if said and heard:
                    return True
                if not os.path.lexists(self._path):
                    if not make:
                        break
                    self._begin()
            except DamagedLogError:
                self.discard()
            except OSError:
                if not self._clear_way():
                    break
        return said

    def encode(self, line: Line) -> bytes:
        """A line as bytes of the file."""
        body = _FRAME.pack(line[0], line[1]) + self.PAYLOAD.pack(*line[2:])
        return body + _CHECK.pack(zlib.crc32(body))

    def take_alone(self, lines: Iterable[Line]) -> None:
        """Process lines that couldn't be appended. When the file is back, it is read from the start."""
        with self._lock:
            self._header = b""
            for line in lines:
                self.take(line, self._offset)
                self._offset += self._size

    # The file

    def _forget(self, header: bytes) -> None:
        self._header = header
        self._offset = len(self.MAGIC) + _NONCE
        self._claim = (0, time.monotonic())
        self.forget()

    def _begin(self) -> None:
        """Create the file, unless another process does. Lines that went with a removed file are lost."""
        self._root.place(self._path, self._new_header() + self.encode(self._whole), new=True)

    def _new_header(self) -> bytes:
        return self.MAGIC + os.urandom(_NONCE)

    def _append_and_read(self, lines: Callable[[bytes], Iterable[Line]], *, read: bool) -> tuple[bool, bool]:
        """Append to the file and read what is new; return whether each was done, as the file may be replaced."""
        try:
            fd = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            return False, False
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > 16 * LONG:
                raise DamagedLogError
            header = os.read(fd, len(self.MAGIC) + _NONCE)
            if len(header) != len(self.MAGIC) + _NONCE or not header.startswith(self.MAGIC):
                raise DamagedLogError
            appended = b"".join(map(self.encode, lines(header)))
            if appended:
                if os.write(fd, appended) != len(appended):
                    raise DamagedLogError  # the disk is full, and only a part was written
                if not self._is(status):  # rewritten: our lines may have come too late to be copied
                    return self._is_handed_on(fd, appended), False
            if (read or status.st_size > LONG) and not self._read(fd, status, header):
                return True, False
            if status.st_size > LONG and self._claim[1] < time.monotonic() - GIVE_UP_AFTER:
                with contextlib.suppress(OSError):  # another process tries again in a few seconds
                    self._rewrite(fd, status, header)
        finally:
            os.close(fd)
        return True, True

    def _is_handed_on(self, fd: int, appended: bytes) -> bool:
        """Whether the process that replaced the file copies what we appended to it.

        The file is closed right after it is replaced, and the answer isn't known before that. The lines may be in the
        summary already; they would count twice if they were added to a later file, which no longer has their refs.
        """
        closing = self._closing()
        for pause in _PAUSES:
            time.sleep(pause)
            there = read_on(fd, 0)
            if closing in there:
                return there.rfind(closing) > there.rfind(appended)
        return False

    def _closing(self) -> bytes:
        """The line that closes a file: nothing after it is copied."""
        return self.encode((CLAIM, _CLOSED, *self._whole[2:]))

    def _is(self, status: os.stat_result) -> bool:
        try:
            return os.lstat(self._path).st_ino == status.st_ino
        except FileNotFoundError:
            return False

    def _read(self, fd: int, status: os.stat_result, header: bytes) -> bool:
        """Read what is new in the open file; ``False`` if it was replaced, since the state may then be newer."""
        with self._lock:
            if header != self._header:
                if not self._is(status):
                    return False
                self._forget(header)
            start = self._offset
        tail = read_on(fd, start)
        with self._lock:
            if header == self._header:  # another thread may have read part of it meanwhile
                self._take(tail[self._offset - start :])
        return True

    def _take(self, tail: bytes) -> None:
        at = 0
        while len(tail) - at >= self._size:  # a truncated line is noticed at the next one
            line = self._decode(tail, at)
            if line is None:
                self.damaged()
                at += 1
                continue
            if line[0] == CLAIM:
                self._claimed(line[1])
            else:
                self.take(line, self._offset + at)
            at += self._size
        self._offset += at

    def _claimed(self, ref: int) -> None:
        if not ref:  # complete: the lines that came during the rewrite have been copied
            self._claim = (0, -GIVE_UP_AFTER)
        elif self._claim[1] < time.monotonic() - GIVE_UP_AFTER:
            self._claim = (ref, time.monotonic())

    def _rewrite(self, fd: int, status: os.stat_result, header: bytes) -> None:
        """Replace the open file by a summary of it, and copy what is appended to it meanwhile."""
        if WINDOWS:  # an open file can't be replaced there: it grows until it is too long, and is recreated
            return
        mine = new_ref()
        os.write(fd, self.encode((CLAIM, mine, *self._whole[2:])))
        self._read(fd, status, header)
        with self._lock:
            if header != self._header or self._claim[0] != mine:
                return  # another process does it, or has done it
            seen = self._offset
            lines = b"".join(map(self.encode, self.summary()))
        if not self._is(status):
            return
        new = header[: -_GENERATION.size] + _GENERATION.pack((_generation(header) + 1) % (1 << 64))
        self._root.place(self._path, new + lines)
        os.write(fd, self._closing())
        late = self._lines(read_on(fd, seen).partition(self._closing())[0])

        def hand_on(there: bytes) -> list[Line]:
            on = _generations(new, there)
            if not on:
                return [*map(self.late, late), self._whole]
            return [line for line in (self.too_late(line, on) for line in late) if line is not None]

        self.exchange(hand_on)

    def _lines(self, tail: bytes) -> list[Line]:
        """The complete lines in a part of a file, except claims."""
        found: list[Line] = []
        for at in range(0, len(tail) - self._size + 1, self._size):
            line = self._decode(tail, at)
            if line is not None and line[0] != CLAIM:
                found.append(line)
        return found

    def _decode(self, tail: bytes, at: int) -> Line | None:
        body = tail[at : at + self._size - _CHECK.size]
        if zlib.crc32(body) != _CHECK.unpack_from(tail, at + len(body))[0]:
            return None
        return (*_FRAME.unpack_from(body), *self.PAYLOAD.unpack_from(body, _FRAME.size))

    def _clear_way(self) -> bool:
        """Move aside whatever lies there that isn't a regular file; return whether something was moved."""
        try:
            status = os.lstat(self._path)
        except OSError:
            return False
        if stat.S_ISREG(status.st_mode):
            return False
        from cuda_progcache.store.removal import set_aside

        return set_aside(self._root, self._path, identity(status))
