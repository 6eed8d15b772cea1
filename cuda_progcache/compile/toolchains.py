# SPDX-License-Identifier: Apache-2.0
"""The identities of the compilers that made a cache's entries, so that a machine without compilers can use it.

A key contains the identity of the compiler's files. If no compiler is installed, lookups use the identities of those
that made the cache's entries, so a host that only runs programs needs no compiler. The identities are kept as small
files under ``toolchains/`` in a cache, are also found in layers, and can be recovered from the entries' records, for
instance after a bundle was imported. ``CUDA_PROGCACHE_TOOLCHAIN`` names such a file, or a cache's directory, to try
first.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from cuda_progcache._util import files
from cuda_progcache._util.digest import sha256
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.keys.toolchain import NotInstalledError, ToolFile, standing_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

Tools = tuple[tuple[str, str], ...]
"""Name and identity of each of a compiler's files, as in a key."""

Slot = tuple[str, bool]
"""The arguments of :func:`cuda_progcache.keys.toolchain.toolchain`: a code type, and whether with libdevice."""

#: The code type that a toolchain compiles, by the name of its first file.
_CODE_TYPES = {"nvrtc": "c++", "nvJitLink": "ptx", "driver": "ptx", "nvvm": "nvvm"}
#: The maximum number of toolchains to try per slot, and of lookups.
_MOST, _TRIES = 8, 32
_SETTING = "CUDA_PROGCACHE_TOOLCHAIN"


def note(cache: Any, tools: Iterable[ToolFile]) -> None:
    """Store the identity of the compiler that made an entry of this cache, unless it is known."""
    root = getattr(cache, "directory", None)
    if root is None:
        return
    for one in _parted((tool.name, tool.identity) for tool in tools):
        name, content = _file_of(one)
        path = os.path.join(root, "toolchains", name)
        if os.path.lexists(path):
            continue
        from cuda_progcache.store.derived import write_beside

        with contextlib.suppress(OSError):  # disposable: the entries' records have it as well
            write_beside(root, path, content)


def _parted(tools: Iterable[tuple[str, str]]) -> list[Tools]:
    """Return the toolchains among the files of a record: a link's record also has those of its inputs."""
    found: list[list[tuple[str, str]]] = []
    for name, identity in tools:
        if name in _CODE_TYPES:
            found.append([])
        if found:
            found[-1].append((name, identity))
    return [tuple(one) for one in found]


@functools.lru_cache(maxsize=16)
def _file_of(tools: Tools) -> tuple[str, bytes]:
    """Return the name and content of a toolchain's file."""
    import json

    content = json.dumps({"format": 1, "tools": tools}, indent=1).encode()
    return sha256(content).hexdigest()[:32], content


def _read(path: str) -> list[Tools]:
    import json

    try:
        content, _ = files.read_regular(path)
        found = json.loads(content or b"")
        return _parted((str(name), str(identity)) for name, identity in found["tools"]) if found["format"] == 1 else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _in_folder(folder: str) -> Iterator[Tools]:
    try:
        with os.scandir(folder) as found:
            aged = sorted(((item.stat().st_mtime_ns, item.path) for item in found), reverse=True)
    except OSError:
        return
    for _, path in aged:
        yield from _read(path)


def made_for(cache: Any) -> dict[Slot, list[tuple[ToolFile, ...]]]:
    """Return the toolchains that made a cache's entries, by slot, the latest first."""
    named = os.environ.get(_SETTING)
    found: dict[Slot, dict[tuple[ToolFile, ...], None]] = {}

    def take(tools: Iterable[Tools]) -> None:
        for one in tools:
            slot = (_CODE_TYPES[one[0][0]], any(name == "libdevice" for name, _ in one))
            found.setdefault(slot, {})[tuple(ToolFile(name, "", identity) for name, identity in one)] = None

    if named:
        take(_in_folder(os.path.join(named, "toolchains")) if os.path.isdir(named) else _read(named))
    directory = getattr(cache, "directory", None)
    for root in dict.fromkeys([*([directory] if directory else []), *map(str, getattr(cache, "roots", ()))]):
        take(_in_folder(os.path.join(root, "toolchains")))
    if not found:
        take(_of_records(cache))
    return {slot: list(tools)[:_MOST] for slot, tools in found.items()}


def _of_records(cache: Any) -> list[Tools]:
    """Return the toolchains in a cache's records, and store them in the cache, since reading all records takes long."""
    entries = getattr(cache, "entries", None)
    if entries is None:
        return []  # a store of cuda.core, which can't be listed
    try:
        recorded = {tuple((tool.name, tool.digest) for tool in entry.about.toolchain) for entry in entries()}
    except NotImplementedError:
        return []  # one of ours that can't be listed either
    except OSError as error:
        from cuda_progcache._util.warning import warn

        what = f"the records of {cache!r} can't be read, so it isn't known which compilers made its programs: {error}"
        warn(what, ProgCacheWarning)
        return []
    for tools in recorded:
        note(cache, (ToolFile(name, "", identity) for name, identity in tools))
    return [one for tools in recorded for one in _parted(tools)]


class _StandIns(dict[Slot, tuple[ToolFile, ...]]):
    """The toolchains to try, and the slots that a lookup has asked for."""

    def __init__(self, tools: Mapping[Slot, tuple[ToolFile, ...]]) -> None:
        super().__init__(tools)
        self.asked: dict[Slot, None] = {}

    def __getitem__(self, slot: Slot) -> tuple[ToolFile, ...]:
        self.asked[slot] = None
        return super().__getitem__(slot)


def without_compiler(cache: Any, look: Callable[[bool], T | None]) -> T | None:
    """Look a program up on a machine without the compiler, with each toolchain that made the cache's entries.

    Parameters
    ----------
    cache : store
    look : callable
        Does a lookup and returns None on a miss. Its argument says whether the lookup is a repetition, which isn't
        counted.

    Returns
    -------
    The first result of ``look``; None if there is none.
    """
    known = made_for(cache)
    latest = _StandIns({slot: tools[0] for slot, tools in known.items()})
    try:
        with standing_in(latest):
            found = look(False)
        asked = list(latest.asked)
        others = itertools.product(*(known[slot] for slot in asked))
        for chosen in itertools.islice(others, 1, _TRIES):
            if found is not None:
                break
            with standing_in({**latest, **dict(zip(asked, chosen, strict=True))}):
                found = look(True)
    except NotInstalledError:
        return None  # it needs a compiler that made no entry of this cache
    return found
