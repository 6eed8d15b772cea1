# SPDX-License-Identifier: Apache-2.0
"""Who shares a store's root, and whether that can be trusted.

Whoever can write to a root chooses what runs on the GPU of everyone who reads there. So a root is private unless the
caller passes ``shared=True``, or the directory's permissions share it with a group: it is group-writable, or it is
setgid and the group may enter it. Directories created in a shared root get its group and the group's permissions,
whatever the umask; entries follow the umask, except that the group can always read them; and the log files that
processes append to are as open as the root. Such a root may belong to another user if its group is one of ours: whoever
put us into that group trusts its members with each other's files.

A root that everyone can write to is shared with everyone if it is setgid, which marks it as intended, and refused
otherwise. The sticky bit, as on ``/tmp``, isn't enough: it only keeps files from being removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import UnsafeRootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Sharing(NamedTuple):
    """The permissions of a root's files and directories.

    Attributes
    ----------
    shared : bool
        Others write here as well: permissions follow the umask.
    root : os.stat_result or None
        The root's status, if its directories are to belong to its group.
    account_bits : int
        Permission bits of the files that all who share the root append to.
    """

    shared: bool
    root: os.stat_result | None = None
    account_bits: int = 0o600

    @classmethod
    def of(cls, path: str, *, shared: bool) -> Self:
        """The sharing of the root at ``path``, opened with ``shared``.

        Raises
        ------
        UnsafeRootError
            ``shared`` wasn't given, and another user (not root, nor one who shares it with us) owns the root, or
            everyone can write to it and it isn't setgid.
        OSError
            It isn't a directory, or is gone.
        """
        if not hasattr(os, "geteuid"):
            return cls(shared)
        status = os.stat(path)
        mode = status.st_mode
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", path)
        setgid = bool(mode & stat.S_ISGID and mode & stat.S_IRWXG)
        account_bits = 0o600 | mode & 0o066
        if shared:
            return cls(shared, status if setgid else None, account_bits)
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
                f"everyone can write to the cache root (mode {stat.S_IMODE(mode):04o}); run `chmod go-w` on it, "
                f"{advice}",
                path,
            )
        return cls(marked, status if marked else None, account_bits if marked else 0o600)

    @classmethod
    def below(cls, root: str | os.PathLike[str]) -> Self:
        """The sharing of a store's entries, for derived data in the same root."""
        try:
            status = os.stat(os.path.join(root, "entries"))
        except OSError:
            return cls(shared=False)
        shared = bool(status.st_mode & (stat.S_IRWXG | stat.S_IRWXO))
        return cls(shared, status if shared and status.st_mode & stat.S_ISGID else None)

    @property
    def file_mode(self) -> int:
        """Permission bits of a new file, before the umask."""
        return 0o666 if self.shared else 0o600

    @property
    def sure_bits(self) -> int:
        """Permission bits of a new file that the umask doesn't take away."""
        return 0o600 if self.root is None else 0o640

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
        before = stat.S_IMODE(status.st_mode)
        mode = before | stat.S_IRWXU  # whatever the umask: the owner must be able to use the root
        if self.root is not None:
            with contextlib.suppress(PermissionError):  # we aren't in that group: then no other group is let in
                if status.st_gid != self.root.st_gid:
                    os.chown(directory, -1, self.root.st_gid)
                others = stat.S_IRWXO if self.root.st_mode & stat.S_IWOTH else 0
                mode |= stat.S_ISGID | self.root.st_mode & (stat.S_IRWXG | others)
        if mode | bits != before:
            os.chmod(directory, mode | bits)


def _is_ours(group: int) -> bool:
    return group == os.getegid() or group in os.getgroups()
