# SPDX-License-Identifier: Apache-2.0
"""Two caches side by side: what one holds and the other doesn't, and why.

Programs are put together by what people would call the same one: kernel and parameters, or name, name expressions and
options; code type, target and architecture. Of one that both hold under different keys, the records say what differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.compile.history import differences
from cuda_progcache.errors import BundleError

if TYPE_CHECKING:
    from cuda_progcache.store.compile_record import CompileRecord


class Held(NamedTuple):
    """A program that one side holds.

    Attributes
    ----------
    digest : str
    name, variant, target_type, arch : str
        As people tell it.
    seconds : float
        What its compile took.
    made_by : mapping or None
        Who compiled it (:func:`~cuda_progcache.compile.history.made_by`).
    about : CompileRecord or None
        What its record says; None where only a list is known.
    """

    digest: str
    name: str
    variant: str
    target_type: str
    arch: str
    seconds: float
    made_by: Mapping[str, Any] | None
    about: CompileRecord | None


class Changed(NamedTuple):
    """A program that both hold, under different keys: the new one, the old one's digest, and what differs."""

    new: Held
    old_digest: str
    reasons: tuple[str, ...]


class Comparison(NamedTuple):
    """What two caches hold.

    Attributes
    ----------
    same : int
        Programs that both hold under the same key.
    changed : tuple of Changed
        What the new one holds of programs that the old one holds under other keys; the costliest first.
    added, gone : tuple of Held
        Held by the new one alone, by the old one alone; the costliest first.
    """

    same: int
    changed: tuple[Changed, ...]
    added: tuple[Held, ...]
    gone: tuple[Held, ...]

    @property
    def causes(self) -> dict[str, tuple[int, float]]:
        """Each sentence of what differs, with how many programs it is true of and what compiling these took."""
        found: dict[str, tuple[int, float]] = {}
        for one in self.changed:
            for reason in one.reasons:
                count, seconds = found.get(reason, (0, 0.0))
                found[reason] = (count + 1, seconds + one.new.seconds)
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))

    @property
    def seconds(self) -> float:
        """What compiling all that the old one didn't have took."""
        return sum(one.new.seconds for one in self.changed) + sum(one.seconds for one in self.added)

    @property
    def makers(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Host and command line of who compiled what the old one didn't have, with programs and seconds."""
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for one in (*(each.new for each in self.changed), *self.added):
            if one.made_by is not None:
                who = (str(one.made_by["host"]), str(one.made_by["command"]))
                count, seconds = found.get(who, (0, 0.0))
                found[who] = (count + 1, seconds + one.seconds)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def compare(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> Comparison:
    """Compare two caches.

    Parameters
    ----------
    old, new : str or os.PathLike
        Each the directory of a cache (others' too: it is only read), a bundle, or a file with the output of
        ``cuda-progcache list --json``, of which no reasons are known.

    Returns
    -------
    Comparison

    Raises
    ------
    BundleError
        One of them is none of these.
    OSError
        It can't be read.
    """
    return compared(held(old), held(new))


def compared(old: Iterable[Held], new: Iterable[Held]) -> Comparison:
    """As :func:`compare`, of what :func:`held` gives."""
    before = {one.digest: one for one in old}
    now = {one.digest: one for one in new}
    same = before.keys() & now.keys()
    places: dict[tuple[str, ...], list[Held]] = {}
    for one in before.values():
        places.setdefault(_place(one), []).append(one)
    changed, added, replaced = [], [], set()
    for one in now.values():
        if one.digest in same:
            continue
        akin = places.get(_place(one))
        if not akin:
            added.append(one)
            continue
        nearest, reasons = min(((each, _reasons(one, each)) for each in akin), key=lambda found: len(found[1]))
        replaced.add(_place(one))
        changed.append(Changed(one, nearest.digest, reasons))
    gone = [one for one in before.values() if one.digest not in same and _place(one) not in replaced]
    return Comparison(
        len(same),
        tuple(sorted(changed, key=lambda one: -one.new.seconds)),
        tuple(sorted(added, key=lambda one: -one.seconds)),
        tuple(sorted(gone, key=lambda one: -one.seconds)),
    )


def _place(one: Held) -> tuple[str, ...]:
    return (one.name, one.variant, one.target_type, one.arch)


def _reasons(new: Held, old: Held) -> tuple[str, ...]:
    if new.about is None or old.about is None:
        return ("the key differs (a list doesn't say why: compare the caches)",)
    return tuple(differences(new.about, old.about)) or ("the records don't differ",)


def held(path: str | os.PathLike[str]) -> Iterator[Held]:
    """What a cache's directory, a bundle or a list holds; BundleError for anything else."""
    path = os.fspath(path)
    if os.path.isdir(path):
        yield from _of_cache(path)
        return
    with open(path, "rb") as file:
        start = file.read(1)
    if start == b"{":
        yield from _of_list(path)
        return
    from cuda_progcache.store.bundle import opened

    with opened(path) as bundle:
        for digest in bundle.digests:
            about = bundle.version(digest)[1]
            if about.is_compile:
                yield _held(digest, about, None)


def _of_cache(path: str) -> Iterator[Held]:
    from cuda_progcache.compile.history import Makers
    from cuda_progcache.store.readonly import look_into

    with look_into(path) as cache:
        makers = Makers(cache)
        for entry in cache.entries():
            if (about := entry.about).is_compile:
                yield _held(entry.digest, about, makers.of(entry))


def _held(digest: str, about: CompileRecord, made_by: Mapping[str, Any] | None) -> Held:
    return Held(digest, about.title, about.variant, about.target_type, about.arch, about.seconds, made_by, about)


def _of_list(path: str) -> Iterator[Held]:
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["entries"]
        for one in entries:
            digest, name, variant, target_type, arch = (
                str(one[field]) for field in ("digest", "name", "variant", "target_type", "arch")
            )
            seconds = float(one["seconds"] or 0.0)
            yield Held(digest, name, variant, target_type, arch, seconds, one["made_by"], None)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} isn't the output of `cuda-progcache list --json`, nor a cache's directory or a bundle "
            f"({type(error).__name__}: {error})"
        ) from None


def title(one: Held) -> str:
    """A program for people: name, what tells it from others of that name, target and architecture."""
    return f"{one.name}{f' {one.variant}' if one.variant else ''} ({one.target_type}, {one.arch})"
