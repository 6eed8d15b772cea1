# SPDX-License-Identifier: Apache-2.0
"""Redis and Valkey, through redis-py.

redis-py connects, encrypts, authenticates and packs commands. What it doesn't bound is bounded here: the answers are
read by :class:`_Parser`, which knows the end of the caller's patience and refuses a value by its announced length, and
connections are opened on a thread that can be left behind, since nothing else ends a dead resolver.

Keys: ``pc1:{<digest>}:e`` holds a program's object, ``pc1:{<digest>}:m`` a header manifest's, and ``pc1:<name>`` any
other object. The braces put what belongs to one program into one slot of a cluster.
"""

from __future__ import annotations

import errno
import functools
import inspect
import math
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis._parsers import BaseParser
from redis.connection import AbstractConnection

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.deadline import within
from cuda_progcache.store.tiers.engine import BATCH_BYTES, Engine, Listed, TooLargeError

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings

R = TypeVar("R")

#: Bytes of a line, items of a list, and lists in lists, that an honest server doesn't exceed.
_LONGEST_LINE, _MOST_ITEMS, _DEEPEST = 1 << 16, 100_000, 4
#: Connections that are kept for the next call.
_KEPT = 8
#: By what a connection tells the server of its library, in two more round trips, once set to None.
_INTRODUCTION = {"driver_info"} & set(inspect.signature(AbstractConnection).parameters) or {"lib_name", "lib_version"}
_TREES = {"v1/programs/": "e", "v1/manifests/": "m"}


class _Parser(BaseParser):
    """Reads answers (RESP 2) by a deadline, and no value that is too large.

    Attributes
    ----------
    until : float
        When the answer has to be there, as :func:`time.monotonic` counts.
    limit : int
        Bytes that a value may have.
    most_items : int
        Items that a list may have.
    """

    def __init__(self, socket_read_size: int = 1 << 16) -> None:
        self._read_size = socket_read_size
        self._socket: Any = None
        self.until = math.inf
        self.limit = _LONGEST_LINE
        self.most_items = _MOST_ITEMS

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
        return bool(self._buffer) or bool(select.select([self._socket], [], [], timeout)[0])

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
            if len(self._buffer) > _LONGEST_LINE:
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
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "took too long")
        self._socket.settimeout(left)
        received: bytes = self._socket.recv(size)
        if not received:
            raise redis.ConnectionError("the server closed the connection")
        return received


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise redis.InvalidResponse("the server doesn't speak the Redis protocol") from None


def _connecting(settings: TierSettings) -> tuple[type[Any], dict[str, Any]]:
    """The class of a connection and its arguments: one attempt, and no waiting beyond what was asked for."""
    entrance = settings.credentials
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port or 6379,
        "db": int(settings.path or 0),
        "username": None if entrance.user is None else entrance.user.reveal(),
        "password": None if entrance.password is None else entrance.password.reveal(),
        "socket_connect_timeout": settings.connect_timeout,
        "socket_timeout": settings.timeout,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        "protocol": 2,
        **dict.fromkeys(_INTRODUCTION),
    }
    if settings.scheme == "rediss":
        return redis.SSLConnection, options | {"ssl_ca_certs": settings.ca_file}
    return redis.Connection, options


def client(settings: TierSettings) -> redis.Redis:
    """A plain client, for what isn't the keeping of objects; it connects when it is used."""
    kind, options = _connecting(settings)
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=kind, **options))


