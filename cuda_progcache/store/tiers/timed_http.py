# SPDX-License-Identifier: Apache-2.0
"""HTTP requests that end in time, whatever the server does, on urllib3.

urllib3 bounds each wait, and not their sum, and its time-out for connecting bounds a body that is sent, too. Here the
sockets do it (:mod:`cuda_progcache.store.tiers.timed_sockets`).
"""

from __future__ import annotations

import errno
import os
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.timed_sockets import connect, hurry, left, tls_context

if TYPE_CHECKING:
    import socket

    from urllib3.response import BaseHTTPResponse

    from cuda_progcache.store.tiers.settings import Credentials

#: Connections to a server that are kept open; more are opened where more threads ask, and closed afterwards.
_KEPT = 32
#: What an answer of no interest may have for its connection to be worth keeping.
_READ_AWAY = 64 << 10


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _open(self)


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _open(self)


def _open(connection: HTTPConnection) -> socket.socket:
    try:
        return connect(connection.host, connection.port, float(connection.timeout or 0.0))
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
        hurry(until)
        try:
            seconds = left()
            pool = self._pool()
            response = pool.urlopen(
                method,
                target,
                body=body,
                headers={**pool.headers, **headers} if headers else None,
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=urllib3.Timeout(connect=self._connect_timeout, read=seconds),
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
            made = _TlsPool(host, port, ssl_context=tls_context(self._ca_file), **settings)
        else:
            made = _Pool(host, port, **settings)
        self._mine = os.getpid(), made
        return made

    def close(self) -> None:
        """Close what is open; the next request opens it anew."""
        mine, self._mine = self._mine, None
        if mine is not None and mine[0] == os.getpid():
            mine[1].close()


def authorization(credentials: Credentials) -> dict[str, str]:
    """The header that says who asks, as HTTP has it (RFC 7617, RFC 6750); none where nobody says so."""
    user, password, token = credentials
    if token is not None:
        return {"Authorization": f"Bearer {token.reveal()}"}
    if user is None and password is None:
        return {}
    pair = ":".join("" if secret is None else secret.reveal() for secret in (user, password))
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


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
