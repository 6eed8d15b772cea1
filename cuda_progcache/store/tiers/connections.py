# SPDX-License-Identifier: Apache-2.0
"""A pool of connections to one server."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.timed_sockets import is_readable

if TYPE_CHECKING:

    class Connection(Protocol):
        """A connection that the pool can keep."""

        sock: Any

        def close(self) -> None:
            """Close it, whatever its state."""


C = TypeVar("C", bound="Connection")
R = TypeVar("R")

#: Seconds that an unused connection is kept. Load balancers silently drop one after a minute or more.
IDLE = 30.0


class HungUpError(StoreError):
    """The server closed the connection before it answered anything."""


class Connections(Generic[C]):
    """The currently unused connections to a server. A forked child opens its own.

    Parameters
    ----------
    connect : callable
        Opens a connection within the time limit of the thread's request.
    most : int
        The number of connections to keep; if more threads need one, more are opened, and closed afterwards.
    """

    def __init__(self, connect: Callable[[], C], most: int) -> None:
        self._connect = connect
        self._most = most
        self._lock = ForkSafeLock()
        self._kept: list[tuple[float, C]] = []  # with the time since which each is unused
        self._pid = os.getpid()
        weakref.finalize(self, _close, self._kept).atexit = False

    def use(self, call: Callable[[C], R]) -> R:
        """Make a call on a connection, which is kept afterwards if it is still open.

        A server may close a kept connection just when it is used. Then the call is made again, on a new one.

        Parameters
        ----------
        call : callable
            Takes a connection, and must read the whole answer. Its result is returned.

        Raises
        ------
        HungUpError
            The server closes a new connection, too.
        """
        kept = self._take()
        if kept is not None:
            try:
                return self._used(kept, call)
            except HungUpError:
                self.close()  # the others are as old
        return self._used(self._connect(), call)

    def _used(self, connection: C, call: Callable[[C], R]) -> R:
        try:
            value = call(connection)
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None and len(self._kept) < self._most and self._pid == os.getpid():
            self._kept.append((time.monotonic(), connection))
        else:
            connection.close()
        return value

    def _take(self) -> C | None:
        """A kept connection that is open and has no unread bytes; ``None`` if there is none."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self.close()  # on a socket shared by parent and child, each would get the other's answers
                    self._pid = os.getpid()  # last, since other threads check it
        while self._kept:
            try:
                since, connection = self._kept.pop()
            except IndexError:  # another thread took it
                break
            if time.monotonic() - since < IDLE and not is_readable(connection.sock):
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close the kept connections; the next request opens a new one."""
        _close(self._kept)


def _close(connections: list[Any]) -> None:
    """Close connections; in a forked child, only the child's copies of their descriptors."""
    while connections:
        try:
            _, connection = connections.pop()
        except IndexError:  # another thread took it
            return
        connection.close()