class RedisEngine(Engine):
    """The objects of a Redis database.

    Parameters
    ----------
    settings : TierSettings
    """

    keeps_time = True

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._lock = ForkSafeLock()
        self._renew()

    def _renew(self) -> None:
        self._kept: list[Any] = []
        self._connections: set[Any] = set()  # that are in use
        self._pid = os.getpid()  # last: other threads go by it

    # Connections

    def _connected(self, until: float) -> Any:
        """A connection that is open and silent."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self._renew()  # a socket that is used by parent and child gives each the other's answers
        while self._kept:
            try:
                connection = self._kept.pop()
            except IndexError:
                break
            if _is_silent(connection._sock):
                return connection
            connection.disconnect()
        return within(until, functools.partial(self._connect, until))

    def _connect(self, until: float) -> Any:
        kind, options = _connecting(self._settings)
        patience = min(self._settings.connect_timeout, until - time.monotonic())
        connection = kind(**options | {"socket_connect_timeout": max(patience, 0.001), "parser_class": _Parser})
        connection._parser.until = until
        connection.connect()
        return connection

    def _use(self, until: float, limit: int, use: Callable[[Any], R], most_items: int = 0) -> R:
        """What is done with a connection, its errors as ours."""
        connection: Any = None
        done = False
        try:
            connection = self._connected(until)
            connection._parser.until = until
            connection._parser.limit = limit
            connection._parser.most_items = most_items
            self._connections.add(connection)
            value = use(connection)
            done = True
            return value
        except redis.TimeoutError as exc:
            raise TimeoutError(errno.ETIMEDOUT, str(exc), self.name) from exc
        except redis.ResponseError as exc:
            done = True  # an answer like others
            raise StoreError(errno.EIO, str(exc), self.name) from exc
        except redis.RedisError as exc:
            raise StoreError(errno.EIO, _trouble(exc), self.name) from exc
        except StoreError as exc:
            raise type(exc)(exc.errno or errno.EIO, exc.strerror or str(exc), self.name) from exc
        except TimeoutError as exc:
            raise TimeoutError(errno.ETIMEDOUT, exc.strerror or str(exc), self.name) from exc
        except OSError as exc:
            raise StoreError(exc.errno or errno.EIO, exc.strerror or str(exc), self.name) from exc
        finally:
            if connection is not None:
                self._connections.discard(connection)
                if done and connection._sock is not None and len(self._kept) < _KEPT and self._pid == os.getpid():
                    self._kept.append(connection)
                else:
                    connection.disconnect()

    def _ask(self, until: float, limit: int, *commands: tuple[Any, ...], most_items: int = 0) -> list[Any]:
        """The answers to commands that are sent together."""

        def use(connection: Any) -> list[Any]:
            _send(connection, commands)
            answers = [connection._parser.read_response() for _ in commands]  # all, before the first error is raised
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

        return self._use(until, limit, use, most_items)

    # Objects

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """See :meth:`Engine.get`."""
        return _value(self._ask(until, limit, ("GET", _key(name)))[0])

    def get_many(self, names: Sequence[str], *, limit: int, until: float) -> Mapping[str, bytes | None]:
        """See :meth:`Engine.get_many`; in one round trip, up to an object that is too large."""
        found: dict[str, bytes | None] = {}

        def use(connection: Any) -> None:
            _send(connection, [("GET", _key(name)) for name in names])
            size = 0
            for name in names:
                try:
                    found[name] = data = _value(connection._parser.read_response())
                except TooLargeError:
                    found[name] = None
                    connection.disconnect()  # the rest of the answers is behind it
                    return
                except redis.ResponseError:
                    connection.disconnect()
                    raise
                size += len(data or b"")
                if size >= BATCH_BYTES and name != names[-1]:
                    connection.disconnect()
                    return

        if names:
            self._use(until, limit, use)
        return found

    def put(self, name: str, data: bytes, *, until: float) -> None:
        """See :meth:`Engine.put`."""
        self._ask(until, _LONGEST_LINE, ("SET", _key(name), data))

    def put_many(self, objects: Mapping[str, bytes], *, until: float) -> None:
        """See :meth:`Engine.put_many`; in one round trip."""
        if objects:
            self._ask(until, _LONGEST_LINE, *[("SET", _key(name), data) for name, data in objects.items()])

    def delete(self, names: Iterable[str], *, until: float) -> None:
        """See :meth:`Engine.delete`."""
        commands = [("UNLINK", _key(name)) for name in names]
        if commands:
            self._ask(until, _LONGEST_LINE, *commands)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See :meth:`Engine.list`.

        Redis knows when a key was last used, and not when it was written: that is given, where its policy of eviction
        has it count that. The size is what the value takes there. Neither looks like a use to Redis.
        """
        cursor = b"0"
        while True:
            until = time.monotonic() + self._settings.timeout
            scan = ("SCAN", cursor, "MATCH", _pattern(prefix), "COUNT", 1000)
            cursor, keys = self._ask(until, _LONGEST_LINE, scan, most_items=_MOST_ITEMS)[0]
            yield from self._listed({key: name for key in keys if (name := _name(key)) and name.startswith(prefix)})
            if cursor == b"0":
                return

    def _listed(self, names: Mapping[bytes, str]) -> Iterator[Listed]:
        if not names:
            return
        commands = [(*what, key) for key in names for what in (("MEMORY", "USAGE"), ("OBJECT", "IDLETIME"))]

        def use(connection: Any) -> list[Any]:
            _send(connection, commands)
            return [connection._parser.read_response() for _ in commands]

        told = self._use(time.monotonic() + self._settings.timeout, _LONGEST_LINE, use)
        now = time.time()
        for name, size, idle in zip(names.values(), told[::2], told[1::2], strict=True):
            if isinstance(size, int):  # else it is gone
                yield Listed(name, size, now - idle if isinstance(idle, int) else 0.0)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        while self._kept:
            self._kept.pop().disconnect()

    def cut(self) -> None:
        """See :meth:`Engine.cut`."""
        for connection in list(self._connections):
            with_socket = connection._sock
            if with_socket is not None:
                try:
                    with_socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


