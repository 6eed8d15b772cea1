# SPDX-License-Identifier: Apache-2.0
"""What depends on a file: what an edit of it invalidates, before it happens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import file_digest
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache.keys import toolchain
from cuda_progcache.memo.files import shared
from cuda_progcache.provenance.nodes import display_name, links, source_digest
from cuda_progcache.provenance.step_records import Steps
from cuda_progcache.provenance.steps import kind_of

if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.memo.caches import BaseCache
    from cuda_progcache.memo.call import DigestedCall, LazyCall
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource


class Affected(NamedTuple):
    """A program or a memoized call that depends on a file.

    Attributes
    ----------
    key : str
        Digest of the entry, or key of the call.
    label : str
        What people know it by.
    kind : {"header", "template", "tool", "source", "file", "input", "call"}
        As what; ``input``: through a binary that was linked in; ``call``: through a program or call that it used.
    name : str
        The name that its record has for the file, or for the binary or call that it depends on it through.
    current : bool
        Whether what it was made with is what the file holds now: editing the file then invalidates it. False: the file
        was edited since, or another one of this name was meant; the entry is no answer to a compile that reads this
        file.
    entry : EntryInfo or None
        Of a program.
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
    """Every program whose record names a file, and every memoized call that depends on it or on such a program.

    Parameters
    ----------
    cache : store, optional
        The programs, and the calls around them.
    path : path-like
        A header, a template, a source or a compiler's file. It needn't be there any more.
    calls : sequence of BaseCache
        Where else calls are recorded.

    Returns
    -------
    list of Affected
        One per program or call; those that an edit would invalidate first, then programs before calls, then by name
        and key. A memoized call doesn't look at the programs it used when its result is reused: that its result is out
        of date is for you to know.

    Notes
    -----
    Records name headers relative to the directory that they were found in, so ``path`` fits a record whose name is the
    tail of it; the digest then says whether it is that file.
    """
    full = os.path.abspath(os.fspath(path))
    found: dict[str, Affected] = {}
    known: list[LazyCall | DigestedCall] = [call for place in calls for call in place.query()]
    if cache is not None:
        _add_programs(found, cache, full)
        known += Steps(cache).calls()
    _add_calls(found, [call for call in known if kind_of(call) is None and "record" not in call.metadata], full)
    return sorted(found.values(), key=lambda a: (not a.current, a.entry is None, a.label, a.key))


def _add_programs(found: dict[str, Affected], cache: ProgramCacheResource, full: str) -> None:
    digests = _digests(full)
    linked: list[EntryInfo] = []
    for entry in cache.entries():
        matches = [
            Affected(
                entry.digest, display_name(entry.record), kind, name, digest is not None and digest in digests, entry
            )
            for kind, name, digest in _named_files(entry.record)
            if _is_tail(name, full) or (kind == "tool" and (_is_tool(name, full) or digest in digests))
        ]
        if matches:
            found[entry.digest] = max(matches, key=lambda match: match.current)
        if entry.record.get("inputs"):
            linked.append(entry)
    # A program that was linked can be linked into another one: until nothing is added.
    more = True
    while more:
        more = False
        for entry in linked:
            parts = [found[part["digest"]] for part in entry.record["inputs"] if part.get("digest") in found]
            through = max(parts, key=lambda part: part.current, default=None)
            known = found.get(entry.digest)
            if through is None or (known is not None and known.current >= through.current):
                continue
            label = display_name(entry.record)
            found[entry.digest] = Affected(entry.digest, label, "input", through.label, through.current, entry)
            more = True


def _add_calls(found: dict[str, Affected], calls: Iterable[LazyCall | DigestedCall], full: str) -> None:
    """Add calls of users' functions that read the file, that used what depends on it, and that used such calls."""
    real = os.path.realpath(full)
    users: dict[str, list[LazyCall | DigestedCall]] = {}
    pending = list(found.values())
    for call in calls:
        for child in links(call, "children"):
            users.setdefault(child, []).append(call)
        key = str(call.to_lookup_key())
        for name, about in (call.metadata.get("files") or {}).items():
            inside = _lies_in(real, name)
            if name == real or inside:
                current = shared.of_path(name, about["algo"], about.get("pattern")) == about["digest"]
                found[key] = Affected(key, call.name, "file", name, current)
                pending.append(found[key])
    # What is found through the file itself stays so; what is found through another takes the way that is current.
    while pending:
        used = pending.pop()
        for call in users.get(used.key, ()):
            key = str(call.to_lookup_key())
            known = found.get(key)
            if known is None or used.current > known.current:
                found[key] = Affected(key, call.name, "call", used.label, used.current)
                pending.append(found[key])


def _lies_in(path: str, directory: str) -> bool:
    return os.path.isdir(directory) and path.startswith(os.path.join(directory, ""))


def _named_files(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    for part in record.get("headers") or ():
        yield "header", str(part["name"]), part["digest"]
    for part in (record.get("kernel") or record.get("part_of") or {}).get("templates") or ():
        yield "template", str(part["name"]), part["digest"]
    for part in record.get("toolchain") or ():
        yield "tool", str(part["name"]), part["digest"]
    rendered = record.get("kernel") or record.get("part_of")
    if record.get("name") and not rendered and record.get("code_type") != "link":
        yield "source", str(record["name"]), source_digest(record)


def _digests(path: str) -> set[str]:
    """What records may call the content of a file; empty if it can't be read."""
    try:
        with open(path, "rb") as file:
            return {file_digest(file, "sha256").hexdigest(), toolchain.identity(path)}
    except OSError:
        return set()


def _is_tail(name: str, path: str) -> bool:
    wanted = [part for part in os.path.normpath(name).split(os.sep) if part not in {"", os.curdir, os.pardir}]
    return bool(wanted) and path.split(os.sep)[-len(wanted) :] == wanted


def _is_tool(name: str, path: str) -> bool:
    return _stem(name) == _stem(os.path.basename(path))


def _stem(name: str) -> str:
    """``nvrtc`` of ``libnvrtc.so.13``."""
    return name.removeprefix("lib").split(".")[0]
