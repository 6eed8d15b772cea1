# SPDX-License-Identifier: Apache-2.0
"""The differences between two binaries: kernel by kernel, in machine code and in resource usage.

Machine code is compared as :func:`~cuda_progcache.inspect.listing.normalised` returns it, so code that only moved is
equal. PTX is compared line by line, anything else byte by byte.
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
    """The differences in one kernel.

    Attributes
    ----------
    name : str
        The kernel's name in the newer binary, or in the older one if the newer doesn't have the kernel.
    before, after : Resources or None
        The kernel's resource usage; None if that binary doesn't have the kernel.
    lines : tuple of str
        A unified diff of the machine code; empty if the code is equal, or only one binary has the kernel.
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
        """The fields of :class:`Resources` that differ, with their values before and after."""
        if self.before is None or self.after is None:
            return {}
        old, new = self.before._asdict(), self.after._asdict()
        return {field: (old[field], new[field]) for field in old if old[field] != new[field]}


class BinaryDiff(NamedTuple):
    """The differences between two binaries.

    Attributes
    ----------
    equal : bool
        Whether the bytes are equal.
    kernels : tuple of KernelDiff
        For two cubins, the kernels in the order of the newer one; removed kernels come last.
    lines : tuple of str
        For two PTX texts, a unified diff.
    """

    equal: bool
    kernels: tuple[KernelDiff, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def same_code(self) -> bool:
        """Whether every kernel is the same in code and resources; for anything but cubins, whether the bytes are."""
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
        The number of equal lines to show around each difference.

    Returns
    -------
    BinaryDiff
        The differences: by kernel for two cubins, by line for two PTX texts, otherwise only whether they are equal.

    Raises
    ------
    InspectError
        If a cubin is corrupt, or nvdisasm isn't installed or rejects it.
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
            # The code may contain the kernel's own name as a label; a renamed kernel isn't a changed one.
            texts = [line.replace(other, name) for line in normalised(old_code[other])]
            lines = _unified(texts, normalised(new_code[name]), context)
        found.append(KernelDiff(name, None if other is None else old[other], used, lines))
    gone = old.keys() - set(counterparts.values())
    return (*found, *(KernelDiff(name, used, None, ()) for name, used in old.items() if name in gone))


def _unified(before: list[str], after: list[str], context: int) -> tuple[str, ...]:
    return tuple(difflib.unified_diff(before, after, "before", "after", lineterm="", n=context))


def paired(before: list[str], after: list[str]) -> Mapping[str, str]:
    """Match each kernel of a newer binary with the kernel of an older one to compare it with.

    A kernel is matched with the kernel of the same name. The others are matched, in order, with a kernel of the same
    identifier (two instances of a template). If one kernel is then left on each side, these two are matched.

    Returns
    -------
    Mapping
        Name in ``after`` to name in ``before``, without kernels that have no counterpart.
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
    """Return the function's own name from a mangled one: ``gemv`` from ``_ZN3lib4gemvIfEEvPT_``; others unchanged."""
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
