# SPDX-License-Identifier: Apache-2.0
"""Fault injection: fail chosen file system calls of this process on one directory tree."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Self

import pytest

#: Functions of ``os`` that touch the file system. Those in CHANGES can also fail after they took effect.
CHANGES = ("mkdir", "replace", "rename", "unlink", "remove", "rmdir", "link", "symlink", "utime", "chmod", "truncate")
BY_PATH = ("open", "stat", "lstat", "listdir", "scandir", "readlink", "statvfs", *CHANGES)
BY_FD = ("read", "pread", "readv", "write", "pwrite", "writev", "fstat", "fsync", "fdatasync", "ftruncate", "close",
         "utime", "chmod", "sendfile", "copy_file_range", "posix_fadvise")  # fmt: skip


class Injector:
    """Counts the calls on paths and descriptors under ``root``, and fails the chosen ones.

    Attributes
    ----------
    calls : list of str
        The calls since :meth:`arm`, in order, each as "replace entries".
    places : list of tuple
        The package's call stack at each call, innermost frame first; filled only if :meth:`arm` was asked to trace.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._descriptors: set[int] = set()
        self.calls: list[str] = []
        self.places: list[tuple[object, ...]] = []
        self._traces = False
        self._fails: Callable[[int], bool] = lambda _: False
        self._make: Callable[[str], OSError] | None = None
        self._after = False
        self._counting = threading.Lock()  # several threads remove files if the machine is slow

    def arm(
        self, fails: Callable[[int], bool], make: Callable[[str], OSError], *, after: bool = False, trace: bool = False
    ) -> None:
        """Fail the calls whose number (from 0) ``fails`` accepts.

        They raise ``make(path)`` instead of making the call; with ``after``, after making it.
        """
        self.calls, self.places = [], []
        self._fails, self._make, self._after, self._traces = fails, make, after, trace

    def disarm(self) -> None:
        """Stop failing and recording calls; `calls` keeps its contents."""
        self._make = None

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self._traces:
            place, frame = [], sys._getframe(2)
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("cuda_progcache."):
                    place.append((frame.f_code.co_qualname, frame.f_lineno))
                frame = frame.f_back
            self.places.append((call, *place))

    def _ours(self, args: tuple[object, ...]) -> str | None:
        if args and isinstance(args[0], int):
            return "descriptor" if args[0] in self._descriptors else None
        if args and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(self._root):
            return os.fspath(args[0])
        return None

    def wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        """Return ``real`` wrapped so that it records its calls and fails the chosen ones."""

        @functools.wraps(real)
        def faulty(*args: object, **kwargs: object) -> object:
            if self._make is None and name not in {"open", "close"}:  # their descriptors are tracked even when disarmed
                return real(*args, **kwargs)
            path = self._ours(args)
            if path is None:
                return real(*args, **kwargs)
            rest = path.removeprefix(self._root).strip("/").split("/")[0]
            with self._counting:
                number = len(self.calls)
                if self._make is not None:
                    self._note(f"{name} {rest}")
            fails = self._make is not None and self._fails(number)
            if fails and name != "close" and not (self._after and name in CHANGES):
                raise self._make(path)
            result = real(*args, **kwargs)
            if name == "close":
                self._descriptors.discard(args[0])
            elif name == "open":
                self._descriptors.add(result)
            if fails:
                raise self._make(path)
            return _Listing(self, result) if name == "scandir" else result

        return faulty

    def access(self, real: Callable[..., bool]) -> Callable[..., bool]:
        """Return a replacement for ``os.access`` that returns False instead of raising."""

        def faulty(path: str, *args: object, **kwargs: object) -> bool:
            number = len(self.calls)
            if self._make is not None and self._ours((path,)) is not None:
                self._note("access")
                if self._fails(number):
                    return False
            return real(path, *args, **kwargs)

        return faulty


class _Listing:
    """The result of ``scandir``, with faults during iteration and in the methods of its entries."""

    def __init__(self, injector: Injector, listing: object) -> None:
        self._injector, self._listing = injector, listing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listing.close()

    def close(self) -> None:
        self._listing.close()

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        item = next(self._listing)
        step = self._injector.wrap("next", lambda _: None)
        step(item.path)
        return _Item(self._injector, item)


class _Item:
    def __init__(self, injector: Injector, item: os.DirEntry[str]) -> None:
        self.name, self.path = item.name, item.path
        for question in ("stat", "is_file", "is_dir", "is_symlink", "inode"):
            real = getattr(item, question)
            ask = injector.wrap(f"item {question}", lambda _, real=real, **kwargs: real(**kwargs))
            setattr(self, question, functools.partial(ask, item.path))

    def __fspath__(self) -> str:
        return self.path


@contextlib.contextmanager
def injected(root: str) -> Iterator[Injector]:
    """Patch the functions of ``os`` and ``open`` with an :class:`Injector` for the length of the block."""
    injector = Injector(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # thousands of calls: counted and failed, but not carried out
        for name in {*BY_PATH, *BY_FD}:
            patch.setattr(os, name, injector.wrap(name, getattr(os, name)))
        patch.setattr(os, "access", injector.access(os.access))
        opened = injector.wrap("file", open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        # The os.supports_* sets hold the function objects, so they need the patched ones.
        for supports in ("supports_fd", "supports_follow_symlinks", "supports_dir_fd", "supports_effective_ids"):
            before = {function.__name__ for function in getattr(os, supports)}
            patch.setattr(os, supports, {getattr(os, name) for name in before})
        yield injector
