# SPDX-License-Identifier: Apache-2.0
"""A disk in memory, under the functions of :mod:`os`: it can stop, fail or lose power at any call.

The store calls :mod:`os` and nothing else for its files, so the disk stands in for those functions (:func:`on`): paths
below :data:`MOUNT` and descriptors from :data:`FIRST` on are its own, all others go to the real ones. It keeps POSIX's
rules so far as the store uses them: names and inodes are apart, an open file outlives its name, ``rename`` replaces in
one step, ``O_EXCL`` and ``link`` don't.

Each call is announced to :attr:`Disk.before` with what it reads and writes (its footprint), *before* it is done: there
a schedule can stop the caller, let another one go first, or raise an error in its place.

Power cuts: :meth:`Disk.after_power_cut` gives what a journalling file system may hold after one. The changes of names
are kept up to some moment, not before the last one that was synced; a file's bytes are those of its last ``fsync``,
and what came later is there, gone, or zeros.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Self

MOUNT = "/simulated"
FIRST = 1 << 24
#: What a call touches: ("name", path), ("names", directory), ("bytes", inode) or ("status", inode).
Resource = tuple[str, Any]
START = 1_800_000_000.0


class Call(NamedTuple):
    """One call of the file layer, before it is done.

    Attributes
    ----------
    name : str
        Of the function.
    path : str
        What it is about.
    reads, writes : frozenset of Resource
        Its footprint.
    target : str
        Where a file goes that is renamed or linked.
    """

    name: str
    path: str
    reads: frozenset[Resource]
    writes: frozenset[Resource]
    target: str = ""

    def conflicts(self, other: Call) -> bool:
        """Whether it matters which of the two is done first.

        Two changes of one directory don't conflict, as long as they are about different names.
        """
        if self.writes & other.reads or self.reads & other.writes:
            return True
        return any(resource[0] != "names" for resource in self.writes & other.writes)

    def __str__(self) -> str:
        where = self.path.removeprefix(MOUNT + "/")
        return f"{self.name} {where}" + (f" -> {self.target.removeprefix(MOUNT + '/')}" if self.target else "")


class Node:
    """An inode."""

    __slots__ = ("atime", "ctime", "data", "ino", "mode", "mtime", "names", "synced")

    def __init__(self, ino: int, mode: int, now: int) -> None:
        self.ino = ino
        self.mode = mode
        self.data = b""
        self.synced: bytes | None = None
        self.names: dict[str, Node] = {}
        self.atime = self.mtime = self.ctime = now

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)


class _Open:
    __slots__ = ("append", "at", "node", "path")

    def __init__(self, node: Node, path: str, *, append: bool) -> None:
        self.node, self.path, self.append, self.at = node, path, append, 0


class Item:
    """What ``scandir`` gives."""

    def __init__(self, disk: Disk, path: str, node: Node) -> None:
        self._disk, self._node = disk, node
        self.path, self.name = path, os.path.basename(path)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # noqa: ARG002 - there are no links
        """Ask for its status."""
        return self._disk.lstat(self.path)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether it was a file when it was listed."""
        return not self._node.is_directory

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether it was a directory when it was listed."""
        return self._node.is_directory

    def __fspath__(self) -> str:
        return self.path


class _Listing(list[Item]):
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Change(NamedTuple):
    """A change of one name, as a journal has it: what the name meant before, and means now."""

    directory: Node
    name: str
    before: Node | None
    after: Node | None
    step: int  # changes of one call go together


class Disk:
    """The disk; see this module's docstring.

    Attributes
    ----------
    before : callable or None
        Told each call before it is done; what it raises, the caller of the call gets.
    now : int
        The clock, nanoseconds since the epoch; each call takes 20 µs, a sleep what it says.
    """

    def __init__(self) -> None:
        self.before: Callable[[Call], None] | None = None
        self.now = int(START * 1e9)
        self._inodes = itertools.count(10)
        self._root = self._node(stat.S_IFDIR | 0o755)
        self._open: dict[int, _Open] = {}
        self._descriptors = itertools.count(FIRST)
        self._journal: list[Change] = []
        self._durable = 0  # changes of the journal that are on the platter
        self._steps = itertools.count()

    def _node(self, mode: int) -> Node:
        return Node(next(self._inodes), mode, self.now)

    # Copies

    def copy(self) -> Disk:
        """The same files on another disk; nothing is open there, and all is durable."""
        made = Disk()
        made.now = self.now
        made._inodes = itertools.count(next(self._inodes))
        self._inodes = itertools.count(next(made._inodes))
        made._root = _copied(self._root, {})
        return made

    def after_power_cut(self, kept: int, lost: str) -> Disk:
        """What a later mount finds.

        Parameters
        ----------
        kept : int
            How many of the changes since the last sync of a directory reached the platter.
        lost : {"kept", "gone", "zeros"}
            What became of bytes that were not synced.
        """
        undone: dict[tuple[int, str], Node | None] = {}
        steps = sorted({change.step for change in self._journal[self._durable :]})
        gone = set(steps[kept:])
        for change in reversed(self._journal):
            if change.step in gone:
                undone[change.directory.ino, change.name] = change.before
        made = Disk()
        made.now = self.now
        made._inodes = itertools.count(next(self._inodes) + 1)
        made._root = _copied(self._root, undone, lost)
        return made

    @property
    def unsynced(self) -> int:
        """How many steps of the journal a power cut could lose."""
        return len({change.step for change in self._journal[self._durable :]})

    # Names

    def _find(self, path: str) -> Node | None:
        node = self._root
        for part in _parts(path):
            if not node.is_directory:
                raise _error(errno.ENOTDIR, path)
            found = node.names.get(part)
            if found is None:
                return None
            node = found
        return node

    def _get(self, path: str) -> Node:
        node = self._find(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        parts = _parts(path)
        if not parts:
            raise _error(errno.EBUSY, path)
        parent = self._get(MOUNT + "".join(f"/{part}" for part in parts[:-1]))
        if not parent.is_directory:
            raise _error(errno.ENOTDIR, path)
        return parent, parts[-1]

    def _set(self, step: int, directory: Node, name: str, node: Node | None) -> None:
        self._journal.append(Change(directory, name, directory.names.get(name), node, step))
        if node is None:
            del directory.names[name]
        else:
            directory.names[name] = node
        directory.mtime = directory.ctime = self.now

    def _touched(self, path: str) -> tuple[set[Resource], Node | None]:
        """What finding a path reads, and what lies there."""
        if self.before is None:
            return set(), None
        parts = _parts(path)
        reads: set[Resource] = {("name", MOUNT + "".join(f"/{p}" for p in parts[:i])) for i in range(1, len(parts) + 1)}
        try:
            return reads, self._find(path)
        except OSError:
            return reads, None

    def _announce(
        self,
        name: str,
        path: str,
        *,
        reads: AbstractSet[Resource] = frozenset(),
        writes: AbstractSet[Resource] = frozenset(),
        target: str = "",
    ) -> None:
        if self.before is not None:
            self.before(Call(name, path, frozenset(reads), frozenset(writes), target))
        self.now += 20_000

    def _ask(self, name: str, path: str, *what: str) -> None:
        reads, node = self._touched(path)
        if node is not None:
            reads |= {(kind, node.ino) for kind in what}
        self._announce(name, path, reads=reads)

    def _change(self, name: str, path: str, target: str = "") -> None:
        """Announce a change of the name ``path``, and of ``target``."""
        reads: set[Resource] = set()
        writes: set[Resource] = set()
        for one in filter(None, (path, target)):
            found, node = self._touched(one)
            reads |= found
            writes |= {("name", one), ("names", os.path.dirname(one))}
            if node is not None:
                writes.add(("status", node.ino))
        self._announce(name, path, reads=reads, writes=writes, target=target)

    # Calls by path

    def lstat(self, path: str, **_: Any) -> os.stat_result:
        """``os.lstat`` and ``os.stat``."""
        self._ask("lstat", path, "bytes", "status")
        return _status(self._get(path))

    def access(self, path: str, *_: Any, **__: Any) -> bool:
        """``os.access``: whether it is there."""
        self._ask("access", path)
        try:
            return self._find(path) is not None
        except OSError:
            return False

    def listdir(self, path: str) -> list[str]:
        """``os.listdir``."""
        reads, node = self._touched(path)
        self._announce("listdir", path, reads=reads | {("names", path.rstrip("/"))})
        node = self._get(path)
        if not node.is_directory:
            raise _error(errno.ENOTDIR, path)
        return list(node.names)

    def scandir(self, path: str) -> _Listing:
        """``os.scandir``, all at once."""
        names = self.listdir(path)
        node = self._get(path)
        return _Listing(Item(self, path.rstrip("/") + "/" + name, node.names[name]) for name in names)

    def mkdir(self, path: str, mode: int = 0o777, **_: Any) -> None:
        """``os.mkdir``."""
        path = path.rstrip("/")
        self._change("mkdir", path)
        parent, name = self._parent(path)
        if name in parent.names:
            raise _error(errno.EEXIST, path)
        self._set(next(self._steps), parent, name, self._node(stat.S_IFDIR | mode))

    def rmdir(self, path: str, **_: Any) -> None:
        """``os.rmdir``."""
        path = path.rstrip("/")
        reads, _node = self._touched(path)
        self._announce("rmdir", path, reads=reads | {("names", path)},
                       writes={("name", path), ("names", os.path.dirname(path))})  # fmt: skip
        node = self._get(path)
        if not node.is_directory:
            raise _error(errno.ENOTDIR, path)
        if node.names:
            raise _error(errno.ENOTEMPTY, path)
        parent, name = self._parent(path)
        self._set(next(self._steps), parent, name, None)

    def unlink(self, path: str, **_: Any) -> None:
        """``os.unlink``."""
        self._change("unlink", path)
        node = self._get(path)
        if node.is_directory:
            raise _error(errno.EISDIR, path)
        parent, name = self._parent(path)
        self._set(next(self._steps), parent, name, None)
        node.ctime = self.now

    def replace(self, source: str, target: str, **_: Any) -> None:
        """``os.replace`` and ``os.rename``."""
        source, target = source.rstrip("/"), target.rstrip("/")
        self._change("replace", source, target)
        node = self._get(source)
        from_, from_name = self._parent(source)
        to, to_name = self._parent(target)
        there = to.names.get(to_name)
        if there is node:
            return
        if there is not None and there.is_directory != node.is_directory:
            raise _error(errno.EISDIR if there.is_directory else errno.ENOTDIR, target)
        if there is not None and there.names:
            raise _error(errno.ENOTEMPTY, target)
        step = next(self._steps)
        self._set(step, from_, from_name, None)
        self._set(step, to, to_name, node)
        node.ctime = self.now

    def link(self, source: str, target: str, **_: Any) -> None:
        """``os.link``."""
        self._change("link", source, target)
        node = self._get(source)
        parent, name = self._parent(target)
        if name in parent.names:
            raise _error(errno.EEXIST, target)
        self._set(next(self._steps), parent, name, node)
        node.ctime = self.now

    def utime(self, path: str | int, _times: Any = None, *, ns: tuple[int, int] | None = None, **_: Any) -> None:
        """``os.utime``."""
        if isinstance(path, int):
            node = self._open[path].node
            self._announce("utime", self._open[path].path, writes={("status", node.ino)})
        else:
            reads, found = self._touched(path)
            self._announce("utime", path, reads=reads, writes={("status", found.ino)} if found else set())
            node = self._get(path)
        node.atime, node.mtime = ns or (self.now, self.now)
        node.ctime = self.now

    def chmod(self, path: str | int, mode: int, **_: Any) -> None:
        """``os.chmod`` and ``os.fchmod``."""
        if isinstance(path, int):
            node = self._open[path].node
            self._announce("chmod", self._open[path].path, writes={("status", node.ino)})
        else:
            reads, found = self._touched(path)
            self._announce("chmod", path, reads=reads, writes={("status", found.ino)} if found else set())
            node = self._get(path)
        node.mode = stat.S_IFMT(node.mode) | mode
        node.ctime = self.now

    # Calls by descriptor

    def open(self, path: str, flags: int, mode: int = 0o777, **_: Any) -> int:
        """``os.open``."""
        path = path.rstrip("/")
        if flags & os.O_CREAT:
            self._change("create", path)
        else:
            self._ask("open", path)
        node = self._find(path)
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            parent, name = self._parent(path)
            node = self._node(stat.S_IFREG | mode)
            self._set(next(self._steps), parent, name, node)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        elif node.is_directory and flags & (os.O_WRONLY | os.O_RDWR):
            raise _error(errno.EISDIR, path)
        fd = next(self._descriptors)
        self._open[fd] = _Open(node, path, append=bool(flags & os.O_APPEND))
        return fd

    def close(self, fd: int) -> None:
        """``os.close``: nobody else can see it."""
        del self._open[fd]

    def fstat(self, fd: int) -> os.stat_result:
        """``os.fstat``."""
        file = self._open[fd]
        self._announce("fstat", file.path, reads={("bytes", file.node.ino), ("status", file.node.ino)})
        return _status(file.node)

    def read(self, fd: int, size: int) -> bytes:
        """``os.read``."""
        file = self._open[fd]
        self._announce("read", file.path, reads={("bytes", file.node.ino)})
        if file.node.is_directory:
            raise _error(errno.EISDIR, file.path)
        data = file.node.data[file.at : file.at + size]
        file.at += len(data)
        return data

    def write(self, fd: int, data: bytes) -> int:
        """``os.write``."""
        file = self._open[fd]
        self._announce("write", file.path, writes={("bytes", file.node.ino), ("status", file.node.ino)})
        at = len(file.node.data) if file.append else file.at
        file.node.data = file.node.data[:at].ljust(at, b"\0") + bytes(data) + file.node.data[at + len(data) :]
        file.at = at + len(data)
        file.node.mtime = file.node.ctime = self.now
        return len(data)

    def lseek(self, fd: int, position: int, _how: int = 0) -> int:
        """``os.lseek`` from the start."""
        self._open[fd].at = position
        return position

    def fsync(self, fd: int) -> None:
        """``os.fsync``; of a directory, all changes of names before it (they are journalled in order)."""
        file = self._open[fd]
        self._announce("fsync", file.path)
        if file.node.is_directory:
            self._durable = len(self._journal)
        else:
            file.node.synced = file.node.data

    def read_whole(self, path: str, mode: str = "r", *_: Any, **__: Any) -> io.BytesIO:
        """``open(path, "rb")``."""
        assert mode == "rb", mode
        self._ask("open", path, "bytes")
        return io.BytesIO(self._get(path).data)

    def sleep(self, seconds: float) -> None:
        """``time.sleep``: the clock goes on."""
        self.now += int(seconds * 1e9)

    # What lies there, for those who look from outside

    def tree(self) -> dict[str, bytes | None]:
        """Every path below the mount with its bytes, ``None`` for directories."""
        found: dict[str, bytes | None] = {}

        def walk(node: Node, path: str) -> None:
            for name, inner in node.names.items():
                found[f"{path}/{name}"] = None if inner.is_directory else inner.data
                walk(inner, f"{path}/{name}")

        walk(self._root, MOUNT)
        return found


def _copied(node: Node, undone: dict[tuple[int, str], Node | None], lost: str = "kept") -> Node:
    made = Node(node.ino, node.mode, 0)
    made.atime, made.mtime, made.ctime = node.atime, node.mtime, node.ctime
    made.data = node.data
    if lost != "kept" and not node.is_directory and node.synced != node.data:
        made.data = (node.synced or b"") if lost == "gone" else b"\0" * len(node.data)
    made.synced = made.data
    names = dict(node.names)
    for (ino, name), before in undone.items():
        if ino == node.ino:
            names.pop(name, None)
            if before is not None:
                names[name] = before
    made.names = {name: _copied(inner, undone, lost) for name, inner in names.items()}
    return made


def _parts(path: str) -> list[str]:
    return [part for part in path.removeprefix(MOUNT).split("/") if part]


def _error(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)


def _status(node: Node) -> os.stat_result:
    times = (node.atime, node.mtime, node.ctime)
    return os.stat_result(
        (node.mode, node.ino, 1, 1, os.geteuid(), os.getegid(), len(node.data), *(t // 10**9 for t in times),
         *(t / 1e9 for t in times), *times)
    )  # fmt: skip


_BY_PATH = (
    "lstat",
    "access",
    "listdir",
    "scandir",
    "mkdir",
    "rmdir",
    "unlink",
    "replace",
    "link",
    "utime",
    "chmod",
    "open",
)
_BY_FD = ("close", "fstat", "read", "write", "lseek", "fsync", "utime", "chmod")


@contextlib.contextmanager
def on(get: Callable[[], Disk]) -> Iterator[None]:
    """Put the disk that ``get`` gives under :mod:`os`, ``open`` and the clock of this process, while the block runs."""
    real = {name: getattr(os, name) for name in {*_BY_PATH, *_BY_FD}}
    aliases = {"stat": "lstat", "rename": "replace", "remove": "unlink", "fchmod": "chmod"}
    patched: list[tuple[Any, str, Any]] = []

    def patch(module: Any, name: str, function: Any) -> None:
        patched.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    def route(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        take = getattr(Disk, method)

        @functools.wraps(original)
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            if type(first) is int:
                ours = first >= FIRST
            else:
                first = os.fspath(first)
                ours = isinstance(first, str) and first.startswith(MOUNT)
            return take(get(), first, *args, **kwargs) if ours else original(first, *args, **kwargs)

        return call

    try:
        for name, original in real.items():
            patch(os, name, route(name, original))
        for name, method in aliases.items():
            patch(os, name, route(method, getattr(os, name)))
        for supports in ("supports_fd", "supports_follow_symlinks", "supports_effective_ids"):
            names = {function.__name__ for function in getattr(os, supports)}
            patch(os, supports, {getattr(os, name) for name in names})
        patch(builtins, "open", route("read_whole", builtins.open))
        patch(time, "time", lambda: get().now / 1e9)
        patch(time, "time_ns", lambda: get().now)
        patch(time, "monotonic", lambda: get().now / 1e9)
        patch(time, "sleep", lambda seconds: get().sleep(seconds))
        yield
    finally:
        for module, name, before in reversed(patched):
            setattr(module, name, before)
