# SPDX-License-Identifier: Apache-2.0
"""Servers in every kind of trouble, for tests of tiers: they speak HTTP (and therefore S3) or the Redis protocol.

:mod:`ci.servers.troubles` has the answers that they send. An honest server has no trouble: it speaks HTTP and keeps
what it is given. A dead resolver, which no server can imitate, is in :mod:`ci.tier_faults`.
"""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from ci.servers.troubles import HONEST, HTML, PROTOCOLS, TROUBLES, Asked, http_head, troubles, whole

#: Seconds after which a server gives up on a waiting client, so that a test fails instead of hanging.
PATIENCE = 60.0


class FaultyServer:
    """A server on a port of the loopback interface, in threads of this process.

    Parameters
    ----------
    protocol : {"http", "redis"}
        The protocol that it speaks.
    trouble : str
        One of :func:`troubles`, or ``"honest"``.
    body : bytes
        The body of an honest server's answer.
    folder : Path, optional
        A folder for its certificate; required if the trouble is a certificate.

    Attributes
    ----------
    port : int
        The port on which it listens.
    connections, requests : int
        The numbers of connections and requests that it has seen.
    objects : dict
        The bodies that an honest server keeps, by path.
    """

    def __init__(self, protocol: str, trouble: str = HONEST, body: bytes = b"", folder: Path | None = None) -> None:
        self.protocol = protocol
        self.trouble = trouble
        self.body = body
        self.connections = self.requests = 0
        self.objects: dict[str, bytes] = {}
        self._folder = folder
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        if trouble not in {HONEST, *troubles(protocol)}:
            raise ValueError(f"no server of {protocol} knows the trouble {trouble!r}")

    @property
    def tls(self) -> bool:
        """Whether it speaks TLS, or seems to."""
        return self.trouble in {"a certificate nobody knows", "TLS, a byte a second"}

    def __enter__(self) -> Self:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        if self.trouble == "refused":
            return self
        if self.trouble == "full backlog":
            self._listener.listen(0)
            for _ in range(4):  # more than fit: the kernel doesn't answer the later ones
                client = socket.socket()
                client.setblocking(False)
                with suppress(BlockingIOError):
                    client.connect(("127.0.0.1", self.port))
                self._open.add(client)
            return self
        if self.trouble == "a certificate nobody knows":
            if self._folder is None:
                raise ValueError("a certificate has to be made in some folder")
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate(self._folder))
        self._listener.listen(128)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            if self.trouble == "full backlog":
                connection.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        talking = connection
        try:
            connection.settimeout(PATIENCE)
            if self.trouble == "TLS, a byte a second":
                self._drip(connection, b"\x16\x03\x03\x40\x00" + bytes(0x4000))  # a record's head and some of its body
                return
            if self._tls is not None:
                talking = self._tls.wrap_socket(connection, server_side=True)
            with talking.makefile("rb") as incoming:
                while not self._ended.is_set():
                    redis = self.protocol == "redis"
                    asked = _next_redis(incoming, talking, self.port) if redis else _next_http(incoming, self.port)
                    if asked is None or not self._answer(talking, asked):
                        return
        except (OSError, ValueError):
            return  # the client has gone, as it should
        finally:
            with self._lock:
                self._open.discard(connection)
            talking.close()
            connection.close()

    def _answer(self, connection: socket.socket, asked: Asked) -> bool:
        """Answer a request; return whether the connection stays open."""
        with self._lock:
            self.requests += 1
        if self.trouble == HONEST:
            connection.sendall(self._kept(asked))
            return True
        script = TROUBLES[self.protocol].get(self.trouble, whole)
        for step in script(PROTOCOLS[self.protocol], asked, self.body):
            if isinstance(step, bytes):
                connection.sendall(step)
            elif step.what == "drip":
                if not self._drip(connection, step.data):
                    return False
            else:
                if step.what == "wait":
                    self._ended.wait(PATIENCE)
                elif step.what == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
        return True

    def _drip(self, connection: socket.socket, data: bytes) -> bool:
        """Send a byte a second; return False if the server ends first."""
        for byte in data:
            connection.sendall(bytes([byte]))
            if self._ended.wait(1.0):
                return False
        return True

    def _kept(self, asked: Asked) -> bytes:
        """Return the answer of a server that keeps objects: over plain HTTP, or as S3, Google and Azure give it."""
        path = asked.target.partition("?")[0]
        with self._lock:
            if asked.method == "PUT":
                self.objects[path] = asked.body
                return http_head(asked, 0, "201 Created")
            if asked.method == "DELETE":
                gone = self.objects.pop(path, None) is None
                return http_head(asked, 0, "404 Not Found" if gone else "204 No Content")
            data = self.objects.get(path)
        if data is None:
            return http_head(asked, len(HTML), "404 Not Found") + HTML
        return http_head(
            asked,
            len(data),
        ) + (b"" if asked.method == "HEAD" else data)


def _next_http(incoming: IO[bytes], port: int) -> Asked | None:
    head = []
    while (line := incoming.readline(65536)) not in {b"\r\n", b""}:
        head.append(line)
    if not head:
        return None
    method, target, _ = head[0].decode("latin-1").split(" ", 2)
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in head[1:])}
    return Asked(method, target, incoming.read(int(fields.get(b"content-length", b"0"))), 1, port)


def _next_redis(incoming: IO[bytes], connection: socket.socket, port: int) -> Asked | None:
    """Return the next command; answer those with which a client introduces itself."""
    while line := incoming.readline(65536):
        words = []
        for _ in range(int(line[1:])):
            length = int(incoming.readline(65536)[1:])
            words.append(incoming.read(length + 2)[:-2])
        command = words[0].decode().upper()
        if command == "HELLO":
            connection.sendall(b"-ERR unknown command 'HELLO'\r\n")
        elif command in {"CLIENT", "SELECT", "AUTH"}:
            connection.sendall(b"+OK\r\n")
        else:
            return Asked(command, words[1].decode("latin-1") if words[1:] else "", b"", len(words) - 1, port)
    return None


def certificate(folder: Path) -> Path:
    """Make a self-signed certificate for 127.0.0.1 and localhost; return the path of a file with it and its key."""
    made = folder / "self-signed.pem"
    if not made.exists():
        key = folder / "self-signed.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", made], check=True, capture_output=True)
        made.write_bytes(made.read_bytes() + key.read_bytes())
    return made
