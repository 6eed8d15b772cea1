# SPDX-License-Identifier: Apache-2.0
"""What differs between two binaries: kernel by kernel, in machine code and in what they use.

Machine code is compared as :func:`~cuda_progcache.inspect.listing.normalised` gives it, so what only moved is equal.
PTX is compared line by line, anything else byte by byte.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.inspect.listing import instructions, normalised
from cuda_progcache.inspect.resources import Resources, resource_usage

_CUBIN = b"\x7fELF"
_PTX = re.compile(rb"^\s*\.version\s", re.MULTILINE)


class KernelDiff(NamedTuple):
    """What differs of one kernel.

    Attributes
    ----------
    name : str
        As it stands in the newer binary; in the older one, if it is gone there.
    before, after : Resources or None
        What it uses; None where it isn't there.
    lines : tuple of str
        A unified diff of the machine code; empty where that is equal, or the kernel stands on one side only.
    """

    name: str
    before: Resources | None
    after: Resources | None
    lines: tuple[str, ...]

    @property
    def kind(self) -> str:
        """``"same"``, ``"changed"``, ``"added"`` or ``"removed"``."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "removed"
        return "changed" if self.lines or self.deltas else "same"

    @property
    def deltas(self) -> dict[str, tuple[int | None, int | None]]:
        """Field of :class:`Resources` to its values before and after, where they differ."""
        if self.before is None or self.after is None:
            return {}
        old, new = self.before._asdict(), self.after._asdict()
        return {field: (old[field], new[field]) for field in old if old[field] != new[field]}


class BinaryDiff(NamedTuple):
    """What differs between two binaries.

    Attributes
    ----------
    equal : bool
        The bytes are equal.
    kernels : tuple of KernelDiff
        Of two cubins, in the order of the newer one; those that are gone come last.
    lines : tuple of str
        Of two PTX texts: a unified diff.
    """

    equal: bool
    kernels: tuple[KernelDiff, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def same_code(self) -> bool:
        """Whether the machine code of every kernel is equal; of what isn't a cubin, whether the bytes are."""
        if self.equal:
            return True
        return bool(self.kernels) and all(one.kind == "same" for one in self.kernels)


def diff(before: bytes, after: bytes, context: int = 3) -> BinaryDiff:
    """Compare two binaries.

    Parameters
    ----------
    before, after : bytes
        Cubins, PTX, or LTO-IR.
    context : int
        Equal lines around each difference.

    Returns
    -------
    BinaryDiff
        Of two cubins by kernel, of two PTX texts by line; else it says whether they are equal.

    Raises
    ------
    InspectError
        If a cubin is damaged, or nvdisasm isn't installed or refuses it.
    """
    if before.startswith(_CUBIN) and after.startswith(_CUBIN):
        return BinaryDiff(before == after, _by_kernel(before, after, context))
    if _PTX.search(before[:4096]) and _PTX.search(after[:4096]):
        old, new = (text.rstrip(b"\0").decode("utf-8", "replace").splitlines() for text in (before, after))
        return BinaryDiff(before == after, lines=_unified(old, new, context))
    return BinaryDiff(before == after)


def _by_kernel(before: bytes, after: bytes, context: int) -> tuple[KernelDiff, ...]:
    old, new = resource_usage(before), resource_usage(after)
    if before == after:
        return tuple(KernelDiff(name, used, used, ()) for name, used in new.items())
    old_code, new_code = instructions(before), instructions(after)
    counterparts = paired(list(old), list(new))
    found = []
    for name, used in new.items():
        other = counterparts.get(name)
        lines: tuple[str, ...] = ()
        if other is not None:
            # Its own name stands in the code where it is the target of a label; under another name that isn't a change.
            texts = [line.replace(other, name) for line in normalised(old_code[other])]
            lines = _unified(texts, normalised(new_code[name]), context)
        found.append(KernelDiff(name, None if other is None else old[other], used, lines))
    gone = old.keys() - set(counterparts.values())
    return (*found, *(KernelDiff(name, used, None, ()) for name, used in old.items() if name in gone))


def _unified(before: list[str], after: list[str], context: int) -> tuple[str, ...]:
    return tuple(difflib.unified_diff(before, after, "before", "after", lineterm="", n=context))


def paired(before: list[str], after: list[str]) -> Mapping[str, str]:
    """Which kernel of an older binary each of a newer one is compared with.

    The one of the same name; of the others, in their order, one of the same identifier (two instances of a template);
    and if one is left on each side, these two.

    Returns
    -------
    Mapping
        Name in ``after`` to name in ``before``; those without a counterpart aren't there.
    """
    found = {name: name for name in after if name in before}
    free = [name for name in before if name not in found]
    for name in after:
        if name not in found:
            alike = next((other for other in free if identifier(other) == identifier(name)), None)
            if alike is not None:
                found[name] = alike
                free.remove(alike)
    left = [name for name in after if name not in found]
    if len(left) == len(free) == 1:
        found[left[0]] = free[0]
    return found


def identifier(name: str) -> str:
    """The function's own name in a mangled one: ``gemv`` in ``_ZN3lib4gemvIfEEvPT_``; another name as it is."""
    if not name.startswith("_Z"):
        return name
    rest, nested = name[2:], False
    if rest.startswith("N"):
        rest, nested = rest[1:].lstrip("KVr"), True
    last = ""
    while found := re.match(r"\d+", rest):
        start, size = found.end(), int(found[0])
        last, rest = rest[start : start + size], rest[start + size :]
        if not nested:
            break
    return last or name
