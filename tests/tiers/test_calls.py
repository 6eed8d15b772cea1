# SPDX-License-Identifier: Apache-2.0
"""A tier's calls to its engine, and the connections that they use."""

from __future__ import annotations

import errno
import gc
import socket
import time

import pytest

from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store import InMemoryProgramCache, ProgramCacheStack
from cuda_progcache.store.tiers import timed_sockets
from cuda_progcache.store.tiers.connections import Connections, HungUpError
from tests.tiers.shelf import CUBIN


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.load(b"k"),
        lambda store: store.get(b"k"),
        lambda store: store.find_manifest("0" * 64),
        lambda store: list(store.load_many([b"k"])),
        lambda store: store.publish(b"k", CUBIN, {}),
    ],
    ids=["load", "get", "find_manifest", "load_many", "publish"],
)
def test_a_warning_points_at_the_line_that_called_the_package(tier, use, stacked):
    store = ProgramCacheStack([InMemoryProgramCache(), tier]) if stacked else tier
    tier._calls.note("trouble", "failed (reset)")
    with pytest.warns(ProgCacheWarning, match="reset") as caught:
        use(store)
    assert {warning.filename for warning in caught} == {__file__}


def test_an_interrupted_look_up_keeps_nobody_waiting(shelf, tier):
    def interrupt(until):
        raise KeyboardInterrupt

    tier.breaker._patience = -1.0  # any call under way has already taken too long
    shelf.trouble = interrupt
    with pytest.raises(KeyboardInterrupt):
        tier.load(b"k")
    shelf.trouble = None
    assert tier.load(b"k") is None
    assert (tier.tier().skipped, len(shelf.calls)) == (0, 2)


def test_an_engine_that_cannot_be_prepared_is_left_alone_like_one_that_fails(shelf, tier):
    prepared = []

    def prepare():
        prepared.append(1)
        raise StoreError(errno.EIO, "no library")

    shelf.prepare = prepare
    with pytest.warns(ProgCacheWarning, match="no library") as caught:
        assert [tier.publish(b"k", CUBIN, {}) for _ in range(9)] == [False] * 9
        assert tier.load(b"k") is None
    assert (len(prepared), len(caught), shelf.calls) == (3, 1, [])
    assert (tier.tier().errors, tier.tier().dropped) == (3, 9)


@pytest.fixture
def opened():
    """The connections that :func:`connect` has opened."""
    made = []
    yield made
    for one in made:
        one.close()
        one.other.close()


@pytest.fixture
def connect(opened):
    """A class of connections to a peer that never answers."""

    class Connection:
        def __init__(self):
            self.sock, self.other = socket.socketpair()
            opened.append(self)

        def close(self):
            if self.sock is not None:
                self.sock.close()
                self.sock = None

    return Connection


def at_once(connections, count):
    """Use ``count`` connections at the same time."""
    connections.use(lambda _: count > 1 and at_once(connections, count - 1))


def test_no_more_connections_are_kept_than_asked_for(connect, opened):
    connections = Connections(connect, 2)
    at_once(connections, 5)
    assert [one.sock is None for one in opened].count(False) == 2
    del connections
    gc.collect()
    assert all(one.sock is None for one in opened)


def test_where_a_kept_connection_was_closed_those_as_old_are_not_tried(connect, opened):
    connections = Connections(connect, 5)
    at_once(connections, 3)
    old, used = opened[:], []

    def call(connection):
        used.append(connection)
        if connection in old:
            raise HungUpError(errno.ECONNRESET, "the server closed the connection")

    connections.use(call)
    assert used == [used[0], opened[3]]
    assert all(one.sock is None for one in old)


@pytest.mark.parametrize("host", ["a..b", "a" * 64, ".", "\udcff"])
def test_a_name_that_no_host_can_have_is_an_error_of_the_store(host):
    timed_sockets.hurry(time.monotonic() + 600)
    with pytest.raises(OSError, match=r"can't be a host name|not known|No address"):
        timed_sockets.connect(host, 80, 600.0)


def test_each_address_of_a_host_gets_its_share_of_the_time(monkeypatch):
    """Otherwise an address that never answers would leave no time for the others."""
    given = []

    class NobodyAnswers(timed_sockets.TimedSocket):
        def connect(self, address):
            given.append((address, self.gettimeout()))
            raise TimeoutError

    address = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    monkeypatch.setattr(timed_sockets, "_addresses", lambda *_: [(*address, host) for host in "abc"])
    monkeypatch.setattr(timed_sockets, "TimedSocket", NobodyAnswers)
    timed_sockets.hurry(time.monotonic() + 6000)
    with pytest.raises(TimeoutError):
        timed_sockets.connect("host", 80, 600.0)
    assert [(host, 100 * round(seconds / 100)) for host, seconds in given] == [("a", 200), ("b", 300), ("c", 600)]
