# SPDX-License-Identifier: Apache-2.0
"""Which files a C++ compile depends on, by what the compiler really opened.

NVRTC's front end, told ``-Xcudafe --trace_includes``, lists every header it
opens, indented by nesting. That list, with a digest per file, is a
:class:`HeaderSet`. Beside the files that were read it remembers what would
change the *choice* of files:

* ``absent``: paths that were not there and would win over a header that was
  found (an earlier include directory, the includer's own folder), or would
  make a ``__has_include`` true;
* ``present``: files whose mere existence a ``__has_include`` asked for.

A :class:`HeaderManifest` keeps the header sets seen for one combination of
source, options and compiler, newest first. A lookup re-checks them: stat
first, content only where the stat moved. If one holds, the compile it came
from would read the same bytes now.

Paths are kept relative to where they were found (``["I", 1, "cub/cub.cuh"]``
is ``cub/cub.cuh`` under the second include directory), so a manifest serves
the same project in another directory.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from cuda_progcache.keys.source import time_macro

# A file whose time stamp is this young may be written again without its stat moving; it is read again next time.
# 2 s is the coarsest time stamp among file systems in use (FAT, some network mounts).
_STAMP_RESOLUTION_NS = 2_000_000_000
_MANIFEST_FORMAT = 1
_MAX_SETS = 16

_HAS_INCLUDE = re.compile(rb"__has_include(?:_next)?\s*\(\s*(?:<([^>\n]+)>|\"([^\"\n]+)\"|([^)\n]*))")
_HAS_INCLUDE_ALIAS = re.compile(rb"#[ \t]*define[^\n]*__has_include(?:_next)?[ \t]*(?:\r?\n|$)")

# Files that the compiler makes up: listed in the trace, but nowhere on disk.
_SYNTHETIC = ("__nv_nvrtc_builtin_header.h", "__nv_name_map")

Place = tuple[str, int, str]
"""A path and what it is relative to: ("I", n, rest) include directory n, ("S", 0, rest) the source's folder,
("C", 0, rest) the working directory, ("A", 0, path) nothing."""


class Header(NamedTuple):
    """A header that was read: where it lies and the SHA-256 of its content (hex)."""

    place: Place
    digest: str

    @property
    def name(self) -> str:
        """As a person would write it: relative to its include directory."""
        return self.place[2]


@dataclass(frozen=True)
class HeaderSet:
    """The files one compile read, and what would change that choice.

    Attributes
    ----------
    headers : tuple of Header
        In the order in which the compiler opened them first.
    absent, present : tuple of Place
        Paths that must not exist / must exist for the set to hold.
    mentions_file : bool
        Whether ``__FILE__`` occurs in one of them: then their paths may reach the output.
    uncacheable : str or None
        Why a compile that reads these can't be cached; None if it can.
    """

    headers: tuple[Header, ...] = ()
    absent: tuple[Place, ...] = ()
    present: tuple[Place, ...] = ()
    mentions_file: bool = False
    uncacheable: str | None = None

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 (hex) over the names and digests of the headers, in order."""
        hasher = sha256(usedforsecurity=False)
        for header in self.headers:
            hasher.update(os.fsencode(header.name) + b"\0" + header.digest.encode() + b"\n")
        return hasher.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """For a manifest's file."""
        return {
            "headers": [[list(h.place), h.digest] for h in self.headers],
            "absent": [list(p) for p in self.absent],
            "present": [list(p) for p in self.present],
            "mentions_file": self.mentions_file,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeaderSet:
        """From a manifest's file (KeyError, TypeError, ValueError where it isn't one)."""
        return cls(
            headers=tuple(Header(_place(place), str(digest)) for place, digest in data["headers"]),
            absent=tuple(_place(p) for p in data["absent"]),
            present=tuple(_place(p) for p in data["present"]),
            mentions_file=bool(data["mentions_file"]),
        )


NO_HEADERS = HeaderSet()


def _place(value: Sequence[Any]) -> Place:
    root, index, rest = value
    return (str(root), int(index), str(rest))


@dataclass(frozen=True)
class SearchPath:
    """Where a compile looks for headers.

    A quoted include is looked for in the folder of the file that has it, then in the include directories; one in angle
    brackets only there; a pre-included one in the working directory first. (So NVRTC 13.5 does; no other folder counts,
    not even the source's for an include in a header.)

    Attributes
    ----------
    include_dirs : tuple of str
        As given to the compiler, relative ones joined to ``cwd``.
    source_dir : str
        The folder of the program's name.
    cwd : str
        The working directory.
    """

    include_dirs: tuple[str, ...]
    source_dir: str
    cwd: str

    @classmethod
    def of(cls, include_dirs: Iterable[str], name: str, cwd: str) -> SearchPath:
        """The search path of a program called ``name``, compiled in ``cwd``."""
        dirs = tuple(os.path.join(cwd, d).rstrip("/") or "/" for d in include_dirs)
        return cls(dirs, os.path.join(cwd, os.path.dirname(name)).rstrip("/"), cwd)

    @functools.cached_property
    def prefixes(self) -> dict[tuple[str, int], str]:
        """What to put before the rest of a place."""
        found = {("I", n): d + "/" for n, d in enumerate(self.include_dirs)}
        return found | {("S", 0): self.source_dir + "/", ("C", 0): self.cwd + "/", ("A", 0): ""}

    def absolute(self, place: Place) -> str | None:
        """The path of a place under this search path; None if it has no such include directory."""
        prefix = self.prefixes.get(place[:2])
        return None if prefix is None else prefix + place[2]

    def places(self, path: str) -> list[Place]:
        """Every way to see ``path`` under this search path, the most specific first."""
        absolute = os.path.join(self.cwd, path)
        found = [
            (prefix, (root, index, absolute[len(prefix) :]))
            for (root, index), prefix in self.prefixes.items()
            if prefix and absolute.startswith(prefix)
        ]
        found.sort(key=lambda item: -len(item[0]))  # stable: include directories come before folders of equal length
        return [place for _, place in found] or [("A", 0, absolute)]


# --- files by content ----------------------------------------------------------------------------------------------

_digests: dict[str, tuple[tuple[int, ...], str]] = {}


def _stamp(st: os.stat_result) -> tuple[int, ...]:
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def file_digest(path: str) -> str | None:
    """SHA-256 (hex) of a file's content, remembered by stat; None if it can't be read.

    The memory is trusted only where the file had been left alone for longer than a time stamp's resolution when it
    was read: an edit within the same tick doesn't move the stat.
    """
    try:
        before = os.stat(path)
    except OSError:
        return None
    stamp = _stamp(before)
    known = _digests.get(path)
    if known is not None and known[0] == stamp:
        return known[1]
    content = _read(path)
    if content is None:
        return None
    digest = sha256(content, usedforsecurity=False).hexdigest()
    _remember(path, before, digest)
    return digest


def _remember(path: str, before: os.stat_result, digest: str) -> None:
    now = time.time_ns()
    newest = max(before.st_mtime_ns, before.st_ctime_ns)
    if newest + _STAMP_RESOLUTION_NS < now:
        _digests[path] = (_stamp(before), digest)
    else:
        _digests.pop(path, None)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


# --- from a trace to a header set ----------------------------------------------------------------------------------


def parse_trace(text: str) -> list[tuple[int, str]] | None:
    """Read an include trace.

    Parameters
    ----------
    text : str
        What NVRTC wrote under ``-Xcudafe --trace_includes``: a path a line, a leading space per level.

    Returns
    -------
    list of (depth, path), or None if it isn't a trace (the compiler's own prologue header is missing).
    """
    opened: list[tuple[int, str]] = []
    genuine = False
    for line in text.splitlines():
        path = line.lstrip(" ")
        if path in _SYNTHETIC:
            genuine = genuine or path == _SYNTHETIC[0]
        elif path:
            opened.append((len(line) - len(path), path))
    return opened if genuine else None


def header_set(trace: list[tuple[int, str]], code: bytes, search: SearchPath, compiled_at_ns: int) -> HeaderSet:
    """What a compile read, from its trace.

    Parameters
    ----------
    trace : list of (depth, path)
        From :func:`parse_trace`.
    code : bytes
        The source, for its own ``__has_include`` probes.
    search : SearchPath
        What the compile had.
    compiled_at_ns : int
        ``time.time_ns()`` before the compile began: a header that is younger may not be what the compiler saw.

    Returns
    -------
    HeaderSet
        With ``uncacheable`` set where the set can't be trusted.
    """
    headers: dict[str, Header] = {}
    choice = _Choice(search)
    mentions_file = False
    problem = choice.probe(code, "the source", [("S", 0, "")])
    chain: list[Place] = []  # the headers being read, outermost first
    for depth, spelled in trace:
        path = os.path.join(search.cwd, spelled)
        place = choice.take(path, chain[depth - 1] if 0 < depth <= len(chain) else None)
        chain[depth:] = [place]
        if path in headers:
            continue
        try:
            before = os.stat(path)
        except OSError as error:
            problem = problem or f"header {spelled} can't be read after the compile ({error.strerror})"
            continue
        content = _read(path)
        if content is None:
            problem = problem or f"header {spelled} can't be read after the compile"
            continue
        if max(before.st_mtime_ns, before.st_ctime_ns) >= compiled_at_ns:
            problem = problem or f"header {spelled} was modified while it was being compiled"
        digest = sha256(content, usedforsecurity=False).hexdigest()
        _remember(path, before, digest)
        headers[path] = Header(place, digest)
        if macro := time_macro(content):
            problem = problem or f"header {spelled} uses {macro}"
        mentions_file = mentions_file or b"__FILE__" in content
        problem = choice.probe(content, spelled, [_folder(place)]) or problem
    return HeaderSet(
        headers=tuple(headers.values()),
        absent=tuple(choice.absent),
        present=tuple(choice.present),
        mentions_file=mentions_file,
        uncacheable=problem,
    )


def _folder(place: Place) -> Place:
    """The folder of a place, ready to put a name behind."""
    root, index, rest = place
    return (root, index, rest[: rest.rfind("/") + 1])


class _Choice:
    """Collects what decides which files are read: paths that must stay absent, and some that must stay present."""

    def __init__(self, search: SearchPath) -> None:
        self.search = search
        self.absent: dict[Place, None] = {}
        self.present: dict[Place, None] = {}
        self._exists: dict[Place, bool] = {}
        self._places: dict[str, list[Place]] = {}
        self._taken: set[tuple[str, Place | None]] = set()

    def take(self, path: str, includer: Place | None) -> Place:
        """Note that ``path`` was read from ``includer`` (None: from the source); returns its place."""
        places = self._places.get(path)
        if places is None:
            places = self._places[path] = self.search.places(path)
        folder = _folder(includer) if includer is not None else None
        if (path, folder) not in self._taken:
            self._taken.add((path, folder))
            # How it was spelled isn't known: every reading of the path counts, whatever of them exists doesn't.
            first = [folder] if folder is not None else [("S", 0, ""), ("C", 0, "")]
            for root, index, rest in places:
                if root != "A":
                    earlier = [("I", n, "") for n in range(index if root == "I" else 0)]
                    for candidate in (*first, *earlier):
                        self._must_stay_absent((candidate[0], candidate[1], candidate[2] + rest))
        return places[0]

    def probe(self, content: bytes, where: str, folders: list[Place]) -> str | None:
        """Note what the ``__has_include`` tests of a file look at; a reason if one can't be known from its text."""
        if b"__has_include" not in content:
            return None
        if _HAS_INCLUDE_ALIAS.search(content):
            return f"{where} gives __has_include another name"
        problem = None
        for angled, quoted, other in _HAS_INCLUDE.findall(content):
            if not (angled or quoted):
                problem = f"{where} tests __has_include({other.decode(errors='replace').strip()}): a macro decides"
                continue
            rest = os.fsdecode(angled or quoted)
            places: list[Place] = [("I", n, "") for n in range(len(self.search.include_dirs))]
            for root, index, folder in [*(folders if quoted else ()), *places]:
                place = (root, index, folder + rest) if not rest.startswith("/") else ("A", 0, rest)
                if self._there(place):
                    self.present[place] = None
                    break
                self._must_stay_absent(place)
        return problem

    def _must_stay_absent(self, place: Place) -> None:
        """Cut to the first missing folder: a thousand paths become a few.

        Never above the directory it was looked for in: in another project that directory may exist.
        """
        root, index, rest = place
        end = 0
        while root != "A" and (end := rest.find("/", end + 1)) > 0:
            folder = (root, index, rest[:end])
            if not self._there(folder):
                self.absent[folder] = None
                return
        if not self._there(place):
            self.absent[place] = None

    def _there(self, place: Place) -> bool:
        found = self._exists.get(place)
        if found is None:
            path = self.search.absolute(place)
            found = self._exists[place] = path is not None and os.access(path, os.F_OK)
        return found


def holds(headers: HeaderSet, search: SearchPath) -> bool:
    """Whether a compile now would read what this set says: every digest equal, nothing shadowed, nothing gone."""
    prefixes = search.prefixes
    try:
        for root, index, rest in headers.absent:
            # An include directory more or less may change the choice, and is another manifest anyway.
            if os.access(prefixes[root, index] + rest, os.F_OK):
                return False
        for root, index, rest in headers.present:
            if not os.access(prefixes[root, index] + rest, os.F_OK):
                return False
        for (root, index, rest), digest in headers.headers:
            if file_digest(prefixes[root, index] + rest) != digest:
                return False
    except KeyError:
        return False  # made for more include directories than there are
    return True


# --- manifests -----------------------------------------------------------------------------------------------------


@dataclass
class HeaderManifest:
    """The header sets seen for one (source, options, compiler), newest first.

    Parameters
    ----------
    path : str or None
        Its file; None keeps it in this process only.

    Notes
    -----
    The file is disposable: without it the next lookup is a miss that writes it anew. It is replaced whole, so two
    writers can lose each other's newest set, which costs one compile and nothing else.
    """

    path: str | None
    sets: list[HeaderSet] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | None) -> HeaderManifest:
        """Read a manifest; a missing, foreign or damaged file gives an empty one."""
        content = _read(path) if path is not None else None
        if content is None:
            return cls(path)
        try:
            data = json.loads(content)
            if data["format"] != _MANIFEST_FORMAT:
                return cls(path)
            return cls(path, [HeaderSet.from_json(item) for item in data["sets"]])
        except (ValueError, KeyError, TypeError):
            return cls(path)

    def match(self, search: SearchPath) -> HeaderSet | None:
        """The newest header set that holds now, if any."""
        return next((s for s in self.sets if holds(s, search)), None)

    def add(self, headers: HeaderSet) -> bytes:
        """Put a set in front; returns the manifest's new content."""
        self.sets = [headers, *(s for s in self.sets if s != headers)][:_MAX_SETS]
        return json.dumps(
            {"format": _MANIFEST_FORMAT, "sets": [s.to_json() for s in self.sets]}, separators=(",", ":")
        ).encode()
