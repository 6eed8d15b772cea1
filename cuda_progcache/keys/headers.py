# SPDX-License-Identifier: Apache-2.0
"""Which files a C++ compile depends on, and whether they still are what they were.

What a compile read (:mod:`cuda_progcache.keys.includes` learns it), with a digest per file, is a :class:`HeaderSet`.
Beside the files that were read it remembers what would change the *choice* of files:

* ``absent``: paths that were not there and would win over a header that was
  found (an earlier include directory, the includer's own folder), or would
  make a ``__has_include`` true;
* ``present``: files whose mere existence a ``__has_include`` asked for, and (with a slash behind) folders that lie
  where a file would win.

A :class:`HeaderManifest` keeps the header sets seen for one combination of
source, options and compiler, newest first. A lookup re-checks them: stat
first, content only where the stat moved. If one holds, the compile it came
from would read the same bytes now.

Paths are kept relative to where they were found (``["I", 1, "cub/cub.cuh"]``
is ``cub/cub.cuh`` under the second include directory), so a manifest serves
the same project in another directory.
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

# A file whose time stamp is this young may be written again without its stat moving; it is read again next time.
# 2 s is the coarsest time stamp among file systems in use (FAT, some network mounts).
_STAMP_RESOLUTION_NS = 2_000_000_000
_MANIFEST_FORMAT = 4
#: Sets of a manifest.
MAX_SETS = 16
_READ_FLAGS = os.O_RDONLY
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _READ_FLAGS |= getattr(os, _flag, 0)
#: Bytes of a header; the largest that are known, of amalgamated libraries, have some 10 MB.
_LARGEST = 64 << 20
_MOST_TWINS = 4

Stamp = tuple[int, int, int, int, int]
"""Of a file's status: device, inode, size, mtime and ctime in ns. While they stay, its content does."""

Place = tuple[str, int, str]
"""A path and what it is relative to: ("I", n, rest) include directory n, ("S", 0, rest) the source's folder,
("C", 0, rest) the working directory, ("B", 0, rest) the folder of NVRTC's bundled headers, ("P", n, rest) the folder of
pre-included header n, where that was given with an absolute path, ("A", 0, path) nothing."""


@dataclass(frozen=True)
class HeaderPolicy:
    """How much is done to be sure of headers.

    Attributes
    ----------
    hermetic : bool
        On a miss, hand the compiler the very bytes that are in the key, from memory: an edit during the compile can't
        come between. The front end runs twice for that. A program that can't be compiled so is compiled as ever, and
        not kept, with the reason.
    recheck_after : float
        Seconds for which headers that were looked at in this process are taken as unchanged by its next lookups, for
        loops that ask for the same programs many times a second. 0: each lookup looks at each header's stat.
    """

    hermetic: bool = False
    recheck_after: float = 0.0

    def __post_init__(self) -> None:
        if not self.recheck_after >= 0:
            raise OptionError(f"recheck_after must be a number of seconds, 0 or more, got {self.recheck_after!r}")


CHECK_EACH_TIME = HeaderPolicy()


class Header(NamedTuple):
    """A header that was read: where it lies and the SHA-256 of its content (hex)."""

    place: Place
    digest: str

    @property
    def name(self) -> str:
        """As a person would write it: relative to its include directory."""
        return self.place[2]

    @property
    def lasting_name(self) -> str:
        """As a key has it: of a header outside all roots, the path isn't its name, but where it happens to lie."""
        return os.path.basename(self.place[2]) if self.place[0] == "A" else self.place[2]


