# SPDX-License-Identifier: Apache-2.0
"""The differences between two lockfiles: the programs whose machine code changed, or only their keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.service.comparison import ProgramDiff, binary_of, compare

if TYPE_CHECKING:
    from cuda_progcache.service.lock import Lock, Locked
    from cuda_progcache.store.base import EntryInfo


class Change(NamedTuple):
    """A program that differs between two lockfiles.

    Attributes
    ----------
    title : str
        Kernel or name, parameters, architecture and target.
    status : {"code", "key", "bytes", "added", "removed", "unknown"}
        ``"code"``: the machine code or PTX differs. ``"key"``: only the key differs, the binary is the same.
        ``"bytes"``: the binary differs, but not its machine code. ``"added"``, ``"removed"``: the program is in one
        lockfile only. ``"unknown"``: a binary isn't in the cache.
    diff : ProgramDiff or None
        The differences; None if a binary isn't in the cache or the program is in one lockfile only.
    before, after : EntryInfo or None
        The entries; None if they aren't in the cache.
    missing : tuple of str
        ``"before"`` or ``"after"`` or both: the binaries that are needed but aren't in the cache.
    """

    title: str
    status: str
    diff: ProgramDiff | None = None
    before: EntryInfo | None = None
    after: EntryInfo | None = None
    missing: tuple[str, ...] = ()


def compare_locks(before: Lock, after: Lock, cache: Any, context: int = 3) -> list[Change]:
    """Return the differences between the programs of two lockfiles, using their binaries in a cache.

    Parameters
    ----------
    before, after : Lock
    cache : store or None
        The cache with the binaries; only those of programs that differ between the lockfiles are read.
    context : int
        Number of equal lines shown around each difference in the machine code.

    Returns
    -------
    list of Change
        In the order of ``after``, removed programs last. Equal programs are left out.

    Raises
    ------
    InspectError
        If nvdisasm isn't installed or refuses a cubin.
    """
    return [change for pair in _pairs(before, after) if (change := _changed(*pair, cache, context)) is not None]


def _pairs(before: Lock, after: Lock) -> Iterator[tuple[Locked | None, Locked | None]]:
    """Yield pairs of the same program in both lockfiles; if its source was edited, all but the source must match."""
    old = {program.identity: program for program in before.programs}
    new = {program.identity for program in after.programs}
    edited: dict[tuple[Any, ...], list[Locked]] = {}
    for identity, program in old.items():
        if identity not in new:
            edited.setdefault(_asked(program), []).append(program)
    for program in after.programs:
        same = old.get(program.identity)
        if same is None and edited.get(_asked(program)):
            same = edited[_asked(program)].pop(0)
        yield same, program
    for programs in edited.values():
        yield from ((program, None) for program in programs)


def _asked(program: Locked) -> tuple[Any, ...]:
    """Return the program's identity without the source's digest."""
    *about, rest = program.identity
    return (*about, rest.rpartition("\0")[0])


def _changed(before: Locked | None, after: Locked | None, cache: Any, context: int) -> Change | None:
    if before is None:
        return None if after is None else Change(after.title(), "added")
    if after is None:
        return Change(before.title(), "removed")
    if before.key == after.key and before.sha256 == after.sha256:
        return None
    entries = [_entry(cache, program.key) for program in (before, after)]
    missing = tuple(side for side, entry in zip(("before", "after"), entries, strict=True) if entry is None)
    old, new = entries
    if old is None or new is None:
        alike = before.sha256 and before.sha256 == after.sha256
        return Change(after.title(), "key" if alike else "unknown", None, old, new, () if alike else missing)
    found = compare((binary_of(old), old.about), (binary_of(new), new.about), context)
    status = "key" if found.binary.equal else "bytes" if found.binary.same_code else "code"
    return Change(after.title(), status, found, old, new)


def _entry(cache: Any, key: str) -> EntryInfo | None:
    if cache is None or not key:
        return None
    try:
        found: EntryInfo = cache.info(key)
    except KeyError:
        return None
    return found
