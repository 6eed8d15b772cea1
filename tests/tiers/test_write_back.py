# SPDX-License-Identifier: Apache-2.0
"""Writes off the caller's path: a bounded queue, lookups and removals of queued writes, and the end of the process."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.records import Version
from cuda_progcache.store.tiers import engine as engine_module
from cuda_progcache.store.tiers import redis, write_back
from cuda_progcache.store.tiers.engine import Listed
from cuda_progcache.store.tiers.envelope import pack
from cuda_progcache.store.tiers.remote import RemoteProgramCache
from cuda_progcache.store.tiers.settings import TierSettings, parse_tier
from cuda_progcache.store.tiers.write_back import WriteBack
from tests.tiers.shelf import CUBIN, name_of


def test_a_write_is_tried_again(shelf, tier, monkeypatch):
    monkeypatch.setattr(write_back, "_PAUSE", 0.001)
    errors = [ConnectionError("reset"), ConnectionError("reset")]

    def fail(until):
        if errors:
            raise errors.pop()

    shelf.trouble = fail
    tier.publish(b"k", CUBIN, {})
    with pytest.warns(ProgCacheWarning, match="reset"):
        assert tier.flush(300)
    assert (tier.stats().dropped, tier.stats().stored, tier.tier().state) == (0, 1, "closed")


def test_a_full_queue_drops_and_counts(shelf, tier, monkeypatch, until):
    monkeypatch.setattr(write_back, "MOST_ITEMS", 2)
    gate = threading.Event()
    shelf.trouble = lambda until: gate.wait(300)
    assert tier.publish(b"0", CUBIN, {})
    until(lambda: shelf.calls)
    assert [tier.publish(b"%d" % number, CUBIN, {}) for number in range(1, 5)] == [True, True, False, False]
    assert tier.get(b"2") == CUBIN  # still queued
    assert tier.get(b"0") == CUBIN
    shelf.trouble = None
    assert sorted(key for key, _ in tier.load_many([b"0", b"1", b"2", b"3"])) == [b"0", b"1", b"2"]
    gate.set()
    assert tier.flush(300)
    assert (tier.stats().dropped, len(shelf.objects)) == (2, 3)


def test_a_write_without_room_leaves_the_one_before_it(shelf, tier, monkeypatch, until):
    gate = threading.Event()
    shelf.trouble = lambda until: gate.wait(300)
    assert tier.publish(b"0", CUBIN, {})
    until(lambda: shelf.calls)
    assert tier.publish(b"k", CUBIN, {})
    monkeypatch.setattr(write_back, "MOST_BYTES", len(tier._objects.writes.find(name_of(b"k"))) + 50)
    assert tier.publish(b"k", bytes(3000), {}) is False
    assert tier.get(b"k") == CUBIN
    for data in (b"another", CUBIN, b"another"):  # each fits in the room of the one that it replaces
        assert tier.publish(b"k", data, {})
    gate.set()
    assert tier.flush(300)
    tier.forget_misses()
    assert tier.get(b"k") == b"another"


def test_what_is_removed_while_it_waits_is_not_sent(shelf, tier, until):
    gate = threading.Event()
    shelf.trouble = lambda until: gate.wait(300)
    tier.publish(b"0", CUBIN, {})
    until(lambda: shelf.calls)
    tier.publish(b"k", CUBIN, {})
    forget = tier._objects.writes.forget
    tier._objects.writes.forget = lambda names: (forget(names), gate.set())
    del tier[b"k"]  # it exists, as far as callers can tell
    with pytest.raises(KeyError):
        del tier[b"k"]
    assert "put" in [what for what, _ in shelf.calls]
    assert name_of(b"k") not in shelf.objects
    assert tier.tier().stored == 1


def test_what_is_on_its_way_is_cleared_too(shelf, tier, until):
    gate = threading.Event()
    shelf.trouble = lambda until: gate.wait(300)
    shelf.list = lambda prefix, *, until: [Listed(name, 1, 0.0) for name in shelf.objects if name.startswith(prefix)]
    tier.publish(b"0", CUBIN, {})
    until(lambda: shelf.calls)
    tier.publish(b"k", CUBIN, {})
    forget = tier._objects.writes.forget
    tier._objects.writes.forget = lambda: (forget(), gate.set())
    tier.clear()
    assert tier.flush(300)
    assert shelf.objects == {}
    assert tier.tier().stored == 1


def test_what_was_refused_was_not_published(shelf):
    tier = RemoteProgramCache(shelf, TierSettings("", max_bytes=1000, write_timeout=0.01))
    gate = threading.Event()
    shelf.trouble = lambda until: gate.wait(300)
    tier.publish(b"k", b"small", {})
    assert not tier.has_published()  # it is still under way
    gate.set()
    assert tier.flush(300)
    assert tier.has_published()
    tier.publish(b"l", bytes(1000), {})
    assert not tier.has_published()
    assert tier.has_published()
    tier.reset()  # as in a forked child, whose counters are also zero
    assert tier._unsent == 0


def test_an_object_that_is_too_large_is_refused(shelf):
    tier = RemoteProgramCache(shelf, TierSettings("", max_bytes=1000))
    assert tier.publish(b"k", bytes(1000), {}) is False
    assert tier.stats().refused == 1
    assert shelf.calls == []


def test_a_signature_is_reckoned_with_in_the_size(shelf):
    # A time has 7 digits after the point, or up to 6 fewer.
    plain = len(pack(entry_digest(b"k"), CUBIN, Version.of(CUBIN, b"{}", 1764445556.1234567)))
    for signer, most, fits in [
        (None, plain, True),
        (None, plain - 7, False),
        (dict, plain + 2048, True),
        (dict, plain + 2041, False),
    ]:
        tier = RemoteProgramCache(shelf, TierSettings("", max_bytes=most), signer=signer and (lambda *_: {}))
        assert tier.publish(b"k", CUBIN, {}) is fits
        assert tier.flush(300)


def test_a_write_that_is_put_off_is_done_at_once_for_who_waits():
    written = []
    queue = write_back.WriteBack(lambda batch: written.append(dict(batch)), lambda _: None, delay=3600.0)
    for end in (lambda: queue.flush(300), lambda: queue.end(time.monotonic() + 300)):
        for number in range(3):
            assert queue.put(str(number), number, 1)
        assert (queue.find("1"), written) == (1, [])
        end()
        assert written == [{"0": 0, "1": 1, "2": 2}]
        written.clear()


def test_a_write_to_redis_has_one_deadline_for_all_its_pieces():
    received, ended = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drain():
            connection, _ = server.accept()
            with connection:
                while not ended.wait(0.005) and (data := connection.recv(1 << 16)):
                    received.append(len(data))

        threading.Thread(target=drain, daemon=True).start()
        engine = redis.RedisEngine(parse_tier(f"redis://127.0.0.1:{server.getsockname()[1]}"))
        with pytest.raises(TimeoutError):
            engine.put_many({f"packs/{n}": bytes(1 << 20) for n in range(64)}, until=time.monotonic() + 0.3)
        ended.set()
        assert sum(received) < 60 << 20


def test_writes_reach_the_tier_before_the_process_ends(redis_url, open_url, python):
    script = """
