# SPDX-License-Identifier: Apache-2.0
"""A comparison of two caches: the programs that only one of them has, and why.

Programs are the same if they have the same kernel and parameters, or the same name, name expressions and options; and
the same code type, target and architecture. If both caches have a program under different keys, the records show how
it differs.
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
    """A program in one of the caches.

    Attributes
    ----------
    digest : str
    name, variant, target_type, arch : str
        As displayed.
    seconds : float
        Compile time.
    made_by : mapping or None
        The process that compiled it (:func:`~cuda_progcache.compile.history.made_by`).
    about : CompileRecord or None
        The program's record; None if it was read from a list.
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
    """A program that both caches have under different keys: the new one, the old digest, and the differences."""

    new: Held
    old_digest: str
    reasons: tuple[str, ...]


class Comparison(NamedTuple):
    """The differences between two caches.

    Attributes
    ----------
    same : int
        The number of programs that both caches have under the same key.
    changed : tuple of Changed
        Programs in the new cache that the old cache has under other keys, the slowest compile first.
    added, gone : tuple of Held
        Programs that only the new cache has, and that only the old cache has, the slowest compile first.
    """

    same: int
    changed: tuple[Changed, ...]
    added: tuple[Held, ...]
    gone: tuple[Held, ...]

    @property
    def causes(self) -> dict[str, tuple[int, float]]:
        """Each reason for a changed program, with the number of such programs and their compile time in seconds."""
        found: dict[str, tuple[int, float]] = {}
        for one in self.changed:
            for reason in one.reasons:
                count, seconds = found.get(reason, (0, 0.0))
                found[reason] = (count + 1, seconds + one.new.seconds)
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))

    @property
    def seconds(self) -> float:
        """The compile time in seconds of all programs that the old cache doesn't have under the same key."""
        return sum(one.new.seconds for one in self.changed) + sum(one.seconds for one in self.added)

    @property
    def makers(self) -> dict[tuple[str, str], tuple[int, float]]:
        """Host and command line of the processes that compiled these programs, with program count and seconds."""
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
        The directory of a cache (it is only read, so it may be another user's), a bundle, or a file with the output of
        ``cuda-progcache list --json``, which has no reasons.

    Returns
    -------
    Comparison

    Raises
    ------
    BundleError
        If ``old`` or ``new`` is none of these.
    OSError
        If ``old`` or ``new`` can't be read.
    """
    return compared(held(old), held(new))


def compared(old: Iterable[Held], new: Iterable[Held]) -> Comparison:
    """Compare two caches, given their programs as :func:`held` returns them."""
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
        return ("the key differs (a list doesn't say why; compare the caches)",)
    return tuple(differences(new.about, old.about)) or ("the records don't differ",)


def held(path: str | os.PathLike[str]) -> Iterator[Held]:
    """Yield the programs of a cache's directory, a bundle or a list; raises BundleError for anything else."""
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
            f"{path} isn't the output of `cuda-progcache list --json`, a cache's directory or a bundle "
            f"({type(error).__name__}: {error})"
        ) from None


def title(one: Held) -> str:
    """Return a program as text for display: name, variant, target and architecture."""
    return f"{one.name}{f' {one.variant}' if one.variant else ''} ({one.target_type}, {one.arch})"
