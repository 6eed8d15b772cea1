# SPDX-License-Identifier: Apache-2.0
"""Functions to call in a forked child to reset its state: it has none of the parent's threads, and its own counters."""

from __future__ import annotations

import os
import types
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    _Owner: TypeAlias = weakref.ref[object]

#: Registered methods in order; keyed by identity, since an object may be equal to another, or unhashable.
_methods: dict[int, tuple[_Owner, Callable[[Any], Any]]] = {}


def in_child(call: Callable[[], Any]) -> None:
    """Register a function to call in each child that this process forks.

    Parameters
    ----------
    call : callable
        A method doesn't keep its object alive, and is dropped with it. Any other callable is kept forever.
    """
    if isinstance(call, types.MethodType):
        owner = weakref.ref(call.__self__, _forget)
        _methods[id(owner)] = owner, call.__func__
    elif hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _forget(owner: _Owner, methods: dict[int, Any] = _methods) -> None:  # globals may be gone before some objects are
    methods.pop(id(owner), None)


def _call_methods() -> None:
    failed = []
    for owner, method in list(_methods.values()):
        living = owner()
        try:
            if living is not None:
                method(living)
        except Exception as exc:  # noqa: BLE001 - the others must run, too
            failed.append(exc)
    if failed:
        raise ExceptionGroup("after a fork", failed)  # os.fork() writes it to stderr


in_child(_call_methods)
