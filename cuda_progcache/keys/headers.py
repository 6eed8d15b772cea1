# SPDX-License-Identifier: Apache-2.0
"""The files that a C++ compile depends on, and the check that they are unchanged.

A :class:`HeaderSet` has the files that a compile read, with their digests (:mod:`cuda_progcache.keys.includes` finds
them). It also has the paths that determine the *choice* of files:

* ``absent``: paths that didn't exist. A file there would be chosen instead of a header that was found (an earlier
  include directory, the includer's own folder), or would make a ``__has_include`` true;
* ``present``: files whose existence a ``__has_include`` tested, and folders (with a trailing slash) in places where a
  file would be chosen.

A :class:`HeaderManifest` keeps the header sets seen for one combination of source, options and compiler, newest first.
A lookup checks them: first the stat of each file, then its content if the stat changed. If a set holds, a compile would
read the same bytes now.

Paths are stored relative to the place where they were found (``["I", 1, "cub/cub.cuh"]`` is ``cub/cub.cuh`` under the
second include directory), so a manifest is valid for the same project in another directory.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple, dataclass, field, replace
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A file whose time stamp is younger than this may be written again without a change of its stat, so it is read again at
# the next lookup. 2 s is the coarsest time stamp among file systems in use (FAT, some network mounts).
_STAMP_RESOLUTION_NS = 2_000_000_000
_MANIFEST_FORMAT = 4
#: The maximum number of sets in a manifest.
MAX_SETS = 16
_READ_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _READ_FLAGS |= getattr(os, _flag, 0)
#: The maximum size of a header in bytes; the largest known ones, of amalgamated libraries, have about 10 MB.
_LARGEST = 64 << 20
_MOST_TWINS = 4

Stamp = tuple[int, int, int, int, int]
"""A file's device, inode, size, mtime and ctime in ns. While these are unchanged, so is the content."""

Place = tuple[str, int, str]
"""A path and its root: ("I", n, rest) is relative to include directory n, ("S", 0, rest) to the source's folder,
("C", 0, rest) to the working directory, ("B", 0, rest) to the folder of NVRTC's bundled headers, ("P", n, rest) to the
folder of pre-included header n if it was given with an absolute path; ("A", 0, path) is absolute."""


@dataclass(frozen=True)
class HeaderPolicy:
    """How thoroughly headers are checked.

    Attributes
    ----------
    hermetic : bool
        On a miss, pass the compiler the bytes that are in the key, from memory, so that an edit during the compile has
        no effect. The front end then runs twice. A program that can't be compiled this way is compiled as usual, and
        isn't kept; the result's reason says why.
    recheck_after : float
        The time in seconds for which lookups in this process assume that checked headers are unchanged, for loops that
        look up the same programs many times a second. With 0, each lookup checks each header's stat.
    """

    hermetic: bool = False
    recheck_after: float = 0.0

    def __post_init__(self) -> None:
        if not self.recheck_after >= 0:
            raise OptionError(f"recheck_after must be a number of seconds, 0 or more, got {self.recheck_after!r}")


CHECK_EACH_TIME = HeaderPolicy()


class Header(NamedTuple):
    """A header that was read: its place and the SHA-256 of its content (hex)."""

    place: Place
    digest: str

    @property
    def name(self) -> str:
        """The header's name as in an ``#include``: relative to its root."""
        return self.place[2]

    @property
    def lasting_name(self) -> str:
        """The header's name in a key; of a header outside all roots, only the file name, since its folder may vary."""
        return os.path.basename(self.place[2]) if self.place[0] == "A" else self.place[2]


