# SPDX-License-Identifier: Apache-2.0
"""HTTP requests that end in time, whatever the server does, on the standard library's client.

That client bounds each wait, but not their sum, which the sockets do here
(:mod:`cuda_progcache.store.tiers.timed_sockets`). It tells the length of an answer before its body is read, follows no
redirect, uses no proxy and retries nothing, which is all that a tier needs.
"""

from __future__ import annotations

import errno
import io
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, parse_headers
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.connections import Connections, HungUpError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.timed_sockets import Tls, connect, hurry, left

if TYPE_CHECKING:
    from http.client import HTTPMessage

    from cuda_progcache.store.tiers.settings import Credentials

#: Connections to a server that are kept open.
_KEPT = 32
#: What an answer of no interest may have for its connection to be worth keeping.
_READ_AWAY = 64 << 10
#: Bytes of a body that is taken piece by piece.
_PIECE = 1 << 18


class Answer(NamedTuple):
    """What a server answered.

    Attributes
    ----------
    status : int
        The status code.
    headers : HTTPMessage
        By name, in any case.
    data : bytes
        The body of an answer with status 200, where it is wanted; else empty.
    """

    status: int
    headers: HTTPMessage
    data: bytes


class _Lines(io.BufferedReader):
    """What a server sends; an end within the head is an error, which the standard library takes for the head's end."""

    has_begun = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if self.has_begun and not line.endswith(b"\n") and len(line) != size:
            raise HTTPException("the response ends within a line, or before an expected one")
        self.has_begun = True
        return line


class _Response(HTTPResponse):
    """An answer as the standard library reads it, with three of its gaps closed."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fp: Any = _Lines(self.fp.detach())

    def _read_status(self) -> tuple[str, int, str]:
        """The status of the answer itself, after any interim ones (RFC 9110, section 15.2)."""
        told: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        while 100 <= told[1] < 200 and told[1] != 101:
            parse_headers(self.fp)
            told = super()._read_status()  # type: ignore[misc]
        return told

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:  # read(-1) would read all that the server sends
            raise HTTPException(f"a chunk of {size} bytes")
        return size


class _Connection(HTTPConnection):
    response_class = _Response


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
        The trusted certificates (PEM); None: the system's.
    headers : callable, optional
        Returns the headers of every request, except ``User-Agent``; called again after an answer of 401.
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
        self._tls = Tls(ca_file) if self._parts.scheme == "https" else None
        self._headers = headers
        self._known: Mapping[str, str] | None = None  # the headers, once they have been asked for
        self._connections = Connections(self._connect, _KEPT)

    def prepare(self) -> None:
        """Make what a connection needs, before the time of a request runs."""
        if self._tls is not None:
            self._tls.prepare()

    def _connect(self) -> HTTPConnection:
        host, is_tls = self._parts.hostname or "", self._tls is not None
        port = self._parts.port or (443 if is_tls else 80)
        made = _Connection(host, port)
        if is_tls:
            made.default_port = 443  # which the Host header leaves out
        made.sock = connect(host, port, self._connect_timeout, self._tls)
        made.auto_open = 0
        return made

    def exchange(
        self,
        method: str,
        target: str,
        *,
        until: float,
        limit: int | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        into: Callable[[bytes], None] | None = None,
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
        into : callable, optional
            Takes the body of an answer with status 200, piece by piece, and the answer has none.

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
        known = self._known
        if known is None:
            known = self._known = {"User-Agent": "cuda-progcache", **self._headers()}
        sent = {**known, **headers} if headers else known

        def call(connection: HTTPConnection) -> Answer:
            with _ask(connection, method, target, body, sent) as response:
                data = _read(response, limit, into)
                is_whole = response.isclosed() and response.status >= 200
            if not is_whole:  # what is left of it would be taken for the next answer
                connection.close()
            return Answer(response.status, response.headers, data)

        try:
            left()
            answer = self._connections.use(call)
        except (HTTPException, OSError, UnicodeError) as exc:  # of a redirect's target that isn't ASCII
            self._fail(exc, until)
        if answer.status == 401:
            self._known = None
        return answer

    def _fail(self, exc: Exception, until: float) -> NoReturn:
        if isinstance(exc, StoreError):
            exc.filename = self.name
            raise exc
        if time.monotonic() >= until or isinstance(exc, TimeoutError):
            raise TimeoutError(errno.ETIMEDOUT, "took too long", self.name) from exc
        code, why = _reason(exc)
        raise StoreError(code, f"can't be reached ({why})", self.name) from exc

    def close(self) -> None:
        """Close what is open; the next request opens it anew."""
        self._connections.close()


def _ask(
    connection: HTTPConnection, method: str, target: str, body: bytes | None, headers: Mapping[str, str]
) -> HTTPResponse:
    """Send a request; the answer as far as its headers."""
    try:
        try:
            connection.request(method, target, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise
            # The server wants no more of the body, and may have said why.
        return connection.getresponse()
    except ConnectionError as exc:
        code, why = _reason(exc)
        raise HungUpError(code, f"can't be reached ({why})") from exc


def _read(response: HTTPResponse, limit: int | None, into: Callable[[bytes], None] | None) -> bytes:
    """The body of an answer, if it is wanted; piece by piece where something takes it."""
    length = response.length  # None: it ends with the connection, or comes in chunks
    if response.status != 200 or limit is None:
        if length is not None and length <= _READ_AWAY:
            response.read(length)
        return b""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise StoreError(errno.EPROTO, f"the response has an encoding that wasn't requested ({encoding[:40]!r})")
    if length is not None and length > limit:
        raise TooLargeError(errno.EFBIG, f"the response has {length} bytes, more than the limit of {limit}")
    wanted = limit + 1 if length is None else length
    if into is None:
        data = response.read(wanted)
        size = len(data)
    else:
        data, size = b"", 0
        while size < wanted and (piece := response.read(min(_PIECE, wanted - size))):
            into(piece)
            size += len(piece)
    if size > limit:
        raise StoreError(errno.EFBIG, f"the response has more bytes than the limit of {limit}")
    if length is not None and size != length:
        raise StoreError(errno.EPROTO, f"the response has {size} bytes instead of {length}")
    return data


def authorization(credentials: Credentials) -> dict[str, str]:
    """The ``Authorization`` header for these credentials (RFC 7617, RFC 6750); no header if there are none."""
    user, password, token = credentials
    if token is not None:
        return {"Authorization": f"Bearer {token.reveal()}"}
    if user is None and password is None:
        return {}
    pair = ":".join("" if secret is None else secret.reveal() for secret in (user, password))
    return {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _reason(exc: Exception) -> tuple[int, str]:
    """The number and the words for what went wrong."""
    code = exc.errno if isinstance(exc, OSError) and exc.errno else errno.EIO
    words = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc) or type(exc).__name__
    return (code if code > 0 else errno.EIO), " ".join(str(words).split())[:200]
