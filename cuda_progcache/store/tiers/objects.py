# SPDX-License-Identifier: Apache-2.0
"""Object stores as tiers, through obstore: Google's and Azure's, and S3 where it takes more than an access key.

obstore runs in a process of its own. It makes room for as many bytes as a server announces, and where there is no such
room it aborts its process; and its runtime hangs in a forked child.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from cuda_progcache._util import forks
from cuda_progcache._util.children import start_module
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.connections import HungUpError
from cuda_progcache.store.tiers.engine import Listed
from cuda_progcache.store.tiers.http import LISTING, HttpEngine
from cuda_progcache.store.tiers.timed_http import HttpClient
from cuda_progcache.store.tiers.timed_sockets import TimedSocket, left

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.timed_http import Answer

_MODULE = "cuda_progcache.store.tiers.object_process"
#: Seconds in which a process that runs takes a connection.
_TAKES = 1.0


class ObjectEngine(HttpEngine):
    """Objects of a bucket of S3 (``s3``) or Google's (``gs``), or of a container of Azure's (``az``), by obstore.

    Without credentials, here or in the environment, requests aren't signed: obstore would ask the machine's metadata
    service for them, which takes long where there is none. For S3, ``AWS_EC2_METADATA_DISABLED=false`` allows that.

    Parameters
    ----------
    settings : TierSettings
        Of an ``s3``, ``gs`` or ``az`` URL.

    Raises
    ------
    ModuleNotFoundError
        obstore isn't installed.
    """

    def __init__(self, settings: TierSettings) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise ModuleNotFoundError("No module named 'obstore'", name="obstore")
        self._process = _Process(settings)
        client = HttpClient(
            "http://obstore",
            name=settings.url,
            connect_timeout=settings.connect_timeout,
            dial=self._process.connection,
        )
        super().__init__(settings, client)

    def prepare(self) -> None:
        """Start the process, which takes as long as an import of obstore would."""
        self._process.start(self._settings.write_timeout)

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """The objects whose names begin so."""
        answer = self._ask("GET", f"/?{quote(prefix)}", until=until, limit=LISTING)
        if answer.status != 200:
            self._refuse("a listing", answer)
        for name, size, modified in json.loads(answer.data):
            yield Listed(name, size, modified)

    def _exchange(
        self, method: str, name: str, *, until: float, limit: int | None = None, body: bytes | None = None
    ) -> Answer:
        return self._ask(method, f"/{quote(name)}", until=until, limit=limit, body=body)

    def _ask(
        self, method: str, target: str, *, until: float, limit: int | None = None, body: bytes | None = None
    ) -> Answer:
        # A pack may take as long as a write.
        is_patient = method != "GET" or until - time.monotonic() > self._settings.timeout
        seconds = self._settings.write_timeout if is_patient else self._settings.timeout
        headers = {"X-Seconds": str(seconds), "X-Limit": str(limit)}
        try:
            return self._client.exchange(method, target, until=until, limit=limit, body=body, headers=headers)
        except HungUpError:
            raise StoreError(errno.EIO, "the process that runs obstore ended meanwhile", self.name) from None

    def _refuse(self, what: str, answer: Answer) -> NoReturn:
        if answer.status == 404:
            raise no_bucket(what, self.name)
        code, why = json.loads(answer.data)
        if code == errno.ETIMEDOUT:
            raise TimeoutError(code, why, self.name)
        raise StoreError(code, why.replace("{what}", what), self.name)

    def close(self) -> None:
        """Close the connections, and end the process."""
        super().close()
        self._process.end()


def no_bucket(what: str, name: str) -> StoreError:
    """The error for a write that a server answers with 404."""
    return StoreError(errno.ENOENT, f"the server answered 404 to {what}: does the bucket exist?", name)


class _Process:
    """A process that runs obstore for one tier, and connections to it. A forked child starts its own.

    Parameters
    ----------
    settings : TierSettings
    """

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[Any], socket.socket] | None = None
        self._end: Any = None
        forks.in_child(self._leave_it)

    def _leave_it(self) -> None:
        """In a forked child: the process is the parent's."""
        self._lock = threading.Lock()
        self._finish()

    def connection(self) -> socket.socket:
        """A new connection, by the end of the thread's request."""
        self.start(left())
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                running = self._running
                if running is None:
                    raise BrokenPipeError(errno.EPIPE, "its process has ended")
                socket.send_fds(running[1], [b"c"], [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return TimedSocket(fileno=ours.detach())

    def start(self, seconds: float) -> None:
        """Start the process where there is none, within so many seconds."""
        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=max(seconds, 0.0)):
            raise TimeoutError(errno.ETIMEDOUT, "took too long", self._settings.url)
        try:
            if self._running is not None and self._running[0].poll() is not None:
                self._finish()
            if self._running is None:
                self._start(until)
        finally:
            self._lock.release()

    def _start(self, until: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = start_module(_MODULE, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            except OSError as exc:
                ours.close()
                raise StoreError(exc.errno, f"can't start a process for obstore ({exc})", self._settings.url) from exc
        self._running = (process, ours)
        self._end = weakref.finalize(self, _end, os.getpid(), process, ours)
        self._end.atexit = False  # a process ends with its parent
        try:
            ours.settimeout(max(until - time.monotonic(), 0.001))
            ours.sendall(json.dumps(self._settings.for_child()).encode() + b"\n")
            greeting = ours.recv(1)
            ours.settimeout(_TAKES)
        except OSError as exc:
            self._finish()
            if isinstance(exc, TimeoutError):
                raise TimeoutError(errno.ETIMEDOUT, "took too long to start obstore", self._settings.url) from None
            greeting = b""
        if not greeting:
            self._finish()
            raise StoreError(errno.EIO, "the process for obstore ended at once", self._settings.url)

    def _finish(self) -> None:
        self._running = None
        if self._end is not None:
            self._end()

    def end(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._finish()


def _end(parent: int, process: subprocess.Popen[Any], control: socket.socket) -> None:
    """End a process; in a forked child of its parent's, only close the copy of the socket to it."""
    control.close()
    if parent == os.getpid():
        process.kill()
        process.wait()
