# SPDX-License-Identifier: Apache-2.0
"""The servers behind tiers, started for tests and benchmarks on ports of the loopback interface.

The guides show ``nginx.conf`` and ``redis.conf``; the servers use them with other ports and folders.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
#: Seconds within which a server must be up.
PATIENCE = 120.0
USER, PASSWORD = "ci", "write-me"
#: S3 keys have a minimum length.
ACCESS_KEY, SECRET_KEY = "progcachetestkey", "progcache-test-secret-key"
BUCKET = "programs"


class Unavailable(Exception):  # noqa: N818 - a reason to skip
    """A server isn't available; the message says what to install."""


class Served(NamedTuple):
    """A running server.

    Attributes
    ----------
    reader : str
        A tier's URL, with options, for clients that only read.
    writer : str
        A tier's URL, with options, for clients that write.
    port : int
        Its port on the loopback interface.
    """

    reader: str
    writer: str
    port: int


def free_port() -> int:
    """Return a port on which nothing listens, and which no other process is given while this one runs."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, so that they can bind it, too
    held.bind(("127.0.0.1", 0))
    atexit.register(held.close)
    port: int = held.getsockname()[1]
    return port


@contextmanager
def running(
    command: Sequence[str | Path], port: int, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; its log is ``folder/log``.

    Raises
    ------
    RuntimeError
        The server ended by itself, or isn't up in time; the message has its log.
    """
    log = folder / "log"
    with log.open("wb") as told:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + PATIENCE
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} isn't up: {log.read_text(errors='replace')}")
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def found(*names: str, package: str) -> str:
    """Return the path of a server's program under one of its names; raise :class:`Unavailable` if there is none."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    for name in names:
        if (path := shutil.which(name, path=places)) is not None:
            return path
    raise Unavailable(f"there is no {names[0]} (apt-get install {package})")


#: The programs of a server, their package, and the modules of the server and of a tier's client.
_PARTS = {
    "nginx": (("nginx",), "nginx-light", ()),
    "redis": (("redis-server", "valkey-server"), "redis-server", ()),
    "nanio": ((), "", ("nanio", "obstore")),
    "moto": ((), "", ("moto", "flask", "obstore")),
}


def why_not(name: str) -> str | None:
    """Return why a server of this module, or the client of a tier on it, isn't available; None if both are."""
    programs, package, modules = _PARTS[name]
    try:
        if programs:
            found(*programs, package=package)
        for module in modules:
            _wanted(module)
    except Unavailable as exc:
        return str(exc)
    return None


def _wanted(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"there is no {module} (pip install {module})")


@contextmanager
def nginx(folder: Path) -> Iterator[Served]:
    """Run an nginx that lets everybody read, and lets :data:`USER` PUT and DELETE."""
    program = found("nginx", package="nginx-light")
    port = free_port()
    for name in ("objects", "tmp"):
        (folder / name).mkdir()
    (folder / "writers").write_text(f"{USER}:{_salted(PASSWORD)}\n", encoding="utf-8")
    # Its other directories are relative to -p. If root starts nginx, the workers would run as another user.
    (folder / "nginx.conf").write_text(_with_port("nginx.conf", "listen 127.0.0.1:8085;", f"listen 127.0.0.1:{port};"))
    own = ["-g", "user root;"] if os.getuid() == 0 else []
    with running([program, "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr", *own], port, folder):
        yield Served(f"http://127.0.0.1:{port}/cache?mode=ro", f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/cache", port)


def _salted(password: str) -> str:
    """Return a password as nginx stores it (RFC 2307's SSHA): quick to check, which suits only a test."""
    salt = os.urandom(8)
    return "{SSHA}" + base64.b64encode(hashlib.sha1(password.encode() + salt).digest() + salt).decode()  # noqa: S324


def _with_port(name: str, before: str, after: str) -> str:
    text = (FOLDER / name).read_text(encoding="utf-8")
    if text.count(before) != 1:
        raise ValueError(f"{name} no longer has {before!r}")
    return text.replace(before, after)


@contextmanager
def redis(folder: Path) -> Iterator[Served]:
    """Run a Redis, or Valkey, with a user who can read and a user who can write."""
    program = found("redis-server", "valkey-server", package="redis-server")
    port = free_port()
    (folder / "redis.conf").write_text(_with_port("redis.conf", "port 6385", f"port {port}"), encoding="utf-8")
    with running([program, folder / "redis.conf", "--dir", folder], port, folder):
        url = f"127.0.0.1:{port}/0"
        yield Served(f"redis://reader:read-me@{url}?mode=ro", f"redis://writer:{PASSWORD}@{url}", port)


@contextmanager
def nanio(folder: Path) -> Iterator[Served]:
    """Run nanio, a small S3 server that keeps objects as files."""
    _wanted("nanio")
    port = free_port()
    data = folder / "data"
    (data / BUCKET).mkdir(parents=True)
    command: list[str | Path] = [sys.executable, "-m", "nanio", "serve", "--no-access-log", "--data-dir", data]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    keys = {"NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY}
    with running(command, port, folder, keys):
        yield _s3(port)


@contextmanager
def moto(folder: Path) -> Iterator[Served]:
    """Run moto's S3 server, which doesn't check credentials."""
    for module in ("moto", "flask"):
        _wanted(module)
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder):
        from http.client import HTTPConnection

        connection = HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{BUCKET}")
        if connection.getresponse().status != 200:
            raise RuntimeError("moto made no bucket")
        connection.close()
        yield _s3(port)


def _s3(port: int) -> Served:
    options = f"endpoint=http://127.0.0.1:{port}"
    url = f"s3://{ACCESS_KEY}:{SECRET_KEY}@{BUCKET}/cache?{options}"
    return Served(f"{url}&mode=ro", url, port)
