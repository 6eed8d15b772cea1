# SPDX-License-Identifier: Apache-2.0
"""Locks that are never left locked in a forked child."""

from __future__ import annotations

import os
import threading
import weakref


class ForkSafeLock(type(threading.RLock())):  # type: ignore[misc]  # its methods are C, and a hit calls four of them
    """A reentrant lock for state in memory; a fork waits until no thread holds it.

    The child therefore finds the lock free and the guarded state consistent. Hold it for memory operations only, never
    for I/O. Never hold two at once, and don't create one while holding another.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        with _registry:
            _locks.add(self)


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
#: Held during a fork, so that no thread adds a lock that the fork would miss, and two forks can't deadlock. Reentrant,
#: like the locks: a fork in a signal handler that interrupted a holder must not wait for itself.
_registry = threading.RLock()
_held: list[list[ForkSafeLock]] = []  # the locks of each fork in progress: one, or those of nested signal handlers


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
