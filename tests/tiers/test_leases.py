# SPDX-License-Identifier: Apache-2.0
"""One compile per program among hosts: a lost lease costs a second compile, never a wrong or missing program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import redis

from ci.fleet.server import RedisServer, why_no_server
from ci.servers.faulty import FaultyServer
from ci.servers.troubles import STALLS, TROUBLES, WAIT, troubles
from cuda_progcache.compile import single_flight
from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.tiers import deadline, leases, open_tier
from cuda_progcache.store.tiers.leases import FleetLeases
from cuda_progcache.store.tiers.redis_client import RedisClient
from cuda_progcache.store.tiers.settings import parse_tier

pytestmark = pytest.mark.skipif(why_no_server() is not None, reason=str(why_no_server()))

#: The life in seconds of a lease that outlasts any load of the machine, and of a lease whose end a test awaits.
LONG, SHORT = 600.0, 0.6
#: Timeouts that outlast any load of the machine.
PATIENCE = "connect_timeout=300&timeout=300&write_timeout=300"
CHILD = """
import sys
from cuda_progcache.store.tiers.leases import FleetLeases
from cuda_progcache.store.tiers.settings import parse_tier
url, life = sys.argv[1:]
hold = FleetLeases(parse_tier(url), life=float(life))
def compile_():
    print("compiling", flush=True)
    sys.stdin.readline()
    return b"the child's"
hold.lead("f", compile_, lambda: None, 60.0)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def client(server):
    with redis.Redis(port=server.port) as made:
        made.flushall()
        yield made


