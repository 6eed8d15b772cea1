# SPDX-License-Identifier: Apache-2.0
"""The version of a compiler's file, for people: its build is what a key has (:mod:`~cuda_progcache.keys.toolchain`).

No library is loaded or read for it. A wheel that brought the file says it, if its ``RECORD`` has the file with the size
that it has now (one that was exchanged by hand has another); else the file's own name, as a toolkit installs it
(``libnvrtc.so.13.5.37``).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.keys.toolchain import ToolFile

_IN_NAME = re.compile(r"\.so\.(\d+(?:\.\d+)+)$")


def version_of(path: str) -> str | None:
    """The version of a compiler's file, such as ``13.5.37``; None where nothing says it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _version(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _version(path: str, size: int, _written: int) -> str | None:
    named = _IN_NAME.search(os.path.basename(os.path.realpath(path)))
    return _of_wheel(path, size) or (named[1] if named else None)


def _of_wheel(path: str, size: int) -> str | None:
    folder, tail = os.path.split(path)
    while folder != os.path.dirname(folder):
        folder, last = os.path.split(folder)
        tail = f"{last}/{tail}"
        if last != "nvidia":  # where NVIDIA's wheels put everything
            continue
        try:
            wheels = [name for name in os.listdir(folder) if name.startswith("nvidia") and name.endswith(".dist-info")]
        except OSError:
            return None
        for wheel in wheels:
            if _brought(os.path.join(folder, wheel, "RECORD"), tail, size):
                return wheel.removesuffix(".dist-info").rpartition("-")[2]
    return None


def _brought(record: str, name: str, size: int) -> bool:
    try:
        with open(record, encoding="utf-8", errors="replace") as lines:
            return any(line.startswith(f"{name},") and line.rstrip().endswith(f",{size}") for line in lines)
    except OSError:
        return False


def as_recorded(tools: Iterable[ToolFile]) -> list[dict[str, str]]:
    """A toolchain as records have it: ``[{"name", "digest", "version"}]``; the version where it is known."""
    found = []
    for tool in tools:
        version = version_of(tool.path) if tool.path else None
        found.append({"name": tool.name, "digest": tool.identity} | ({"version": version} if version else {}))
    return found


def difference(now: list[str], before: list[str]) -> str:
    """Two builds of a tool apart: by version where that tells them apart, else by build.

    Parameters
    ----------
    now, before : list of str
        As :func:`named` gives them.
    """
    shorter = [list(dict.fromkeys(name.partition(" ")[0] for name in names)) for names in (before, now)]
    told = shorter if shorter[0] != shorter[1] and all("." in name for names in shorter for name in names) else None
    was, is_ = told or (before, now)
    return f"{', '.join(was)} → {', '.join(is_)}"


def named(identity: str, version: str | None) -> str:
    """A build for people: ``13.5.37 (build feebac3bea34)``, or the build alone."""
    build = next((part for part in identity.split(":")[1:] if part), identity)[:12]
    return f"{version} (build {build})" if version else f"build {build}"
