# SPDX-License-Identifier: Apache-2.0
"""A small file that any number of processes append to, and that stays small: what the ledger and the counters stand on.

The file is a header and lines of one size::

    magic:8 lineage:8 generation:u64         another file lies there, another header
    kind:u8 ref:u64 payload check:u32        little endian; check: CRC-32 of what stands before it in the line

A line is written with one append, and each process reads what the others appended since it last looked. When the file
is longer than :data:`LONG`, one process claims it (a line of kind 0), writes lines that say the same to a new file and
renames that into place, the next generation; then it closes the old one (a line of kind 0 again) and hands on what was
appended to it meanwhile. Who appends looks afterwards whether the file is still the one in place. If not, it waits for
the old one to be closed, and appends again unless that was after its line. A line may come twice, with the same ref.

A line is lost where the process that rewrites the file is killed between the renaming and the handing on, or where the
file system doesn't append in one step (some network file systems). Damage shows by the checks.
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

#: Written anew when it is longer than this, in bytes: reading it from the start then takes 2 ms.
LONG = 32 * 1024
#: A claim that has not been made good for so many seconds is taken for a dead process's.
GIVE_UP_AFTER = 5.0
#: Seconds between looks for the closing line of a file that was just replaced.
_PAUSES = (0.0, 0.001, 0.004, 0.016, 0.064, 0.256)
CLAIM = 0
#: In the place of a claim's ref: the file is closed.
_CLOSED = (1 << 64) - 1

_NONCE = 16
_GENERATION = struct.Struct("<Q")
#: How many generations on a file is that was begun anew.
BEGUN_ANEW = -1
_FRAME = struct.Struct("<BQ")
_CHECK = struct.Struct("<I")
_FLAGS = os.O_RDWR | os.O_APPEND
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _FLAGS |= getattr(os, _flag, 0)

#: Kind, ref and the payload's fields.
Line = tuple[int, ...]


class DamagedLogError(Exception):
    """Not such a file, or no longer one."""


def new_ref() -> int:
    """A number that names a line, or an operation, among all processes."""
    return int.from_bytes(os.urandom(8), "little") | 1


def _generation(header: bytes) -> int:
    return int(_GENERATION.unpack_from(header, len(header) - _GENERATION.size)[0])


def _generations(one: bytes, other: bytes) -> int:
    """How many generations the file of the one header is before that of the other; :data:`BEGUN_ANEW`: no telling."""
    if one[: -_GENERATION.size] != other[: -_GENERATION.size]:
        return BEGUN_ANEW
    return (_generation(other) - _generation(one)) % (1 << 64)


class AppendLog(abc.ABC):
    """The file, and what this process has made of it; its meaning is in the subclass.

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

    # What a subclass gives

    @abc.abstractmethod
    def forget(self) -> None:
        """Nothing is known: another file lies there."""

    @abc.abstractmethod
    def take(self, line: Line, at: int) -> None:
        """Take in a line that lies at that offset; under the lock."""

    @abc.abstractmethod
    def summary(self) -> list[Line]:
        """Lines that say what is known; under the lock."""

    def late(self, line: Line) -> Line:
        """What to write into the new file of a line that came after the summary."""
        return line

    def too_late(self, line: Line, generations: int) -> Line | None:  # noqa: ARG002 - a subclass may ask
        """The same where a file lies there by now that is so many generations on; ``None``: nothing."""
        return self.late(line)

    def damaged(self) -> None:
        """Bytes of the file are no lines. Here: it is worth nothing any more."""
        raise DamagedLogError

    # What it does for the subclass

    @property
    def position(self) -> tuple[bytes, int]:
        """Which file was read last, and how far."""
        return self._header, self._offset

    @property
    def is_whole(self) -> bool:
        """Whether what was appended to the file before this one has been handed on, as far as it was read."""
        ref, since = self._claim
        return ref != 0 or since == -GIVE_UP_AFTER

    def exists(self) -> bool:
        """Whether somebody keeps one."""
        return os.access(self._path, os.F_OK)

    def discard(self) -> None:
        """Begin anew: nothing is known, to no process."""
        unlink_quietly(self._path)
        with self._lock:
            self._forget(b"")

    def exchange(self, lines: Callable[[bytes], Iterable[Line]], *, read: bool = True, make: bool = True) -> bool:
        """Append lines, and take in what others have appended.

        Parameters
        ----------
        lines : callable
            Given the header of the file, those to append.
        read : bool
            Whether to take in others' lines.
        make : bool
            Whether to make the file where there is none.

        Returns
        -------
        bool
            ``False``: the file can't be had.
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
        """A line as it stands in the file."""
        body = _FRAME.pack(line[0], line[1]) + self.PAYLOAD.pack(*line[2:])
        return body + _CHECK.pack(zlib.crc32(body))

    def take_alone(self, lines: Iterable[Line]) -> None:
        """Take in lines that could not be appended; the file, when it is back, is read from the start."""
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
        """Make the file, unless another process does; what was removed with the one before, we don't know."""
        self._root.place(self._path, self._new_header() + self.encode(self._whole), new=True)

    def _new_header(self) -> bytes:
        return self.MAGIC + os.urandom(_NONCE)

    def _append_and_read(self, lines: Callable[[bytes], Iterable[Line]], *, read: bool) -> tuple[bool, bool]:
        """Append to the file and take in what is new in it; whether each was done, as it may be replaced meanwhile."""
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
                    raise DamagedLogError  # a disk that is just full has taken a part
                if not self._is(status):  # rewritten: what we appended may have come too late to be handed on
                    return self._is_handed_on(fd, appended), False
            if (read or status.st_size > LONG) and not self._read(fd, status, header):
                return True, False
            if status.st_size > LONG and self._claim[1] < time.monotonic() - GIVE_UP_AFTER:
                with contextlib.suppress(OSError):  # in some seconds another one tries
                    self._rewrite(fd, status, header)
        finally:
            os.close(fd)
        return True, True

    def _is_handed_on(self, fd: int, appended: bytes) -> bool:
        """Whether who has replaced the file answers for what we appended to it.

        The file is closed right after it is replaced. Until then that isn't known: the lines may be in the summary
        already, and would count twice if they came into a later file, which no longer has their refs.
        """
        closing = self._closing()
        for pause in _PAUSES:
            time.sleep(pause)
            there = read_on(fd, 0)
            if closing in there:
                return there.rfind(closing) > there.rfind(appended)
        return False

    def _closing(self) -> bytes:
        """The line after which nothing is handed on."""
        return self.encode((CLAIM, _CLOSED, *self._whole[2:]))

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
        tail = read_on(fd, start)
        with self._lock:
            if header == self._header:  # another thread may have read a part of it meanwhile
                self._take(tail[self._offset - start :])
        return True

    def _take(self, tail: bytes) -> None:
        at = 0
        while len(tail) - at >= self._size:  # what was cut short shows at the next line
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
        if not ref:  # the file is whole: what came while it was written anew has been handed on
            self._claim = (0, -GIVE_UP_AFTER)
        elif self._claim[1] < time.monotonic() - GIVE_UP_AFTER:
            self._claim = (ref, time.monotonic())

    def _rewrite(self, fd: int, status: os.stat_result, header: bytes) -> None:
        """Replace the open file by a summary of it, and hand on what is appended to it meanwhile."""
        if WINDOWS:  # nobody can replace what is open there: it grows until it is too long, and is begun anew
            return
        mine = new_ref()
        os.write(fd, self.encode((CLAIM, mine, *self._whole[2:])))
        self._read(fd, status, header)
        with self._lock:
            if header != self._header or self._claim[0] != mine:
                return  # another one does it, or has done it
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
        """The whole lines in a part of a file, but for claims."""
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
        """Move away what isn't a file and can't be opened as one; whether that was the trouble and is done."""
        try:
            status = os.lstat(self._path)
        except OSError:
            return False
        if stat.S_ISREG(status.st_mode):
            return False
        from cuda_progcache.store.removal import set_aside

        return set_aside(self._root, self._path, identity(status))