@pytest.fixture
def host(server, client, monkeypatch):
    """A function that makes the leases of one host; ends of flights are remembered long enough for a slow machine."""
    monkeypatch.setattr(leases, "REMEMBERED", 600.0)
    made = []

    def make(life=LONG, **more):
        made.append(FleetLeases(patient(server), life=life, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def url_of(server):
    """Return a server's URL, with long timeouts."""
    return f"{server.url}?{PATIENCE}"


def patient(server):
    """Return the settings of a tier on a server, with long timeouts."""
    return parse_tier(url_of(server))


def give(settings, seconds):
    """Limit the time of later calls to so many seconds."""
    vars(settings)["timeout"] = seconds


class Tier:
    """The tier that all hosts see, and a list of the hosts that compiled for it."""

    def __init__(self, kept=True):
        self.compiles, self.kept, self.held, self.error = [], None if kept else False, None, None
        self.lock = threading.Lock()

    def compile(self, who, go=None):
        with self.lock:
            self.compiles.append(who)
        if go is not None:
            assert go.wait(300)
        if self.error is not None:
            raise self.error
        if self.kept is not False:
            self.kept = b"binary"
        return b"binary"

    def look_up(self):
        return self.kept or None


def never():
    raise AssertionError("must not be called")


def until(said):
    end = time.monotonic() + 300
    while not said():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(client, count):
    """Return whether ``count`` clients listen for the end of a flight."""
    return dict(client.pubsub_numsub("pc1:{f}"))[b"pc1:{f}"] == count


def test_hosts_share_one_compile(host, client):
    tier, go = Tier(), threading.Event()
    hosts = [host() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(hosts[0].lead, "f", lambda: tier.compile(0, go), tier.look_up, 600.0)
        until(lambda: tier.compiles)
        rest = [pool.submit(one.lead, "f", never, tier.look_up, 600.0) for one in hosts[1:]]
        until(lambda: waiting(client, 3))
        go.set()
        assert [each.result() for each in (first, *rest)] == [b"binary"] * 4
    assert tier.compiles == [0]
    assert client.keys("*:l") == []
    assert host().lead("f", never, tier.look_up, 600.0) == b"binary", "word is kept for who looked just before"


def test_one_who_looked_before_the_end_and_asks_after_it_looks_again(host):
    """Otherwise a program that arrives between a miss and the request for the lease would be compiled twice."""
    tier = Tier()
    assert host().lead("f", lambda: tier.compile(0), lambda: None, 600.0) == b"binary"
    assert host().lead("f", never, tier.look_up, 600.0) == b"binary"
    gone = host()
    assert gone.lead("f", lambda: tier.compile(2), lambda: None, 600.0) == b"binary", "what landed is of no use here"
    assert tier.compiles == [0, 2]


def test_the_threads_and_processes_of_a_host_ask_once(host, tmp_path, client):
    tier, go = Tier(), threading.Event()
    one, asked = host(), []

    def lead(*given):
        asked.append(1)
        return one.lead("f", *given)

    def fly(_):
        return single_flight.fly("g", str(tmp_path / "leases"), lambda: tier.compile(0, go), tier.look_up, fleet=lead)

    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(fly, n) for n in range(4)]
        until(lambda: tier.compiles)
        go.set()
        assert {each.result() for each in made} == {b"binary"}
    assert (tier.compiles, asked) == ([0], [1])


@pytest.mark.parametrize("raises", [True, False])
def test_a_flight_without_a_result_keeps_nobody(host, client, raises):
    """All waiting hosts compile at once. In turn, each would wait for the failures of the others."""
    tier, go = Tier(kept=False), threading.Event()
    tier.error = ValueError("refused") if raises else None
    with ThreadPoolExecutor(3) as pool:
        hosts = [pool.submit(host().lead, "f", lambda: tier.compile(0, go), tier.look_up, 600.0)]
        until(lambda: tier.compiles)
        hosts += [pool.submit(host().lead, "f", partial(tier.compile, n), tier.look_up, 600.0) for n in (1, 2)]
        until(lambda: waiting(client, 2))
        go.set()
        for each in hosts:
            assert (str(each.exception()) if raises else each.result()) == ("refused" if raises else b"binary")
    assert sorted(tier.compiles) == [0, 1, 2]
    assert client.keys("*:l") == []


def holder(server, life):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url_of(server), str(life)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"compiling\n"
    return child


def test_a_dead_holder_is_replaced_by_one(host, server):
    with holder(server, SHORT) as child:
        child.kill()
    tier = Tier()
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(host().lead, "f", partial(tier.compile, n), tier.look_up, 600.0) for n in range(3)]
        assert {each.result() for each in made} == {b"binary"}
    assert len(tier.compiles) == 1


def test_a_holder_that_stood_still_takes_nothing_from_its_successor(host, server, client):
    with holder(server, SHORT) as child:
        child.send_signal(signal.SIGSTOP)
        tier, go = Tier(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(host().lead, "f", lambda: tier.compile(1, go), tier.look_up, 600.0)
            until(lambda: tier.compiles)
            (token,) = map(client.get, client.keys("*:l"))
            child.send_signal(signal.SIGCONT)
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"done\n"
            assert list(map(client.get, client.keys("*:l"))) == [token]
            go.set()
            assert made.result() == b"binary"
    assert client.keys("*:l") == []


def test_a_lease_lives_while_its_holder_works_and_comes_back_when_it_is_evicted(host, client):
    tier, go, one = Tier(), threading.Event(), host(SHORT)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(one.lead, "f", lambda: tier.compile(0, go), tier.look_up, 600.0)
        until(lambda: tier.compiles)
        token = client.get("pc1:{f}:l")
        for _ in range(2):
            client.delete("pc1:{f}:l")
            until(lambda: client.get("pc1:{f}:l") == token)
        go.set()
        assert made.result() == b"binary"
    one._renew("f", token.decode())
    assert client.get("pc1:{f}:l") is None, "a renewal that comes late brings no lease back"


def test_a_lease_lasts_until_the_tier_has_the_program(host, client):
    pending = []
    tier, one = Tier(), host(SHORT, landed=pending.append)
    assert one.lead("f", lambda: tier.compile(0), tier.look_up, 600.0) == b"binary"
    token = client.get("pc1:{f}:l")
    client.delete("pc1:{f}:l")
    until(lambda: client.get("pc1:{f}:l") == token)
    pending.pop()()
    assert client.get("pc1:{f}:l") is None
    assert client.get("pc1:{f}:o") == token


def test_a_directory_has_the_leases_of_the_tier_behind_it(server, tmp_path):
    shared = FileStreamProgramCache(tmp_path / "a", tiers=[url_of(server)])
    assert shared.fleet is FileStreamProgramCache(tmp_path / "b", tiers=[url_of(server)]).fleet
    assert shared.fleet.name == server.url
    elsewhere = FileStreamProgramCache(tmp_path / "c", tiers=[f"http://127.0.0.1:1/x?lease_url={server.url}"])
    assert elsewhere.fleet.name == server.url
    for tiers in ([], [f"{server.url}?mode=ro"], ["http://127.0.0.1:1/x"]):
        assert FileStreamProgramCache(tmp_path / "d", tiers=tiers).fleet is None


def test_one_that_must_not_wait_does_not(host):
    tier, go = Tier(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(host().lead, "f", lambda: tier.compile(0, go), tier.look_up, 600.0)
        until(lambda: tier.compiles)
        assert host().lead("f", lambda: b"ours", never, 0.0) == b"ours"
        assert host().lead("f", lambda: b"ours", tier.look_up, 0.05) == b"ours", "it has waited long enough"
        go.set()
        made.result()


def test_an_interrupt_while_looking_leaves_no_lease(host, server, client):
    with holder(server, SHORT) as child:
        child.kill()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host().lead("f", never, interrupted, 600.0)
    assert client.keys("*:l") == []


def test_what_a_host_compiled_while_the_server_was_away_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "FIRST_REST", 0.02)
    with RedisServer(tmp_path / "redis") as server:
        cache = FileStreamProgramCache(tmp_path / "a", tiers=[url_of(server)])
        shared = cache.fleet
        assert cache.load(b"program 0") is None
        server.kill()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProgCacheWarning)
            for n in range(3):
                key = b"program %d" % n
                assert shared.lead(f"g{n}", partial(cache.publish, key, b"binary", {}), never, 600.0)
        server.start()
        another = open_tier(patient(server))
        until(lambda: len(another) == 3)
        another.close()


def lose(server, cache, make=lambda n: b"made"):
    """Kill a server that was in use, and make lookups and compiles that notice."""
    assert cache.load(b"k") is None
    assert cache.fleet.lead("f", lambda: b"made", never, 600.0) == b"made"
    server.kill()
    with pytest.warns(ProgCacheWarning):
        for n in range(3):
            assert cache.load(b"k%d" % n) is None
            assert make(n) == b"made"


def test_hosts_share_one_compile_though_the_server_is_restarted_meanwhile(tmp_path, monkeypatch):
    """Lookups notice first and stop using the server as a tier; as the keeper of leases, it is waited for."""
    monkeypatch.setattr(leases, "PATIENCE", 600.0)
    with RedisServer(tmp_path / "redis", lasting=True) as server, ThreadPoolExecutor(1) as pool:
        cache = FileStreamProgramCache(tmp_path / "a", tiers=[url_of(server)])
        lose(server, cache)
        assert cache.fleet is not None, "the process goes on as if there were no other host"
        failures = cache.fleet._failures
        found = pool.submit(cache.fleet.lead, "f", never, lambda: b"theirs", 600.0)
        until(lambda: cache.fleet._failures > failures)
        server.start()
        assert found.result() == b"theirs"


def test_a_server_that_refuses_is_asked_before_each_compile(tmp_path, monkeypatch):
    """The request costs nothing and shows when the server is back; nothing else checks the server in this test."""
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    monkeypatch.setattr(FleetLeases, "_start_heart", lambda _: None)
    with RedisServer(tmp_path / "redis") as server:
        cache = FileStreamProgramCache(tmp_path / "a", tiers=[url_of(server)])
        lose(server, cache, lambda n: cache.fleet.lead(f"g{n}", lambda: b"made", never, 600.0))
        assert cache.fleet.down
        server.start()
        cache.publish(b"k", b"binary", {})
        assert cache.fleet.lead("h", never, partial(cache.get, b"k"), 600.0) == b"binary", "it was shut out"
        assert not cache.fleet.down


def test_what_is_compiled_when_the_server_comes_back_has_a_lease_from_then_on(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    monkeypatch.setattr(leases, "FIRST_REST", 0.02)
    tier, go = Tier(), threading.Event()
    with RedisServer(tmp_path / "redis") as server, ThreadPoolExecutor(2) as pool:
        one, other = FleetLeases(patient(server)), FleetLeases(patient(server))
        server.kill()
        with pytest.warns(ProgCacheWarning):
            one.lead("f", lambda: b"made", never, 600.0)
            one.lead("f", lambda: b"made", never, 600.0)
        made = pool.submit(one.lead, "f", lambda: tier.compile(1, go), never, 600.0)
        until(lambda: tier.compiles)
        server.start()
        with redis.Redis(port=server.port) as client:
            until(lambda: client.exists("pc1:{f}:l"))
            waits = pool.submit(other.lead, "f", never, tier.look_up, 600.0)
            until(lambda: waiting(client, 1))
            go.set()
            assert made.result() == waits.result() == b"binary"
            assert not client.exists("pc1:{f}:l")
        one.close()
        other.close()


@pytest.mark.parametrize("trouble", ["refused", "silent"])
def test_a_server_in_trouble_costs_its_patience_once(tmp_path, trouble, monkeypatch):
    monkeypatch.setattr(leases, "FIRST_REST", 0.02)
    with RedisServer(tmp_path) as server:
        settings = patient(server)
        one = FleetLeases(settings)
        assert one.lead("f", lambda: b"made", never, 600.0) == b"made"
        server.kill(signal.SIGKILL if trouble == "refused" else signal.SIGSTOP)
        if trouble == "silent":
            give(settings, 0.3)
        with pytest.warns(ProgCacheWarning, match="each host compiles for itself") as told:
            for n in range(50):
                assert one.lead(f"g{n}", lambda: b"made", never, 600.0) == b"made"
        assert len(told) == 1
        assert one.down
        give(settings, 300.0)
        if trouble == "refused":
            server.start()
        else:
            server.kill(signal.SIGCONT)
        until(lambda: not one.down)
        asked = []
        one.lead("h", lambda: asked.append(redis.Redis(port=server.port).exists("pc1:{h}:l")), never, 600.0)
        assert asked == [1]
        one.close()


def test_a_forked_child_neither_renews_nor_ends_what_its_parent_holds(host, client):
    tier, one = Tier(), host()

    def compile_():
        child = os.fork()
        if not child:
            done = 1
            try:
                held = dict(one._held)
                made = one.lead("g", lambda: b"the child's", lambda: None, 0.0)
                done = int((held, made) != ({}, b"the child's"))
            finally:
                os._exit(done)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.exists("pc1:{f}:l")
        return tier.compile(0)

    assert one.lead("f", compile_, tier.look_up, 600.0) == b"binary"
    assert client.keys("*:l") == []


@pytest.mark.parametrize("trouble", [one for one in troubles("redis") if "certificate" not in one])
def test_a_server_in_any_trouble_holds_no_thread_and_raises_nothing(trouble, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    monkeypatch.setattr(FleetLeases, "_start_heart", lambda _: None)
    seconds = 0.3 if trouble in STALLS else 300
    with FaultyServer("redis", trouble, b"a program") as server:
        url = f"redis://127.0.0.1:{server.port}?connect_timeout={seconds}&timeout={seconds}"
        one = FleetLeases(parse_tier(url))
        assert one.lead("f", lambda: b"made", lambda: None, 0.0) == b"made"
        assert one.down
        assert not one._well_again()
        until(lambda: deadline._threads.stuck == 0)
        with pytest.warns(ProgCacheWarning, match="more than the limit" if "terabyte" in trouble else "can't be used"):
            one.lead("g", lambda: b"made", lambda: None, 0.0)
        one.close()


LEASED, HELD = b"*2\r\n$6\r\nleased\r\n$1\r\n1\r\n", b"*2\r\n$4\r\nheld\r\n$0\r\n\r\n"


@pytest.fixture
def mortal(monkeypatch):
    """A server that stores no program and grants every lease, until it stops answering.

    ``dead`` has the commands that it no longer answers, and ``waiting`` those that it left unanswered. With ``held``
    set, every lease belongs to another host. With ``dead`` set, each request shortens the timeout of calls.
    """

    def answer(speaks, asked, body):
        if running.dead:
            give(running.settings, 0.3)
        if asked.method in running.dead:
            running.waiting.append(asked.method)
            yield WAIT
        elif asked.method == "EVAL":
            yield b":1\r\n" if "PUBLISH" in asked.target else HELD if running.held else LEASED
        else:
            yield b"$-1\r\n"

    monkeypatch.setitem(TROUBLES["redis"], "mortal", answer)
    monkeypatch.setattr(FleetLeases, "_start_heart", lambda _: None)
    with FaultyServer("redis", "mortal") as running:
        running.dead, running.waiting, running.held = set(), [], False
        running.settings = patient(SimpleNamespace(url=f"redis://127.0.0.1:{running.port}"))
        yield running


@pytest.mark.filterwarnings("ignore::cuda_progcache.errors.ProgCacheWarning")
@pytest.mark.parametrize("first", ["look-up", "lease"])
def test_a_server_of_programs_and_leases_that_dies_is_waited_for_once(mortal, first):
    tier = open_tier(mortal.settings)
    assert tier.get(b"a") is None
    assert tier.fleet.lead("f", lambda: b"made", never, 0.0) == b"made"
    mortal.dead = {"GET", "EVAL"}
    give(mortal.settings, 0.3)
    if first == "look-up":
        assert tier.get(b"b") is None
        assert tier.fleet is None
    else:
        assert tier.fleet.lead("g", lambda: b"made", never, 0.0) == b"made"
        assert tier.get(b"b") is None
    assert mortal.waiting == ["GET" if first == "look-up" else "EVAL"]
    tier.close()


def test_who_got_a_lease_only_at_the_second_try_looks_again_first(monkeypatch):
    """The lookup before it may have failed like the first try."""
    monkeypatch.setattr(leases, "PATIENCE", 600.0)
    answers = [b"-LOADING the dataset\r\n", LEASED, b":1\r\n"]
    monkeypatch.setitem(TROUBLES["redis"], "loading", lambda *_: [answers.pop(0)])
    monkeypatch.setattr(FleetLeases, "_start_heart", lambda _: None)
    with FaultyServer("redis", "loading") as running:
        one = FleetLeases(patient(SimpleNamespace(url=f"redis://127.0.0.1:{running.port}")))
        assert one.lead("f", never, lambda: b"theirs", 600.0) == b"theirs"
        assert answers == []
        one.close()


@pytest.mark.filterwarnings("ignore::cuda_progcache.errors.ProgCacheWarning")
def test_a_server_in_trouble_is_checked_until_the_leases_are_closed(monkeypatch):
    for name, seconds in (("PATIENCE", 0.0), ("FIRST_REST", 0.01), ("LONGEST_REST", 0.01)):
        monkeypatch.setattr(leases, name, seconds)
    asked = []
    monkeypatch.setitem(TROUBLES["redis"], "broken", lambda *_: [asked.append(1) or b"-ERR out of order\r\n"])
    with FaultyServer("redis", "broken") as running:
        one = FleetLeases(parse_tier(f"redis://127.0.0.1:{running.port}?connect_timeout=30&timeout=30"), life=SHORT)
        for _ in range(2):  # after close() it can be used again, and closed again
            assert one.lead("f", lambda: b"made", never, 0.0) == b"made"
            heart, asked[:] = one._heart, []
            until(lambda: len(asked) > 3)
            one.close()
            heart.join(60)
            assert not heart.is_alive()


def test_a_server_that_answers_no_listener_is_waited_for_once(mortal):
    mortal.held, mortal.dead = True, {"SUBSCRIBE"}
    one = FleetLeases(mortal.settings)
    assert one.lead("f", lambda: b"made", lambda: None, 1.0) == b"made"
    assert mortal.waiting == ["SUBSCRIBE"]
    assert one.down
    one.close()


def test_half_a_message_holds_no_waiter(monkeypatch):
    """It costs no more time than no message, and later data on that connection isn't taken for a message."""
    looks = []

    def answer(speaks, asked, body):
        if asked.method == "SUBSCRIBE":
            yield b"*3\r\n$9\r\nsubscribe\r\n$7\r\npc1:{f}\r\n:1\r\n*3\r\n"
            yield WAIT
        else:
            looks.append(asked.method)
            yield HELD if len(looks) < 4 else LEASED

    monkeypatch.setitem(TROUBLES["redis"], "half a message", answer)
    with FaultyServer("redis", "half a message") as running:
        settings = parse_tier(f"redis://127.0.0.1:{running.port}?connect_timeout=300&timeout=600")
        with RedisClient(settings).listening("pc1:{f}", time.monotonic() + 600) as wait:
            with pytest.raises(TimeoutError):
                wait(0.1)
            with pytest.raises(StoreError):
                wait(0.1)
        one = FleetLeases(settings)
        assert one.lead("f", lambda: b"made", lambda: None, 600.0) == b"made"
        one.close()
