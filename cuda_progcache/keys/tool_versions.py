# SPDX-License-Identifier: Apache-2.0
"""Versions of compiler files, for display. Keys have builds instead (:mod:`~cuda_progcache.keys.toolchain`).

No library is loaded or read. The version is that of the wheel that installed the file, if the wheel's ``RECORD`` lists
the file with its current size (a file replaced by hand has another size). Otherwise it is taken from the file's name in
a toolkit (``libnvrtc.so.13.5.37``).
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
    """Return the version of a compiler file, such as ``13.5.37``; None if it isn't known."""
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
        if last != "nvidia":  # NVIDIA's wheels install everything in this folder
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
    """Return a toolchain as stored in records: ``[{"name", "digest", "version"}]``, with the version if it is known."""
    found = []
    for tool in tools:
        version = version_of(tool.path) if tool.path else None
        found.append({"name": tool.name, "digest": tool.identity} | ({"version": version} if version else {}))
    return found


def difference(now: list[str], before: list[str]) -> str:
    """Return the difference of a tool's builds: their versions if these differ, otherwise the full names.

    Parameters
    ----------
    now, before : list of str
        Names of builds, from :func:`named`.
    """
    shorter = [list(dict.fromkeys(name.partition(" ")[0] for name in names)) for names in (before, now)]
    told = shorter if shorter[0] != shorter[1] and all("." in name for names in shorter for name in names) else None
    was, is_ = told or (before, now)
    return f"{', '.join(was)} → {', '.join(is_)}"


def named(identity: str, version: str | None) -> str:
    """Return a build's name for display: ``13.5.37 (build feebac3bea34)``, or only the build."""
    build = next((part for part in identity.split(":")[1:] if part), identity)[:12]
    return f"{version} (build {build})" if version else f"build {build}"
