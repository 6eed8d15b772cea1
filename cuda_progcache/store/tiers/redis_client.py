# SPDX-License-Identifier: Apache-2.0
"""Questions of a Redis or Valkey server that are answered in time, through redis-py.

redis-py authenticates and packs commands. What it doesn't bound is bounded here: sockets know when the request has to
end (:mod:`cuda_progcache.store.tiers.timed_sockets`), and the answers are read by :class:`_Parser`, which refuses a
value by its announced length. After trouble of any kind a connection is closed: its next answer would be another's.
"""

from __future__ import annotations

import errno
import inspect
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis._parsers import BaseParser
from redis.connection import AbstractConnection

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.timed_sockets import connect, hurry, is_readable, left, tls_context

if TYPE_CHECKING:
    import socket
    import ssl

    from cuda_progcache.store.tiers.settings import TierSettings

R = TypeVar("R")

#: Bytes of a line, or of a value that no object is; items of a list, and lists in lists, that an honest server doesn't
#: exceed.
SHORT, MOST_ITEMS, _DEEPEST = 1 << 16, 100_000, 4
#: Connections that are kept for the next call.
_KEPT = 8
#: By what a connection tells the server of its library, in two more round trips, once set to None.
_INTRODUCTION = {"driver_info"} & set(inspect.signature(AbstractConnection).parameters) or {"lib_name", "lib_version"}


class _Parser(BaseParser):
    """Reads answers (RESP 2), and no value that is too large.

    Attributes
    ----------
    limit : int
        Bytes that a value may have.
    most_items : int
        Items that a list may have.
    """

    def __init__(self, socket_read_size: int = 1 << 16) -> None:
        self._read_size = socket_read_size
        self._socket: Any = None
        self.limit = SHORT
        self.most_items = MOST_ITEMS

    def on_connect(self, connection: Any) -> None:
        """Take the connection's new socket."""
        self._socket = connection._sock
        self._buffer = bytearray()

    def on_disconnect(self) -> None:
        """Let go of it."""
        self._socket = None
        self._buffer = bytearray()

    def can_read(self, timeout: float = 0) -> bool:
        """Whether there is something to be read."""
        return bool(self._buffer) or is_readable(self._socket, timeout)

    def read_response(self, disable_decoding: bool = False, **_: Any) -> Any:  # noqa: ARG002, FBT001, FBT002
        """The next answer; an error of the server as an exception that is returned."""
        return self._answer(0)

    def _answer(self, depth: int) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._value(_number(rest))
        if kind == b"+":
            return bytes(rest)
        if kind == b":":
            return _number(rest)
        if kind == b"-":
            parse: Callable[[str], Exception] = self.parse_error
            return parse(rest.decode("utf-8", "replace"))
        if kind == b"*":
            count = _number(rest)
            if count > self.most_items or depth >= _DEEPEST:
                raise redis.InvalidResponse(f"the server sent a list of {count} items")
            return None if count < 0 else [self._answer(depth + 1) for _ in range(count)]
        raise redis.InvalidResponse("the server doesn't speak the Redis protocol")

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > SHORT:
                raise redis.InvalidResponse("the server doesn't speak the Redis protocol")
            self._buffer += self._receive(self._read_size)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _value(self, length: int) -> bytes | None:
        if length < 0:
            return None
        if length > self.limit:
            raise TooLargeError(errno.EFBIG, f"the value has {length} bytes, more than the limit of {self.limit}")
        missing = length + 2 - len(self._buffer)
        if missing > 0:
            pieces = [bytes(self._buffer)]
            self._buffer.clear()
            while missing > 0:
                pieces.append(self._receive(min(missing, 1 << 20)))
                missing -= len(pieces[-1])
            whole = b"".join(pieces)
        else:
            whole = bytes(self._buffer[: length + 2])
            del self._buffer[: length + 2]
        if not whole.endswith(b"\r\n"):
            raise redis.InvalidResponse("the value is longer than announced")
        return whole[:-2]

    def _receive(self, size: int) -> bytes:
        received: bytes = self._socket.recv(size)
        if not received:
            raise redis.ConnectionError("the server closed the connection")
        return received


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise redis.InvalidResponse("the server doesn't speak the Redis protocol") from None


