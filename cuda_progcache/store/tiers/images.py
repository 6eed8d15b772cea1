# SPDX-License-Identifier: Apache-2.0
"""The images that a user's processes have pulled; each is unpacked once into a cache directory.

::

    <the user's cache>/cuda-progcache-images/
        sha256-<the image's digest>/            a cache directory
            .in-use                             locked (shared) by each process that has it open

The mtime of ``.in-use`` is the time when the image was last opened.

A layer may only contain plain files with the names of a cache directory. If it has any other member (a link, a device,
a path that leads elsewhere), the whole layer is refused. It is read, checked and written piece by piece.

After an image is unpacked, other images are removed if no process has opened them for :data:`KEPT_FOR` seconds or still
has them open. Without such locks (on Windows, on some network file systems), they stay.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator
from typing import IO, cast

from cuda_progcache._util.user_dirs import user_cache_dir
from cuda_progcache.errors import StoreError

if sys.platform != "win32":
    import fcntl

#: Seconds after which an unused image is removed, and a directory that a killed process left behind.
KEPT_FOR, _ABANDONED = 30 * 86400.0, 86400.0
#: The maximum of unpacked bytes in a layer, and of files.
_UNPACKED, _FILES = 4 << 30, 1_000_000
#: Bytes that are read and unpacked at a time.
_PIECE = 1 << 16
#: The maximum of bytes before, between and after an archive's files, which tarfile keeps in memory.
_HEADERS = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
#: The folders of a cache directory, and its tag.
_FOLDERS = frozenset({"entries", "latest", "manifests", "records", "toolchains"})
_TAG = "CACHEDIR.TAG"
_IN_USE, _MARK_FLAGS = ".in-use", os.O_RDWR | os.O_CREAT
_IMAGE = re.compile(r"sha256-[0-9a-f]{64}")


class Image:
    """An unpacked image. It isn't removed while it is open; a forked child keeps it open as well.

    Parameters
    ----------
    path : str
        The cache directory.
    lock : int or None
        The descriptor that holds the lock; None if locks aren't available.
    """

    def __init__(self, path: str, lock: int | None) -> None:
        self.path = path
        self._close = None if lock is None else weakref.finalize(self, os.close, lock)

    def close(self) -> None:
        """Stop using it."""
        if self._close is not None:
            self._close()


class Images:
    """The images of this user.

    Parameters
    ----------
    name : str
        The tier's name, for error messages.

    Raises
    ------
    StoreError
        The directory for images can't be used.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._root = ""
        try:
            self._root = os.path.join(user_cache_dir(), "cuda-progcache-images")
            os.makedirs(self._root, mode=0o700, exist_ok=True)
        except OSError as exc:
            raise self._trouble(exc) from exc

    def find(self, digest: str) -> Image | None:
        """Open the image of that digest; ``None`` if it isn't there."""
        path = os.path.join(self._root, digest.replace(":", "-"))
        mark = os.path.join(path, _IN_USE)
        try:
            lock = os.open(mark, _MARK_FLAGS, 0o600)
        except OSError:
            return Image(path, None) if os.path.isdir(path) else None
        try:
            if _locked(lock, shared=True):
                os.utime(mark)
                if os.path.samestat(os.fstat(lock), os.stat(mark)):
                    return Image(path, lock)
        except OSError:
            pass  # just removed
        os.close(lock)
        return None

    def scratch(self) -> IO[bytes]:
        """Make a temporary file for a layer, on the disk on which it will be unpacked."""
        try:
            return tempfile.TemporaryFile(dir=self._root)
        except OSError as exc:
            raise self._trouble(exc) from exc

    def _trouble(self, exc: OSError) -> StoreError:
        where = self._root or "the user's cache"
        return StoreError(exc.errno, f"can't unpack the image in {where} ({exc.strerror})", self._name)

    # Unpacking

    def unpack(self, digest: str, layer: IO[bytes]) -> Image:
        """Unpack and open the image of that digest, and remove images that are no longer used.

        Raises
        ------
        StoreError
            The layer has a member that doesn't belong there, or the disk is full.
        """
        try:
            self._unpack(layer, os.path.join(self._root, digest.replace(":", "-")))
        except StoreError:
            raise
        except FileExistsError as exc:
            raise self._refuse("contains a file twice, or in the place of a folder") from exc
        except OSError as exc:
            raise self._trouble(exc) from exc
        except _ImplausibleError as exc:
            raise self._refuse(str(exc)) from exc
        except (tarfile.TarError, zlib.error, EOFError, UnicodeError, OverflowError, ValueError, RecursionError) as exc:
            raise self._refuse(f"can't be read ({type(exc).__name__}: {exc})") from exc
        found = self.find(digest)
        if found is None:
            raise StoreError(errno.ENOENT, "the image was removed while it was unpacked", self._name)
        self._prune()
        return found

    def _unpack(self, layer: IO[bytes], path: str) -> None:
        staged = tempfile.mkdtemp(prefix=".unpacking-", dir=self._root)
        try:
            for name, content in self._files(layer):
                target = os.path.join(staged, *name.split("/"))
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "xb") as file:
                    shutil.copyfileobj(content, file, _PIECE)
            if not os.path.isdir(os.path.join(staged, "entries")):
                raise StoreError(errno.EPROTO, "the layer contains no programs", self._name)
            try:
                os.rename(staged, path)
            except OSError:
                if not os.path.isdir(path):  # otherwise another process has just done the same
                    raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _files(self, layer: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
        """Names and contents of a layer's files, in archive order. Each must be read before the next is requested."""
        plain = _Plain(layer)
        with tarfile.open(fileobj=cast("IO[bytes]", plain), mode="r|") as tar:
            for count, member in enumerate(_members(tar, plain)):
                if count >= _FILES:
                    raise self._refuse(f"contains more than {_FILES} files")
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise self._refuse(f"contains {member.name[:100]!r}, which is not a regular file")
                if not _is_ours(member.name):
                    raise self._refuse(f"contains {member.name[:100]!r}, which doesn't belong in a cache directory")
                content = tar.extractfile(member)
                if content is not None:
                    yield member.name, content
        plain.finish()

    def _refuse(self, why: str) -> StoreError:
        return StoreError(errno.EPROTO, f"the layer {why}; none of it is used", self._name)

    # Removal

    def _prune(self) -> None:
        """Remove images that were last opened long ago and aren't open now, and what killed processes left behind."""
        now = time.time()
        try:
            found = sorted(os.listdir(self._root))
        except OSError:
            return  # the next call tries again
        for name in found:
            path = os.path.join(self._root, name)
            try:
                if name.startswith("."):
                    if now - os.stat(path).st_mtime > _ABANDONED:
                        shutil.rmtree(path, ignore_errors=True)
                elif _IMAGE.fullmatch(name) and now - _last_opened(path) > KEPT_FOR:
                    self._remove(path)
            except OSError:
                continue  # as above

    def _remove(self, path: str) -> None:
        """Remove an image, unless a process has it open."""
        lock = os.open(os.path.join(path, _IN_USE), _MARK_FLAGS, 0o600)
        try:
            if _locked(lock, shared=False):
                aside = tempfile.mkdtemp(prefix=".removing-", dir=self._root)
                os.rename(path, os.path.join(aside, os.path.basename(path)))
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)


