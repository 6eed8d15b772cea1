# SPDX-License-Identifier: Apache-2.0
"""TLS on timed sockets.

A module of its own: importing :mod:`ssl` takes some 15 ms, and plain Redis does without.
"""

from __future__ import annotations

import contextlib
import errno
import ssl

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.timed_sockets import Timed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket


class TimedTlsSocket(Timed, ssl.SSLSocket):
    """A socket with TLS, whose ``sendall`` calls ``send``."""


class Tls:
    """TLS to servers whose certificates are verified.

    Parameters
    ----------
    ca_file : str or None
        The trusted certificates (PEM); None: the system's.
    """

    def __init__(self, ca_file: str | None) -> None:
        self._ca_file = ca_file
        self._lock = ForkSafeLock()
        self._context: ssl.SSLContext | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """The SSL context of timed sockets. It is made once, since reading the certificates takes some 20 ms."""
        with self._lock:
            if self._context is None:
                context = ssl.create_default_context(cafile=self._ca_file)
                context.sslsocket_class = TimedTlsSocket
                self._context = context
            return self._context

    def prepare(self) -> None:
        """Make the context before a request's time runs; where it can't be made, a connection says why."""
        with contextlib.suppress(OSError):
            _ = self.context

    def wrap(self, opened: socket.socket, host: str) -> socket.socket:
        """Make a connection a TLS connection to ``host``; it is closed if that fails (OSError)."""
        try:
            return self.context.wrap_socket(opened, server_hostname=host)
        except BaseException as exc:
            opened.close()
            if isinstance(exc, ssl.SSLError) and exc.reason == "WRONG_VERSION_NUMBER":
                why = "the server doesn't speak TLS: without it, use http://, redis:// or, with oci://, tls=no"
                raise StoreError(errno.EPROTO, why) from exc
            raise
