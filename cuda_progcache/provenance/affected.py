# SPDX-License-Identifier: Apache-2.0
"""The programs and memoized calls that depend on a file, and that an edit of the file would invalidate."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from hashlib import file_digest
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache.keys import toolchain
from cuda_progcache.memo.files import shared
from cuda_progcache.provenance.nodes import Part, parts_of
from cuda_progcache.provenance.step_records import Steps
from cuda_progcache.provenance.steps import kind_of, links_of, rendering_of

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache
    from cuda_progcache.memo.call import DigestedCall, LazyCall
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource
    from cuda_progcache.store.compile_record import CompileRecord


class Affected(NamedTuple):
    """A program or a memoized call that depends on a file.

    Attributes
    ----------
    key : str
        Digest of the entry, or key of the call.
    label : str
        Name for display: the program's title or the function's name.
    kind : {"header", "template", "tool", "source", "file", "input", "call"}
        The role of the file. ``input``: the program depends on it through a binary that was linked in. ``call``: the
        call depends on it through a program or call that it used.
    name : str
        The file's name in the record; for an indirect dependency, the name of the binary or call in between.
    current : bool
        Whether the file still has the recorded content, so that editing it invalidates the program or call. If False,
        the file was edited since, or another file of the same name was meant; a compile that reads this file doesn't
        hit the entry.
    entry : EntryInfo or None
        The program's entry; None for a call.
    """

    key: str
    label: str
    kind: str
    name: str
    current: bool
    entry: EntryInfo | None = None


def affected(
    cache: ProgramCacheResource | None, path: str | os.PathLike[str], calls: Sequence[BaseCache] = ()
) -> list[Affected]:
    """Find every program whose record names a file, and every memoized call that depends on the file or the programs.

    Parameters
    ----------
    cache : store, optional
        The store that holds the programs and the calls around them.
    path : path-like
        A header, a template, a source or a compiler's file. The file may have been deleted.
    calls : sequence of BaseCache
        Other caches that record calls.

    Returns
    -------
    list of Affected
        One per program or call. Those that an edit would invalidate come first; then programs come before calls; then
        the order is by name and key. A memoized call doesn't check the programs it used before its result is reused,
        so a stale result must be recomputed by hand.

    Notes
    -----
    Records name headers relative to the directory where they were found. ``path`` therefore matches a recorded name
    that equals its last components; the digest then tells whether it is the same file.
    """
    full = os.path.abspath(os.fspath(path))
    found: dict[str, Affected] = {}
    users: dict[str, list[Affected]] = {}  # programs and calls, by the key of a program or call that they used
    recorded: list[Iterable[LazyCall | DigestedCall]] = [place.query() for place in calls]
    if cache is not None:
        _look_at_programs(cache.entries(), full, found, users)
        recorded.append(Steps(cache).calls())
    for call in itertools.chain.from_iterable(recorded):
        if kind_of(call) is None and "record" not in call.metadata:
            _look_at_call(call, os.path.realpath(full), found, users)
    pending = deque(sorted(found.values(), key=_order))
    while pending:
        used = pending.popleft()
        for user in users.get(used.key, ()):
            known = found.get(user.key)
            if known is None or used.current > known.current:
                found[user.key] = user._replace(name=used.label, current=used.current)
                pending.append(found[user.key])
    return sorted(found.values(), key=_order)


def _order(hit: Affected) -> tuple[bool, bool, str, str]:
    return (not hit.current, hit.entry is None, hit.label, hit.key)


def _look_at_programs(
    entries: Iterable[EntryInfo], full: str, found: dict[str, Affected], users: dict[str, list[Affected]]
) -> None:
    """Find the programs whose records name a file, and note which programs were linked from which."""
    digests = _digests(full)
    for entry in entries:
        about = entry.about
        matches = [
            Affected(entry.digest, about.title, kind, name, digest is not None and digest in digests, entry)
            for kind, name, digest in _named_files(about)
            if _is_tail(name, full) or (kind == "tool" and (_is_tool(name, full) or digest in digests))
        ]
        if matches:
            found[entry.digest] = max(matches, key=lambda match: match.current)
        for child in links_of(about).get("children", ()):
            users.setdefault(child, []).append(Affected(entry.digest, about.title, "input", "", False, entry))


def _look_at_call(
    call: LazyCall | DigestedCall, real: str, found: dict[str, Affected], users: dict[str, list[Affected]]
) -> None:
    """Find whether a memoized call read a file, and note the programs and calls that it used."""
    key = str(call.to_lookup_key())
    for child in call.links("children"):
        users.setdefault(child, []).append(Affected(key, call.name, "call", "", False))
    for name, about in (call.metadata.get("files") or {}).items():
        if name == real or (os.path.isdir(name) and real.startswith(os.path.join(name, ""))):
            current = shared.of_path(name, about["algo"], about.get("pattern")) == about["digest"]
            found[key] = Affected(key, call.name, "file", name, current)


def _named_files(about: CompileRecord) -> Iterator[Part]:
    """Return the files that a record names; a rendered source isn't a file, and neither are linked binaries."""
    rendered = rendering_of(about) is not None
    return (part for part in parts_of(about) if part.kind != "source" or (about.name and not rendered))


def _digests(path: str) -> set[str]:
    """Return the digests that records may have for a file's content; empty if the file can't be read."""
    try:
        with open(path, "rb") as file:
            return {file_digest(file, "sha256").hexdigest(), toolchain.identity(path)}
    except OSError:
        return set()


def _is_tail(name: str, path: str) -> bool:
    wanted = [part for part in os.path.normpath(name).split(os.sep) if part not in {"", os.curdir, os.pardir}]
    return bool(wanted) and path.split(os.sep)[-len(wanted) :] == wanted


def _is_tool(name: str, path: str) -> bool:
    """Return whether a file's name is a compiler's: ``libnvrtc.so.13`` belongs to ``nvrtc``."""
    one, other = (each.removeprefix("lib").split(".")[0] for each in (name, os.path.basename(path)))
    return one == other