def _trouble(exc: redis.RedisError) -> str:
    """What went wrong; redis-py's own sentence about a connection repeats the server's name."""
    inner = exc.__context__
    if isinstance(exc, redis.ConnectionError) and isinstance(inner, OSError):
        return f"can't be reached ({inner.strerror or inner})"
    return str(exc)


def _send(connection: Any, commands: Sequence[tuple[Any, ...]]) -> None:
    """Send commands by the parser's deadline; a socket's own time-out is for each piece anew."""
    for piece in connection.pack_commands(commands):
        rest = memoryview(piece)
        while rest:
            left = connection._parser.until - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "took too long")
            connection._sock.settimeout(left)
            rest = rest[connection._sock.send(rest) :]


def _value(answer: Any) -> bytes | None:
    """What GET is answered with."""
    if isinstance(answer, Exception):
        raise answer
    if answer is not None and not isinstance(answer, bytes):
        raise redis.InvalidResponse(f"the server answered GET with a {type(answer).__name__}")
    return answer


def _is_silent(sock: socket.socket | ssl.SSLSocket) -> bool:
    """Whether a connection is open, and nothing lies there that nobody has asked for."""
    try:
        ready, _, _ = select.select([sock], [], [], 0)
    except (OSError, ValueError):  # closed; a descriptor beyond what select takes
        return False
    return not ready


def _key(name: str) -> str:
    """The key of an object."""
    for tree, suffix in _TREES.items():
        if name.startswith(tree):
            return f"pc1:{{{name[len(tree) :].replace('/', '')}}}:{suffix}"
    return f"pc1:{name}"


def _name(key: bytes) -> str | None:
    """The object of a key; ``None`` if it is none's, such as a lease."""
    text = key.decode("utf-8", "replace").removeprefix("pc1:")
    for tree, suffix in _TREES.items():
        if text.startswith("{") and text.endswith(f"}}:{suffix}"):
            digest = text[1 : -len(suffix) - 2]
            return f"{tree}{digest[:2]}/{digest[2:]}"
    return None if text.startswith("{") else text


def _pattern(prefix: str) -> str:
    """What the keys of objects whose names begin so look like; it may fit others, too."""
    for tree, suffix in _TREES.items():
        if prefix.startswith(tree):
            return f"pc1:{{{prefix[len(tree) :].replace('/', '')}*}}:{suffix}"
    return f"pc1:{prefix}*" if prefix.startswith("packs") else "pc1:*"
