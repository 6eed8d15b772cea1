# SPDX-License-Identifier: Apache-2.0
"""Locks that a fork can't leave locked in the child."""

from __future__ import annotations

import os
import threading
import weakref


class ForkSafeLock(type(threading.RLock())):  # type: ignore[misc]  # its methods are C, and a hit calls four of them
    """A reentrant lock around state in memory; a fork waits until nobody holds it.

    So the child finds the lock free and what it guards whole. Hold it for memory operations only, never for I/O, never
    two at once, and make none while holding one.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        with _registry:
            _locks.add(self)


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
#: Held through a fork: nobody adds a lock that the fork wouldn't know of, and two forks don't wait for each other's.
#: Reentrant, as the locks are: a fork out of a signal handler that interrupted a holder must not wait for itself.
_registry = threading.RLock()
_held: list[list[ForkSafeLock]] = []  # by the forks in progress: one, or those of nested signal handlers


def _before_fork() -> None:
    _registry.acquire()
    held = list(_locks)
    for lock in held:
        lock.acquire()
    _held.append(held)


def _after_fork() -> None:
    for lock in _held.pop():
        lock.release()
    _registry.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