@dataclass(frozen=True)
class HeaderSet:
    """The files one compile read, and what would change that choice.

    Attributes
    ----------
    headers : tuple of Header
        In the order in which the compiler opened them first.
    absent, present : tuple of Place
        Paths that must not exist / must exist for the set to hold.
    perhaps : tuple of (Place, int)
        Other places where a header, by its number, may have been found; here they may be other files, and then must
        not exist or have its content.
    probes : tuple of str
        What each ``__has_include`` in what was read comes to: ``"<extra.h> in value.h: there"``, or ``missing``.
    mentions_file : int
        What they and the source say about paths, as :func:`cuda_progcache.keys.include_text.path_macros`: ``NO_PATH``;
        ``PRINTED``: a path that reaches the output can be seen there; ``FOLDED``: it may reach it as other bytes.
    paths : tuple of (str, int)
        The roots of places whose paths are in what was compiled (:func:`cuda_progcache.keys.paths.reaching`).
    linked_paths : tuple of (str, int)
        The same for what was linked from it.
    columns : bool
        Whether one of them or the source, the vendor's headers aside, may ask in which column of a line it stands.
    links : tuple of (int, int)
        Headers that are the same file as an earlier one, by their numbers: ``#pragma once`` passes over them.
    uncacheable : str or None
        Why a compile that reads these can't be cached; None if it can.
    stamps : tuple of (Stamp or None)
        What each header's status was when it was digested, where an edit since would have moved it: spares a new
        process reading some hundred files. None are another set all the same.
    entry : str
        Digest of the entry that was compiled from them.
    source : str
        Identity of the source that was compiled with them; empty where the manifest is that source's own.
    plain : tuple of str
        Of each header, the digest of its normal form (:mod:`cuda_progcache.keys.plain_text`), or its own.
    stands_for : str
        Identity of the set that the entry was compiled from, where this one has the same normal form.
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
        """SHA-256 (hex) over the names and digests of the headers, in order; of those that it stands for."""
        if self.stands_for:
            return self.stands_for
        lines = [os.fsencode(header.lasting_name) + b"\0" + header.digest.encode() + b"\n" for header in self.headers]
        lines += [b"%d is %d\n" % pair for pair in self.links]
        return sha256(b"".join(lines)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """For a manifest's file."""
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
        """From a manifest's file (KeyError, TypeError, ValueError where it isn't one)."""
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
    bundled : str or None
        Where NVRTC puts the headers that it brings, where it was asked to.
    pre_included : tuple of str
        The folder of each header that is read before the source; empty unless it was given with an absolute path.
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
        """The search path of a program called ``name``, compiled in ``cwd``."""
        dirs = tuple(os.path.join(cwd, d).rstrip("/") or "/" for d in include_dirs)
        bundled = None if bundled is None else os.path.join(cwd, bundled).rstrip("/")
        source_dir = os.path.join(cwd, os.path.dirname(name)).rstrip("/")
        return cls(dirs, source_dir, cwd, bundled, tuple(map(os.path.dirname, pre_includes)))

    @kept_property
    def prefixes(self) -> dict[tuple[str, int], str]:
        """What to put before the rest of a place."""
        found = {("I", n): d + "/" for n, d in enumerate(self.include_dirs)}
        if self.bundled is not None:
            found["B", 0] = self.bundled + "/"
        found |= {("P", n): d + "/" for n, d in enumerate(self.pre_included) if d.startswith("/")}
        return found | {("S", 0): self.source_dir + "/", ("C", 0): self.cwd + "/", ("A", 0): ""}

    @kept_property
    def roots(self) -> list[Place]:
        """The directories in which any include is looked for, in order, ready to put a name behind."""
        return [("I", n, "") for n in range(len(self.include_dirs))] + ([("B", 0, "")] if self.bundled else [])

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


Holds = Callable[[HeaderSet, SearchPath], bool]
"""Tells whether a compile now would read what a set says: :func:`holds`, or one of :func:`looking_once`."""


# --- files by content ----------------------------------------------------------------------------------------------

_digests: dict[str, tuple[Stamp, str]] = {}


def _stamp(st: os.stat_result) -> Stamp:
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
    """The digest of a file that was read before, if this is still its status."""
    known = _digests.get(path)
    return known[1] if known is not None and known[0] == _stamp(status) else None


def known_stamp(path: str, digest: str) -> Stamp | None:
    """The status that a file had when it had this digest, as far as that is remembered."""
    known = _digests.get(path)
    return known[0] if known is not None and known[1] == digest else None


def remember_digest(path: str, before: os.stat_result, digest: str) -> None:
    """Spare later lookups reading a file that had this status before it was read."""
    now = time.time_ns()
    newest = max(before.st_mtime_ns, before.st_ctime_ns)
    if newest + _STAMP_RESOLUTION_NS < now:
        _digests[path] = (_stamp(before), digest)
    else:
        _digests.pop(path, None)


def read_file(path: str) -> bytes | None:
    """A regular file's content; None if it can't be read, is something else, or larger than any header."""
    try:
        # A manifest of a tier may name anything: a FIFO would hang for ever, and a device, or a file of /proc, has no
        # end.
        fd = os.open(path, _READ_FLAGS)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                return None
            # A limited read allocates the whole limit first: that is for files that don't tell their size.
            content = file.read() if status.st_size else file.read(_LARGEST + 1)
            return content if len(content) <= _LARGEST else None
    except OSError:
        return None


