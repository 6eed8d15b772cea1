# SPDX-License-Identifier: Apache-2.0
"""The kinds of trouble that a server can be in, as scripts: what it sends instead of a whole answer."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

TERABYTE = 10**12
HTML = b"<!DOCTYPE html><html><body><h1>Please sign in</h1></body></html>"

_DATE = "Sun, 29 Nov 2026 12:00:00 GMT"


class Act:
    """A step of a script besides sending bytes: wait until the client goes, close, reset, or send a byte a second."""

    def __init__(self, what: str, data: bytes = b"") -> None:
        self.what = what
        self.data = data


WAIT, CLOSE, RESET = Act("wait"), Act("close"), Act("reset")


class Asked(NamedTuple):
    """A request.

    Attributes
    ----------
    method, target : str
        The method and target of an HTTP request; for Redis the command, in capitals, and its first argument.
    body : bytes
        The body of an HTTP request.
    objects : int
        The number of objects asked for; more than one only with ``MGET``.
    port : int
        The server's port.
    """

    method: str
    target: str
    body: bytes
    objects: int
    port: int


class Protocol(NamedTuple):
    """The parts of an answer.

    Attributes
    ----------
    head : callable
        Takes a request and the length of a body; returns what precedes the body.
    tail : bytes
        What follows the body.
    """

    head: Callable[[Asked, int], bytes]
    tail: bytes


def http_head(_: Asked, length: int, status: str = "200 OK", more: str = "") -> bytes:
    """Return the head of an answer, with the fields that the clients of object stores expect."""
    told = f'HTTP/1.1 {status}\r\nDate: {_DATE}\r\nLast-Modified: {_DATE}\r\nETag: "1"\r\n'
    return f"{told}Content-Type: application/octet-stream\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def _redis_head(asked: Asked, length: int) -> bytes:
    head = b"$%d\r\n" % length
    return b"*%d\r\n%b" % (asked.objects, head) if asked.method == "MGET" else head


PROTOCOLS = {"http": Protocol(http_head, b""), "redis": Protocol(_redis_head, b"\r\n")}
Script = Iterator[bytes | Act]
#: Takes the protocol, the request and the body of an honest server's answer.
Trouble = Callable[[Protocol, Asked, bytes], Script]


# Any protocol


def _silent(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield WAIT


def _half(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, len(body)) + body[: len(body) // 2]
    yield WAIT


def _slow_head(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield Act("drip", protocol.head(asked, len(body)) + body)


def _slow_body(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, len(body))
    yield Act("drip", body)


def _reset(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield RESET


def _reset_midway(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, len(body)) + body[: len(body) // 2]
    yield RESET


def _closes(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield CLOSE


def _too_short(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, len(body) + 1000) + body + protocol.tail
    yield CLOSE


def _too_long(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, len(body) // 2) + body + protocol.tail


def _terabyte(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield protocol.head(asked, TERABYTE) + body
    yield Act("drip", b"more")  # some clients allocate room for all of it at the second piece
    yield WAIT


def _html(protocol: Protocol, asked: Asked, _: bytes) -> Script:
    yield protocol.head(asked, len(HTML)) + HTML + protocol.tail


def _empty(protocol: Protocol, asked: Asked, _: bytes) -> Script:
    yield protocol.head(asked, 0) + protocol.tail


def whole(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    """Answer with the whole body, which is trouble only if the body belongs to another key."""
    yield protocol.head(asked, len(body)) + body + protocol.tail


def _gibberish(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield b"SSH-2.0-OpenSSH_9.2p1\r\n"
    yield WAIT


# HTTP


def _status(status: str, more: str = "", body: bytes = HTML) -> Trouble:
    def script(_: Protocol, asked: Asked, __: bytes) -> Script:
        told = more.format(target=asked.target, port=asked.port)
        yield http_head(asked, len(body), status, told) + body

    return script


def _terabyte_of_an_error(_: Protocol, asked: Asked, __: bytes) -> Script:
    yield http_head(asked, TERABYTE, "500 Internal Server Error") + HTML
    yield Act("drip", b"more")
    yield WAIT


def _continues(_: Protocol, __: Asked, ___: bytes) -> Script:
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n"


def _endless_head(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        yield b"X-More: " + 1000 * b"x" + b"\r\n"


def _endless_line(_: Protocol, __: Asked, ___: bytes) -> Script:
    while True:
        yield 4096 * b"+"


def _endless_body(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + 0x10000 * b"x" + b"\r\n"


def _chunks(more: bytes, endless: bytes) -> Trouble:
    def script(_: Protocol, __: Asked, ___: bytes) -> Script:
        yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + more
        while True:
            yield endless

    return script


def _early_hints(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + protocol.head(asked, len(body)) + body


def _gone_and_closed(_: Protocol, asked: Asked, __: bytes) -> Script:
    yield http_head(asked, len(HTML), "404 Not Found") + HTML
    yield CLOSE


@functools.cache
def _packed() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(16)) + packer.flush()


def _bomb(_: Protocol, asked: Asked, __: bytes) -> Script:
    yield http_head(asked, len(_packed()), more="Content-Encoding: gzip\r\n") + _packed()


# Redis


def _twice(protocol: Protocol, asked: Asked, body: bytes) -> Script:
    yield 2 * (protocol.head(asked, len(body)) + body + protocol.tail)


def _nil_and_closed(_: Protocol, __: Asked, ___: bytes) -> Script:
    yield b"$-1\r\n"
    yield CLOSE


def _line(text: str) -> Trouble:
    def script(_: Protocol, asked: Asked, __: bytes) -> Script:
        yield text.format(port=asked.port).encode() + b"\r\n"

    return script


def _nested(_: Protocol, __: Asked, ___: bytes) -> Script:
    while True:
        yield 1000 * b"*1\r\n"


def _http_at_redis(_: Protocol, asked: Asked, __: bytes) -> Script:
    yield http_head(asked, len(HTML), "400 Bad Request") + HTML
    yield CLOSE


_OF_ALL: dict[str, Trouble] = {
    "black hole": _silent,
    "half an answer, then silence": _half,
    "a byte a second, from the head on": _slow_head,
    "a byte a second of the body": _slow_body,
    "reset": _reset,
    "reset midway": _reset_midway,
    "closed": _closes,
    "shorter than said": _too_short,
    "longer than said": _too_long,
    "a terabyte, it says": _terabyte,
    "HTML in place of the object": _html,
    "nothing in place of the object": _empty,
    "another key's object": whole,
    "another protocol": _gibberish,
}
TROUBLES: dict[str, dict[str, Trouble]] = {
    "http": _OF_ALL
    | {
        "500": _status("500 Internal Server Error"),
        "503, try again in an hour": _status("503 Service Unavailable", "Retry-After: 3600\r\n"),
        "429, try again in an hour": _status("429 Too Many Requests", "Retry-After: 3600\r\n"),
        "401": _status("401 Unauthorized", 'WWW-Authenticate: Basic realm="x"\r\n'),
        "403": _status("403 Forbidden"),
        "404 with HTML": _status("404 Not Found"),
        "a redirect to itself": _status("302 Found", "Location: {target}\r\n"),
        "a redirect elsewhere": _status("307 Temporary Redirect", "Location: http://127.0.0.1:{port}/elsewhere\r\n"),
        "304": _status("304 Not Modified", body=b""),
        "206 of nothing asked": _status("206 Partial Content", "Content-Range: bytes 0-63/64\r\n"),
        "an endless row of 100 Continue": _continues,
        "an endless head": _endless_head,
        "an endless line": _endless_line,
        "an endless body": _endless_body,
        "a gzip bomb": _bomb,
        "a chunk of -1 bytes": _chunks(b"-1\r\n", 0x10000 * b"x"),
        "a chunk of -5 bytes": _chunks(b"-5\r\n", b"x"),
        "a chunk of a googol": _chunks(100 * b"9" + b"\r\n", 0x10000 * b"x"),
        "endless trailers": _chunks(b"2\r\nab\r\n0\r\n", b"X: y\r\n"),
        "early hints before another's object": _early_hints,
        "an error of a terabyte": _terabyte_of_an_error,
        "101": _status("101 Switching Protocols", body=b""),
        "404, and closed without a word": _gone_and_closed,
    },
    "redis": _OF_ALL
    | {
        "an error": _line("-ERR internal error"),
        "no password": _line("-NOAUTH Authentication required."),
        "no permission": _line("-NOPERM this user has no permissions"),
        "loading": _line("-LOADING Redis is loading the dataset in memory"),
        "out of memory": _line("-OOM command not allowed when used memory > 'maxmemory'."),
        "a redirect to itself": _line("-MOVED 1 127.0.0.1:{port}"),
        "a number": _line(":42"),
        "a length below zero": _line("$-7"),
        "an array of a billion": _line("*1000000000"),
        "endless arrays in arrays": _nested,
        "an endless line": _endless_line,
        "HTTP": _http_at_redis,
        "an answer too many": _twice,
        "a push message": _line(">3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\nb"),
        "a map": _line("%1\r\n+a\r\n:1"),
        "a number of 60,000 digits": _line(":" + 60_000 * "9"),
        "a length of 60,000 digits": _line("$" + 60_000 * "9"),
        "read-only": _line("-READONLY You can't write against a read only replica."),
        "nothing, and closed without a word": _nil_and_closed,
    },
}
#: Troubles of the listening socket or of TLS.
OF_THE_PORT = ("refused", "full backlog", "a certificate nobody knows", "TLS, a byte a second")
#: Troubles that end only by the client's own timeout.
STALLS = frozenset(
    {
        "full backlog",
        "black hole",
        "half an answer, then silence",
        "a byte a second, from the head on",
        "a byte a second of the body",
        "an endless row of 100 Continue",
        "endless trailers",
        "TLS, a byte a second",
    }
)
HONEST = "honest"


def troubles(protocol: str) -> tuple[str, ...]:
    """Return every trouble that a server of a protocol can be in."""
    return (*OF_THE_PORT, *TROUBLES[protocol])
