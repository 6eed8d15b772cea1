# SPDX-License-Identifier: Apache-2.0
"""Sockets whose waits end at the deadline of their thread's request, whatever the server does.

A socket's own time-out bounds each wait, but not their sum: a server that sends a byte a second can block a client
forever. These sockets know the request's deadline (:func:`hurry`), and each wait is limited to the time left. Only
looking up a host name needs a thread, since the system call for it has no time-out.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - socket.getaddrinfo would import it in a thread
import errno
import select
import socket
import threading
import time

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.deadline import within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.tiers.timed_tls import Tls

#: Seconds by which a wait may overrun.
_CLOSE_ENOUGH = 0.02
#: Used if available: ``select`` doesn't accept descriptors above 1023, which a process with many open files may have.
_poll = getattr(select, "poll", None)


class _Patience(threading.local):
    """The deadline of this thread's request."""

    until = 0.0


_patience = _Patience()


def hurry(until: float) -> None:
    """Set the deadline of this thread's next requests, on the clock of :func:`time.monotonic`."""
    _patience.until = until


def left() -> float:
    """Seconds that this thread's request may still take (TimeoutError if none are left)."""
    seconds = _patience.until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "took too long")
    return seconds


def _bound(waiting: socket.socket) -> None:
    """Limit a socket's waits to the time left for the thread's request.

    This takes a system call, which is skipped if the socket's time-out is close enough.
    """
    seconds, set_to = left(), waiting.gettimeout()
    if set_to is None or not seconds <= set_to <= seconds + _CLOSE_ENOUGH:
        waiting.settimeout(seconds)


class Timed(socket.socket):
    """The common part of sockets with and without TLS."""

    def recv(self, *args: Any, **kwargs: Any) -> bytes:
        """Receive within the request's deadline."""
        _bound(self)
        return super().recv(*args, **kwargs)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Receive within the request's deadline."""
        _bound(self)
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        """Send within the request's deadline."""
        _bound(self)
        return super().send(*args, **kwargs)


class TimedSocket(Timed):
    """A socket without TLS."""

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        """Send all data within the request's deadline."""
        _bound(self)
        super().sendall(*args, **kwargs)


def connect(host: str, port: int, seconds: float, tls: Tls | None = None) -> socket.socket:
    """Connect to one of a host's addresses, within ``seconds`` for all of them.

    Raises
    ------
    OSError
        None of them accepted the connection; TimeoutError if none did in time.
    """
    if tls is not None:
        _ = tls.context  # made before the time limit starts
    opened = _connected(host, port, seconds)
    return opened if tls is None else tls.wrap(opened, host)


def _connected(host: str, port: int, seconds: float) -> TimedSocket:
    until = min(time.monotonic() + seconds, _patience.until)
    addresses = _addresses(host, port, until)
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        made = TimedSocket(family, kind, protocol)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            share = (until - time.monotonic()) / (len(addresses) - number)
            if share <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "took too long to connect")
            made.settimeout(share)
            made.connect(address)
            made.settimeout(left())  # for the TLS handshake
        except BaseException as exc:
            made.close()
            if number + 1 == len(addresses) or not isinstance(exc, OSError):
                raise
        else:
            return made
    raise StoreError(errno.EADDRNOTAVAIL, f"no address found for {host}")


def _addresses(host: str, port: int, until: float) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return within(until, lambda: socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
    except UnicodeError as exc:
        raise StoreError(errno.EADDRNOTAVAIL, f"{host!a} can't be a host name ({exc})") from exc


def is_readable(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Whether bytes, or the end of the connection, can be read within ``seconds``; true for a closed socket."""
    try:
        if (pending := getattr(sock, "pending", None)) and pending():  # decrypted by TLS already
            return True
        if _poll is None:
            return bool(select.select([sock], [], [], max(seconds, 0.0))[0])
        waiting = _poll()
        waiting.register(sock, select.POLLIN)
        return bool(waiting.poll(max(seconds, 0.0) * 1000))
    except (OSError, ValueError):  # closed
        return True
