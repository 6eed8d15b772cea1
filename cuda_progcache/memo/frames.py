# SPDX-License-Identifier: Apache-2.0
"""The running memoized calls, and the files and variables that each is found to depend on while it runs."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import forks
from cuda_progcache._util.running import Running, running, under_way

if TYPE_CHECKING:
    from cuda_progcache.memo.files import Watched


class Frame(Running):
    """A memoized call whose body runs.

    ``node`` is its id in the call tree, or None. ``watched`` are the files, by path, and ``variables`` the environment
    variables that the call tracked or that the calls it made depend on.
    """

    __slots__ = ("node", "room", "variables", "watched")

    def __init__(self, key: Any, name: str, parent: Running | None, node: str | None = None) -> None:
        super().__init__(key, name, parent)
        self.node = node
        self.room = 0
        self.watched: dict[str, Watched] = {}
        self.variables: dict[str, str | None] = {}


#: Set while a call is run again: memoized calls in it don't hit.
refreshing: ContextVar[bool] = ContextVar("cuda_progcache_refreshing", default=False)

#: Every frame of this process, by its id.
_under_way: dict[int, Frame] = {}


def frames_here() -> list[Frame]:
    """Return the calls that depend on a file read now: the innermost one that runs in this thread or task.

    A thread doesn't know which call's body started it. If no call runs in this thread or task, all calls that run in
    this process are returned.
    """
    here = (call for call in under_way() if isinstance(call, Frame))
    return list(itertools.islice(here, 1)) or list(_under_way.values())


#: The fewest stack frames that the engine uses between a call and its body. The recursion limit is raised by this many,
#: and no more, so that an endless recursion still ends.
OVERHEAD = 8
#: The same for a function that calls itself. Up to Python 3.11 a wrapper's call counts twice: as a frame and a C call.
SHORTEST_OVERHEAD = 2 if sys.version_info < (3, 12) else 1
_room = threading.Lock()


def _allow(frames: int) -> None:
    """Raise the recursion limit by the engine's own frames, or lower it again (less than 1 KiB of stack a frame)."""
    with _room, contextlib.suppress(RecursionError):  # the stack is too deep at the moment for a lower limit
        sys.setrecursionlimit(sys.getrecursionlimit() + frames)


def enter(frame: Frame, room: int = 0) -> Any:
    """Make a call the innermost one that runs in this thread or task; return a token for :func:`leave`.

    The recursion limit is raised by ``room`` stack frames until then.
    """
    frame.room = room
    _allow(room)
    _under_way[id(frame)] = frame
    return running.set(frame)


def leave(frame: Frame, token: Any) -> None:
    """Undo :func:`enter`."""
    running.reset(token)
    _under_way.pop(id(frame), None)
    _allow(-frame.room)


def hand_up(frames: Iterable[Frame], watched: Iterable[Watched], variables: Mapping[str, str | None]) -> None:
    """Add the files and variables that a call depends on to the enclosing calls."""
    for frame in frames:
        for item in watched:
            frame.watched.setdefault(item.path, item)
        for name, value in variables.items():
            frame.variables.setdefault(name, value)


def _forget() -> None:
    global _room  # noqa: PLW0603 - a lock that another thread held stays locked in a forked child
    _room = threading.Lock()
    running.set(None)
    _under_way.clear()


# Calls made in a forked child aren't children of the call that runs in the parent.
forks.in_child(_forget)
