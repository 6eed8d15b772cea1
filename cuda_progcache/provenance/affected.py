# SPDX-License-Identifier: Apache-2.0
"""What depends on a file: what an edit of it invalidates, before it happens."""

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
    users: dict[str, list[Affected]] = {}  # by what they used: how they depend on a file that it depends on
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
    """Find the programs whose records name a file, and note which programs they were linked from."""
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
    """Find whether a call of a user's function read a file, and note what it used."""
    key = str(call.to_lookup_key())
    for child in call.links("children"):
        users.setdefault(child, []).append(Affected(key, call.name, "call", "", False))
    for name, about in (call.metadata.get("files") or {}).items():
        if name == real or (os.path.isdir(name) and real.startswith(os.path.join(name, ""))):
            current = shared.of_path(name, about["algo"], about.get("pattern")) == about["digest"]
            found[key] = Affected(key, call.name, "file", name, current)


def _named_files(about: CompileRecord) -> Iterator[Part]:
    """The files that a record names; a source that was rendered is none, nor is what was linked."""
    rendered = rendering_of(about) is not None
    return (part for part in parts_of(about) if part.kind != "source" or (about.name and not rendered))


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
    """Whether a file's name is a compiler's: ``libnvrtc.so.13`` is of ``nvrtc``."""
    one, other = (each.removeprefix("lib").split(".")[0] for each in (name, os.path.basename(path)))
    return one == other
