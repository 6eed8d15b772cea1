# SPDX-License-Identifier: Apache-2.0
"""Digests of files and directories, cached as long as the file's status doesn't change.

A file is always read whole, since a sample would miss edits. A cached digest is
bound to the file's device, inode, size, mtime and ctime (ns); a program can set
back a file's mtime, but not its ctime. A file that changed a moment ago is read
again next time, since its file system's clock may not distinguish two edits.
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
    """A digest and the state of the file that it was computed from."""

    digest: str
    algo: str
    device: int
    signature: Signature


def new_hasher(algo: str) -> Any:
    """Make a hasher: SHA-256, or XXH64 (seed 0), which is fast but not safe against forgery; OptionError for others."""
    if algo == "sha256":
        return hashlib.sha256(usedforsecurity=False)
    if algo == "xxhash64":
        import xxhash

        return xxhash.xxh64()
    raise OptionError(f"algo={algo!r} is not a known hash; valid: xxhash64, sha256")


def hash_file(path: str, algo: str) -> tuple[str, os.stat_result]:
    """Hash a file's whole content; also return its status from before the read. OSError if it can't be read."""
    hasher = new_hasher(algo)
    with open(path, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest(), before


class FileDigests:
    """A cache of digests by path, spelled as given. It holds ``limit()`` digests and drops the oldest first.

    It is thread-safe, since single operations on a dict are atomic.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self.memory: dict[str, Remembered] = {}
        self.limit = limit

    def of_file(self, path: str, algo: str) -> str | None:
        """Return the hash of a regular file; None if it is missing, can't be read or isn't a regular file."""
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
        # A signature that no file can have lists the path, but makes the next call read the file again.
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
                break  # another thread changes it too

    def of_path(self, path: str, algo: str, pattern: Pattern = None) -> str | None:
        """Return the hash of a file or directory (see :meth:`of_file`, :meth:`of_directory`); None if it is missing."""
        if os.path.isdir(path):
            return self.of_directory(path, algo, pattern)
        return self.of_file(path, algo)

    def of_directory(self, path: str, algo: str, pattern: Pattern = None) -> str | None:
        """Return the hash of a directory: of the relative names and contents of the matching files below it, sorted."""
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


#: The signs by which a pattern is recognized as a regular expression or a glob.
_REGEX = re.compile(r"[\\^$|()+]|\.[*?]")
_GLOB = re.compile(r"[*?\[]")


def name_filter(pattern: Pattern) -> Callable[[str], bool]:
    r"""Make a test for file names.

    Parameters
    ----------
    pattern : str or re.Pattern, optional
        A regular expression, found anywhere in the name, if it contains ``.*``, ``|`` or another sign that globs don't
        have (``\.csv$``, ``data_.*|x.*``); a glob if it contains ``*``, ``?`` or ``[`` (``*.csv``); the whole name if
        it contains a dot (``a.csv``); otherwise a part of the name (``csv``). None matches every name.
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


#: The cache of digests that the whole process shares.
shared = FileDigests(lambda: 10_000)

_LONGEST_PATH = 4096


def is_there(path: str) -> bool:
    """Return whether a text is an existing path; False also if it can't be a path."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False  # it contains a NUL


def _looks_like_path(text: str) -> bool:
    if len(text) > _LONGEST_PATH or not text.isprintable() or not text.strip("./"):  # only separators and dots
        return False
    parted = os.sep in text or (os.altsep is not None and os.altsep in text)
    return (parted or text.startswith(".")) and is_there(text)


def without_paths(value: Any, found: list[str], *, declared: bool, guess: bool) -> Any:
    """Return an argument with each path in it, also in lists, tuples, sets and dicts, replaced by one fixed text.

    The paths are added to ``found``. A string is a path if the argument is ``declared``, or if paths are to be guessed
    and the string looks like one.
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
    """A file or directory that a call depends on, and its hash when the call looked (None: it was missing).

    ``path`` is absolute and free of symbolic links; ``pattern`` says which files of a directory count.
    """

    path: str
    algo: str
    pattern: Pattern
    digest: str | None

    def written(self) -> dict[str, str | None]:
        """Return the file's description for a record."""
        pattern = self.pattern.pattern if isinstance(self.pattern, re.Pattern) else self.pattern
        return {"algo": self.algo, "pattern": pattern, "digest": self.digest}


def state_of(item: Watched) -> str | None:
    """Return the present hash of a file or directory."""
    return shared.of_path(item.path, item.algo, item.pattern)


class PathRule(NamedTuple):
    """The rule that says which arguments of a function are files, and what counts of each file.

    The ``declared`` parameters are files. With ``objects``, so are path objects anywhere; with ``guess``, so are
    strings that look like a path and exist. ``others()`` gives further paths that count. Without ``places`` only the
    content counts.
    """

    declared: frozenset[str] = frozenset()
    objects: bool = False
    guess: bool = False
    pattern: Pattern = None
    algo: str = "xxhash64"
    places: bool = True
    others: Callable[[], Iterator[str]] = lambda: iter(())

    def argument(self, name: str, value: Any, watched: dict[str, Watched]) -> Any:
        """Return the part of an argument that is digested as a value; add the files in it to ``watched``."""
        named = name in self.declared
        if not (named or self.objects or self.guess):
            return value
        seen: list[str] = []
        rest = without_paths(value, seen, declared=named, guess=self.guess)
        for path in seen:
            self._watch(path, watched)
        # The path as watched counts, or no path at all; the path's spelling never does.
        return rest if seen and (named or not self.places) else value

    def add_others(self, watched: dict[str, Watched]) -> None:
        """Add the paths that count besides the arguments to ``watched``."""
        for path in self.others():
            self._watch(path, watched)

    def _watch(self, path: str, watched: dict[str, Watched]) -> None:
        real = os.path.realpath(path)
        if real not in watched:
            watched[real] = Watched(real, self.algo, self.pattern, shared.of_path(real, self.algo, self.pattern))

    def inputs(self, watched: Mapping[str, Watched]) -> dict[str, str]:
        """Return the hashes of the files for the key: by path, or by number if places don't count."""
        return {
            item.path if self.places else str(index): str(item.digest) for index, item in enumerate(watched.values())
        }
