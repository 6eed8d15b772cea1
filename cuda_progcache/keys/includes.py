# SPDX-License-Identifier: Apache-2.0
"""Find the headers that a compile read, from the compiler, and its other dependencies, from the headers' texts.

The compiler reports headers in one of two ways, the better first.
:func:`cuda_progcache.compile.compilers.include_source` finds out which of them an NVRTC supports:

* with ``-Xcudafe --trace_includes``, the front end lists every header that it opens, indented by nesting. This is
  undocumented, and costs nothing;
* with ``--fdevice-time-trace`` (documented, NVRTC 13.0 and later), NVRTC writes an event for each header, without the
  nesting, in Chrome's trace format: events "Processing Header File" whose ``args.detail`` is the path.

Either gives a :class:`~cuda_progcache.keys.headers.HeaderSet`. If an NVRTC supports neither, the headers are unknown,
and programs that read headers aren't cached. Following the ``#include`` lines of the text instead would need a second
preprocessor, which can't follow includes made by macros; and every NVRTC since 11.8 supports the first way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import replace
from cuda_progcache.keys import has_include
from cuda_progcache.keys.folders import Folders
from cuda_progcache.keys.headers import (
    Header,
    HeaderSet,
    Place,
    SearchPath,
    known_digest,
    known_stamp,
    read_file,
    remember_digest,
)
from cuda_progcache.keys.include_text import (
    FOLDED,
    NO_PATH,
    PRINTED,
    TIME_MACROS,
    asks_for_columns,
    included_names,
    may_name_paths,
    path_macros,
    redefines_printing,
    time_macro,
    written_time_macro,
)
from cuda_progcache.keys.known_text import KnownText
from cuda_progcache.keys.quick_text import can_paste, may_paste

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.keys.schema import BaseKey

#: The ways in which an NVRTC may report headers.
TRACE, TIME_TRACE, NOTHING = "trace", "time-trace", "nothing"

Trace = list[tuple[int, str]]
"""Headers in the order in which they were opened: nesting depth (0: by the source; or UNKNOWN) and path as opened."""

UNKNOWN = -1

# Synthetic files of the compiler, which are in the trace, but not on disk.
_PROLOGUE = "__nv_nvrtc_builtin_header.h"
_SYNTHETIC = (_PROLOGUE, "__nv_name_map")
_TIME_TRACE_EVENT = "Processing Header File"


def parse_trace(text: str) -> Trace | None:
    """Parse an include trace.

    Parameters
    ----------
    text : str
        The output of ``-Xcudafe --trace_includes``: one path per line, with one leading space per nesting level.

    Returns
    -------
    list of (depth, path), or None if the text isn't a trace (the compiler's own prologue header is missing).
    """
    opened: Trace = []
    genuine = False
    for line in text.splitlines():
        path = line.lstrip(" ")
        if path in _SYNTHETIC:
            genuine = genuine or path == _PROLOGUE
        elif path:
            opened.append((len(line) - len(path), path))
    return opened if genuine else None


def parse_time_trace(text: str) -> Trace | None:
    """Parse the output of ``--fdevice-time-trace``; None if the text is something else. Depths are ``UNKNOWN``."""
    try:
        events = [event for event in json.loads(text)["traceEvents"] if event.get("name") == _TIME_TRACE_EVENT]
        opened = [(int(event["ts"]), str(event["args"]["detail"])) for event in events]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if _PROLOGUE not in {path for _, path in opened}:
        return None
    opened.reverse()  # events are written when they end: put the outer of two that began in one microsecond first
    opened.sort(key=lambda event: event[0])
    return [(UNKNOWN, path) for _, path in opened if path not in _SYNTHETIC]


def header_set(
    trace: Trace,
    code: bytes,
    search: SearchPath,
    compiled_at_ns: int,
    contents: dict[str, bytes] | None = None,
    macros: Iterable[str] = (),
) -> HeaderSet:
    """Return the files that a compile read, from its trace.

    Parameters
    ----------
    trace : list of (depth, path)
        The result of :func:`parse_trace` or :func:`parse_time_trace`.
    code : bytes
        The source.
    search : SearchPath
        The search path of the compile.
    compiled_at_ns : int
        ``time.time_ns()`` before the compile began. The compiler may not have seen the current content of a header that
        is younger.
    contents : dict, optional
        A dict that receives the contents of the headers, by path.
    macros : iterable of str
        The macros that options define, each as ``NAME`` or ``NAME=value``.

    Returns
    -------
    HeaderSet
        The set; its ``uncacheable`` says why if it can't be trusted.
    """
    found = _Collector(search, compiled_at_ns, contents)
    found.source(code, macros)
    sources: tuple[Place, ...] = (("S", 0, ""), ("C", 0, ""))  # the folders that may contain the source
    named = None if search.pre_included else included_names(code)
    beside = () if named and not any(named.values()) else sources  # the source's folders that are searched
    chain: list[Place] = []  # the folders of the headers being read, outermost first
    folders: dict[Place, None] = dict.fromkeys(sources)  # the folders that may contain the includer
    seen: dict[tuple[str, Place | None], Place] = {}  # traces repeat headers: cub's has 4400 lines for 420 headers
    for depth, spelled in trace:
        if depth > 0 and not spelled.startswith("/") and _may_begin_with_a_blank(search.cwd, spelled, depth):
            found.note_problem(f"the path of {spelled} or of another header begins with a blank: the trace can't tell")
        if depth == UNKNOWN:
            place = found.opened(spelled, folders)
            folders[_folder(place)] = None
            continue
        includer = chain[depth - 1] if 0 < depth <= len(chain) else None
        folder = seen.get((spelled, includer))
        if folder is None:
            if includer is None:
                place = found.opened(spelled, beside, ANY_NAME if named is None else named)
            else:
                place = found.opened(spelled, (includer,))
            folder = seen[spelled, includer] = _folder(place)
        chain[depth:] = [folder]
    return found.result()


def _may_begin_with_a_blank(cwd: str, path: str, depth: int) -> bool:
    """Return whether the leading blanks that show the depth may belong to the path itself."""
    return any(os.path.lexists(os.path.join(cwd, " " * n + path)) for n in range(1, depth + 1))


def _folder(place: Place) -> Place:
    """Return the folder of a place, as a place to which a name is appended."""
    root, index, rest = place
    return (root, index, rest[: rest.rfind("/") + 1])


#: The names of a source that names a header by a macro: it may name any header.
ANY_NAME: Mapping[str, bool] = MappingProxyType({})


def _may_be(place: Place, named: Mapping[str, bool], folders: Iterable[Place]) -> bool:
    """Return whether a file in one of ``folders`` that includes these names may find one of them at this place."""
    if named is ANY_NAME or (place[0] in {"I", "B"} and place[2] in named):
        return True
    return any(
        place[:2] == (root, index) and place[2].startswith(rest) and named.get(place[2][len(rest) :], False)
        for root, index, rest in folders
    )


def _turn(place: Place) -> tuple[int, int]:
    """Return the sort key of a place in the order in which the compiler searches for a header in quotes."""
    return ("SCIBPA".index(place[0]), place[1])


def _below(folder: Place, name: str) -> Place:
    root, index, rest = folder
    return ("A", 0, name) if name.startswith("/") else (root, index, rest + name)


#: The vendor's folders, each with a file in or next to the folder; a project's own "cuda/" has no such file.
_VENDORS = {
    "cub": "cub/version.cuh",
    "thrust": "thrust/version.h",
    "cuda": "cuda/std/version",
    "nv": "nv/target",
    "cooperative_groups": "cooperative_groups.h",
    "crt": "crt/host_defines.h",
}

_PASTED_PATHS = (b"__FILE__", b"__BASE_FILE__", b"__builtin_FILE")

_NOTHING, _FILE, _FOLDER = range(3)


class _Collector:
    """The headers of a compile, and the paths that must stay absent or present for it to read the same files."""

    def __init__(self, search: SearchPath, compiled_at_ns: int, contents: dict[str, bytes] | None = None) -> None:
        self._search = search
        self._compiled_at_ns = compiled_at_ns
        self._contents = contents
        self._headers: dict[str, Header] = {}
        self._files: dict[str, tuple[int, int]] = {}
        self._texts: list[tuple[KnownText, list[Place]]] = []  # each with the folders that its quoted includes search
        self._mine: list[KnownText] = []  # the texts that aren't the vendor's
        self._absent: dict[Place, None] = {}
        self._present: dict[Place, None] = {}
        self._perhaps: dict[Place, str] = {}
        self._probes: dict[str, str] = {}
        self._paths = NO_PATH
        self._problem: str | None = None
        self._kinds: dict[Place, int] = {}
        self._missing: dict[Place, Place | None] = {}
        self._places: dict[str, list[Place]] = {}
        self._chosen: set[tuple[str, Place]] = set()

    def result(self) -> HeaderSet:
        """Return everything collected as a header set."""
        columns = False
        try:
            macros = self._probe()
            self._check_pasting(macros)
            columns = any(text.ask(asks_for_columns) for text in self._mine)
            if self._paths == PRINTED and any(text.ask(redefines_printing) for text in self._mine):
                self._paths = FOLDED
        except OSError as error:
            self.note_problem(f"header {error} was modified while it was being compiled")
        return HeaderSet(
            headers=tuple(self._headers.values()),
            absent=tuple(self._absent),
            perhaps=self._elsewhere(),
            present=tuple(self._present),
            probes=tuple(f"{asked}: {outcome}" for asked, outcome in sorted(self._probes.items())),
            links=self._links(),
            mentions_file=self._paths,
            columns=columns,
            uncacheable=self._problem,
            stamps=tuple([known_stamp(path, header.digest) for path, header in self._headers.items()]),
        )

    def _elsewhere(self) -> tuple[tuple[Place, int], ...]:
        number = {path: at for at, path in enumerate(self._headers)}
        return tuple((place, number[path]) for place, path in self._perhaps.items() if path in number)

    def _links(self) -> tuple[tuple[int, int], ...]:
        first: dict[tuple[int, int], int] = {}
        same = [(at, first.setdefault(file, at)) for at, file in enumerate(self._files.values())]
        return tuple((at, other) for at, other in same if at != other)

    def note_problem(self, problem: str) -> None:
        """Record why the set can't be trusted; only the first reason is kept."""
        self._problem = self._problem or problem

    def source(self, code: bytes, macros: Iterable[str]) -> None:
        """Add the source, and the macros that options define."""
        self._note(KnownText.of("the source", code), None, [("S", 0, "")])
        defined = "".join("#define {} {}\n".format(*macro.partition("=")[::2]) for macro in macros)
        if defined:
            self._note(KnownText.of("an option", os.fsencode(defined)), None, [])

    def opened(self, spelled: str, folders: Collection[Place], named: Mapping[str, bool] | None = None) -> Place:
        """Add a header that the compiler opened from a file in one of ``folders``, and return its place.

        ``named`` has the headers that this file includes, and whether in quotes; None if they aren't known.
        """
        path = os.path.join(self._search.cwd, spelled)
        place = self.chose(path, folders)
        if named is not None:
            fitting = [other for other in self._places[path] if _may_be(other, named, folders)]
            if fitting and path not in self._headers and place not in fitting:
                place = fitting[0]
            self._perhaps.update(dict.fromkeys((other for other in fitting if _turn(other) < _turn(place)), path))
        if path not in self._headers:
            self._read(path, place, spelled)
        return place

    def _read(self, path: str, place: Place, spelled: str) -> None:
        try:
            before = os.stat(path)
        except OSError:
            self.note_problem(f"header {spelled} can't be read after the compile")
            return
        digest = known_digest(path, before)
        content = None
        if digest is None or self._contents is not None:
            content = read_file(path)
            if content is None:
                self.note_problem(f"header {spelled} can't be read after the compile")
                return
            digest = sha256(content).hexdigest()
            remember_digest(path, before, digest)
            if self._contents is not None:
                self._contents[path] = content
        # A file's stamp may lag the clock by a tick (4 ms), so an edit right after the start may look older; but NVRTC
        # takes longer than that to read its own prologue before it opens the first header.
        # Bundled headers are exempt: NVRTC writes them itself, during the first compile that uses them.
        if place[0] != "B" and before.st_ctime_ns >= self._compiled_at_ns:
            self.note_problem(f"header {spelled} was modified while it was being compiled")
        self._headers[path] = Header(place, digest)
        self._files[path] = (before.st_dev, before.st_ino)
        try:
            self._note(KnownText(place[2], digest, path, content), place, [_folder(place)])
        except OSError:
            self.note_problem(f"header {spelled} was modified while it was being compiled")

    def _note(self, text: KnownText, place: Place | None, folders: list[Place]) -> None:
        """Add a text and what it depends on; ``place`` is None if it isn't a header."""
        self._texts.append((text, folders))
        if place is not None and self.is_vendors(place):
            # The vendor's headers aren't edited, and there are hundreds: they are only searched for words.
            macro = text.ask(written_time_macro)
            self._paths = max(self._paths, PRINTED if text.ask(may_name_paths) else NO_PATH)
        else:
            macro = text.ask(time_macro)
            self._paths = max(self._paths, text.ask(path_macros))
            self._mine.append(text)
        if macro and place is not None:
            self.note_problem(f"header {text.where} uses {macro}")

    def is_vendors(self, place: Place) -> bool:
        """Return whether a place is a header of CUDA or CCCL, judged by its folder and another file there."""
        root, index, rest = place
        if root in {"A", "B"}:
            return root == "B"
        if "/../" in rest:  # libcu++ up to 12.4 includes its own headers like this, also nested
            rest = os.path.normpath(rest)
        folder, _, below = rest.partition("/")
        anchor = _VENDORS.get(folder) if below else "cuda_runtime.h"
        return anchor is not None and self._kind((root, index, anchor)) == _FILE

    def _probe(self) -> frozenset[bytes]:
        """Add the paths that ``__has_include`` tests check; return the macros through which tests may be written."""
        probes = has_include.probes([text for text, _ in self._texts])
        for index, reason in probes.undecided:
            self.note_problem(f"{self._texts[index][0].where} {reason}")
        for index, name, quoted in probes.asked:
            text, folders = self._texts[index]
            asked = f'"{name}" in {text.where}' if quoted else f"<{name}> in {text.where}"
            self._probes[asked] = "missing"
            for folder in [*(folders if quoted else ()), *self._search.roots]:
                place = _below(folder, name)
                if self._kind(place) == _FILE:
                    self._present[place] = None
                    self._probes[asked] = "there"
                    self._check_age(place)
                    break
                self._must_stay_absent(place)
        return probes.macros

    def _check_pasting(self, probes: frozenset[bytes]) -> None:
        """Check for names that macros may make with ``##`` from words in the texts that aren't the vendor's."""
        pieces = frozenset(piece for text in self._mine for piece in text.pieces(None))
        if not any(text.ask(may_paste) for text, _ in self._texts):
            return
        for name in (*TIME_MACROS, *probes):
            parts = pieces if name.startswith(b"__") else ()
            if name not in has_include.PROBES and name not in TIME_MACROS:
                parts = frozenset(piece for text in self._mine for piece in text.pieces(name))
            if can_paste(name, parts):
                self.note_problem(f"macros may paste {name.decode(errors='replace')} together")
        if any(can_paste(name, pieces) for name in _PASTED_PATHS):
            self._paths = FOLDED

    def chose(self, path: str, folders: Iterable[Place]) -> Place:
        """Record that ``path`` was read from a file in one of ``folders``, and return its place."""
        places = self._places.get(path)
        first = places is None
        if places is None:
            places = self._places[path] = self._search.places(path)
        new = [folder for folder in folders if (path, folder) not in self._chosen]
        if new or first:
            self._chosen.update((path, folder) for folder in new)
            # The spelling of the include isn't known, so all places of the path count, whether or not they exist.
            for root, index, rest in places:
                if root != "A":
                    for candidate in (*new, *(self._before(root, index) if first else ())):
                        place = _below(candidate, rest)
                        if self._search.absolute(place) != path:
                            self._must_stay_absent(place)
        return places[0]

    def _before(self, root: str, index: int) -> list[Place]:
        """Return the directories that are searched before this one, except the includer's own folder."""
        if root not in {"I", "B"}:
            return []
        return [other for other in self._search.roots if other[0] != root or other[1] < index]

    def _must_stay_absent(self, place: Place) -> None:
        """Record that a place must stay absent, by its outermost missing folder: a thousand paths become a few.

        The root directory of the search is never recorded as missing, since it may exist in another project.
        """
        missing = self._missing_folder(place) if place[0] != "A" else None
        kind = _NOTHING if missing is not None else self._kind(place)
        if kind == _NOTHING:
            self._absent[missing or place] = None
        elif kind == _FOLDER:  # the search skips a folder, but wouldn't skip a file in its place
            root, index, rest = place
            self._present[root, index, rest + "/"] = None
        else:  # a different include, or a file that appeared after the compiler's search
            self._check_age(place)

    def _check_age(self, place: Place) -> None:
        """Record a problem if a file may have appeared while the compiler was running."""
        path = self._search.absolute(place)
        if place[0] == "B" or path is None:
            return
        try:
            young = os.stat(path).st_ctime_ns >= self._compiled_at_ns
        except OSError:
            young = True
        if young:
            self.note_problem(f"header {place[2]} appeared while it was being compiled")

    def _missing_folder(self, place: Place) -> Place | None:
        """Return the outermost folder of a place that doesn't exist; None if all exist."""
        root, index, rest = place
        end = rest.rfind("/")
        if end <= 0:
            return None
        above = (root, index, rest[:end])
        try:
            return self._missing[above]
        except KeyError:
            missing = self._missing_folder(above)
            if missing is None and self._kind(above) == _NOTHING:
                missing = above
            self._missing[above] = missing
            return missing

    def _kind(self, place: Place) -> int:
        found = self._kinds.get(place)
        if found is None:
            path = self._search.absolute(place)
            found = _NOTHING
            if path is not None and os.access(path, os.F_OK):
                found = _FOLDER if os.path.isdir(path) else _FILE
            self._kinds[place] = found
        return found


