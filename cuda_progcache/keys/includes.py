# SPDX-License-Identifier: Apache-2.0
"""Learn which headers a compile reads: from what the compiler tells, or from the text.

Three sources, the best first; which of them an NVRTC offers, :func:`cuda_progcache.compile.nvrtc.include_source` finds
out:

* its front end, told ``-Xcudafe --trace_includes``, lists every header it opens, indented by nesting. Not documented,
  and costs nothing;
* ``--fdevice-time-trace`` (documented, NVRTC 13.0 and later) writes an event for each, without their nesting: Chrome's
  trace format, events "Processing Header File" whose ``args.detail`` is the path;
* :func:`scan` follows the ``#include`` lines themselves, as if every conditional held. That is more than the compiler
  reads, so an edit may cost a compile that wasn't needed; includes whose name a macro gives can't be followed.

Each gives a :class:`~cuda_progcache.keys.headers.HeaderSet`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple, replace
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
from cuda_progcache.keys.include_text import FOLDED, NO_PATH, PRINTED, asks_for_columns, path_macros, redefines_printing
from cuda_progcache.keys.source import joined, time_macro, whole_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.keys.schema import BaseKey

#: What an NVRTC offers.
TRACE, TIME_TRACE, TEXT = "trace", "time-trace", "text"

Trace = list[tuple[int, str]]
"""Headers in the order in which they were opened: how deep (0: by the source; or UNKNOWN), path as it was opened."""

UNKNOWN = -1

# In text whose continued lines were joined. What is tested; or what stands behind the name where that isn't tested.
_PROBE = re.compile(
    rb"__has_include(?:_next)?(?!\w)[ \t]*(?:\([ \t]*(?:<([^>\n]+)>|\"([^\"\n]+)\"|([^)\n]*))|(?=([^\n]*)))"
)
_ASKED_ABOUT = re.compile(rb"[ \t]*(?:\)|&&|\|\||\r?$)")  # "#ifdef __has_include", "defined(__has_include) && ..."
_DIRECTIVE = re.compile(rb"(?:#|%:|\?\?=)[^\n]*__has_include[^\n]*")
_DEFINES = re.compile(rb"(?:#|%:|\?\?=)[ \t]*define")
_COMMENT = re.compile(rb"/\*.*?\*/|//[^\n]*")
# Comments may stand wherever blanks may.
_BLANK = rb"(?:[ \t\v\f]|/\*(?:[^*]|\*(?!/))*\*/)*"
_INCLUDE = re.compile(
    rb"(?:#|%:|\?\?=)" + _BLANK + rb"include(?:_next)?" + _BLANK + rb"(?:<([^>\n]+)>|\"([^\"\n]+)\"|([^\n]*))"
)

# Files that the compiler makes up: listed in the trace, but nowhere on disk.
_PROLOGUE = "__nv_nvrtc_builtin_header.h"
_SYNTHETIC = (_PROLOGUE, "__nv_name_map")
_TIME_TRACE_EVENT = "Processing Header File"


def parse_trace(text: str) -> Trace | None:
    """Read an include trace.

    Parameters
    ----------
    text : str
        What NVRTC wrote under ``-Xcudafe --trace_includes``: a path a line, a leading space per level.

    Returns
    -------
    list of (depth, path), or None if it isn't a trace (the compiler's own prologue header is missing).
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
    """Read what NVRTC wrote under ``--fdevice-time-trace``; None if it isn't that. Depths are ``UNKNOWN``."""
    try:
        events = [event for event in json.loads(text)["traceEvents"] if event.get("name") == _TIME_TRACE_EVENT]
        opened = [(int(event["ts"]), str(event["args"]["detail"])) for event in events]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if _PROLOGUE not in {path for _, path in opened}:
        return None
    opened.reverse()  # an event is written when it ends: of those that began in one microsecond, the outer one first
    opened.sort(key=lambda event: event[0])
    return [(UNKNOWN, path) for _, path in opened if path not in _SYNTHETIC]


def header_set(
    trace: Trace,
    code: bytes,
    search: SearchPath,
    compiled_at_ns: int,
    contents: dict[str, bytes] | None = None,
) -> HeaderSet:
    """What a compile read, from its trace.

    Parameters
    ----------
    trace : list of (depth, path)
        From :func:`parse_trace` or :func:`parse_time_trace`.
    code : bytes
        The source, for its own ``__has_include`` probes.
    search : SearchPath
        What the compile had.
    compiled_at_ns : int
        ``time.time_ns()`` before the compile began: a header that is younger may not be what the compiler saw.
    contents : dict, optional
        Takes what was read, by path.

    Returns
    -------
    HeaderSet
        With ``uncacheable`` set where the set can't be trusted.
    """
    found = _Collector(search, compiled_at_ns, contents)
    found.source(code)
    sources = (("S", 0, ""), ("C", 0, ""))  # the folders in which the source itself may lie
    chain: list[Place] = []  # the folders of the headers being read, outermost first
    folders: dict[Place, None] = dict.fromkeys(sources)  # any of which may hold the includer
    seen: dict[tuple[str, Place | None], Place] = {}  # ten lines of a trace say the same thing: cub has 4400 for 420
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
            place = found.opened(spelled, sources if includer is None else (includer,))
            folder = seen[spelled, includer] = _folder(place)
        chain[depth:] = [folder]
    return found.result()