import sys
from cuda_progcache.store.tiers import open_tier, write_back
from cuda_progcache.store.tiers.settings import parse_tier
tier = open_tier(parse_tier(sys.argv[1]))
for number in range(200):
    tier.publish(b"%d" % number, bytes(1000), {"n": number})
write_back.AT_EXIT = 300.0
"""
    python(script, redis_url)
    assert len(open_url(redis_url)) == 200


def test_the_end_of_a_process_waits_for_a_dead_tier_no_longer_than_it_says(black_hole, python):
    script = """
import sys, time
from cuda_progcache.store.tiers import open_tier, write_back
from cuda_progcache.store.tiers.settings import parse_tier
tier = open_tier(parse_tier(sys.argv[1]))
write_back.AT_EXIT = 0.2
tier.publish(b"k", b"v", {})
"""
    python(script, f"{black_hole}?write_timeout=3000&timeout=3000")  # python() gives up after 5 minutes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_writes_are_on_their_way_doubles_and_loses_none(redis_url, open_url, python):
    script = """
import multiprocessing, os, sys
from cuda_progcache.store.tiers import open_tier, write_back
from cuda_progcache.store.tiers.settings import parse_tier
tier = open_tier(parse_tier(sys.argv[1]))

write_back.AT_EXIT = 300.0

