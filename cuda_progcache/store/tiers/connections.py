# SPDX-License-Identifier: Apache-2.0
"""Connections to one server, kept for the next request."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store.tiers.timed_sockets import is_readable

if TYPE_CHECKING:

    class Connection(Protocol):
        """What is kept."""

        sock: Any

        def close(self) -> None:
            """Close it, whatever its state."""


C = TypeVar("C", bound="Connection")


class Connections(Generic[C]):
    """The connections to a server that no request uses at present. A forked child opens its own.

    Parameters
    ----------
    connect : callable
        Opens one, by the end of the thread's request.
    most : int
        How many are kept; more are opened where more threads ask, and closed afterwards.
    """

    def __init__(self, connect: Callable[[], C], most: int) -> None:
        self._connect = connect
        self._most = most
        self._lock = ForkSafeLock()
        self._kept: list[C] = []
        self._pid = os.getpid()
        weakref.finalize(self, _close, self._kept).atexit = False

    def take(self) -> C:
        """A connection that is open, and on which nothing lies that nobody has asked for."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self.close()  # a socket that is used by parent and child gives each the other's answers
                    self._pid = os.getpid()  # last: other threads go by it
        while self._kept:
            try:
                connection = self._kept.pop()
            except IndexError:  # another thread took it
                break
            if not is_readable(connection.sock):
                return connection
            connection.close()
        return self._connect()

    def give_back(self, connection: C) -> None:
        """Keep a connection whose last answer was read to its end; one that is closed is forgotten."""
        if connection.sock is not None and len(self._kept) < self._most and self._pid == os.getpid():
            self._kept.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close those that are kept; the next request opens one."""
        _close(self._kept)


def _close(connections: list[Any]) -> None:
    """Close connections; of those that a parent process has, only this process's share."""
    while connections:
        try:
            connection = connections.pop()
        except IndexError:  # another thread took it
            return
        connection.close()
