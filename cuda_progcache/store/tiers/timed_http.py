# SPDX-License-Identifier: Apache-2.0
"""HTTP requests that end in time, whatever the server does, on urllib3.

urllib3 bounds each wait, and not their sum: a server that sends a byte a second holds it for ever, and its time-out for
connecting bounds a body that is sent, too. Here the sockets know when the request has to end, and each of their waits
is bounded by what is left until then. No thread is needed but for a host's name, which no call resolves in time.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.deadline import within
from cuda_progcache.store.tiers.engine import TooLargeError

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

#: Connections to a server that are kept open; more are opened where more threads ask, and closed afterwards.
_KEPT = 32
#: Seconds by which a wait may overrun.
_CLOSE_ENOUGH = 0.02
#: What an answer of no interest may have for its connection to be worth keeping.
_READ_AWAY = 64 << 10


class _Patience(threading.local):
    """When the request that this thread makes has to end."""

    until = 0.0


_patience = _Patience()


def _left() -> float:
    seconds = _patience.until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "took too long")
    return seconds


def _bound(waiting: socket.socket) -> None:
    """Have a socket wait for no longer than the thread's request may take.

    That is a system call, which is spared where the time that the socket has is as good.
    """
    left, set_to = _left(), waiting.gettimeout()
    if set_to is None or not left <= set_to <= left + _CLOSE_ENOUGH:
        waiting.settimeout(left)


class _Socket(socket.socket):
    """A socket whose waits end when the thread's request has to."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _bound(self)
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        _bound(self)
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        _bound(self)  # of all that is sent
        super().sendall(*args, **kwargs)


class _TlsSocket(ssl.SSLSocket):
    """The same over TLS, where ``sendall`` is made of ``send``."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _bound(self)
        return super().recv_into(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> int:
        _bound(self)
        return super().send(*args, **kwargs)


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to one of a host's addresses, within so many seconds for all of them."""
    until = min(time.monotonic() + seconds, _patience.until)
    addresses = _addresses(host, port, until)
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        made = _Socket(family, kind, protocol)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            share = (until - time.monotonic()) / (len(addresses) - number)
            if share <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "took too long to connect")
            made.settimeout(share)
            made.connect(address)
            made.settimeout(_left())  # for the handshake of TLS
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


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _open(self)


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _open(self)


def _open(connection: HTTPConnection) -> socket.socket:
    try:
        return _connect(connection.host, connection.port, float(connection.timeout or 0.0))
    except TimeoutError as exc:  # which urllib3 would take for a broken connection
        raise ConnectTimeoutError(connection, str(exc)) from exc


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Answer(NamedTuple):
    """What a server answered.

    Attributes
    ----------
    status : int
        The status code.
    headers : mapping
        By name, in any case.
    data : bytes
        The body of an answer with status 200, where it is wanted; else empty.
    """

    status: int
    headers: Mapping[str, str]
    data: bytes