@dataclass(frozen=True)
class HeaderSet:
    """The files that a compile read, and the conditions under which it would choose the same files.

    Attributes
    ----------
    headers : tuple of Header
        The headers, in the order in which the compiler first opened them.
    absent, present : tuple of Place
        Paths that must not exist, and paths that must exist, for the set to hold.
    perhaps : tuple of (Place, int)
        Other places where a header, given by its index, may have been found. In another project they may be different
        files; for the set to hold, they must not exist or must have the header's content.
    probes : tuple of str
        The result of each ``__has_include`` in the texts: ``"<extra.h> in value.h: there"``, or ``missing``.
    mentions_file : int
        How the headers and the source may use their paths, from
        :func:`cuda_progcache.keys.include_text.path_macros`. ``NO_PATH``: not at all. ``PRINTED``: a path that reaches
        the output is visible there. ``FOLDED``: a path may reach the output as other bytes.
    paths : tuple of (str, int)
        The roots whose paths are in the compiled output (:func:`cuda_progcache.keys.paths.reaching`).
    linked_paths : tuple of (str, int)
        The roots whose paths are in the output linked from it.
    columns : bool
        Whether the source or a header, other than the vendor's, may ask for the column of a token.
    links : tuple of (int, int)
        Headers that are the same file as an earlier header, by index: ``#pragma once`` skips them.
    uncacheable : str or None
        Why a compile that reads these headers can't be cached; None if it can.
    stamps : tuple of (Stamp or None)
        The status of each header when it was digested, or None if a later edit might not change the status. With
        stamps, a new process needn't read hundreds of files. They don't count when sets are compared.
    entry : str
        The digest of the entry that was compiled from these headers.
    source : str
        The identity of the source that was compiled with these headers; empty if the manifest belongs to that source.
    plain : tuple of str
        For each header, the digest of its normal form (:mod:`cuda_progcache.keys.plain_text`), or its own digest.
    stands_for : str
        The identity of the set that the entry was compiled from, if this set has the same normal form.
    """

    headers: tuple[Header, ...] = ()
    absent: tuple[Place, ...] = ()
    perhaps: tuple[tuple[Place, int], ...] = ()
    present: tuple[Place, ...] = ()
    probes: tuple[str, ...] = ()
    mentions_file: int = 0
    paths: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    linked_paths: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    columns: bool = False
    links: tuple[tuple[int, int], ...] = ()
    uncacheable: str | None = None
    stamps: tuple[Stamp | None, ...] = field(default=(), repr=False, compare=False)
    entry: str = field(default="", repr=False, compare=False)
    source: str = ""
    plain: tuple[str, ...] = field(default=(), repr=False, compare=False)
    stands_for: str = field(default="", repr=False, compare=False)

    @kept_property
    def identity(self) -> str:
        """The SHA-256 (hex) over names and digests of the headers in order, or the identity that the set stands for."""
        if self.stands_for:
            return self.stands_for
        lines = [os.fsencode(header.lasting_name) + b"\0" + header.digest.encode() + b"\n" for header in self.headers]
        lines += [b"%d is %d\n" % pair for pair in self.links]
        return sha256(b"".join(lines)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the form stored in a manifest."""
        return {
            "headers": [[list(h.place), h.digest] for h in self.headers],
            "absent": [list(p) for p in self.absent],
            "perhaps": [[list(p), header] for p, header in self.perhaps],
            "present": [list(p) for p in self.present],
            "probes": list(self.probes),
            "mentions_file": self.mentions_file,
            "paths": [list(root) for root in self.paths],
            "linked_paths": [list(root) for root in self.linked_paths],
            "columns": self.columns,
            "links": [list(pair) for pair in self.links],
            "stamps": [None if stamp is None else list(stamp) for stamp in self.stamps],
            "entry": self.entry,
            "source": self.source,
            "plain": list(self.plain),
            "stands_for": self.stands_for,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeaderSet:
        """Parse the form stored in a manifest; raise KeyError, TypeError or ValueError if it is invalid."""
        return cls(
            headers=tuple(Header(_place(place), str(digest)) for place, digest in data["headers"]),
            absent=tuple(_place(p) for p in data["absent"]),
            perhaps=tuple((_place(p), int(header)) for p, header in data["perhaps"]),
            present=tuple(_place(p) for p in data["present"]),
            probes=tuple(map(str, data["probes"])),
            mentions_file=int(data["mentions_file"]),
            paths=tuple((str(root), int(index)) for root, index in data["paths"]),
            linked_paths=tuple((str(root), int(index)) for root, index in data["linked_paths"]),
            columns=bool(data["columns"]),
            links=tuple((int(at), int(first)) for at, first in data["links"]),
            stamps=tuple(None if stamp is None else _stamp_of(*stamp) for stamp in data.get("stamps", ())),
            entry=str(data.get("entry", "")),
            source=str(data["source"]),
            plain=tuple(map(str, data["plain"])),
            stands_for=str(data["stands_for"]),
        )


NO_HEADERS = HeaderSet()


def _place(value: Sequence[Any]) -> Place:
    root, index, rest = value
    return (str(root), int(index), str(rest))


def _stamp_of(device: int, inode: int, size: int, mtime: int, ctime: int) -> Stamp:
    return (device, inode, size, mtime, ctime)


@dataclass(frozen=True)
class SearchPath:
    """The folders in which a compile searches for headers.

    A quoted include is searched for in the folder of the including file, then in the include directories; an include in
    angle brackets only in the include directories; a pre-included header first in the working directory. This is the
    behaviour of NVRTC 13.5. It searches no other folder, not even the source's folder for an include in a header.

    Attributes
    ----------
    include_dirs : tuple of str
        The include directories as given to the compiler; relative ones are joined to ``cwd``.
    source_dir : str
        The folder in the program's name.
    cwd : str
        The working directory.
    bundled : str or None
        The folder in which NVRTC installs its bundled headers; None if it wasn't asked to.
    pre_included : tuple of str
        The folder of each header that is read before the source; empty if the header's path isn't absolute.
    """

    include_dirs: tuple[str, ...]
    source_dir: str
    cwd: str
    bundled: str | None = None
    pre_included: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        include_dirs: Iterable[str],
        name: str,
        cwd: str,
        bundled: str | None = None,
        pre_includes: Iterable[str] = (),
    ) -> SearchPath:
        """Return the search path of a program called ``name`` that is compiled in ``cwd``."""
        dirs = tuple(os.path.join(cwd, d).rstrip("/") or "/" for d in include_dirs)
        bundled = None if bundled is None else os.path.join(cwd, bundled).rstrip("/")
        source_dir = os.path.join(cwd, os.path.dirname(name)).rstrip("/")
        return cls(dirs, source_dir, cwd, bundled, tuple(map(os.path.dirname, pre_includes)))

    @kept_property
    def prefixes(self) -> dict[tuple[str, int], str]:
        """The prefix of each root, which precedes the rest of a place."""
        found = {("I", n): d + "/" for n, d in enumerate(self.include_dirs)}
        if self.bundled is not None:
            found["B", 0] = self.bundled + "/"
        found |= {("P", n): d + "/" for n, d in enumerate(self.pre_included) if d.startswith("/")}
        return found | {("S", 0): self.source_dir + "/", ("C", 0): self.cwd + "/", ("A", 0): ""}

    @kept_property
    def roots(self) -> list[Place]:
        """The directories that are searched for every include, in order, as places to which a name is appended."""
        return [("I", n, "") for n in range(len(self.include_dirs))] + ([("B", 0, "")] if self.bundled else [])

    def absolute(self, place: Place) -> str | None:
        """Return the path of a place; None if this search path has no such root."""
        prefix = self.prefixes.get(place[:2])
        return None if prefix is None else prefix + place[2]

    def places(self, path: str) -> list[Place]:
        """Return all places that ``path`` has under this search path, the most specific first."""
        absolute = os.path.join(self.cwd, path)
        found = [
            (prefix, (root, index, absolute[len(prefix) :]))
            for (root, index), prefix in self.prefixes.items()
            if prefix and absolute.startswith(prefix)
        ]
        found.sort(key=lambda item: -len(item[0]))  # stable: include directories come before folders of equal length
        return [place for _, place in found] or [("A", 0, absolute)]


Holds = Callable[[HeaderSet, SearchPath], bool]
"""A function that tells whether a compile now would read a set's files: :func:`holds`, or from :func:`looking_once`."""


# --- files by content ----------------------------------------------------------------------------------------------

_digests: dict[str, tuple[Stamp, str]] = {}


def _stamp(st: os.stat_result) -> Stamp:
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def file_digest(path: str) -> str | None:
    """Return the SHA-256 (hex) of a file's content, remembered by stat; None if the file can't be read.

    The digest is remembered only if the file had been unchanged for longer than the resolution of time stamps when it
    was read: an edit within the same tick doesn't change the stat.
    """
    try:
        before = os.stat(path)
    except OSError:
        return None
    known = known_digest(path, before)
    if known is not None:
        return known
    content = read_file(path)
    if content is None:
        return None
    digest = sha256(content).hexdigest()
    remember_digest(path, before, digest)
    return digest


def known_digest(path: str, status: os.stat_result) -> str | None:
    """Return the remembered digest of a file, if it was read with this status."""
    known = _digests.get(path)
    return known[1] if known is not None and known[0] == _stamp(status) else None


def known_stamp(path: str, digest: str) -> Stamp | None:
    """Return the remembered status of a file with this digest, if any."""
    known = _digests.get(path)
    return known[0] if known is not None and known[1] == digest else None


def remember_digest(path: str, before: os.stat_result, digest: str) -> None:
    """Remember the digest of a file that had this status before it was read, unless the status is too recent."""
    now = time.time_ns()
    newest = max(before.st_mtime_ns, before.st_ctime_ns)
    if newest + _STAMP_RESOLUTION_NS < now:
        _digests[path] = (_stamp(before), digest)
    else:
        _digests.pop(path, None)


def read_file(path: str) -> bytes | None:
    """Return a regular file's content; None if it can't be read, isn't a regular file, or is too large for a header."""
    try:
        # A manifest from a tier may name any path: a FIFO would block forever, and a device or a file in /proc may have
        # no end.
        fd = os.open(path, _READ_FLAGS)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None
            # A limited read first allocates the whole limit, so it is only used for files that don't report a size.
            content = file.read() if status.st_size else file.read(_LARGEST + 1)
            return content if len(content) <= _LARGEST else None
    except OSError:
        return None


class _Paths(NamedTuple):
    """A header set's paths under one search path."""

    search: SearchPath
    absent: list[str]
    perhaps: list[tuple[str, str]]  # each with the header that may have been found there
    present: list[str]
    headers: list[tuple[str, str, Stamp | None]]
    twins: list[tuple[str, str, bool]]  # pairs of headers with equal content, and whether they are the same file


def paths_of(headers: HeaderSet, search: SearchPath) -> _Paths:
    """Return a set's paths under a search path; raise KeyError if a root is missing.

    They are cached in the set, since most lookups use the same search path.
    """
    known: _Paths | None = headers.__dict__.get("_paths")
    if known is None or known.search != search:
        prefixes = search.prefixes
        for root in (*headers.paths, *headers.linked_paths):
            if root != ("N", 0):  # the program's own name
                prefixes[root]
        absent, present = (
            [prefixes[root, index] + rest for root, index, rest in places]
            for places in (headers.absent, headers.present)
        )
        stamps = headers.stamps if len(headers.stamps) == len(headers.headers) else (None,) * len(headers.headers)
        files = [
            (prefixes[root, index] + rest, digest, stamp)
            for ((root, index, rest), digest), stamp in zip(headers.headers, stamps, strict=True)
        ]
        known = headers.__dict__["_paths"] = _Paths(
            search,
            absent,
            [(prefixes[root, index] + rest, files[at][0]) for (root, index, rest), at in headers.perhaps],
            present,
            files,
            _twins(headers, files),
        )
    return known


def _twins(headers: HeaderSet, files: list[tuple[str, str, Stamp | None]]) -> list[tuple[str, str, bool]]:
    file = dict(headers.links)  # by index, the first header that is the same file
    found: list[tuple[str, str, bool]] = []
    by_digest: dict[str, list[int]] = {}
    for at, (path, digest, _) in enumerate(files):
        others = by_digest.setdefault(digest, [])
        found += [(path, files[other][0], file.get(at, at) == file.get(other, other)) for other in others[:_MOST_TWINS]]
        others.append(at)
    return found


def choice_holds(paths: _Paths) -> bool:
    """Return whether no file shadows a header, each ``__has_include`` has the same result, and links are unchanged."""
    there = os.access
    for path in paths.absent:
        if there(path, os.F_OK):
            return False
    for path, header in paths.perhaps:
        if path != header and there(path, os.F_OK) and file_digest(path) != file_digest(header):
            return False
    for path in paths.present:
        if not there(path, os.F_OK) or (not path.endswith("/") and os.path.isdir(path)):
            return False
    for path, other, same in paths.twins:
        try:
            if os.path.samefile(path, other) is not same:
                return False
        except OSError:
            return False
    return True


def holds(headers: HeaderSet, search: SearchPath) -> bool:
    """Return whether a compile now would read this set's files: unchanged, none shadowed and none missing."""
    try:
        paths = paths_of(headers, search)
    except KeyError:
        return False  # the set has more include directories than the search path
    if not choice_holds(paths):
        return False
    known, stat = _digests.get, os.stat
    for path, digest, stamp in paths.headers:
        # The same as file_digest, inlined to save hundreds of calls.
        seen = known(path)
        if seen is not None or stamp is not None:
            try:
                st = stat(path)
            except OSError:
                return False
            now = (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
            if seen is not None and seen[0] == now:
                if seen[1] != digest:
                    return False
                continue
            if stamp == now:
                _digests[path] = (now, digest)
                continue
        if file_digest(path) != digest:
            return False
    return True


def looking_once() -> Holds:
    """Return a :func:`holds` that checks each set of files once, for a call that looks up many programs.

    It doesn't notice edits after its first check, so each call needs its own.
    """
    known: dict[tuple[object, ...], bool] = {}

    def holds_once(headers: HeaderSet, search: SearchPath) -> bool:
        files = (headers.headers, headers.absent, headers.perhaps, headers.present, headers.links)
        asked = (files, headers.paths, headers.linked_paths, search)
        if asked not in known:
            known[asked] = holds(headers, search)
        return known[asked]

    return holds_once


def as_now(headers: HeaderSet, search: SearchPath) -> HeaderSet:
    """Return the same headers with their current digests, without headers that can't be read."""
    try:
        paths = paths_of(headers, search)
    except KeyError:
        return headers
    pairs = zip(headers.headers, paths.headers, strict=True)
    now = [Header(header.place, digest) for header, (path, *_) in pairs if (digest := file_digest(path)) is not None]
    return replace(headers, headers=tuple(now), stamps=(), plain=())


# --- manifests -----------------------------------------------------------------------------------------------------


class HeaderManifest:
    """The header sets seen for one combination of source, options and compiler, newest first.

    Parameters
    ----------
    path : str or None
        The manifest's file; None keeps the manifest only in this process.

    Notes
    -----
    The file is disposable: without it, the next lookup is a miss that writes it again. It is replaced as a whole, so
    one of two concurrent writers may lose its newest set, which costs one compile and nothing else.
    """

    def __init__(self, path: str | None, sets: Iterable[HeaderSet] = ()) -> None:
        self.path = path
        self.sets = list(sets)
        self._checked: tuple[HeaderSet, SearchPath, float] | None = None

    @classmethod
    def read(cls, path: str | None) -> HeaderManifest:
        """Read a manifest; a missing, foreign or corrupt file gives an empty one."""
        content = read_file(path) if path is not None else None
        return cls(path, () if content is None else sets_in(content))

    def match(self, search: SearchPath, recheck_after: float = 0.0, look: Holds = holds) -> HeaderSet | None:
        """Return the newest header set that holds now, or that held less than ``recheck_after`` seconds ago, if any."""
        now = time.monotonic()
        if recheck_after and self._checked is not None:
            headers, where, when = self._checked
            if now - when < recheck_after and where == search:
                return headers
        found = next((s for s in self.sets if look(s, search)), None)
        if look is holds:  # otherwise the check may be some time ago
            self._checked = None if found is None else (found, search, now)
        return found

    def add(self, headers: HeaderSet) -> bytes:
        """Insert a set at the front, and return the manifest's new content."""
        self.sets = [headers, *(s for s in self.sets if s != headers)][:MAX_SETS]
        return content_of(self.sets)


def with_stamps(headers: HeaderSet, search: SearchPath) -> HeaderSet:
    """Return a set that has just been found to hold, with the stamps of this machine's files."""
    paths = [search.absolute(header.place) for header in headers.headers]
    stamps = [
        None if path is None else known_stamp(path, header.digest)
        for path, header in zip(paths, headers.headers, strict=True)
    ]
    return replace(headers, stamps=tuple(stamps))


def content_of(sets: Iterable[HeaderSet]) -> bytes:
    """Return the content of a manifest with these sets."""
    import json

    manifest = {"format": _MANIFEST_FORMAT, "sets": [one.to_json() for one in sets]}
    return json.dumps(manifest, separators=(",", ":")).encode()


def sets_in(content: bytes) -> list[HeaderSet]:
    """Return the header sets of a manifest; an empty list if the content isn't a manifest."""
    try:
        import json

        data = json.loads(content)
        if data["format"] != _MANIFEST_FORMAT:
            return []
        return [HeaderSet.from_json(item) for item in data["sets"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return []
