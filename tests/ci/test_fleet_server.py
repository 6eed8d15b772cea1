# SPDX-License-Identifier: Apache-2.0
"""The Redis server that tests and tools start: it is the one that answers, on whichever port."""

from __future__ import annotations

import signal

import pytest

from ci.fleet import server
from ci.fleet.server import RedisServer, why_no_server

pytestmark = pytest.mark.skipif(why_no_server() is not None, reason=str(why_no_server()))


def test_a_port_that_another_one_took_is_left_to_it(tmp_path, monkeypatch):
    """Between the choice of a free port and the start, which takes a while on a busy machine."""
    free = server.free_port
    with RedisServer(tmp_path / "first") as first:
        ports = [first.port, first.port]
        monkeypatch.setattr(server, "free_port", lambda: ports.pop() if ports else free())
        with RedisServer(tmp_path / "second") as second:
            assert second.port != first.port
            first.kill(signal.SIGKILL)
            assert second.has("nothing") is False


def test_started_again_it_keeps_its_port(tmp_path):
    with RedisServer(tmp_path / "redis") as one:
        port = one.port
        one.kill(signal.SIGKILL)
        assert one.has("nothing") is None
        assert one.start().port == port
        assert one.has("nothing") is False