def plain_texts(base: BaseKey, headers: HeaderSet) -> tuple[str, ...]:
    """Return, for each header, the digest of its normal form; for the vendor's headers, the header's own digest."""
    from cuda_progcache.keys.plain_text import plain_digest

    collector = _Collector(base.search, 0)
    found = []
    for place, digest in headers.headers:
        content = None if collector.is_vendors(place) else read_file(base.search.absolute(place) or "")
        same = content is not None and sha256(content).hexdigest() == digest
        found.append(plain_digest(digest, content) if content is not None and same else digest)
    return tuple(found)


def folders_of(base: BaseKey) -> Folders:
    """Return the current state of the folders that a compile is about to search for headers."""
    if not base.inputs.reads_headers:
        return Folders.now(())
    search = base.search
    return Folders.now((*search.include_dirs, *filter(None, search.pre_included), search.source_dir, search.cwd))


def headers_read(
    base: BaseKey, trace: Trace | None, since: Folders, contents: dict[str, bytes] | None = None
) -> HeaderSet:
    """Return the headers that a compile read; ``uncacheable`` says why if they can't be known.

    Parameters
    ----------
    base : BaseKey
    trace : list of (depth, path) or None
        The trace; None if the compiler didn't report one.
    since : Folders
        The result of :func:`folders_of` before the compile.
    contents : dict, optional
        A dict that receives the contents of the headers, by path.
    """
    inputs = base.inputs
    if trace is None:
        return HeaderSet(uncacheable="this NVRTC doesn't tell which headers it reads")
    macros = inputs.facts.macros
    found = header_set(trace, inputs.code, base.search, since.time_ns, contents, macros)
    if found.uncacheable is None and since.steps:
        # Bundled headers are exempt, since NVRTC itself creates their folder.
        places = (header.place for header in found.headers if header.place[0] != "B")
        below = dict.fromkeys(os.path.dirname(base.search.absolute(place) or "") for place in places)
        if (moved := since.moved(below)) is not None:
            return replace(found, uncacheable=f"the folder {moved} was changed while headers were read from there")
    return found
