# SPDX-License-Identifier: Apache-2.0
"""HTTP requests that end in time, whatever the server does, on the standard library's reader of answers.

Their time is bounded by the sockets (:mod:`cuda_progcache.store.tiers.timed_sockets`). That reader tells the length of
an answer before its body is read. Heads are written and read here, since the library's e-mail parser takes longer for
one than all the rest. No redirect is followed, no proxy used and nothing retried, which is all that a tier needs.

Source: RFC 9112, "HTTP/1.1".
"""

from __future__ import annotations

import errno
import io
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.connections import Connections, HungUpError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.timed_sockets import connect, hurry, left
from cuda_progcache.store.tiers.timed_tls import Tls

if TYPE_CHECKING:
    from socket import socket

    from cuda_progcache.store.tiers.settings import Credentials

#: Connections to a server that are kept open.
_KEPT = 32
#: What an answer without an object may have to be read, so that its connection can be kept.
_READ_AWAY = 64 << 10
#: Bytes of a body that is taken piece by piece.
_PIECE = 1 << 18


#: Lines of a head, and bytes of one.
_MOST_LINES, _LONGEST = 100, 1 << 16
#: Bytes that are asked of the system at once: a program, mostly.
_BUFFER = 1 << 15
#: What would end a line, or a part of one.
_UNFIT_TARGET = re.compile(r"[^!-~]")
_UNFIT_VALUE = re.compile(r"[^\t -~\x80-\xff]")


class Headers(dict[str, str]):
    """The headers of an answer, by name in any case; of several with one name, the first."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value, without white space at its ends."""
        return super().get(name.lower(), default)

    @classmethod
    def read(cls, lines: IO[bytes]) -> Headers:
        """Read those of a head, up to the empty line (HTTPException: there are too many, or one isn't a header)."""
        found = cls()
        for _ in range(_MOST_LINES):
            line = lines.readline(_LONGEST)
            if line in {b"\r\n", b"\n"}:
                return found
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or not line.endswith(b"\n") or name.strip() != name:
                raise HTTPException("a line of its head isn't a header")
            found.setdefault(name.lower(), value.strip())
        raise HTTPException(f"its head has more than {_MOST_LINES} lines")


class Answer(NamedTuple):
    """What a server answered.

    Attributes
    ----------
    status : int
        The status code.
    headers : Headers
    data : bytes
        The body of an answer with status 200, where it is wanted; of any other, what has at most 64 KiB.
    """

    status: int
    headers: Headers
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
    """An answer as the standard library reads it, but for the head, and with three of its gaps closed."""

    def __init__(self, sock: socket, method: str) -> None:
        super().__init__(sock, method=method)
        self.fp: Any = _Lines(self.fp.detach(), _BUFFER)

    def begin(self) -> None:
        """Read the head of the answer itself, after any interim ones (RFC 9110, section 15.2)."""
        version, status, headers = self._read_head()
        while 100 <= status < 200 and status != 101:
            version, status, headers = self._read_head()
        self.status = status
        self.version = 10 if version == "HTTP/1.0" else 11
        self.head = headers
        self.headers: Any = headers
        self.chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.chunk_left = None
        length = headers.get("Content-Length", "")
        self.length = int(length) if not self.chunked and length.isascii() and length.isdecimal() else None
        if status < 200 or status in {204, 304}:
            self.length = 0
        is_open_ended = self.length is None and not self.chunked
        self.will_close = is_open_ended or bool(self._check_close())  # type: ignore[attr-defined]

    def _read_head(self) -> tuple[str, int, Headers]:
        version, status, _ = self._read_status()  # type: ignore[attr-defined]
        if not version.startswith("HTTP/1."):
            raise HTTPException(f"its version is {version[:20]!r}")
        return version, status, Headers.read(self.fp)

    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:  # read(-1) would read all that the server sends
            raise HTTPException(f"a chunk of {size} bytes")
        return size


