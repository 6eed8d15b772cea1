# SPDX-License-Identifier: Apache-2.0
"""A server at a distance: what is sent to its port and back arrives later, in order."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def at_a_distance(port: int, round_trip: float) -> Iterator[int]:
    """Yield another port of the loopback interface for a server; round trips through it take longer.

    Parameters
    ----------
    port : int
        The server's port.
    round_trip : float
        The additional seconds of a round trip. Opening a connection isn't delayed; what is sent afterwards is.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                try:
                    near, _ = listener.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    return
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _carry(near, far, round_trip / 2)
                _carry(far, near, round_trip / 2)

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _carry(source: socket.socket, target: socket.socket, seconds: float) -> None:
    """Forward bytes in one direction: one thread receives them, another sends them when they are due."""
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take() -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + seconds, data))

    def hand_on() -> None:
        while True:
            due, data = waiting.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            try:
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
            except OSError:
                return

    for work in (take, hand_on):
        threading.Thread(target=work, daemon=True).start()
