# SPDX-License-Identifier: Apache-2.0
"""Operations on files that other processes may replace, remove and damage at the same time.

All functions take plain ``str`` paths: :mod:`pathlib` costs more than the system calls it wraps.
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

#: Never follow a planted link, hang on a FIFO, or leak the descriptor into a child; O_BINARY matters on Windows only.
READ_FLAGS = os.O_RDONLY
#: Read a file without changing its access time. The kernel refuses it (EPERM) for other users' files.
QUIETLY = getattr(os, "O_NOATIME", 0)
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    READ_FLAGS |= getattr(os, _flag, 0)
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL
for _flag in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    CREATE_FLAGS |= getattr(os, _flag, 0)

#: Delay in seconds before each attempt, 185 ms in total. A virus scanner or a reader holds a file for less time.
SHARING_DELAYS = (0.0, 0.005, 0.010, 0.020, 0.050, 0.100)
_SHARING_WINERRORS = (5, 32, 33)  # access denied (delete pending), sharing violation, lock violation

#: The size (256 MiB) above which a file's size isn't trusted: after a crash or `truncate`, it may exceed the memory.
LARGE = 1 << 28

#: A file changed less than this long ago (ns) may change again without its time stamps changing. The coarse value is
#: for time stamps in whole seconds (ext4 with small inodes, old NFS, FAT).
CLOCK_TICK_NS = 20_000_000
COARSE_TICK_NS = 2_000_000_000

Identity = tuple[int, int, int]
Signature = tuple[int, int, int, int]


def identity(st: os.stat_result) -> Identity:
    """Return inode, size and mtime (ns); while they are unchanged, the path names the same file."""
    return (st.st_ino, st.st_size, st.st_mtime_ns)


def signature(st: os.stat_result) -> Signature:
    """Return inode, size, mtime and ctime (ns); while they are the same, so is a file that :func:`is_settled`."""
    return (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def is_settled(st: os.stat_result, now: int) -> bool:
    """Return whether any further change of a file will change its :func:`signature`; ``now`` is in nanoseconds."""
    latest = max(st.st_mtime_ns, st.st_ctime_ns)
    coarse = not (st.st_mtime_ns % 1_000_000_000 or st.st_ctime_ns % 1_000_000_000)
    return now - latest > (COARSE_TICK_NS if coarse else CLOCK_TICK_NS)


def is_missing(exc: OSError) -> bool:
    """Return whether an error means that there is no file at a path: ENOENT, ENOTDIR or ELOOP."""
    return isinstance(exc, (FileNotFoundError, NotADirectoryError)) or exc.errno == errno.ELOOP


def is_sharing_violation(exc: OSError) -> bool:
    """Return whether Windows refused an operation because another process has the file open."""
    if not WINDOWS or not isinstance(exc, PermissionError):
        return False
    winerror = getattr(exc, "winerror", None)
    return winerror in _SHARING_WINERRORS or (winerror is None and exc.errno == errno.EACCES)


def retry_sharing(operation: Callable[[], T]) -> T:
    """Run ``operation``; retry it for a while if Windows reports a sharing violation.

    Raises
    ------
    OSError
        The last error of ``operation``; a sharing violation if it persists for 185 ms.
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
    """Call ``os.replace``, with retries on Windows."""
    if WINDOWS:
        retry_sharing(lambda: os.replace(source, target))
    else:
        os.replace(source, target)


def unlink(path: str) -> None:
    """Call ``os.unlink``, with retries on Windows."""
    if WINDOWS:
        retry_sharing(lambda: os.unlink(path))
    else:
        os.unlink(path)


def read_descriptor(fd: int, size: int) -> bytes:
    """Return all the bytes of an open file of ``size`` bytes; more if the file has grown in the meantime."""
    data = os.read(fd, size + 1)
    if len(data) >= size:
        return data
    # A short read: a huge file (one read returns at most 2 GiB), a signal, or a truncated file. Read everything again.
    del data
    os.lseek(fd, 0, os.SEEK_SET)
    with io.FileIO(fd, closefd=False) as file:
        return file.readall()


def read_regular(
    path: str, *, largest: int | None = LARGE, quietly: bool = False
) -> tuple[bytes | None, os.stat_result]:
    """Return the bytes and status of a regular file; None for the bytes of a link, FIFO, directory or device.

    Parameters
    ----------
    largest : int or None
        The largest size in bytes to read; a larger file also yields None. None means no limit: its size is trusted.
    quietly : bool
        Don't change the file's access time, if that is possible.

    Raises
    ------
    OSError
        The file doesn't exist or can't be read.
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
        # A link gives ELOOP, EMLINK or EFTYPE, a socket ENXIO, a directory on Windows EACCES: check the type instead.
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
        Flush the file to disk (``fsync``) before closing it.
    at_least : int
        The bits of ``mode`` to set whatever the umask.
    on_failure : callable, optional
        Called with the path to remove a partial file. The default unlinks it, which is right for a unique name.

    Returns
    -------
    os.stat_result
        The status of the written file.

    Raises
    ------
    OSError
        The file can't be written. A partial file has been removed, if possible.
    """
    # On Windows, a removed file keeps its name as long as another process reads it.
    fd = retry_sharing(lambda: os.open(path, CREATE_FLAGS, mode)) if WINDOWS else os.open(path, CREATE_FLAGS, mode)
    try:
        try:
            written = os.write(fd, data)
            if written < len(data):  # one write takes at most 2 GiB, or a signal came
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
    """Write a file atomically: other processes see the previous file or the complete new one.

    Parameters
    ----------
    staged : str
        A unique temporary name on the same file system.
    mode, sync, at_least
        As for :func:`write_new`.
    new : bool
        Raise FileExistsError instead of replacing an existing file.

    Returns
    -------
    os.stat_result
        The status of the file.

    Raises
    ------
    OSError
        The file can't be written; ``path`` is unchanged.
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
    """Rename a file to a name that doesn't exist; otherwise raise FileExistsError and leave ``source`` in place.

    On a file system without hard links, another process can create ``target`` between the check and the rename.
    """
    if WINDOWS:
        os.rename(source, target)  # fails if the target exists
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
    """Return the bytes of an open file from an offset to its end."""
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
    """Remove a file that is no longer needed; return False if that fails and the file is left for later."""
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
        Whether this call removed the file. False if the file was replaced, no longer exists, or is open (Windows).

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
