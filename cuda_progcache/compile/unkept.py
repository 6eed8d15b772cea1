# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled but not kept, because a hit could differ from a fresh compile. None is skipped silently.

Each is counted by its kind of reason (``stats().unkeyed``), reported by a warning that says how to fix it, once per
program and process, and listed in the cache's directory, for ``list --unkept`` and ``explain``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.warning import warn
from cuda_progcache.compile import lines
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.store.base import ProgramCacheResource
from cuda_progcache.store.derived import derived, forget_oldest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.compile_record import CompileRecord

#: Kind of reason: a pattern that recognizes its sentences (which also contain file names), and how to fix it. The first
#: match counts.
KINDS: dict[str, tuple[str, str]] = {
    "store": (
        r"^the cache couldn't store it",
        "Fix what the store reports, or use one of cuda_progcache's stores, which report more.",
    ),
    "working_directory": (
        r"^the working directory ",
        "Compile in a directory that exists, and don't change it during the compile.",
    ),
    "changed": (
        r" (?:was modified|was changed|were replaced|appeared) while | changed again and again ",
        "The next compile keeps it, if no file changes meanwhile.",
    ),
    "unreadable": (
        r" can't be read after the compile$|the trace can't tell$| can't be told from another ",
        "Make the headers readable, and avoid folders and names that begin with blanks.",
    ),
    "untold_headers": (
        r" doesn't tell which headers ",
        "Compile with an NVRTC that reports the headers it reads, or without includes.",
    ),
    "time_macro": (
        r"(?: uses| paste) __(?:DATE|TIME|TIMESTAMP)__",
        "Remove the macro, or define one of your own with define_macro; its value is in the key.",
    ),
    "undecided_header": (
        r"__has_include| tests for|gives the header's name|another macro|on to a macro| may paste ",
        "Write the header's name in the test instead of the macro.",
    ),
    "hermetic": (
        r" hermetically: ",
        "Compile with a header policy that isn't hermetic, if that is acceptable.",
    ),
    "option": (
        r"^(?:an |the )?option|precompiled header|--pch",
        "Compile without that option, or without a cache.",
    ),
    "other": ("", "Nothing more is known about this reason."),
}

#: The number of programs listed per cache, and the file size in bytes from which it is cut down to these.
_KEPT, _LARGEST = 256, 131_072
#: Programs that this process has warned about.
_told: set[tuple[str, str, str, str]] = set()
_MOST_TOLD = 4096


class Unkept(NamedTuple):
    """A program that wasn't kept.

    Attributes
    ----------
    digest : str
        The digest of the entry that it would have had.
    name, code_type, target_type, arch : str
    kind : str
        One of :data:`KINDS`.
    reason : str
        A sentence.
    when : float
        Seconds since the epoch.
    """

    digest: str
    name: str
    code_type: str
    target_type: str
    arch: str
    kind: str
    reason: str
    when: float

    @property
    def advice(self) -> str:
        """How to fix it."""
        return KINDS[self.kind][1] if self.kind in KINDS else KINDS["other"][1]


def kind_of(reason: str) -> str:
    """Return the kind of a reason."""
    return next(kind for kind, (words, _) in KINDS.items() if re.search(words, reason))


def note(cache: Any, about: CompileRecord, digest: str, reason: str) -> None:
    """Count, list and warn about a program that was compiled but not kept.

    Parameters
    ----------
    cache : store
        One of our stores, or another.
    about : CompileRecord
        The compile.
    digest : str
        The digest of the entry that it would have had.
    reason : str
    """
    made = (about.name, about.code_type, about.target_type, about.arch)
    one = Unkept(digest, *made, kind_of(reason), reason, time.time())
    if isinstance(cache, ProgramCacheResource):
        cache.count_unkeyed(one.kind)
        with contextlib.suppress(OSError):  # disposable
            _list(cache, one)
    program = (one.name, one.target_type, one.arch, one.kind)
    if program not in _told:
        if len(_told) >= _MOST_TOLD:
            _told.clear()
        _told.add(program)
        warn(f"{one.name} for {one.arch} was compiled but not kept: {reason}. {one.advice}", ProgCacheWarning)


def _list(cache: Any, one: Unkept) -> None:
    path = _path(cache)
    if path is None:
        kept = derived(cache, "unkept")
        kept.pop(one.digest, None)
        kept[one.digest] = one
        forget_oldest(kept, _KEPT)
        return
    if lines.append(cache, path, json.dumps(one)) > _LARGEST:
        lines.rewrite(cache, path, [json.dumps(known) for known in reversed(listed(cache)[:_KEPT])])


def forget(cache: Any, digest: str) -> None:
    """Remove a program from the list, since it is kept now."""
    path = _path(cache)
    if path is None:
        derived(cache, "unkept").pop(digest, None)
        return
    if os.path.lexists(path):
        known = listed(cache)
        left = [one for one in known if one.digest != digest]
        if len(left) < len(known):
            with contextlib.suppress(OSError):
                lines.rewrite(cache, path, [json.dumps(one) for one in reversed(left)])


def listed(cache: Any) -> list[Unkept]:
    """Return the programs that weren't kept in a cache, each once, the latest first."""
    path = _path(cache)
    if path is None:
        return list(reversed(derived(cache, "unkept").values()))
    found: dict[str, Unkept] = {}
    for line in reversed(lines.read(path)):
        with contextlib.suppress(ValueError, TypeError):  # truncated by a crash
            one = Unkept(*json.loads(line))
            found.setdefault(one.digest, one)
    return list(found.values())


def by_kind(unkept: Iterable[Unkept]) -> dict[str, int]:
    """Return the number of programs of each kind, the most frequent first."""
    return dict(Counter(one.kind for one in unkept).most_common())


def _path(cache: Any) -> str | None:
    root = getattr(cache, "directory", None)
    return None if root is None else os.path.join(root, "unkept", "programs")