def _may_begin_with_a_blank(cwd: str, path: str, depth: int) -> bool:
    """Whether the blanks that tell how deep a path lies may be its own."""
    return any(os.path.lexists(os.path.join(cwd, " " * n + path)) for n in range(1, depth + 1))


def scan(code: bytes, pre_includes: Iterable[str], search: SearchPath, compiled_at_ns: int) -> HeaderSet:
    """What a compile may read at most, from the text alone.

    Parameters
    ----------
    code : bytes
        The source.
    pre_includes : iterable of str
        Headers that are read before it.
    search : SearchPath
        What the compile has.
    compiled_at_ns : int
        As in :func:`header_set`.

    Returns
    -------
    HeaderSet
        A superset: conditionals are ignored, and a name counts in every directory where it may be looked for.
        ``uncacheable`` where a macro gives the name of a header.
    """
    found = _Collector(search, compiled_at_ns)
    source = [("S", 0, ""), ("C", 0, "")]
    pending = [(whole_words(code), "the source", source)]
    for name in pre_includes:
        pending += found.follow(name, source)
    while pending:
        content, where, folders = pending.pop()
        if where == "the source":
            found.source(content)
        for angled, quoted, other in _includes(content):
            if angled or quoted:
                pending += found.follow(os.fsdecode(angled or quoted), folders if quoted else [])
            elif (macro := other.strip()) and not macro.startswith((b"<", b'"')):
                found.note_problem(f"{where} includes {macro.decode(errors='replace')[:60]}: a macro decides")
    return found.result()