def child():
    assert tier.tier().waiting == 0
    tier.publish(b"child", b"x", {})  # sent as the worker ends

for number in range(300):
    tier.publish(b"%d" % number, bytes(5000), {})
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
"""
    python(script, redis_url)
    assert len(open_url(redis_url)) == 301


def test_batches_are_of_so_many_items_and_bytes(monkeypatch):
    monkeypatch.setattr(engine_module, "_OBJECTS", 3)
    monkeypatch.setattr(engine_module, "_BYTES", 100)
    begun, gate, sizes = threading.Event(), threading.Event(), [50, 40, 40, 40, 200, 1, 1, 1, 1]
    batches = []

    def write(batch):
        batches.append(list(batch.values()))
        begun.set()
        assert gate.wait(300)

    writes = WriteBack(write, batches.append)
    for number, size in enumerate(sizes):
        assert writes.put(f"{number}", size, size)
        assert begun.wait(300)  # the first one is already on its way, alone
    gate.set()
    assert writes.flush(300)
    assert batches == [[50], [40, 40], [40], [200], [1, 1, 1], [1]]


def test_pauses_before_another_try_grow_and_differ():
    pauses, dropped = [], []

    class Ending(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    def fail(batch):
        raise ConnectionError("reset")

    writes = WriteBack(fail, dropped.append)
    writes._ending = Ending()
    for number in range(20):
        assert writes.put(f"{number}", number, 1)
        assert writes.flush(300)
    assert dropped == [1] * 20
    assert len(pauses) == 40
    assert all(0.125 <= pause <= 0.375 for pause in pauses[::2])
    assert all(0.25 <= pause <= 0.75 for pause in pauses[1::2])
    assert len(set(pauses)) > 20


def test_where_there_can_be_no_thread_a_write_is_dropped(monkeypatch):
    class Threading:
        def __getattr__(self, name):
            return getattr(threading, name)

        def Thread(self, **_):  # noqa: N802 - as the module has it
            assert writes.put("another thread's", 0, 10)
            raise RuntimeError("can't start new thread")

    written, dropped = {}, []
    writes = WriteBack(written.update, dropped.append)
    monkeypatch.setattr(write_back, "MOST_BYTES", 60)
    monkeypatch.setattr(write_back, "threading", Threading())
    assert not writes.put("a", 1, 50)
    assert (writes.find("a"), writes.count, writes.flush(0)) == (None, 0, True)
    monkeypatch.setattr(write_back, "threading", threading)
    assert writes.put("b", 2, 50)
    assert writes.flush(300)
    assert (written, dropped) == ({"b": 2}, [2])


def test_a_call_is_made_once_what_was_queued_before_it_is_done():
    made, written, begun, gate, held, go = [], [], *(threading.Event() for _ in range(4))

    def write(batch):
        begun.set()
        assert gate.wait(300)
        written.extend(batch)

    writes = WriteBack(write, made.append)
    writes.then(lambda: made.append("at once"))
    assert made == ["at once"]
    assert writes.put("a", 1, 1)
    assert begun.wait(300)
    writes.then(lambda: 1 / 0)  # an error that only its caller is responsible for
    assert writes.put("b", 2, 1)
    writes.then(lambda: made.append([*written]))
    writes.then(lambda: (held.set(), go.wait(300)))
    assert (made, writes.count) == (["at once"], 2)
    gate.set()
    assert held.wait(300)
    writes.then(lambda: made.append("in turn"))
    assert (made, writes.flush(0)) == (["at once", ["a", "b"]], False)
    go.set()
    assert writes.flush(300)
    assert made == ["at once", ["a", "b"], "in turn"]


def test_the_end_drops_what_is_left_and_tries_nothing_again():
    tried, dropped, begun, gate = [], [], threading.Event(), threading.Event()

    def fail(batch):
        tried.append(list(batch))
        begun.set()
        assert gate.wait(300)
        raise ConnectionError("reset")

    writes = WriteBack(fail, dropped.append)
    assert writes.put("a", 1, 1)
    assert begun.wait(300)
    assert writes.put("b", 2, 1)
    writes.end(time.monotonic() - 1.0)
    assert dropped == [2]
    gate.set()
    assert writes.flush(300)
    assert tried == [["a"], ["b"]]
