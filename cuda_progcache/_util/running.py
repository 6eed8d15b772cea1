# SPDX-License-Identifier: Apache-2.0
"""Which recorded call runs in this thread or task: what it asks for is its child, and has it as a parent.

Known down here, so that a compile can say who asked for it without knowing anything of how calls are kept.
"""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from functools import partial

from cuda_progcache._util.warning import asking, caller

TYPE_CHECKING = False  # importing typing takes 9 ms, and a hit in a new process needs this
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")


class Running:
    """A call whose body runs now.

    Parameters
    ----------
    key : str
        Under which it is, or will be, recorded.
    name : str
        What people know it by.
    parent : Running or None
        The call whose body made it.

    Attributes
    ----------
    children : dict
        Keys of the calls whose results it used, in their order.
    """

    __slots__ = ("children", "key", "name", "parent")

    def __init__(self, key: Any, name: str, parent: Running | None) -> None:
        self.key = key
        self.name = name
        self.parent = parent
        self.children: dict[Any, None] = {}

    def outwards(self) -> Iterator[Running]:
        """The call and those around it, the innermost first."""
        around: Running | None = self
        while around is not None:
            yield around
            around = around.parent


#: The innermost call whose body runs in this thread or task.
running: ContextVar[Running | None] = ContextVar("cuda_progcache_running", default=None)


def under_way() -> Iterator[Running]:
    """The calls whose bodies run here, the innermost first."""
    around = running.get()
    return iter(()) if around is None else around.outwards()


def note_child(key: str) -> None:
    """Tell the call that runs here, if there is one, that it used another call's result."""
    around = running.get()
    if around is not None:
        around.children[key] = None


class run:  # noqa: N801 - used as a function
    """Let a call be the one that runs here, and a child of the one around it: ``with run(key, name) as body``."""

    def __init__(self, key: str, name: str) -> None:
        self._made = Running(key, name, running.get())

    def __enter__(self) -> Running:
        note_child(self._made.key)
        self._token = running.set(self._made)
        return self._made

    def __exit__(self, *exc_info: object) -> None:
        running.reset(self._token)


def asked_by() -> list[dict[str, str]]:
    """Who asks for what is made here, as a record has it: ``[{"name", "key"}]``, or nothing."""
    around = running.get()
    return [] if around is None else [{"name": around.name, "key": str(around.key)}]


def here(work: Callable[P, R]) -> Callable[P, R]:
    """Give ``work`` to be called in another thread, where the same call runs as here; once per result of this.

    Warnings point at the line that asked for it, as they do here.
    """
    context = copy_context()
    context.run(asking.set, caller())
    return partial(context.run, work)
