# SPDX-License-Identifier: Apache-2.0
"""Detect whether a folder was replaced during a compile: renamed, or reached through a link that changed.

The stamps of files don't show this: ``mv inc old; mv new inc`` moves whole trees of old files. So each folder and each
link on the path to the headers is checked, without following links.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator

from cuda_progcache._util.fields import NamedTuple

_MOST_LINKS = 40  # the limit of Linux

_Step = tuple[str, int, int, str]
"""A folder or link on the way to a path: its path, device, inode, and a link's target."""


def way(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every folder and link on the way to an absolute path, including the path itself.

    Yields
    ------
    (str, os.stat_result)
        The path of the folder or link and its own status (of a link, not of its target). The iteration ends at the
        first path that doesn't exist.
    """
    pending = path.split("/")[::-1]
    at = ""
    links = 0
    while pending:
        name = pending.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            at = at.rpartition("/")[0]
            continue
        here = f"{at}/{name}"
        try:
            status = os.lstat(here)
            target = os.readlink(here) if stat.S_ISLNK(status.st_mode) else None
        except OSError:
            return
        yield here, status
        if target is None:
            at = here
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        if target.startswith("/"):
            at = ""
        pending += target.split("/")[::-1]


def _steps(path: str) -> list[_Step]:
    return [
        (step, status.st_dev, status.st_ino, os.readlink(step) if stat.S_ISLNK(status.st_mode) else "")
        for step, status in way(path)
    ]


class Folders(NamedTuple):
    """The steps on the way to some folders, at one moment.

    Attributes
    ----------
    time_ns : int
        ``time.time_ns()`` of that moment.
    steps : dict
        The steps by folder.
    """

    time_ns: int
    steps: dict[str, list[_Step]]

    @classmethod
    def now(cls, folders: Iterable[str]) -> Folders:
        """Return the current state of these absolute paths."""
        time_ns = time.time_ns()
        return cls(time_ns, {folder: _steps(folder) for folder in dict.fromkeys(folders)})

    def moved(self, below: Iterable[str] = ()) -> str | None:
        """Return the first folder or link that was replaced or changed since; None if all are unchanged.

        Parameters
        ----------
        below : iterable of str
            More folders, whose state wasn't recorded. On the way to them, a folder or link that isn't among the
            recorded steps counts as changed if its status has changed since.
        """
        seen: set[str] = set()
        for folder, before in self.steps.items():
            now = _steps(folder)
            if now != before:
                return folder
            seen.update(step for step, *_ in now)
        for folder in below:
            for step, status in way(folder):
                if step not in seen:
                    seen.add(step)
                    if status.st_ctime_ns >= self.time_ns:
                        return step
        return None
