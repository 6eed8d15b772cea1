# SPDX-License-Identifier: Apache-2.0
"""Whether a folder was another one while something was compiled: renamed, or a link to it changed.

A file's own stamps don't tell of that: ``mv inc old; mv new inc`` moves whole trees of old files. So the folders on
the way to the headers are looked at, one by one, links as links.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator

from cuda_progcache._util.fields import NamedTuple

_MOST_LINKS = 40  # as many as Linux follows

_Step = tuple[str, int, int, str]
"""A folder or link on the way to a path: its path, device, inode, and what a link says."""


def way(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every folder and link that is passed on the way to an absolute path, the path itself included.

    Yields
    ------
    (str, os.stat_result)
        Its path, and its own status (of a link, not of what it leads to). It ends where something isn't there.
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
    """What leads to some folders, at one moment.

    Attributes
    ----------
    time_ns : int
        ``time.time_ns()`` of that moment.
    steps : dict
        By folder.
    """

    time_ns: int
    steps: dict[str, list[_Step]]

    @classmethod
    def now(cls, folders: Iterable[str]) -> Folders:
        """The state of these absolute paths now."""
        time_ns = time.time_ns()
        return cls(time_ns, {folder: _steps(folder) for folder in dict.fromkeys(folders)})

    def moved(self, below: Iterable[str] = ()) -> str | None:
        """The first folder that is another one now, or was made so since; None if all are the same.

        Parameters
        ----------
        below : iterable of str
            More folders, not looked at before: any of which, or of the links to which, something was changed since
            counts, as far as it lies below those that were looked at.
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