def _last_opened(path: str) -> float:
    try:
        return os.stat(os.path.join(path, _IN_USE)).st_mtime
    except FileNotFoundError:
        return os.stat(path).st_mtime


def _locked(fd: int, *, shared: bool) -> bool:
    """Try to lock a file. On a file system without locks, it counts as locked by others in shared mode."""
    if sys.platform == "win32":
        return shared
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return shared
    return True


def _members(tar: tarfile.TarFile, plain: _Plain) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, one at a time, without keeping them; sets how much of each may be read."""
    while True:
        plain.allow(_HEADERS)
        member = tar.next()
        if member is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise there would be one for each file
        plain.allow(member.size + _HEADERS)
        yield member


class _ImplausibleError(Exception):
    """A layer unpacks to an implausible size."""


class _Plain:
    """The uncompressed archive in a layer, read sequentially and within limits.

    Parameters
    ----------
    layer : file
        Compressed by gzip, or not at all.
    """

    def __init__(self, layer: IO[bytes]) -> None:
        self._layer = layer
        size = layer.seek(0, os.SEEK_END)
        layer.seek(0)
        self._inflate = zlib.decompressobj(wbits=31) if layer.read(2) == b"\x1f\x8b" else None
        layer.seek(0)
        # Cubins compress to about a third, and their padding to a thousandth. What compresses better is a bomb.
        self._left = min(_UNPACKED, 100 * size + (16 << 20))
        self._allowed = _HEADERS

    def allow(self, size: int) -> None:
        """Set how many bytes may be read until the next call."""
        self._allowed = size

    def read(self, size: int = _PIECE) -> bytes:
        """Read up to ``size`` bytes; returns none at the end."""
        piece = self._layer.read(size) if self._inflate is None else self._inflated(self._inflate, size)
        self._left -= len(piece)
        self._allowed -= len(piece)
        if self._left < 0:
            raise _ImplausibleError("unpacks to an implausible size")
        if self._allowed < 0:
            raise _ImplausibleError("has headers of an implausible size")
        return piece

    def _inflated(self, inflate: zlib._Decompress, size: int) -> bytes:
        while not inflate.eof:
            packed = inflate.unconsumed_tail or self._layer.read(_PIECE)
            piece = inflate.decompress(packed, size)
            if piece:
                return piece
            if not packed:
                raise _ImplausibleError("is truncated")
        return b""

    def finish(self) -> None:
        """Read the rest after the end of the archive, which is padding."""
        self.allow(_HEADERS)
        while self.read(_PIECE):
            pass


def _is_ours(name: str) -> bool:
    """Whether a cache directory has files with such a name."""
    first, *rest = name.split("/")
    return name == _TAG or (first in _FOLDERS and 0 < len(rest) <= 4 and all(map(_NAME.fullmatch, rest)))
