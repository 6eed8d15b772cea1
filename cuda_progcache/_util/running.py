# SPDX-License-Identifier: Apache-2.0
"""The recorded call that is running in the current thread or task: the parent of whatever it asks for.

This module is on the lowest floor so that a compile can name its caller without depending on the storage of calls.
"""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from functools import partial

from cuda_progcache._util.warning import asking, caller

TYPE_CHECKING = False  # importing typing takes 9 ms, and a hit in a new process imports this module
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")


class Running:
    """A call whose body is running.

    Parameters
    ----------
    key : str
        The key under which the call is, or will be, recorded.
    name : str
        The call's name for display.
    parent : Running or None
        The enclosing call.

    Attributes
    ----------
    children : dict
        Keys of the calls whose results this call has used, in order.
    """

    __slots__ = ("children", "key", "name", "parent")

    def __init__(self, key: Any, name: str, parent: Running | None) -> None:
        self.key = key
        self.name = name
        self.parent = parent
        self.children: dict[Any, None] = {}

    def outwards(self) -> Iterator[Running]:
        """Yield this call and its enclosing calls, innermost first."""
        around: Running | None = self
        while around is not None:
            yield around
            around = around.parent


#: The innermost call whose body is running in the current thread or task.
running: ContextVar[Running | None] = ContextVar("cuda_progcache_running", default=None)


def under_way() -> Iterator[Running]:
    """Yield the calls whose bodies are running in the current thread or task, innermost first."""
    around = running.get()
    return iter(()) if around is None else around.outwards()


def note_child(key: str) -> None:
    """Note in the current call, if there is one, that it used another call's result."""
    around = running.get()
    if around is not None:
        around.children[key] = None


class run:  # noqa: N801 - used as a function
    """Make a call the current one, as a child of the enclosing call: ``with run(key, name) as body``."""

    def __init__(self, key: str, name: str) -> None:
        self._made = Running(key, name, running.get())

    def __enter__(self) -> Running:
        note_child(self._made.key)
        self._token = running.set(self._made)
        return self._made

    def __exit__(self, *exc_info: object) -> None:
        running.reset(self._token)


def asked_by() -> list[dict[str, str]]:
    """Return the current call in the form for a record, ``[{"name", "key"}]``; an empty list if there is none."""
    around = running.get()
    return [] if around is None else [{"name": around.name, "key": str(around.key)}]


def here(work: Callable[P, R]) -> Callable[P, R]:
    """Return ``work`` wrapped for another thread, so that it runs under the current call; use each wrapper once.

    Warnings from ``work`` point at the same line as warnings from the current thread.
    """
    context = copy_context()
    context.run(asking.set, caller())
    return partial(context.run, work)
