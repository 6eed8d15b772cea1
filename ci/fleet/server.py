# SPDX-License-Identifier: Apache-2.0
"""A separate Redis server that can be killed and started again."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from ci.servers import free_port


def why_no_server() -> str | None:
    """Return why no server can be started; None if one can."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return None if found else "no redis-server (apt-get install redis-server)"


#: The number of attempts to start a server.
_TRIES = 50


class RedisServer:
    """A server on the loopback interface, for the length of the block.

    Parameters
    ----------
    folder : path
        A folder for its files.
    lasting : bool
        Whether its data survives a kill.
    """

    def __init__(self, folder: Path, *, lasting: bool = False) -> None:
        self._folder, self._lasting = folder, lasting
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = False

    @property
    def url(self) -> str:
        """The URL of a tier on the server."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start the server and wait until it answers; before its first start, a port that is taken is replaced."""
        started_before = self._started
        for _ in range(_TRIES):
            if self._starts():
                self._started = True
                return self
            if started_before:
                time.sleep(0.1)
            else:
                self.port = free_port()
        raise RuntimeError(f"no server starts on port {self.port} of the loopback")

    def _starts(self) -> bool:
        program = shutil.which("redis-server") or shutil.which("valkey-server") or "redis-server"
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        settings += ["--appendonly", "yes" if self._lasting else "no", "--appendfsync", "everysec"]
        self._process = subprocess.Popen([program, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self._answers(self._process.pid):
            if self._process.poll() is not None:
                return False
            time.sleep(0.01)
        return True

    def _answers(self, pid: int) -> bool:
        """Return whether the server is ready and is the process that answers on its port."""
        return self._ask("PING") == b"+PONG\r\n" and f"process_id:{pid}\r\n".encode() in self._ask("INFO server")

    def has(self, key: str) -> bool | None:
        """Return whether the server has a key; None if it doesn't answer."""
        return {b":0\r\n": False, b":1\r\n": True}.get(self._ask(f"EXISTS {key}"))

    def _ask(self, question: str) -> bytes:
        """Return a short answer; empty if there is none. Any process may ask, without the cost of a client."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10.0) as connection:
                connection.sendall(question.encode() + b"\r\n")
                return connection.recv(1 << 16)
        except OSError:
            return b""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the server a signal; after SIGKILL, wait for its end."""
        if self._process is not None:
            self._process.send_signal(number)
            if number == signal.SIGKILL:
                self._process.wait()
                self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