class _Paths(NamedTuple):
    """A header set's places under one search path."""

    search: SearchPath
    absent: list[str]
    perhaps: list[tuple[str, str]]  # each with the header that it may stand for
    present: list[str]
    headers: list[tuple[str, str, Stamp | None]]
    twins: list[tuple[str, str, bool]]  # headers of one content, and whether they are one file


def paths_of(headers: HeaderSet, search: SearchPath) -> _Paths:
    """Its places under a search path (KeyError where a root is missing).

    They are remembered with the set, since lookups come from one place mostly.
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
    file = dict(headers.links)  # by number, the first header that is the same file
    found: list[tuple[str, str, bool]] = []
    by_digest: dict[str, list[int]] = {}
    for at, (path, digest, _) in enumerate(files):
        others = by_digest.setdefault(digest, [])
        found += [(path, files[other][0], file.get(at, at) == file.get(other, other)) for other in others[:_MOST_TWINS]]
        others.append(at)
    return found


def choice_holds(paths: _Paths) -> bool:
    """Whether nothing shadows a header, each ``__has_include`` comes to what it came to, and links are links."""
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
    """Whether a compile now would read what this set says: every digest equal, nothing shadowed, nothing gone."""
    try:
        paths = paths_of(headers, search)
    except KeyError:
        return False  # made for more include directories than there are
    if not choice_holds(paths):
        return False
    known, stat = _digests.get, os.stat
    for path, digest, stamp in paths.headers:
        # As file_digest does it, without a call for each of some hundreds.
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
    """Make a :func:`holds` that looks at each file once, for a call that asks for many programs.

    It sees no edit after its first look, so no two calls may share it.
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
    """The same headers with the digests that they have now; without those that are gone."""
    try:
        paths = paths_of(headers, search)
    except KeyError:
        return headers
    pairs = zip(headers.headers, paths.headers, strict=True)
    now = [Header(header.place, digest) for header, (path, *_) in pairs if (digest := file_digest(path)) is not None]
    return replace(headers, headers=tuple(now), stamps=(), plain=())


# --- manifests -----------------------------------------------------------------------------------------------------


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

    def __init__(self, path: str | None, sets: Iterable[HeaderSet] = ()) -> None:
        self.path = path
        self.sets = list(sets)
        self._checked: tuple[HeaderSet, SearchPath, float] | None = None

    @classmethod
    def read(cls, path: str | None) -> HeaderManifest:
        """Read a manifest; a missing, foreign or damaged file gives an empty one."""
        content = read_file(path) if path is not None else None
        return cls(path, () if content is None else sets_in(content))

    def match(self, search: SearchPath, recheck_after: float = 0.0, look: Holds = holds) -> HeaderSet | None:
        """The newest header set that holds now, if any; or that held less than ``recheck_after`` seconds ago."""
        now = time.monotonic()
        if recheck_after and self._checked is not None:
            headers, where, when = self._checked
            if now - when < recheck_after and where == search:
                return headers
        found = next((s for s in self.sets if look(s, search)), None)
        if look is holds:  # else it may have been seen a while ago
            self._checked = None if found is None else (found, search, now)
        return found

    def add(self, headers: HeaderSet) -> bytes:
        """Put a set in front; returns the manifest's new content."""
        self.sets = [headers, *(s for s in self.sets if s != headers)][:MAX_SETS]
        return content_of(self.sets)


def with_stamps(headers: HeaderSet, search: SearchPath) -> HeaderSet:
    """A set that has just been found to hold, with the stamps of the files here."""
    paths = [search.absolute(header.place) for header in headers.headers]
    stamps = [
        None if path is None else known_stamp(path, header.digest)
        for path, header in zip(paths, headers.headers, strict=True)
    ]
    return replace(headers, stamps=tuple(stamps))


def content_of(sets: Iterable[HeaderSet]) -> bytes:
    """A manifest's content."""
    import json

    manifest = {"format": _MANIFEST_FORMAT, "sets": [one.to_json() for one in sets]}
    return json.dumps(manifest, separators=(",", ":")).encode()


def sets_in(content: bytes) -> list[HeaderSet]:
    """The header sets of a manifest; none of what isn't one."""
    try:
        import json

        data = json.loads(content)
        if data["format"] != _MANIFEST_FORMAT:
            return []
        return [HeaderSet.from_json(item) for item in data["sets"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return []
