# SPDX-License-Identifier: Apache-2.0
"""A client of Redis and Valkey whose requests have deadlines.

It speaks version 2 of the protocol (RESP), https://redis.io/docs/latest/develop/reference/protocol-spec: a request is a
list of strings, an answer is a number, a string, a list or an error. Sockets know the request's deadline
(:mod:`cuda_progcache.store.tiers.timed_sockets`), and a value or list that is too long is refused by its announced
length. After any trouble, a connection is closed: its next answer would belong to another request.

Existing clients limit neither the total time nor the size of an answer, and importing redis-py takes longer than
fetching 180 programs.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util.printable import one_line
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.connections import Connections, HungUpError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.timed_sockets import connect, hurry, is_readable

if TYPE_CHECKING:
    import socket

    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.timed_tls import Tls

R = TypeVar("R")

#: Limits that a correct server doesn't exceed: bytes of a line, or of a value that isn't an object; items of a list;
#: and the depth of nested lists.
SHORT, MOST_ITEMS, _DEEPEST = 1 << 16, 100_000, 4
#: Connections that are kept for the next call.
_KEPT = 8
#: Bytes that are requested from a socket at a time.
_READ, _LARGE_READ = 1 << 16, 1 << 20
#: The maximum of bytes of a server's error that a message quotes.
_TOLD = 200


class RefusedError(StoreError):
    """The server answered with an error; the connection can still be used."""


class RedisConnection:
    """A connection to a server.

    Parameters
    ----------
    opened : socket
        A socket with deadlines.

    Attributes
    ----------
    sock : socket or None
        None once it is closed.
    limit : int
        The maximum of bytes in an answer's values.
    most_items : int
        The maximum number of items in its lists.
    """

    def __init__(self, opened: socket.socket) -> None:
        self.sock: socket.socket | None = opened
        self.limit = SHORT
        self.most_items = MOST_ITEMS
        self._bytes_left = self._items_left = 0  # of the answer that is being read
        self._buffer = bytearray()
        self._was_answered = False

    def close(self) -> None:
        """Close it."""
        closing, self.sock = self.sock, None
        if closing is not None:
            closing.close()

    def send(self, commands: Sequence[Sequence[str | bytes | int]]) -> None:
        """Send commands together, within the request's deadline."""
        pieces: list[bytes] = []
        for command in commands:
            pieces.append(b"*%d\r\n" % len(command))
            for part in command:
                data = part if isinstance(part, bytes) else str(part).encode()
                pieces.append(b"$%d\r\n%b\r\n" % (len(data), data))
        self._was_answered = False
        try:
            self._open.sendall(b"".join(pieces))
        except ConnectionError as exc:
            raise self._hung_up() from exc

    def close_if_ahead(self) -> None:
        """Close it if it has unread bytes that no request asked for: the next one would take them for its answer."""
        if self._buffer:
            self.close()

    def has_answer(self, seconds: float) -> bool:
        """Whether an answer starts within ``seconds``."""
        return bool(self._buffer) or is_readable(self._open, seconds)

    def answer(self) -> Any:
        """The next answer: bytes, a number, a list or None. An error of the server is returned, not raised."""
        self._bytes_left, self._items_left = self.limit, self.most_items
        return self._answer(0)

    @property
    def _open(self) -> socket.socket:
        if self.sock is None:
            raise StoreError(errno.ENOTCONN, "the connection is closed")
        return self.sock

    def _answer(self, depth: int) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._value(_number(rest))
        if kind == b"+":
            self._take(len(rest))
            return rest
        if kind == b":":
            return _number(rest)
        if kind == b"-":
            return RefusedError(errno.EIO, one_line(rest[:_TOLD].decode("utf-8", "replace")))
        if kind == b"*":
            count = _number(rest)
            if depth >= _DEEPEST:
                raise StoreError(errno.EPROTO, f"the server sent lists nested more than {_DEEPEST} deep")
            if count > self._items_left:
                raise StoreError(errno.EPROTO, f"the server sent a list of {count} items")
            self._items_left -= max(count, 0)
            return None if count < 0 else [self._answer(depth + 1) for _ in range(count)]
        raise _nonsense()

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > SHORT:
                raise _nonsense()
            self._buffer += self._received(_READ)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _take(self, length: int) -> None:
        """Count bytes of the answer before they are read (TooLargeError if they exceed the limit)."""
        if length > self._bytes_left:
            size = self.limit - self._bytes_left + length
            raise TooLargeError(errno.EFBIG, f"the value has {size} bytes, more than the limit of {self.limit}")
        self._bytes_left -= length

    def _value(self, length: int) -> bytes | None:
        if length < 0:
            return None
        self._take(length)
        missing = length + 2 - len(self._buffer)
        if missing > 0:
            pieces = [bytes(self._buffer)]
            self._buffer.clear()
            while missing > 0:
                pieces.append(self._received(min(missing, _LARGE_READ)))
                missing -= len(pieces[-1])
            whole = b"".join(pieces)
        else:
            whole = bytes(self._buffer[: length + 2])
            del self._buffer[: length + 2]
        if not whole.endswith(b"\r\n"):
            raise StoreError(errno.EPROTO, "the value is longer than announced")
        return whole[:-2]

    def _received(self, size: int) -> bytes:
        try:
            received = self._open.recv(size)
        except ConnectionError as exc:
            raise self._hung_up() from exc
        if not received:
            raise self._hung_up()
        self._was_answered = True
        return received

    def _hung_up(self) -> StoreError:
        kind = StoreError if self._was_answered else HungUpError
        return kind(errno.ECONNRESET, "the server closed the connection")


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise _nonsense() from None


