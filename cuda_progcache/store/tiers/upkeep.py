# SPDX-License-Identifier: Apache-2.0
"""Maintenance of tiers: copying between them and directories, removing old programs, and checking their health."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import batches
from cuda_progcache.store.tiers.envelope import MANIFESTS, PROGRAMS, object_name
from cuda_progcache.store.tiers.packs import packs_on, write_pack
from cuda_progcache.store.tiers.sides import (
    Item,
    NotMade,
    Side,
    TierSide,
    is_url,
    manifests_of,
    side,
    side_of,
)

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings

#: Called with the number of programs done, their total, and the bytes copied.
Progress = Callable[[int, int, int], None]


class SyncReport(NamedTuple):
    """The result of a :func:`sync`.

    Attributes
    ----------
    copied, bytes : int
        Programs that were copied, or would be, and the size of their data (as listed, for objects that weren't read).
    there : int
        Programs that the target already had.
    missing : int
        Requested programs that the source doesn't have.
    unusable : int
        Programs left out because they are damaged or have no trusted signature.
    refused : int
        Programs that are too large for the target.
    manifests : int
        Header manifests that were copied, or merged with the target's.
    packed : int
        The number of programs in the pack that was written; 0 if none was.
    """

    copied: int
    bytes: int
    there: int
    missing: int
    unusable: int
    refused: int
    manifests: int
    packed: int = 0


def sync(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    digests: Collection[str] | None = None,
    pack: str | None = None,
    dry_run: bool = False,
    on_progress: Progress | None = None,
) -> SyncReport:
    """Copy the programs that the target lacks, and the header manifests that lead to them.

    If this is interrupted, what was copied stays, and the next run continues. Nothing is removed.

    Parameters
    ----------
    source, target : str or path
        A directory, or a tier's URL.
    digests : collection of str, optional
        Only these programs, for instance those of a lockfile. Required if the source can't list.
    pack : str, optional
        The lockfile's digest: also write its programs as one object, for machines that have none of them. It is only
        written if the source has all of them.
    dry_run : bool
        Don't copy; report what would be copied.
    on_progress : callable, optional
        Called after each group of programs.

    Raises
    ------
    StoreError
        One side can't be reached, read or written, or the source can't list; the pack would be too large.
    ConfigError
        A URL is invalid.
    """
    if pack is not None and (digests is None or not is_url(os.fspath(target))):
        raise ValueError("a pack needs the digests of a lockfile's programs, and a tier as the target")
    origin = side(source, writes=False)
    unmade = dry_run and not is_url(os.fspath(target)) and not os.path.isdir(target)
    goal = NotMade(os.fspath(target)) if unmade else side(target, writes=not dry_run)
    try:
        copying = _Sync(origin, goal, None if digests is None else frozenset(digests), on_progress)
        report = copying.run(dry_run=dry_run)
        if pack is not None and isinstance(goal, TierSide) and not (dry_run or report.missing or report.unusable):
            report = report._replace(packed=write_pack(origin, goal, pack, copying.asked or ()))
        return report
    finally:
        origin.close()
        goal.close()


class _Sync:
    def __init__(self, source: Side, target: Side, asked: frozenset[str] | None, on_progress: Progress | None) -> None:
        self.source, self.target, self.asked = source, target, asked
        self.on_progress = on_progress or (lambda *_: None)
        self.copied = self.size = self.unusable = self.refused = 0

    def run(self, *, dry_run: bool) -> SyncReport:
        sizes = self._sizes()
        there = self._there(sizes)
        wanted = [digest for digest in sorted(sizes) if digest not in there]
        missing = 0 if self.asked is None else len(self.asked - sizes.keys())
        if dry_run:
            total = sum(sizes[digest] for digest in wanted)
            return SyncReport(len(wanted), total, len(there), missing, 0, 0, 0)
        done, unread = 0, 0
        self.on_progress(done, len(wanted), 0)
        for batch in batches(wanted, lambda digest: sizes[digest]):
            unread += len(batch) - self._copy(batch)
            done += len(batch)
            self.on_progress(done, len(wanted), self.size)
        manifests = self._manifests(sizes)
        return SyncReport(self.copied, self.size, len(there), missing + unread, self.unusable, self.refused, manifests)

    def _sizes(self) -> dict[str, int]:
        """Digests and sizes of the requested programs that may be in the source."""
        try:
            found = self.source.sizes(PROGRAMS)
        except OSError as exc:
            if self.asked is None:
                raise StoreError(
                    exc.errno, f"{exc.strerror or exc}; name the programs to copy (--lock)", self.source.name
                ) from exc
            return dict.fromkeys(self.asked, 0)
        return found if self.asked is None else {one: size for one, size in found.items() if one in self.asked}

    def _there(self, sizes: Iterable[str]) -> set[str]:
        """The programs that the target has; if it can't list, they are requested one by one."""
        try:
            return set(self.target.sizes(PROGRAMS)).intersection(sizes)
        except OSError:
            found: set[str] = set()
            for batch in batches(sorted(sizes), lambda _: 0):
                found.update(one.digest for one in self.target.read(PROGRAMS, batch) if isinstance(one, Item))
            return found

    def _copy(self, batch: Sequence[str]) -> int:
        """Copy programs; return how many of them the source had."""
        read = list(self.source.read(PROGRAMS, batch))
        items = [one for one in read if isinstance(one, Item)]
        self.unusable += len(read) - len(items)
        kept = self.target.write(PROGRAMS, items)
        self.copied += kept
        self.refused += len(items) - kept
        self.size += sum(len(one.data) for one in items)
        return len(read)

    def _manifests(self, digests: Collection[str]) -> int:
        wanted = None if self.asked is None else digests
        return sum(self.target.write(MANIFESTS, items) for items in manifests_of(self.source, wanted))


class Collected(NamedTuple):
    """The result of :func:`collect`.

    Attributes
    ----------
    removed, bytes : int
        Programs that were removed, or would be, and their size on the tier.
    kept : int
        Programs that stay.
    pinned : int
        How many of those are old, but are kept because of ``keep``.
    undated : int
        How many of those have no known age, because the service doesn't report it.
    manifests : int
        Header manifests that were removed, or would be.
    packs : int
        Packs that were removed, or would be; ``bytes`` includes them.
    """

    removed: int
    bytes: int
    kept: int
    pinned: int
    undated: int
    manifests: int
    packs: int = 0


def collect(
    tier: str,
    *,
    older_than: float,
    keep: Collection[str] = (),
    keep_packs: Collection[str] = (),
    dry_run: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """Remove programs, header manifests and packs that were written long ago (on Redis: last used).

    The tier is listed; no object is read. If some programs are to be kept, all header manifests are kept as well, since
    finding out which of them lead to these programs would mean reading them.

    Parameters
    ----------
    tier : str
        Its URL.
    older_than : float
        The minimum age in seconds.
    keep : collection of str
        Digests of programs to keep, whatever their age.
    keep_packs : collection of str
        Digests of lockfiles whose packs are kept.
    dry_run : bool
        Remove nothing; report what would be removed.
    on_progress : callable, optional
        Called with the number of objects removed, and their total.

    Raises
    ------
    StoreError
        The tier can't be listed or written.
    """
    if older_than < 0:
        raise ValueError(f"older_than must be a number of seconds, 0 or more, not {older_than}")
    opened = side(tier, writes=not dry_run)
    if not isinstance(opened, TierSide):
        raise StoreError(None, "not a tier but a directory; use cuda-progcache prune --cache-dir", opened.name)
    try:
        before = time.time() - older_than
        packs = {
            one.name: one.size
            for digest, one in packs_on(opened)
            if 0 < one.modified < before and digest not in keep_packs
        }
        return _collect(opened, before, frozenset(keep), packs, dry_run, on_progress or (lambda *_: None))
    finally:
        opened.close()


def _collect(
    tier: TierSide,
    before: float,
    keep: frozenset[str],
    packs: Mapping[str, int],
    dry_run: bool,  # noqa: FBT001
    on_progress: Callable[[int, int], None],
) -> Collected:
    old: dict[str, int] = {}
    kept = pinned = undated = 0
    for digest, listed in tier.listed(PROGRAMS):
        if 0 < listed.modified < before and digest not in keep:
            old[object_name(PROGRAMS, digest)] = listed.size
            continue
        kept += 1
        pinned += digest in keep and 0 < listed.modified < before
        undated += listed.modified <= 0
    manifests = []
    if not keep:
        listing = tier.listed(MANIFESTS)
        manifests = [object_name(MANIFESTS, digest) for digest, one in listing if 0 < one.modified < before]
    removed = [*old, *manifests, *packs]
    if not dry_run:
        done = 0
        for batch in batches(removed, lambda _: 0):
            tier.delete(batch)
            done += len(batch)
            on_progress(done, len(removed))
    size = sum(old.values()) + sum(packs.values())
    return Collected(len(old), size, kept, pinned, undated, len(manifests), len(packs))


class Health(NamedTuple):
    """The health of a tier.

    Attributes
    ----------
    url, mode, trust : str
    ok : bool
        Whether it answers.
    trouble : str
        Why it doesn't; empty if it does.
    latency : float or None
        Seconds that the fastest of three lookups took.
    objects, bytes : int or None
        The number and size of its programs; None if they weren't requested or can't be listed.
    """

    url: str
    mode: str
    trust: str
    ok: bool
    trouble: str
    latency: float | None
    objects: int | None = None
    bytes: int | None = None


def health(settings: TierSettings, *, count: bool = False) -> Health:
    """Measure a tier with three lookups that miss, and optionally list its contents.

    Parameters
    ----------
    settings : TierSettings
    count : bool
        Whether to list its contents, which may take long.
    """
    told = (settings.url, settings.mode, settings.trust)
    try:
        opened = side_of(settings)
        try:
            return Health(*told, True, "", *_measured(opened, count=count))
        finally:
            opened.close()
    except OSError as exc:
        return Health(*told, False, exc.strerror or str(exc), None)


def _measured(opened: Side, *, count: bool) -> tuple[float, int | None, int | None]:
    """Seconds that a lookup takes, and the number and bytes of the programs. For a directory, a listing is timed."""
    if isinstance(opened, TierSide):
        latency = min(opened.asked() for _ in range(3))
        try:
            sizes = opened.sizes(PROGRAMS) if count else None
        except OSError:
            sizes = None
    else:
        started = time.perf_counter()
        sizes = opened.sizes(PROGRAMS)
        latency = time.perf_counter() - started
    return latency, *((None, None) if sizes is None else (len(sizes), sum(sizes.values())))
