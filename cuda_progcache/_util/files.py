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
#: A look that is no use: "last used" stays as it is. For files of our own alone; others' refuse it (EPERM).
QUIETLY = getattr(os, "O_NOATIME", 0)
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

#: A file changed this recently (ns) could change again without its time stamps showing it; where they are whole
#: seconds (ext4 with small inodes, old NFS, FAT), this recently.
CLOCK_TICK_NS = 20_000_000
COARSE_TICK_NS = 2_000_000_000

Identity = tuple[int, int, int]
Signature = tuple[int, int, int, int]


def identity(st: os.stat_result) -> Identity:
    """Inode, size and mtime (ns): while they stay, it is the file that was looked at."""
    return (st.st_ino, st.st_size, st.st_mtime_ns)


def signature(st: os.stat_result) -> Signature:
    """Inode, size, mtime and ctime (ns): while they stay, the file's content does, if it :func:`is_settled`."""
    return (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def is_settled(st: os.stat_result, now: int) -> bool:
    """Whether any further change of a file will show in its :func:`signature`; ``now`` in nanoseconds."""
    latest = max(st.st_mtime_ns, st.st_ctime_ns)
    coarse = not (st.st_mtime_ns % 1_000_000_000 or st.st_ctime_ns % 1_000_000_000)
    return now - latest > (COARSE_TICK_NS if coarse else CLOCK_TICK_NS)


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


def read_regular(
    path: str, *, largest: int | None = LARGE, quietly: bool = False
) -> tuple[bytes | None, os.stat_result]:
    """Bytes and status of a regular file; no bytes where something else (link, FIFO, directory, device) lies there.

    Parameters
    ----------
    largest : int or None
        No bytes either of a file of more than this many; ``None``: someone has vouched for its size.
    quietly : bool
        Leave the file's time of access as it is, where that can be done.

    Raises
    ------
    OSError
        It isn't there or can't be read.
    """
    flags = READ_FLAGS | QUIETLY if quietly else READ_FLAGS
    if WINDOWS:
        return retry_sharing(lambda: _read_regular(path, largest, flags))
    try:
        return _read_regular(path, largest, flags)
    except PermissionError as exc:
        if not quietly or exc.errno != errno.EPERM:
            raise
        return _read_regular(path, largest, READ_FLAGS)


def _read_regular(path: str, largest: int | None, flags: int) -> tuple[bytes | None, os.stat_result]:
    try:
        fd = os.open(path, flags)
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


def write_new(
    path: str,
    data: bytes,
    *,
    mode: int,
    sync: bool,
    at_least: int = 0o600,
    on_failure: Callable[[str], object] | None = None,
) -> os.stat_result:
    """Write a file that must not exist yet.

    Parameters
    ----------
    mode : int
        Permission bits, before the umask.
    sync : bool
        Flush the file to the disk (``fsync``) before it is closed.
    at_least : int
        Those of ``mode`` that the umask doesn't take away.
    on_failure : callable, optional
        Removes what was written in part; default: unlink it, which is right for a name that is ours alone.

    Returns
    -------
    os.stat_result
        Of the file as it was written.

    Raises
    ------
    OSError
        The file is removed again, as far as that can be done.
    """
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
            status = os.fstat(fd)
            missing = mode & at_least & ~status.st_mode
            if missing and not WINDOWS:
                os.fchmod(fd, stat.S_IMODE(status.st_mode) | missing)
            return status
        finally:
            os.close(fd)
    except BaseException:
        (on_failure or unlink_quietly)(path)
        raise


def put_in_place(
    path: str, data: bytes, *, staged: str, mode: int, sync: bool = False, at_least: int = 0o600, new: bool = False
) -> os.stat_result:
    """Write a file in one step: others see what lay there before, or all of it.

    Parameters
    ----------
    staged : str
        A name of ours on the same file system, for as long as it is written.
    mode, sync, at_least
        As for :func:`write_new`.
    new : bool
        Leave what lies there, if something does (FileExistsError).

    Returns
    -------
    os.stat_result
        Of the file.

    Raises
    ------
    OSError
        Nothing has changed.
    """
    try:
        status = write_new(staged, data, mode=mode, sync=sync, at_least=at_least)
        if new:
            move_new(staged, path)
        else:
            replace(staged, path)
    except BaseException:
        unlink_quietly(staged)
        raise
    return status


def move_new(source: str, target: str) -> None:
    """Rename a file to where nothing lies (FileExistsError: something does, and ``source`` stays).

    Where the file system has no links, nearly so: there is a moment between the look and the renaming.
    """
    if WINDOWS:
        os.rename(source, target)  # never onto what is there
        return
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target)
    else:
        unlink_quietly(source)


def read_on(fd: int, start: int) -> bytes:
    """What lies in an open file from an offset on."""
    os.lseek(fd, start, os.SEEK_SET)
    tail = os.read(fd, 1 << 15)
    while tail and (part := os.read(fd, 1 << 15)):
        tail += part
    return tail


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
