# SPDX-License-Identifier: Apache-2.0
"""Digests of files and directories, remembered while nothing about the file moved.

A file is always read whole: a sample misses edits. What is remembered is bound
to device, inode, size, mtime and ctime (ns); a program can set back a file's
mtime, not its ctime. A file that changed a moment ago is read again next time,
since the clock of its file system may not tell two edits apart.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from cuda_progcache._util.files import Signature, is_settled, signature
from cuda_progcache.errors import OptionError

_CHUNK = 1 << 20

Pattern: TypeAlias = "str | re.Pattern[str] | None"


class Remembered(NamedTuple):
    """A digest, and the state of the file that it was taken from."""

    digest: str
    algo: str
    device: int
    signature: Signature


def new_hasher(algo: str) -> Any:
    """Make a hasher: XXH64 (seed 0) for speed, where nobody forges content, or SHA-256; OptionError for other names."""
    if algo == "sha256":
        return hashlib.sha256(usedforsecurity=False)
    if algo == "xxhash64":
        import xxhash

        return xxhash.xxh64()
    raise OptionError(f"algo={algo!r} is not a known hash; valid: xxhash64, sha256")


def hash_file(path: str, algo: str) -> tuple[str, os.stat_result]:
    """Hash a file's whole content; gives also its status from before it was read. OSError where it can't be read."""
    hasher = new_hasher(algo)
    with open(path, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest(), before


class FileDigests:
    """Digests by path as it was given, as many as ``limit()`` allows; the oldest go first.

    Single operations on a dict are atomic, so threads may share it.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self.memory: dict[str, Remembered] = {}
        self.limit = limit

    def of_file(self, path: str, algo: str) -> str | None:
        """Hash of a regular file; None if it isn't there, can't be read or is no regular file."""
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                return None
            known = self.memory.get(path)
            if isinstance(known, Remembered) and known[1:] == (algo, status.st_dev, signature(status)):
                return known.digest
            now = time.time_ns()
            digest, before = hash_file(path, algo)
            after = os.stat(path)
        except OSError:
            return None
        seen = (before.st_dev, signature(before))
        # With no signature that a file could have, it is listed, but read again.
        kept = seen if is_settled(before, now) and seen == (after.st_dev, signature(after)) else (0, (0, 0, 0, 0))
        self._keep(path, Remembered(digest, algo, *kept))
        return digest

    def _keep(self, path: str, what: Remembered) -> None:
        self.memory.pop(path, None)
        self.memory[path] = what
        while len(self.memory) > max(self.limit(), 1):
            try:
                self.memory.pop(next(iter(self.memory)), None)
            except (StopIteration, RuntimeError):
                break  # another thread is at it, too

    def of_path(self, path: str, algo: str, pattern: Pattern = None) -> str | None:
        """Hash of a file, or of a directory's names and contents as far as they fit; None where there is neither."""
        if os.path.isdir(path):
            return self.of_directory(path, algo, pattern)
        return self.of_file(path, algo)

    def of_directory(self, path: str, algo: str, pattern: Pattern = None) -> str | None:
        """Hash of a directory: relative names and contents of the files below it, in the order of the names."""
        fits = name_filter(pattern)
        hasher = new_hasher(algo)
        lines = []
        for folder, folders, names in os.walk(path):
            base = os.path.relpath(folder, path)
            folders.sort()
            lines += [f"{os.path.join(base, name)}\0directory" for name in folders if pattern is None]
            for name in names:
                if fits(name):
                    found = os.path.join(folder, name)
                    lines.append(f"{os.path.join(base, name)}\0{self.of_file(found, algo) or _kind(found)}")
        for line in sorted(lines):
            hasher.update(line.encode("utf-8", "surrogatepass") + b"\n")
        digest: str = hasher.hexdigest()
        return digest


#: What makes a pattern a regular expression, and what a glob.
_REGEX = re.compile(r"[\\^$|()+]|\.[*?]")
_GLOB = re.compile(r"[*?\[]")


