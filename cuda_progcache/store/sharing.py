# SPDX-License-Identifier: Apache-2.0
"""Who shares a store's root, and whether that can be trusted.

Whoever can write to a root chooses what runs on the GPU of all who read there. So a root is private unless its caller
says ``shared=True``, or the directory itself says that a group shares it: it is group-writable, or it is setgid and the
group may enter it. Then directories made in it take its group and the group's permissions, whatever the umask, and
entries follow the umask. Such a root may belong to another user if its group is one of ours: who put us there trusts us
with each other.

A root that everyone can write to is shared with everyone if it is setgid, as somebody has marked it then, and else
refused: sticky, as ``/tmp`` is, only keeps files from being removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import replace, unlink_quietly, write_new
from cuda_progcache.errors import UnsafeRootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Sharing(NamedTuple):
    """How the files and directories of a root are open to others.

    Attributes
    ----------
    shared : bool
        Others write here, too: permissions follow the umask.
    root : os.stat_result or None
        The root's status, where its directories are to belong to its group.
    """

    shared: bool
    root: os.stat_result | None = None

    @classmethod
    def of(cls, path: str, *, shared: bool) -> Self:
        """That of the root at ``path``, opened with ``shared``.

        Raises
        ------
        UnsafeRootError
            ``shared`` wasn't said, and another user (not root, nor one who shares it with us) owns the root, or
            everyone can write to it and it isn't setgid.
        OSError
            It is no directory, or gone.
        """
        if not hasattr(os, "geteuid"):
            return cls(shared)
        status = os.stat(path)
        mode = status.st_mode
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", path)
        setgid = bool(mode & stat.S_ISGID and mode & stat.S_IRWXG)
        if shared:
            return cls(shared, status if setgid else None)
        marked = setgid or bool(mode & stat.S_IWGRP)
        with_us = marked and (_is_ours(status.st_gid) or bool(mode & stat.S_IWOTH))
        advice = "or, if everyone who can write there may choose what runs on your GPU, pass shared=True"
        if status.st_uid not in (os.geteuid(), 0) and not with_us:
            raise UnsafeRootError(
                errno.EPERM,
                f"the cache root belongs to user id {status.st_uid}, not to you; choose another directory "
                f"(CUDA_PROGCACHE_DIR), {advice}",
                path,
            )
        if mode & stat.S_IWOTH and not setgid:
            raise UnsafeRootError(
                errno.EPERM,
                f"all others can write to the cache root (mode {stat.S_IMODE(mode):04o}); run `chmod go-w` on it, "
                f"{advice}",
                path,
            )
        return cls(marked, status if marked else None)

    @property
    def file_mode(self) -> int:
        """Permission bits of a new file, before the umask."""
        return 0o666 if self.shared else 0o600

    @property
    def directory_mode(self) -> int:
        """Permission bits of a new directory, before the umask."""
        return 0o777 if self.shared else 0o700

    def open_to_group(self, directory: str, bits: int = 0) -> None:
        """Give a directory of ours to the root's group, if that shares the root, and add permission bits.

        Raises
        ------
        OSError
            It is gone, or not ours.
        """
        status = os.stat(directory)
        before = mode = stat.S_IMODE(status.st_mode)
        if self.root is not None:
            with contextlib.suppress(PermissionError):  # not in that group: then no other group is let in
                if status.st_gid != self.root.st_gid:
                    os.chown(directory, -1, self.root.st_gid)
                others = stat.S_IRWXO if self.root.st_mode & stat.S_IWOTH else 0
                mode |= stat.S_ISGID | self.root.st_mode & (stat.S_IRWXG | others)
        if mode | bits != before:
            os.chmod(directory, mode | bits)


def write_beside(root: str | os.PathLike[str], path: str, content: bytes, *, new: bool = False) -> None:
    """Write a small file of another room below a store's root, as open to others as the store's entries are.

    Parameters
    ----------
    root : str or os.PathLike
        The store's.
    path : str
        The file; directories that it lacks are made.
    content : bytes
        All of it.
    new : bool
        Write it in place, if nothing lies there; else it is replaced in one step.

    Raises
    ------
    FileExistsError
        ``new``, and something does.
    OSError
        It can't be written.
    """
    sharing = _like_entries(root)
    staged = path if new else f"{path}.{os.getpid()}.{threading.get_ident()}"
    try:
        try:
            write_new(staged, content, mode=sharing.file_mode, sync=False)
        except FileNotFoundError:
            _make_directories(os.fspath(root), os.path.dirname(path), sharing)
            write_new(staged, content, mode=sharing.file_mode, sync=False)
        if not new:
            replace(staged, path)
    except OSError:
        if not new:
            unlink_quietly(staged)
        raise


def _like_entries(root: str | os.PathLike[str]) -> Sharing:
    try:
        status = os.stat(os.path.join(root, "entries"))
    except OSError:
        return Sharing(shared=False)
    shared = bool(status.st_mode & (stat.S_IRWXG | stat.S_IRWXO))
    return Sharing(shared, status if shared and status.st_mode & stat.S_ISGID else None)


def _make_directories(root: str, directory: str, sharing: Sharing) -> None:
    if directory == root or os.path.isdir(directory):
        return
    _make_directories(root, os.path.dirname(directory), sharing)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, sharing.directory_mode)
        if sharing.root is not None:
            sharing.open_to_group(directory)


def _is_ours(group: int) -> bool:
    return group == os.getegid() or group in os.getgroups()