def _includes(content: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """What stands behind each ``#include``: in angle brackets, in quotes, or something else."""
    return _INCLUDE.findall(joined(content))


def included_names(content: bytes) -> set[str]:
    """The names that stand in the ``#include`` lines of a file, in any conditional."""
    return {os.fsdecode(angled or quoted) for angled, quoted, _ in _includes(content) if angled or quoted}


def probed_names(content: bytes) -> set[tuple[str, bool]]:
    """The names in the ``__has_include`` tests of a file, and whether each stands in quotes."""
    return set(_text(content).probed)


class _Text(NamedTuple):
    """What the text of a file says, beside what it includes."""

    time_macro: str | None
    paths: int
    redefines_printing: bool
    columns: bool
    probed: tuple[tuple[str, bool], ...]  # names in __has_include tests, and whether in quotes
    undecided: str | None  # such a test that the text doesn't decide


def _text(code: bytes) -> _Text:
    text = whole_words(code)
    probed: set[tuple[str, bool]] = set()
    undecided = None
    # In directives alone: elsewhere the name means nothing.
    for line in _DIRECTIVE.findall(joined(code)) if b"__has_include" in text else ():
        directive = _COMMENT.sub(b" ", line)
        for angled, quoted, other, behind in _PROBE.findall(directive):
            if angled or quoted:
                probed.add((os.fsdecode(angled or quoted), bool(quoted)))
            elif other or not _ASKED_ABOUT.match(behind):
                test = (other or behind).decode(errors="replace").strip()
                undecided = undecided or f"tests __has_include({test}): a macro decides"
            elif _DEFINES.match(directive):
                undecided = undecided or "gives __has_include another name"
    return _Text(
        time_macro(text),
        path_macros(code),
        redefines_printing(code),
        asks_for_columns(code),
        tuple(sorted(probed)),
        undecided,
    )


#: By digest: one process compiles many programs over the same headers.
_texts: dict[str, _Text] = {}
_MAX_TEXTS = 8192


def _folder(place: Place) -> Place:
    """The folder of a place, ready to put a name behind."""
    root, index, rest = place
    return (root, index, rest[: rest.rfind("/") + 1])


def _below(folder: Place, name: str) -> Place:
    root, index, rest = folder
    return ("A", 0, name) if name.startswith("/") else (root, index, rest + name)


#: The vendor's folders, each with a file that lies in it or beside it: a project's own "cuda/" has none.
_VENDORS = {
    "cub": "cub/version.cuh",
    "thrust": "thrust/version.h",
    "cuda": "cuda/std/version",
    "nv": "nv/target",
    "cooperative_groups": "cooperative_groups.h",
    "crt": "crt/host_defines.h",
}

_NOTHING, _FILE, _FOLDER = range(3)


class _Collector:
    """Collects headers, and what decides which files are read: paths that must stay absent, and some present."""

    def __init__(self, search: SearchPath, compiled_at_ns: int, contents: dict[str, bytes] | None = None) -> None:
        self._search = search
        self._compiled_at_ns = compiled_at_ns
        self._contents = contents
        self._headers: dict[str, Header] = {}
        self._absent: dict[Place, None] = {}
        self._present: dict[Place, None] = {}
        self._probes: dict[str, str] = {}
        self._paths = NO_PATH
        self._redefines_printing = False
        self._columns = False
        self._problem: str | None = None
        self._kinds: dict[Place, int] = {}
        self._missing: dict[Place, Place | None] = {}
        self._places: dict[str, list[Place]] = {}
        self._chosen: set[tuple[str, Place]] = set()
        self._followed: set[tuple[str, str]] = set()

    def result(self) -> HeaderSet:
        """All of it."""
        return HeaderSet(
            headers=tuple(self._headers.values()),
            absent=tuple(self._absent),
            present=tuple(self._present),
            probes=tuple(f"{asked}: {outcome}" for asked, outcome in sorted(self._probes.items())),
            mentions_file=FOLDED if self._paths == PRINTED and self._redefines_printing else self._paths,
            columns=self._columns,
            uncacheable=self._problem,
            stamps=tuple([known_stamp(path, header.digest) for path, header in self._headers.items()]),
        )

    def note_problem(self, problem: str) -> None:
        """Say why the set can't be trusted; the first reason counts."""
        self._problem = self._problem or problem

    def opened(self, spelled: str, folders: Iterable[Place]) -> Place:
        """Note a header that the compiler opened, from a file in one of ``folders``; its place."""
        path = os.path.join(self._search.cwd, spelled)
        place = self.chose(path, folders)
        self.read(path, place, spelled, with_content=False)
        return place

    def read(self, path: str, place: Place, spelled: str, *, with_content: bool = True) -> bytes | None:
        """Note a header; its content where it is new and can be read, and was asked for or is not known by its stat."""
        if path in self._headers:
            return None
        content = None
        try:
            before = os.stat(path)
        except OSError:
            self.note_problem(f"header {spelled} can't be read after the compile")
            return None
        digest = known_digest(path, before) or ""
        text = _texts.get(digest)
        if text is None or with_content or self._contents is not None:
            content = read_file(path)
            if content is None:
                self.note_problem(f"header {spelled} can't be read after the compile")
                return None
            digest = sha256(content).hexdigest()
            remember_digest(path, before, digest)
            text = _texts.get(digest) or _text(content)
            if len(_texts) >= _MAX_TEXTS:
                _texts.clear()
            _texts[digest] = text
            if self._contents is not None:
                self._contents[path] = content
        # A file's stamp may lag the clock by a tick (4 ms), so an edit right after the start may look older than that;
        # NVRTC reads its own prologue for longer before it opens the first header.
        # Bundled headers it writes itself, as a part of the first compile that asks for them.
        if place[0] != "B" and max(before.st_mtime_ns, before.st_ctime_ns) >= self._compiled_at_ns:
            self.note_problem(f"header {spelled} was modified while it was being compiled")
        self._headers[path] = Header(place, digest)
        if text.time_macro:
            self.note_problem(f"header {spelled} uses {text.time_macro}")
        self._judge_paths(text, place)
        self.probe(text, place[2], [_folder(place)])
        return content

    def chose(self, path: str, folders: Iterable[Place]) -> Place:
        """Note that ``path`` was read from a file in one of ``folders``; its place."""
        places = self._places.get(path)
        if places is None:
            places = self._places[path] = self._search.places(path)
        new = [folder for folder in folders if (path, folder) not in self._chosen]
        if new:
            self._chosen.update((path, folder) for folder in new)
            # How it was spelled isn't known: every reading of the path counts, whatever of them exists doesn't.
            for root, index, rest in places:
                if root != "A":
                    for candidate in (*new, *self._before(root, index)):
                        self._must_stay_absent(_below(candidate, rest))
        return places[0]

    def _before(self, root: str, index: int) -> list[Place]:
        """The directories that may be looked in before this one; those beside the includer are another matter."""
        if root not in {"I", "B"}:
            return []
        return [other for other in self._search.roots if other[0] != root or other[1] < index]

    def follow(self, name: str, folders: list[Place]) -> list[tuple[bytes, str, list[Place]]]:
        """Read a header of this name wherever it may be found; what is new of it, for its own includes.

        In every directory, not in the first that has it: which directories come first, and which an ``#include_next``
        passes over, need not be known then.
        """
        found: list[tuple[bytes, str, list[Place]]] = []
        for place in dict.fromkeys(_below(folder, name) for folder in (*folders, *self._search.roots)):
            path = self._search.absolute(place)
            if path is None or not os.path.isfile(path):
                self._must_stay_absent(place)
                continue
            # By the real folder: an include of "../x/y.h" in x/y.h would otherwise be a new path each time round.
            folder, base = os.path.split(path)
            real = (os.path.realpath(folder), base)
            if real not in self._followed:
                self._followed.add(real)
                content = self.read(path, place, name)
                if content is not None:
                    found.append((content, name, [_folder(place)]))
        return found

    def source(self, code: bytes) -> None:
        """Note what the source itself says."""
        text = _text(code)
        self._judge_paths(text, None)
        self.probe(text, "the source", [("S", 0, "")])

    def _judge_paths(self, text: _Text, place: Place | None) -> None:
        if place is not None and self.is_vendors(place):
            self._paths = max(self._paths, min(text.paths, PRINTED))
            return
        self._paths = max(self._paths, text.paths)
        self._redefines_printing = self._redefines_printing or text.redefines_printing
        self._columns = self._columns or text.columns

    def is_vendors(self, place: Place) -> bool:
        """Whether a place is of CUDA's headers or CCCL's, by its folder and by what else lies there."""
        root, index, rest = place
        folder, _, below = rest.partition("/")
        anchor = _VENDORS.get(folder) if below else "cuda_runtime.h"
        if anchor is None or root == "A" or "/../" in rest:
            return root == "B"
        return root == "B" or self._kind((root, index, anchor)) == _FILE

    def probe(self, text: _Text, where: str, folders: list[Place]) -> None:
        """Note what the ``__has_include`` tests of a file look at; a problem if one can't be known from its text."""
        if text.undecided:
            self.note_problem(f"{where} {text.undecided}")
        for name, quoted in text.probed:
            asked = f'"{name}" in {where}' if quoted else f"<{name}> in {where}"
            self._probes[asked] = "missing"
            for folder in [*(folders if quoted else ()), *self._search.roots]:
                place = _below(folder, name)
                if self._kind(place) == _FILE:
                    self._present[place] = None
                    self._probes[asked] = "there"
                    break
                self._must_stay_absent(place)

    def _must_stay_absent(self, place: Place) -> None:
        """Cut to the first missing folder: a thousand paths become a few.

        Never above the directory it was looked for in: in another project that directory may exist.
        """
        missing = self._missing_folder(place) if place[0] != "A" else None
        kind = _NOTHING if missing is not None else self._kind(place)
        if kind == _NOTHING:
            self._absent[missing or place] = None
        elif kind == _FOLDER:  # passed over in the search; a file in its stead wouldn't be
            root, index, rest = place
            self._present[root, index, rest + "/"] = None

    def _missing_folder(self, place: Place) -> Place | None:
        """The outermost folder of a place that isn't there."""
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
    """Of each header the digest of its normal form; its own for the vendor's, which nobody edits."""
    from cuda_progcache.keys.plain_text import plain_digest

    collector = _Collector(base.search, 0)
    found = []
    for place, digest in headers.headers:
        content = None if collector.is_vendors(place) else read_file(base.search.absolute(place) or "")
        same = content is not None and sha256(content).hexdigest() == digest
        found.append(plain_digest(digest, content) if content is not None and same else digest)
    return tuple(found)


def folders_of(base: BaseKey) -> Folders:
    """The folders in which a compile that is about to begin looks for headers, as they are now."""
    if not base.inputs.reads_headers:
        return Folders.now(())
    search = base.search
    return Folders.now((*search.include_dirs, *filter(None, search.pre_included), search.source_dir, search.cwd))


def headers_read(
    base: BaseKey, trace: Trace | None, since: Folders, contents: dict[str, bytes] | None = None
) -> HeaderSet:
    """What a compile read; ``uncacheable`` says why where that can't be known.

    Parameters
    ----------
    base : BaseKey
    trace : list of (depth, path) or None
        None where the compiler didn't tell.
    since : Folders
        From :func:`folders_of`, before the compile.
    contents : dict, optional
        Takes what was read, by path.
    """
    inputs = base.inputs
    if trace is None:
        found = scan(inputs.code, inputs.pre_includes, base.search, since.time_ns)
    else:
        found = header_set(trace, inputs.code, base.search, since.time_ns, contents)
    if found.uncacheable is None and since.steps:
        # NVRTC itself makes the folder of its bundled headers.
        places = (header.place for header in found.headers if header.place[0] != "B")
        below = dict.fromkeys(os.path.dirname(base.search.absolute(place) or "") for place in places)
        if (moved := since.moved(below)) is not None:
            return replace(found, uncacheable=f"the folder {moved} was changed while headers were read from there")
    return found
