# SPDX-License-Identifier: Apache-2.0
"""Files that other processes replace, remove and damage while we look at them.

Everything here works on plain ``str`` paths: :mod:`pathlib` costs more than the system calls it wraps.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

WINDOWS = os.name == "nt"

#: Never follow a link someone planted, never hang on a FIFO, never leak into a child; text mode is a Windows matter.
READ_FLAGS = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    READ_FLAGS |= getattr(os, _flag, 0)
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    CREATE_FLAGS |= getattr(os, _flag, 0)

#: Seconds before each try; 185 ms in all. A virus scanner or a reader holds a file for less than that.
SHARING_DELAYS = (0.0, 0.005, 0.010, 0.020, 0.050, 0.100)
_SHARING_WINERRORS = (5, 32, 33)  # access denied (delete pending), sharing violation, lock violation

#: Bytes (256 MiB) from which a file's size is doubted: after a crash, or a `truncate`, it can exceed the memory.
LARGE = 1 << 28

Identity = tuple[int, int, int]


def identity(st: os.stat_result) -> Identity:
    """Inode, size and mtime (ns): while they stay, it is the file that was looked at."""
    return (st.st_ino, st.st_size, st.st_mtime_ns)


def is_missing(exc: OSError) -> bool:
    """Whether nothing lies at a path, or something that isn't a directory lies on the way to it."""
    return isinstance(exc, (FileNotFoundError, NotADirectoryError)) or exc.errno == errno.ELOOP


def is_sharing_violation(exc: OSError) -> bool:
    """Whether Windows refused because another process has the file open just now."""
    if not WINDOWS or not isinstance(exc, PermissionError):
        return False
    winerror = getattr(exc, "winerror", None)
    return winerror in _SHARING_WINERRORS or (winerror is None and exc.errno == errno.EACCES)


def retry_sharing(operation: Callable[[], T]) -> T:
    """Run ``operation``, again for a while where Windows reports a sharing violation.

    Raises
    ------
    OSError
        Whatever ``operation`` raised last; the violation itself when the time (185 ms) is used up.
    """
    for delay in SHARING_DELAYS[1:]:
        try:
            return operation()
        except PermissionError as exc:
            if not is_sharing_violation(exc):
                raise
            time.sleep(delay)
    return operation()


def replace(source: str, target: str) -> None:
    """``os.replace``, patient with Windows."""
    if WINDOWS:
        retry_sharing(lambda: os.replace(source, target))
    else:
        os.replace(source, target)


def unlink(path: str) -> None:
    """``os.unlink``, patient with Windows."""
    if WINDOWS:
        retry_sharing(lambda: os.unlink(path))
    else:
        os.unlink(path)


def read_descriptor(fd: int, size: int) -> bytes:
    """All the bytes of an open file of ``size`` bytes; what it grew by meanwhile shows as a longer result."""
    data = os.read(fd, size + 1)
    if len(data) >= size:
        return data
    # A short read: a huge file (2 GiB at once at most), a signal, or a file cut under us. Again, into one block.
    del data
    os.lseek(fd, 0, os.SEEK_SET)
    with io.FileIO(fd, closefd=False) as file:
        return file.readall()


def read_regular(path: str, *, largest: int | None = LARGE) -> tuple[bytes | None, os.stat_result]:
    """Bytes and status of a regular file; no bytes where something else (link, FIFO, directory, device) lies there.

    Parameters
    ----------
    largest : int or None
        No bytes either of a file of more than this many; ``None``: someone has vouched for its size.

    Raises
    ------
    OSError
        It isn't there or can't be read.
    """
    if WINDOWS:
        return retry_sharing(lambda: _read_regular(path, largest))
    return _read_regular(path, largest)


def _read_regular(path: str, largest: int | None) -> tuple[bytes | None, os.stat_result]:
    try:
        fd = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise
    except OSError:
        # A link gives ELOOP, EMLINK or EFTYPE, a socket ENXIO, a directory on Windows EACCES: ask what it is instead.
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            raise
        return None, status
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or (largest is not None and status.st_size > largest):
            return None, status
        return read_descriptor(fd, status.st_size), status
    finally:
        os.close(fd)


def write_new(path: str, data: bytes, *, mode: int, sync: bool) -> None:
    """Write a file that must not exist yet.

    Parameters
    ----------
    mode : int
        Permission bits, before the umask.
    sync : bool
        Flush the file to the disk (``fsync``) before it is closed.

    Raises
    ------
    OSError
        The file is removed again, as far as that can be done.
    """
    _write_new(path, data, mode, sync, _unseen)


def write_new_seen(path: str, data: bytes, *, mode: int, sync: bool) -> Identity:
    """:func:`write_new`; returns which file it made, for one call more."""
    return identity(_write_new(path, data, mode, sync, os.fstat))


def _unseen(_: int) -> None:
    pass


def _write_new(path: str, data: bytes, mode: int, sync: bool, look: Callable[[int], T]) -> T:  # noqa: FBT001 - passed on
    # Windows: a file removed just now keeps its name as long as someone reads it.
    fd = retry_sharing(lambda: os.open(path, CREATE_FLAGS, mode)) if WINDOWS else os.open(path, CREATE_FLAGS, mode)
    try:
        try:
            written = os.write(fd, data)
            if written < len(data):  # 2 GiB at once at most, or a signal
                view = memoryview(data)
                while written < len(data):
                    written += os.write(fd, view[written:])
            if sync:
                os.fsync(fd)
            return look(fd)
        finally:
            os.close(fd)
    except BaseException:
        unlink_quietly(path)
        raise


def sync_directory(path: str) -> None:
    """Make the names in a directory durable; Windows has no such call and needs none."""
    if WINDOWS:
        return
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unlink_quietly(path: str) -> bool:
    """Remove a file that nobody needs any more; ``False`` where that failed and it is left for later."""
    try:
        unlink(path)
    except OSError:
        return False
    return True


def remove_if_same(path: str, seen: Identity) -> bool:
    """Unlink ``path`` if it is still the file with identity ``seen``.

    Returns
    -------
    bool
        Whether it is gone by our hand. ``False``: replaced by another writer, vanished, or held open (Windows).

    Raises
    ------
    OSError
        The directory can't be written.
    """
    try:
        if identity(os.lstat(path)) != seen:
            return False
        unlink(path)
    except FileNotFoundError:
        return False
    except PermissionError as exc:
        if is_sharing_violation(exc):
            return False
        raise
    return True
