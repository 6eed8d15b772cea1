# SPDX-License-Identifier: Apache-2.0
"""Calls that a forked child makes to start anew: it has none of its parent's threads, and counts for itself."""

from __future__ import annotations

import os
import types
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    _Owner: TypeAlias = weakref.ref[object]

#: In the order in which they were registered; by identity, since an object may be equal to another, or unhashable.
_methods: dict[int, tuple[_Owner, Callable[[Any], Any]]] = {}


def in_child(call: Callable[[], Any]) -> None:
    """Call something in each child that this process forks.

    Parameters
    ----------
    call : callable
        A method doesn't keep its object alive, and is forgotten with it; anything else is held for good.
    """
    if isinstance(call, types.MethodType):
        owner = weakref.ref(call.__self__, _forget)
        _methods[id(owner)] = owner, call.__func__
    elif hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _forget(owner: _Owner, methods: dict[int, Any] = _methods) -> None:  # a module's names end before some objects
    methods.pop(id(owner), None)


def _call_methods() -> None:
    failed = []
    for owner, method in list(_methods.values()):
        living = owner()
        try:
            if living is not None:
                method(living)
        except Exception as exc:  # noqa: BLE001 - the others start anew all the same
            failed.append(exc)
    if failed:
        raise ExceptionGroup("after a fork", failed)  # which os.fork() writes to stderr


in_child(_call_methods)