class _Connection:
    """A connection, for one request at a time.

    Parameters
    ----------
    sock : socket
    host : str
        For the ``Host`` header.
    """

    def __init__(self, sock: socket, host: str) -> None:
        self.sock: socket | None = sock
        self._host = host

    def ask(self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> _Response:
        """Send a request; the answer as far as its head. A connection that the server ends with it is closed."""
        if self.sock is None:
            raise HTTPException("its connection is closed")
        if _UNFIT_TARGET.search(target):
            raise HTTPException("the target of a request isn't quoted")
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self._host}", "Accept-Encoding: identity"]
        for name, value in headers.items():
            if _UNFIT_VALUE.search(value):
                raise HTTPException(f"the value of the header {name} can't be sent")
            lines.append(f"{name}: {value}")
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        try:
            self._send("\r\n".join([*lines, "", ""]).encode("latin-1"), body)
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise
            # The server wants no more of the body, and may have said why.
        response = _Response(self.sock, method)
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        if response.will_close:
            self.close()  # the response has the socket until it is read
        return response

    def _send(self, head: bytes, body: bytes | None) -> None:
        assert self.sock is not None  # noqa: S101 - for mypy
        if body is None or len(body) <= _BUFFER:
            self.sock.sendall(head + (body or b""))
        else:
            self.sock.sendall(head)
            self.sock.sendall(body)

    def close(self) -> None:
        """Close it."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class HttpClient:
    """Makes requests of one server: one attempt each, no redirect followed, no proxy used.

    A forked child opens connections of its own.

    Parameters
    ----------
    url : str
        Scheme, host, port and a path, without secrets.
    name : str, optional
        What errors call it; None: the URL.
    connect_timeout : float
        Seconds.
    ca_file : str, optional
        The trusted certificates (PEM); None: the system's.
    headers : callable, optional
        Returns the headers of every request, except ``User-Agent``; called again after an answer of 401.
    dial : callable, optional
        Opens a connection, by the end of the thread's request; None: one to the URL's host and port.

    Attributes
    ----------
    host : str
        As it is sent in the ``Host`` header.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        connect_timeout: float,
        ca_file: str | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
        dial: Callable[[], socket] | None = None,
    ) -> None:
        self.name = name or url
        parts = urlsplit(url)
        usual = 443 if parts.scheme == "https" else 80
        self._address = parts.hostname or "", parts.port or usual
        host, port = self._address
        named = f"[{host}]" if ":" in host else host
        self.host = named if port == usual else f"{named}:{port}"
        self._connect_timeout = connect_timeout
        self._tls = Tls(ca_file) if parts.scheme == "https" else None
        self._headers = headers
        self._known: Mapping[str, str] | None = None  # the headers, once they have been asked for
        self._dial = dial
        self._connections = Connections(self._connect, _KEPT)

    def prepare(self) -> None:
        """Make what a connection needs, before the time of a request runs."""
        if self._tls is not None:
            self._tls.prepare()

    def _connect(self) -> _Connection:
        sock = self._dial() if self._dial else connect(*self._address, self._connect_timeout, self._tls)
        return _Connection(sock, self.host)

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
            Bytes that an object may have; of a larger one nothing is read. None: no object is asked for.
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

        def call(connection: _Connection) -> Answer:
            with _ask(connection, method, target, body, sent) as response:
                data = _read(response, limit, into)
                is_whole = response.isclosed() and response.status >= 200
            if not is_whole:  # what is left of it would be taken for the next answer
                connection.close()
            return Answer(response.status, response.head, data)

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
    connection: _Connection, method: str, target: str, body: bytes | None, headers: Mapping[str, str]
) -> _Response:
    try:
        return connection.ask(method, target, body, headers)
    except ConnectionError as exc:
        code, why = _reason(exc)
        raise HungUpError(code, f"can't be reached ({why})") from exc


def _read(response: HTTPResponse, limit: int | None, into: Callable[[bytes], None] | None) -> bytes:
    """The body of an answer, if it is wanted; piece by piece where something takes it."""
    length = response.length  # None: it ends with the connection, or comes in chunks
    if response.status != 200 or limit is None:
        return _read_away(response)
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


def _read_away(response: HTTPResponse) -> bytes:
    """What a server says beside its status; empty where that is long, or ends with the connection."""
    length = response.length
    if length is None and not response.chunked:
        return b""
    if length is not None and length > _READ_AWAY:
        return b""
    data = response.read(_READ_AWAY + 1 if length is None else length)
    return data if len(data) <= _READ_AWAY else b""


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