class HttpClient:
    """Makes requests of one server: one attempt each, no redirect followed, no proxy used.

    A forked child opens connections of its own.

    Parameters
    ----------
    url : str
        Scheme, host, port and a path, without secrets.
    connect_timeout : float
        Seconds.
    ca_file : str, optional
        Certificates (PEM) by which the server is known; None: the system's.
    headers : callable, optional
        Gives the headers of every request; asked anew after an answer of 401.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float,
        ca_file: str | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.name = url
        self._parts = urlsplit(url)
        self._connect_timeout = connect_timeout
        self._ca_file = ca_file
        self._headers = headers
        self._mine: tuple[int, urllib3.HTTPConnectionPool] | None = None

    def exchange(
        self,
        method: str,
        target: str,
        *,
        until: float,
        limit: int | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make a request, and read its answer.

        Parameters
        ----------
        method, target : str
            ``GET`` and the path, quoted.
        until : float
            When it has to have ended, as :func:`time.monotonic` counts.
        limit : int, optional
            Bytes that the answer's body may have; of a larger one nothing is read. None: the body is of no interest.
        body : bytes, optional
            What is sent.
        headers : mapping, optional
            Beside the client's own.

        Raises
        ------
        TimeoutError
            It took longer.
        TooLargeError
            The answer says that it is larger than ``limit``.
        StoreError
            There was no connection, no whole answer, or one that proved larger than ``limit``.
        """
        _patience.until = until
        try:
            left = _left()
            pool = self._pool()
            response = pool.urlopen(
                method,
                target,
                body=body,
                headers={**pool.headers, **headers} if headers else None,
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(connect=self._connect_timeout, read=left),
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as exc:
            self._fail(exc, until)
        try:
            data = self._read(response, limit)
        except (HTTPError, OSError) as exc:
            self._fail(exc, until)
        finally:
            if not response.closed:
                response.close()  # what is left of it would be taken for the next answer
            response.release_conn()
        if response.status == 401:
            self.close()
        return Answer(response.status, response.headers, data)

    def _read(self, response: BaseHTTPResponse, limit: int | None) -> bytes:
        length = getattr(response, "length_remaining", None)
        if response.status != 200 or limit is None:
            if length is not None and length <= _READ_AWAY:
                response.read(length)
            return b""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise StoreError(errno.EPROTO, f"the response has an encoding that wasn't requested ({encoding[:40]!r})")
        if length is not None and length > limit:
            raise TooLargeError(errno.EFBIG, f"the response has {length} bytes, more than the limit of {limit}")
        data = response.read(limit + 1 if length is None else length)
        if len(data) > limit:
            raise StoreError(errno.EFBIG, f"the response has more bytes than the limit of {limit}")
        if length is not None and len(data) != length:
            raise StoreError(errno.EPROTO, f"the response has {len(data)} bytes instead of {length}")
        return data

    def _fail(self, exc: Exception, until: float) -> NoReturn:
        if isinstance(exc, StoreError):
            raise type(exc)(exc.errno or errno.EIO, exc.strerror or str(exc), self.name) from None
        # NewConnectionError, which isn't raised here, would be of urllib3's TimeoutError, too.
        if time.monotonic() >= until or isinstance(exc, TimeoutError | urllib3.exceptions.TimeoutError):
            raise TimeoutError(errno.ETIMEDOUT, "took too long", self.name) from exc
        code, why = _reason(exc)
        raise StoreError(code, f"can't be reached ({why})", self.name) from exc

    def _pool(self) -> urllib3.HTTPConnectionPool:
        mine = self._mine
        if mine is not None and mine[0] == os.getpid():
            return mine[1]
        host, port = self._parts.hostname or "", self._parts.port
        settings: dict[str, Any] = {"maxsize": _KEPT, "block": False, "headers": dict(self._headers())}
        made: urllib3.HTTPConnectionPool
        if self._parts.scheme == "https":
            context = ssl.create_default_context(cafile=self._ca_file)
            context.sslsocket_class = _TlsSocket
            made = _TlsPool(host, port, ssl_context=context, **settings)
        else:
            made = _Pool(host, port, **settings)
        self._mine = os.getpid(), made
        return made

    def close(self) -> None:
        """Close what is open; the next request opens it anew."""
        mine, self._mine = self._mine, None
        if mine is not None and mine[0] == os.getpid():
            mine[1].close()


def _reason(exc: BaseException) -> tuple[int, str]:
    """The number and the words for what went wrong at the bottom of an error of urllib3."""
    inner: BaseException = exc
    for part in exc.args:
        if isinstance(part, BaseException):
            inner = part
    if inner is exc and isinstance(exc.__cause__, Exception):
        inner = exc.__cause__
    code = inner.errno if isinstance(inner, OSError) and inner.errno else errno.EIO
    words = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner) or type(inner).__name__
    return (code if code > 0 else errno.EIO), " ".join(str(words).split())[:200]