def name_filter(pattern: Pattern) -> Callable[[str], bool]:
    r"""Make a test for file names.

    Parameters
    ----------
    pattern : str or re.Pattern, optional
        A regular expression, which is searched for, if it has ``.*``, ``|`` or another sign that globs don't have
        (``\.csv$``, ``data_.*|x.*``); a glob if it has ``*``, ``?`` or ``[`` (``*.csv``); the whole name of a file if
        it has a dot (``a.csv``); else a part of the name (``csv``). None fits all.
    """
    if pattern is None:
        return lambda _: True
    if isinstance(pattern, re.Pattern):
        return lambda name: pattern.search(name) is not None
    if _REGEX.search(pattern):
        expression = re.compile(pattern)
        return lambda name: expression.search(name) is not None
    if _GLOB.search(pattern):
        glob = re.compile(fnmatch.translate(pattern))
        return lambda name: glob.match(name) is not None
    if "." in pattern:
        return lambda name: name == pattern
    return lambda name: pattern in name


def _kind(path: str) -> str:
    try:
        return f"type {stat.S_IFMT(os.lstat(path).st_mode):o}"
    except OSError:
        return "gone"


#: The digests that all of this process shares.
shared = FileDigests(lambda: 10_000)

_LONGEST_PATH = 4096


def is_there(path: str) -> bool:
    """Whether a text names something; False also where it can't be a name."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False  # a NUL in it


def _looks_like_path(text: str) -> bool:
    if len(text) > _LONGEST_PATH or not text.isprintable() or not text.strip("./"):  # a separator, a full stop
        return False
    parted = os.sep in text or (os.altsep is not None and os.altsep in text)
    return (parted or text.startswith(".")) and is_there(text)


def without_paths(value: Any, found: list[str], *, declared: bool, guess: bool) -> Any:
    """An argument with each path in it, also in lists, tuples, sets and dicts, replaced by the same text.

    Adds the paths to ``found``. A string is one where it is ``declared`` to be, or is to be guessed and looks like one.
    """
    if isinstance(value, os.PathLike) or (isinstance(value, str) and (declared or (guess and _looks_like_path(value)))):
        found.append(os.fsdecode(value))
        return "a path"
    if isinstance(value, dict):
        return {key: without_paths(item, found, declared=declared, guess=guess) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        mine: list[str] = []
        rest = [without_paths(item, mine, declared=declared, guess=guess) for item in value]
        found += sorted(mine) if isinstance(value, set | frozenset) else mine
        return rest
    return value


class Watched(NamedTuple):
    """A file or directory that a call depends on, and its hash when it was looked at (None: it wasn't there).

    ``path`` is absolute, without links; ``pattern`` says which files of a directory count.
    """

    path: str
    algo: str
    pattern: Pattern
    digest: str | None

    def written(self) -> dict[str, str | None]:
        """The file as a record describes it."""
        pattern = self.pattern.pattern if isinstance(self.pattern, re.Pattern) else self.pattern
        return {"algo": self.algo, "pattern": pattern, "digest": self.digest}


def state_of(item: Watched) -> str | None:
    """The hash of a file or directory as it is now."""
    return shared.of_path(item.path, item.algo, item.pattern)


class PathRule(NamedTuple):
    """Which arguments of a function are files, and what of them counts.

    Those ``declared`` are, and where it is to ``guess``, whatever looks like a path and is there, and path objects;
    ``others()`` gives paths that count beside the arguments. Without ``places`` the content counts alone.
    """

    declared: frozenset[str] = frozenset()
    guess: bool = False
    pattern: Pattern = None
    algo: str = "xxhash64"
    places: bool = True
    others: Callable[[], Iterator[str]] = lambda: iter(())

    def argument(self, name: str, value: Any, watched: dict[str, Watched]) -> Any:
        """The part of an argument that is digested as a value. Files in it are added to `watched`."""
        named = name in self.declared
        if not (named or self.guess):
            return value
        seen: list[str] = []
        rest = without_paths(value, seen, declared=named, guess=self.guess)
        for path in seen:
            self._watch(path, watched)
        # The place counts by the path that is watched, or not at all: its spelling doesn't.
        return rest if seen and (named or not self.places) else value

    def add_others(self, watched: dict[str, Watched]) -> None:
        """Watch what counts beside the arguments."""
        for path in self.others():
            self._watch(path, watched)

    def _watch(self, path: str, watched: dict[str, Watched]) -> None:
        real = os.path.realpath(path)
        if real not in watched:
            watched[real] = Watched(real, self.algo, self.pattern, shared.of_path(real, self.algo, self.pattern))

    def inputs(self, watched: Mapping[str, Watched]) -> dict[str, str]:
        """The hashes of the files for the key: by path, or by number if places don't count."""
        return {
            item.path if self.places else str(index): str(item.digest) for index, item in enumerate(watched.values())
        }