def _nonsense() -> StoreError:
    return StoreError(errno.EPROTO, "the server doesn't speak the Redis protocol")


class RedisClient:
    """Sends commands to a server, once each, on connections that are kept.

    A forked child opens connections of its own.

    Parameters
    ----------
    settings : TierSettings
        The settings of a ``redis`` or ``rediss`` URL.
    """

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._tls: Tls | None = None
        if settings.scheme == "rediss":
            from cuda_progcache.store.tiers.timed_tls import Tls

            self._tls = Tls(settings.ca_file)
        self._connections = Connections(self._connect, _KEPT)

    def prepare(self) -> None:
        """Make what a connection needs, before the time of a request runs."""
        if self._tls is not None:
            self._tls.prepare()

    def _connect(self) -> RedisConnection:
        settings = self._settings
        opened = connect(settings.host, settings.port or 6379, settings.connect_timeout, self._tls)
        connection = RedisConnection(opened)
        try:
            self._enter(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _enter(self, connection: RedisConnection) -> None:
        """Log in, and select the database."""
        user, password, _ = self._settings.credentials
        commands: list[Sequence[str]] = []
        if user is not None or password is not None:
            secret = "" if password is None else password.reveal()
            commands.append(("AUTH", secret) if user is None else ("AUTH", user.reveal(), secret))
        if self._settings.path not in {"", "0"}:
            commands.append(("SELECT", self._settings.path))
        if commands:
            _told(connection, commands)

    def use(self, until: float, limit: int, use: Callable[[RedisConnection], R], most_items: int = 0) -> R:
        """Call a function with a connection.

        Parameters
        ----------
        until : float
            The deadline, on the clock of :func:`time.monotonic`.
        limit, most_items : int
            The maximum of bytes in each answer, and of items in its lists.
        use : callable
            Takes the connection, which is kept afterwards unless it was closed. Its result is returned.

        Raises
        ------
        TimeoutError
            It took longer.
        TooLargeError
            An answer is larger than ``limit``.
        RefusedError
            The server's last answer was an error.
        StoreError
            There is no connection, or the answer can't be parsed.
        """
        hurry(until)

        def call(connection: RedisConnection) -> R | RefusedError:
            connection.limit, connection.most_items = limit, most_items
            try:
                return use(connection)
            except RefusedError as exc:
                return exc  # returned, since raising it would close the connection
            finally:
                connection.close_if_ahead()

        with self._errors():
            used = self._connections.use(call)
            if isinstance(used, RefusedError):
                raise used
            return used

    def ask(self, until: float, limit: int, *commands: Sequence[str | bytes | int], most_items: int = 0) -> list[Any]:
        """Send commands together, and return the answers; see :meth:`use`."""
        return self.use(until, limit, lambda connection: _told(connection, commands), most_items)

    @contextmanager
    def listening(self, channel: str, until: float) -> Iterator[Callable[[float], bool]]:
        """Subscribe to a channel within a deadline, on a separate connection that is open while the context lasts.

        Yields
        ------
        callable
            Waits for a message: the given seconds for its start, and as long again for its end. Returns whether one
            came (OSError if the connection has failed, so that none will come).
        """
        with self._errors():
            hurry(until)
            connection = self._connect()
        try:
            with self._errors():
                connection.most_items = 3  # kind, channel, message
                connection.send([("SUBSCRIBE", channel)])
                _message(connection)

            def wait(seconds: float) -> bool:
                with self._errors():
                    if not connection.has_answer(seconds):
                        return False
                    hurry(time.monotonic() + seconds)
                    try:
                        _message(connection)
                    except BaseException:
                        connection.close()  # further bytes would be taken for a message
                        raise
                return True

            yield wait
        finally:
            connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate the system's errors into those of an engine, with the tier's name."""
        try:
            yield
        except StoreError as exc:
            exc.filename = self.name
            raise
        except TimeoutError as exc:
            raise TimeoutError(errno.ETIMEDOUT, exc.strerror or "took too long", self.name) from exc
        except OSError as exc:
            raise StoreError(exc.errno or errno.EIO, exc.strerror or str(exc), self.name) from exc

    def close(self) -> None:
        """Close the kept connections; the next request opens a new one."""
        self._connections.close()


def _told(connection: RedisConnection, commands: Sequence[Sequence[str | bytes | int]]) -> list[Any]:
    """Send commands together, and return the answers (RefusedError if one is an error)."""
    connection.send(commands)
    answers = [connection.answer() for _ in commands]  # read all of them before the first error is raised
    for answer in answers:
        if isinstance(answer, RefusedError):
            raise answer
    return answers


def _message(connection: RedisConnection) -> None:
    answer = connection.answer()
    if isinstance(answer, RefusedError):
        raise answer
    if not isinstance(answer, list):
        raise StoreError(errno.EPROTO, f"the server sent a {type(answer).__name__} to a subscriber")