class _Connection(redis.Connection):
    """A connection over a socket that has been opened."""

    def __init__(self, opened: socket.socket, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._opened = opened

    def _connect(self) -> socket.socket:
        return self._opened


class RedisClient:
    """Asks a server, on connections that are kept; one attempt each.

    A forked child opens connections of its own.

    Parameters
    ----------
    settings : TierSettings
        Of a ``redis`` or ``rediss`` URL.
    """

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._tls: ssl.SSLContext | None = None
        self._lock = ForkSafeLock()
        self._kept: list[Any] = []
        self._pid = os.getpid()
        weakref.finalize(self, _disconnect, self._kept).atexit = False

    def _connected(self) -> Any:
        """A connection that is open and silent."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self.close()  # a socket that is used by parent and child gives each the other's answers
                    self._pid = os.getpid()  # last: other threads go by it
        while self._kept:
            try:
                connection = self._kept.pop()
            except IndexError:
                break
            if not is_readable(connection._sock):
                return connection
            connection.disconnect()
        return self._connect()

    def _connect(self) -> Any:
        settings = self._settings
        entrance = settings.credentials
        opened: socket.socket = connect(settings.host, settings.port or 6379, settings.connect_timeout)
        try:
            if settings.scheme == "rediss":
                if self._tls is None:
                    self._tls = tls_context(settings.ca_file)
                opened = self._tls.wrap_socket(opened, server_hostname=settings.host)
            connection = _Connection(
                opened,
                host=settings.host,
                db=int(settings.path or 0),
                username=None if entrance.user is None else entrance.user.reveal(),
                password=None if entrance.password is None else entrance.password.reveal(),
                socket_timeout=left(),
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
                protocol=2,
                parser_class=_Parser,
                **dict.fromkeys(_INTRODUCTION),
            )
            connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            opened.close()
            raise
        return connection

    def use(self, until: float, limit: int, use: Callable[[Any], R], most_items: int = 0) -> R:
        """What is done with a connection.

        Parameters
        ----------
        until : float
            When it has to have ended, as :func:`time.monotonic` counts.
        limit, most_items : int
            Bytes that a value of the answers may have, and items that a list may.
        use : callable
            Takes the connection, which is kept afterwards if it is open then.

        Raises
        ------
        TimeoutError
            It took longer.
        TooLargeError
            A value is larger than ``limit``.
        StoreError
            There is no connection, or the server said no or nothing of sense.
        """
        connection: Any = None
        done = False
        with self._errors():
            try:
                hurry(until)
                connection = self._connected()
                connection._parser.limit = limit
                connection._parser.most_items = most_items
                value = use(connection)
                done = True
                return value
            except redis.ResponseError:
                done = connection is not None  # an answer like others
                raise
            finally:
                if connection is not None:
                    if done and connection._sock is not None and len(self._kept) < _KEPT and self._pid == os.getpid():
                        self._kept.append(connection)
                    else:
                        connection.disconnect()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise redis-py's errors as ours."""
        try:
            yield
        except redis.TimeoutError as exc:
            raise TimeoutError(errno.ETIMEDOUT, str(exc), self.name) from exc
        except redis.RedisError as exc:
            raise StoreError(errno.EIO, str(exc), self.name) from exc
        except StoreError as exc:
            exc.filename = self.name
            raise
        except TimeoutError as exc:
            raise TimeoutError(errno.ETIMEDOUT, exc.strerror or str(exc), self.name) from exc
        except OSError as exc:
            raise StoreError(exc.errno or errno.EIO, exc.strerror or str(exc), self.name) from exc

    def ask(self, until: float, limit: int, *commands: tuple[Any, ...], most_items: int = 0) -> list[Any]:
        """The answers to commands that are sent together; see :meth:`use`."""

        def ask(connection: Any) -> list[Any]:
            send(connection, commands)
            answers = [connection._parser.read_response() for _ in commands]  # all, before the first error is raised
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

        return self.use(until, limit, ask, most_items)

    @contextmanager
    def listening(self, channel: str, until: float) -> Iterator[Callable[[float], bool]]:
        """Subscribe to a channel, by a deadline; for as long as the context lasts, on a connection of its own.

        Yields
        ------
        callable
            Waits for a message, so many seconds at most: whether one came. OSError: the connection is in trouble.
        """
        connection: Any = None
        try:
            with self._errors():
                hurry(until)
                connection = self._connect()
                connection._parser.most_items = 3  # kind, channel, message
                send(connection, [("SUBSCRIBE", channel)])
                self._message(connection)

            def wait(seconds: float) -> bool:
                with self._errors():
                    if not connection._parser.can_read(seconds):
                        return False
                    hurry(time.monotonic() + self._settings.timeout)
                    self._message(connection)
                return True

            yield wait
        finally:
            if connection is not None:
                connection.disconnect()

    def _message(self, connection: Any) -> None:
        answer = connection._parser.read_response()
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, list):
            raise redis.InvalidResponse(f"the server sent a {type(answer).__name__} to a subscriber")

    def close(self) -> None:
        """Close the connections that are kept; the next question opens one."""
        _disconnect(self._kept)


def _disconnect(connections: list[Any]) -> None:
    """Close connections; of those that a parent process has, only this process's share."""
    while connections:
        try:
            connection = connections.pop()
        except IndexError:  # another thread took it
            return
        connection.disconnect()


def send(connection: Any, commands: Sequence[tuple[Any, ...]]) -> None:
    """Send commands together, all by the end of the request."""
    for piece in connection.pack_commands(commands):
        connection._sock.sendall(piece)
