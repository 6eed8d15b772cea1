# SPDX-License-Identifier: Apache-2.0
"""The cost of a tier: nothing until it is asked, its deadline once if it is dead, and no errors or stuck forks."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings

import pytest

from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.tiers import connections, envelope, redis, remote_objects, write_back
from cuda_progcache.store.tiers.engine import TooLargeError, each_of
from cuda_progcache.store.tiers.envelope import DamagedObjectError, pack, unpack
from cuda_progcache.store.tiers.remote import RemoteProgramCache
from tests.tiers.shelf import CUBIN, name_of

CLIENTS = ("cuda_progcache.store.tiers.redis", "cuda_progcache.store.tiers.http", "http.client", "obstore")


# Objects


def test_an_object_is_its_sidecar_and_its_bytes():
    record = encode_record({"name": "k"})
    digest = entry_digest(b"k")
    packed = pack(digest, CUBIN, Version.of(CUBIN, record, 1.5))
    assert packed.startswith(b"CPCO\x01\0\0\0")
    assert packed.endswith(CUBIN)
    data, version = unpack(digest, packed)
    assert (data, version.record(), version.created) == (CUBIN, {"name": "k"}, 1.5)


def test_nothing_else_is_taken_for_an_object():
    digest = entry_digest(b"k")
    packed = pack(digest, CUBIN, Version.of(CUBIN, b"{}", 1.0))
    wrong = [packed[:length] for length in range(len(packed))] + [packed + b"x", b"<html>404</html>", b"x" * 500]
    for other in wrong:
        with pytest.raises(DamagedObjectError):
            unpack(digest, other)
    with pytest.raises(DamagedObjectError):
        unpack(entry_digest(b"other"), packed)
    for at in range(len(packed)):
        altered = packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]
        if at < 16:  # the format and the lengths
            with pytest.raises(DamagedObjectError):
                unpack(digest, altered)
            continue
        try:
            data, version = unpack(digest, altered)
        except DamagedObjectError:
            continue
        assert (data, version.record()) == (CUBIN, {})  # only the time, or braces without a meaning, have changed


@pytest.mark.parametrize("sent", [b"", b"<html>not found</html>", b"half", b"swapped"])
def test_what_a_service_sends_instead_is_a_miss_told_once_and_healed_by_the_next_write(shelf, tier, sent):
    for key in (b"k", b"other"):
        tier.publish(key, CUBIN, {"key": key.decode()})
    assert tier.flush()
    whole = shelf.objects[name_of(b"k")]
    shelf.objects[name_of(b"k")] = {b"half": whole[:-100], b"swapped": shelf.objects[name_of(b"other")]}.get(sent, sent)
    with pytest.warns(ProgCacheWarning, match="sent something else"):
        assert tier.load(b"k") is None
    tier.forget_misses()
    assert tier.get(b"k") is None
    assert tier.stats().corrupt == tier.tier().corrupt == 2
    tier.publish(b"k", CUBIN, {})
    assert tier.flush()
    assert tier.get(b"k") == CUBIN
    assert shelf.objects[name_of(b"k")] != whole


def test_a_service_that_sends_something_else_three_times_in_a_row_is_left_alone(shelf, tier):
    keys = [b"%d" % number for number in range(10)]
    for key in keys:
        tier.publish(key, CUBIN, {})
    assert tier.flush(300)
    for key in keys[1:]:
        shelf.objects[name_of(key)] = b"<html>"
    before = tier.tier()
    with pytest.warns(ProgCacheWarning, match="sent something else"):
        for key in (*keys[1:3], keys[0], *keys[3:5], b"none", *keys[5:7]):  # an answer or a miss resets the count
            tier.load(key)
        assert tier.tier().state == "closed"
        tier.load(keys[7])
    told = tier.tier()
    assert (told.state, told.errors, told.calls - before.calls) == ("open", 1, 9)
    assert told.error == "the server sends something other than what was asked for"
    assert 0 <= told.seconds - before.seconds < 60
    assert tier.load(keys[8]) is None
    assert tier.tier().skipped == 1


def test_an_entry_that_nobody_who_is_trusted_has_signed_is_a_miss(shelf, until):
    signed = RemoteProgramCache(shelf, signer=lambda digest, data, record: {**record, "by": digest[:8]})
    signed.publish(b"k", CUBIN, {"n": 1})
    signed.keep_manifest(entry_digest(b"m"), b'{"format":1,"sets":[]}')
    RemoteProgramCache(shelf).publish(b"unsigned", CUBIN, {})
    assert signed.flush()

    def verify(digest, data, record):
        return None if record.get("by") == digest[:8] and data else "nobody has signed it"

    trusting = RemoteProgramCache(shelf, verifier=verify)
    assert trusting.load(b"k") == (CUBIN, {"n": 1, "by": entry_digest(b"k")[:8]})
    assert trusting.find_manifest(entry_digest(b"m")) == b'{"format":1,"sets":[]}'
    until(lambda: name_of(b"unsigned") in shelf.objects)
    with pytest.warns(ProgCacheWarning, match="isn't trusted"):
        assert trusting.get(b"unsigned") is None
    asked = len(shelf.calls)
    assert trusting.get(b"unsigned") is None
    assert (trusting.tier().untrusted, len(shelf.calls)) == (1, asked)


# Manifests


def manifest(*names):
    return json.dumps({"format": 1, "sets": [{"name": name} for name in names]}, separators=(",", ":")).encode()


def sets(content):
    return [one["name"] for one in json.loads(content)["sets"]]


def test_a_manifest_gets_the_sets_of_all_who_write_it(shelf):
    name = entry_digest(b"m")
    for set_name in "abc":
        writer = RemoteProgramCache(shelf)
        writer.keep_manifest(name, manifest(set_name))
        writer.keep_manifest(name, manifest(set_name + "2"))
        assert writer.flush()
    assert set(sets(RemoteProgramCache(shelf).find_manifest(name))) == {"a", "a2", "b", "b2", "c", "c2"}


@pytest.mark.parametrize("theirs", [manifest("x" * 3000), b"no manifest"])
def test_a_manifest_that_does_not_go_together_with_the_one_there_takes_its_place(shelf, monkeypatch, theirs):
    """The other manifest has sets that would make the result too large for a lookup, or is invalid."""
    name = entry_digest(b"m")
    for content in (theirs, manifest("y" * 2000)):
        writer = RemoteProgramCache(shelf)
        writer.keep_manifest(name, content)
        assert writer.flush(300)
        monkeypatch.setattr(envelope, "MOST_OF_MANIFEST", remote_objects._ROOM + 4000)
    assert sets(RemoteProgramCache(shelf).find_manifest(name)) == ["y" * 2000]


def test_a_manifest_is_found_at_once_where_it_took_the_place_of_something_else(shelf, tier):
    digest = entry_digest(b"m")
    tier.keep_manifest(digest, manifest("a"))
    assert tier.flush(300)
    (name,) = shelf.objects
    shelf.objects[name] = b"<html>"
    with pytest.warns(ProgCacheWarning, match="sent something else"):
        tier.keep_manifest(digest, manifest("b"))
        assert tier.flush(300)
    assert sets(tier.find_manifest(digest)) == ["b"]


def test_what_is_queued_is_found_without_a_call(shelf, until):
    """This holds for single lookups and for batches; programs are signed when they are sent."""
    gate, digest = threading.Event(), entry_digest(b"m")
    tier = RemoteProgramCache(
        shelf,
        signer=lambda digest, data, record: {**record, "by": digest},
        voucher=lambda digest, data, record: "nobody has signed it",
        verifier=lambda digest, data, record: None if record.get("by") == digest else "nobody has signed it",
    )
    shelf.trouble = lambda until: gate.wait(300)
    tier.publish(b"0", CUBIN, {})
    until(lambda: shelf.calls)
    tier.publish(b"k", CUBIN, {"n": 1})
    tier.keep_manifest(digest, manifest("a"))
    assert tier.load(b"k") == dict(tier.load_many([b"k", b"0"]))[b"k"] == (CUBIN, {"n": 1})
    assert tier.find_manifests([digest]) == {digest: manifest("a")}
    assert [what for what, _ in shelf.calls] == ["put"]
    gate.set()
    assert tier.flush(300)
    told = tier.tier()
    assert (told.hits, told.misses, told.untrusted, told.bytes_in) == (3, 0, 0, 0)


# Time and trouble


def test_a_dead_tier_costs_its_deadline_once(black_hole, open_url, monkeypatch):
    monkeypatch.setattr(write_back, "_PAUSE", 0.001)
    tier = open_url(f"{black_hole}?timeout=0.5")
    stack = ProgramCacheStack((InMemoryProgramCache(), tier))
    with pytest.warns(ProgCacheWarning, match=r"failed \(") as caught:
        for number in range(1000):
            assert stack.load(b"%d" % number) is None
            assert stack.publish(b"%d" % number, CUBIN, {})
        assert stack.find_manifest("0" * 64) is None
    told = tier.tier()
    assert (told.errors, told.timeouts, told.state) == (1, 1, "open")
    assert told.skipped > 900
    assert len(caught) == 1
    assert stack.stats().hits == 0


def test_threads_do_not_each_wait_for_a_dead_tier(shelf, tier):
    """While one call has been waiting for long, other calls skip the tier."""
    waiting, joined = threading.Event(), threading.Event()

    def hang(until):
        waiting.set()
        assert joined.wait(300)
        raise TimeoutError("late")

    shelf.trouble = hang
    first = threading.Thread(target=tier.load, args=(b"k",))
    with pytest.warns(ProgCacheWarning, match=r"failed \("):
        first.start()
        assert waiting.wait(300)
        tier.breaker._patience = -1.0  # the call has taken too long by now
        for number in range(8):
            assert tier.load(b"%d" % number) is None
        joined.set()
        first.join()
        tier.load(b"more")
    assert len(shelf.calls) == 1


@pytest.mark.parametrize("slow", ["put", "get_many", "list"])
def test_a_slow_write_batch_or_listing_keeps_nobody_from_looking_up(shelf, tier, slow):
    tier.publish(b"k", CUBIN, {})
    assert tier.flush(300)
    tier.breaker._patience = 0.0  # any call under way has already taken too long
    waiting, gate = threading.Event(), threading.Event()

    def hang(until):
        waiting.set()
        assert gate.wait(300)

    def listed(prefix, *, until):
        hang(None)
        return iter(())

    if slow == "list":
        shelf.list = listed
    else:
        shelf.trouble = hang
    work = {
        "put": lambda: tier.publish(b"other", CUBIN, {}),
        "get_many": lambda: list(tier.load_many([b"1", b"2"])),
        "list": lambda: len(tier),
    }[slow]
    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(300)
    shelf.trouble = None
    assert tier.load(b"k") == (CUBIN, {})
    gate.set()
    thread.join()
    assert tier.flush(300)


def test_a_client_that_is_not_installed_is_sought_once(open_url, monkeypatch):
    sought = []

    def lacking(name):
        sought.append(name)
        raise ModuleNotFoundError("No module named 'obstore'")

    monkeypatch.setattr("importlib.import_module", lacking)
    tier = open_url("s3://bucket/prefix")
    with pytest.warns(ProgCacheWarning, match=r"pip install 'cuda-progcache\[s3\]'") as caught:
        for number in range(20):
            assert tier.load(b"%d" % number) is None
            assert not tier.publish(b"%d" % number, CUBIN, {})
        assert tier.stats().dropped == 20
        tier.breaker._resting_until = time.monotonic()  # its rest is over
        assert tier.load(b"k") is None
        assert list(tier.load_many([b"1", b"2"])) == []
    assert len(sought) == len(caught) == tier.tier().errors == 1


def test_a_tier_is_tried_again_off_every_callers_path(shelf, tier, until):
    shelf.trouble = TimeoutError("late")
    with pytest.warns(ProgCacheWarning):
        assert tier.load(b"k") is None
    tier.breaker._resting_until = time.monotonic()  # its rest is over
    shelf.trouble = None
    until(lambda: (tier.tier().state == "closed", tier.load(b"k"))[0])
    me = threading.current_thread().name
    assert [who == me for _, who in shelf.calls][:2] == [True, False]
    tier.publish(b"k", CUBIN, {})
    assert tier.flush()
    assert tier.load(b"k") == (CUBIN, {})


def test_trouble_with_writes_opens_the_breaker(shelf, tier, monkeypatch):
    monkeypatch.setattr(write_back, "_PAUSE", 0.001)
    shelf.trouble = ConnectionError("reset")
    assert tier.publish(b"k", CUBIN, {})
    with pytest.warns(ProgCacheWarning, match="reset"):
        assert tier.flush(300)
    assert tier.tier().state == "open"
    assert (tier.tier().waiting, tier.stats().dropped) == (1, 0)
    tier.publish(b"l", CUBIN, {})
    assert tier.flush(300)
    assert (tier.tier().waiting, tier.stats().dropped) == (2, 0)
    assert len(shelf.calls) == 3
    tier._objects.writes.end(time.monotonic())
    assert tier.stats().dropped == 2


@pytest.fixture
def put_off(shelf, tier, monkeypatch):
    """A function that publishes programs while the service is in trouble."""
    monkeypatch.setattr(write_back, "_PAUSE", 0.001)

    def publish(*keys, data=CUBIN):
        shelf.trouble = ConnectionError("reset")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProgCacheWarning)
            for key in keys:
                tier.publish(key, data, {})
            assert tier.flush(300)
        shelf.trouble = None

    return publish


def test_what_could_not_be_written_is_written_when_the_service_works_again(shelf, tier, put_off, until):
    put_off(b"k", b"l")
    assert tier.get(b"k") == CUBIN, "it is on its way"
    assert not tier.has_published()
    tier.breaker._resting_until = time.monotonic()  # its rest is over
    assert tier.load(b"another") is None  # a lookup triggers another try
    until(lambda: tier.tier().stored == 2)
    assert {name_of(b"k"), name_of(b"l")} <= set(shelf.objects)
    assert (tier.tier().waiting, tier.stats().dropped) == (0, 0)


def test_what_was_put_off_is_superseded_and_removed_as_what_waits_is(shelf, tier, put_off):
    put_off(b"k", b"l", b"m")
    put_off(b"k", data=b"newer")
    assert tier.tier().waiting == 3
    assert tier.get(b"k") == b"newer"
    del tier[b"l"]
    tier._well_again()
    assert tier.flush(300)
    assert set(shelf.objects) == {name_of(b"k"), name_of(b"m")}
    tier.forget_misses()
    assert tier.get(b"k") == b"newer"
    put_off(b"k")
    tier.clear()
    tier._well_again()
    assert tier.tier().waiting == 0


def test_what_is_put_off_has_its_bounds(shelf, tier, put_off, monkeypatch):
    monkeypatch.setattr(write_back, "MOST_PUT_OFF", 3500)
    put_off(b"k", b"l", data=bytes(1000))
    put_off(b"m", data=bytes(1000))
    assert (tier.tier().waiting, tier.stats().dropped) == (2, 1)
    for _ in range(write_back.MOST_VAIN):
        shelf.trouble = ConnectionError("no permission")
        tier._well_again()
        assert tier.flush(300)
    assert (tier.tier().waiting, tier.stats().dropped) == (0, 3), (
        "one that works and takes no writes isn't tried for ever"
    )
    shelf.trouble = None
    tier._well_again()
    tier.publish(b"k", CUBIN, {})
    assert tier.flush(300)
    put_off(b"l")
    assert tier.tier().waiting == 1


def test_an_object_there_that_is_too_large_is_a_miss_and_no_trouble(shelf, tier):
    keys = [b"%d" % number for number in range(6)]
    for key in keys:
        tier.publish(key, CUBIN, {})
    assert tier.flush(300)
    large = {name_of(key) for key in keys[1:5]}
    plain = shelf.get

    def get(name, *, limit, until):
        if name in large:
            raise TooLargeError(27, "the object has 10 bytes, more than the limit of 9")
        return plain(name, limit=limit, until=until)

    shelf.get = get
    with pytest.warns(ProgCacheWarning, match="too large") as caught:
        assert [tier.load(key) for key in keys[1:5]] == [None] * 4
        asked = len(shelf.calls)
        assert tier.load(keys[1]) is None  # the tier remembers it
    assert (len(caught), len(shelf.calls)) == (1, asked)
    assert (tier.stats().refused, tier.tier().state, tier.tier().errors) == (4, "closed", 0)
    tier.forget_misses()
    before = tier.tier().bytes_in
    assert {key for key, _ in tier.load_many(keys)} == {keys[0], keys[5]}
    assert tier.tier().bytes_in - before == len(shelf.objects[name_of(keys[0])]) + len(shelf.objects[name_of(keys[5])])
    del tier[keys[1]]  # even though it is large
    assert name_of(keys[1]) not in shelf.objects


@pytest.mark.parametrize(("objects", "calls"), [(0.5, 7), (1.5, 5), (99, 3)])
def test_a_batch_from_redis_leaves_out_what_is_too_large_and_is_read_in_parts(
    redis_url, monkeypatch, open_url, objects, calls
):
    budget = objects * len(pack(entry_digest(b"0"), bytes(10), Version.of(bytes(10), b"{}", 0.0)))
    monkeypatch.setattr(redis, "BATCH_BYTES", budget)
    monkeypatch.setattr(connections, "is_readable", lambda *_: False)  # as if unread answers were still under way
    keys = [b"%d" % number for number in range(6)]
    mark = "&" if "?" in redis_url else "?"
    writer, reader = open_url(redis_url), open_url(f"{redis_url}{mark}max_bytes=2000")
    for number, key in enumerate(keys):
        writer.publish(key, bytes(9000 if number in {2, 3} else 10), {})
    assert writer.flush(300)
    assert {key for key, _ in reader.load_many([*keys, b"none"])} == {keys[0], keys[1], keys[4], keys[5]}
    assert reader.tier().calls == calls
    assert reader.load(keys[0]) == (bytes(10), {})


def test_a_miss_is_remembered_for_a_moment(shelf, tier):
    for _ in range(5):
        assert tier.load(b"k") is None
    assert len(shelf.calls) == 1
    tier.publish(b"k", CUBIN, {})
    assert tier.load(b"k") == (CUBIN, {})


def test_the_latest_misses_are_remembered_until_their_time_is_over(monkeypatch):
    monkeypatch.setattr(remote_objects, "_MOST_MISSED", 2)
    remembered = remote_objects.RecentMisses()
    monkeypatch.setattr(remote_objects, "_MISSED_FOR", 600.0)
    for name in "abac":
        remembered.add(name)
    assert [name in remembered for name in "abc"] == [True, False, True]
    monkeypatch.setattr(remote_objects, "_MISSED_FOR", 0.0)
    remembered.add("a")
    assert "a" not in remembered


def test_who_answers_none_of_several_questions_is_asked_once():
    asked = []
    with pytest.raises(StoreError, match="answered none"):
        list(each_of("abc", lambda names: {} if asked.append(names) is None and len(asked) == 1 else 1 / 0, "t"))


def test_a_removal_that_fails_is_counted(shelf, tier):
    tier.publish(b"k", CUBIN, {})
    assert tier.flush(300)
    shelf.trouble = ConnectionError("reset")
    with pytest.warns(ProgCacheWarning, match="reset"):
        del tier[b"k"]  # nobody knows whether it existed
    shelf.list = shelf.get
    tier.clear()
    assert tier.stats().failed == 2


# Processes


def test_a_local_hit_imports_no_client_and_opens_no_connection(black_hole, python, tmp_path):
    script = """
import sys, threading
from cuda_progcache import FileStreamProgramCache, ProgramCacheStack
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier
stack = ProgramCacheStack((FileStreamProgramCache(sys.argv[2]), open_tier(parse_tier(sys.argv[1]))))
assert stack.get(b"k") == stack.load(b"k").data == b"v"
stack.close()
print([name for name in sys.argv[3:] if name in sys.modules], threading.active_count())
"""
    with FileStreamProgramCache(tmp_path) as disk:
        disk[b"k"] = b"v"
    assert python(script, black_hole, tmp_path, *CLIENTS) == "[] 1\n"


def test_nothing_is_imported_by_a_thread(tier_url, python, tmp_path):
    """A child forked while a thread imports a module would wait for that module forever."""
    script = """
import sys, threading
from cuda_progcache import FileStreamProgramCache, ProgramCacheStack
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier
import builtins
original, culprits = builtins.__import__, set()

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    before = set(sys.modules)
    found = original(name, globals, locals, fromlist, level)
    if threading.current_thread() is not threading.main_thread():
        culprits.update(set(sys.modules) - before)
    return found

builtins.__import__ = watched
tier = open_tier(parse_tier(sys.argv[1]))
for number in range(3):
    tier.publish(b"%d" % number, bytes(1000), {"n": 1})
tier.keep_manifest("0" * 64, b'{"format":1,"sets":[]}')
assert tier.flush(300)
stack = ProgramCacheStack((FileStreamProgramCache(sys.argv[2], max_size_bytes=10**9), tier))
for number in range(3):
    assert stack.load(b"%d" % number).record == {"n": 1}
stack.close()
print(sorted(culprits))
"""
    assert python(script, tier_url, tmp_path) == "[]\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_a_tier_of_its_own(redis_url, python):
    """Parent and children look up and publish at the same time; the parent opened connections before it forked."""
    script = """
import os, sys
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier
tier = open_tier(parse_tier(sys.argv[1]))
for number in range(50):
    tier.publish(b"%d" % number, b"%d" % number * 100, {"n": number})
assert tier.flush(300)

def work(who):
    for number in range(50):
        assert tier.load(b"%d" % number) == (b"%d" % number * 100, {"n": number}), number
        tier.publish(b"%s %d" % (who, number), b"x", {})
    assert tier.flush(300)

children = []
for child in range(4):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert tier.tier().hits == 0
            work(b"%d" % child)
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
work(b"parent")
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
tier.forget_misses()
assert len(tier) == 50 * 6, len(tier)
"""
    python(script, redis_url)


# Stacks


def test_what_comes_from_afar_goes_to_the_disk_later_and_is_found_meanwhile(shelf, tier, tmp_path):
    tier.publish(b"k", CUBIN, {"n": 1})
    assert tier.flush()
    memory, disk = InMemoryProgramCache(), FileStreamProgramCache(tmp_path)
    with ProgramCacheStack((memory, disk, tier)) as stack:
        assert stack.load(b"k") == (CUBIN, {"n": 1})
        assert memory.get(b"k") == CUBIN
        assert stack.flush(300)
        assert disk.load(b"k") == (CUBIN, {"n": 1})


def test_what_was_missed_before_is_on_the_disk_at_once(shelf, tier, tmp_path, until):
    """A process that missed it may hold a lease, and those that wait for the lease look on the disk."""
    disk = FileStreamProgramCache(tmp_path)
    with ProgramCacheStack((disk, tier)) as stack:
        tier.publish(b"first", CUBIN, {})
        assert stack.load(b"first")  # this one is copied at once, too
        assert stack.load(b"k") is None
        RemoteProgramCache(shelf).publish(b"k", CUBIN, {})
        until(lambda: name_of(b"k") in shelf.objects)
        tier.forget_misses()
        assert stack.load_again(b"k") == (CUBIN, {})
        assert disk.get(b"k") == CUBIN


def test_a_copy_on_its_way_does_not_undo_a_later_write(shelf, tier, tmp_path):
    tier.publish(b"k", b"old", {})
    tier.publish(b"gone", b"old", {})
    for key in (b"first", b"second"):
        tier.publish(key, b"1", {})
    assert tier.flush()
    started, gate = threading.Event(), threading.Event()

    class Slow(FileStreamProgramCache):
        def copy(self, key, entry):
            if threading.current_thread() is not threading.main_thread():
                started.set()
                assert gate.wait(300)
            return super().copy(key, entry)

    disk = Slow(tmp_path)
    with ProgramCacheStack((disk, tier)) as stack:
        assert stack.get(b"first") == stack.get(b"second") == b"1"  # one is copied at once, one later
        assert started.wait(300)  # the thread is busy with this copy; the others wait behind it
        assert stack.get(b"k") == stack.get(b"k") == b"old"
        assert stack.get(b"gone") == b"old"
        assert [what for what, _ in shelf.calls].count("get") == 4  # one call per key
        gate.set()
        stack[b"k"] = b"new"
        del stack[b"gone"]
        assert stack.flush(300)
        assert disk.get(b"k") == b"new"
        assert disk.get(b"gone") is None


def test_listings_and_clear_are_of_this_machine(shelf, tier, tmp_path):
    tier.publish(b"far", CUBIN, {})
    assert tier.flush()
    with ProgramCacheStack((FileStreamProgramCache(tmp_path), tier)) as stack:
        stack[b"near"] = CUBIN
        assert stack.flush(300)
        asked = len(shelf.calls)
        assert len(stack) == len(list(stack.entries())) == stack.stats().entries == 1
        assert len(shelf.calls) == asked
        stack.clear()
        assert len(stack) == 0
        assert stack.get(b"near") == CUBIN  # still in the tier: others may use it
        assert stack.info(entry_digest(b"far")).size == len(CUBIN)
        stack.remove(entry_digest(b"far"))
        assert stack.get(b"far") is None


def test_many_are_fetched_together(shelf, tier, tmp_path):
    keys = [b"%d" % number for number in range(250)]
    for key in keys[:200]:
        tier.publish(key, CUBIN, {})
    assert tier.flush(300)
    many = []

    def get_many(names, *, limit, until):
        many.append(names)
        return {name: shelf.objects.get(name) for name in names}

    shelf.get_many = get_many
    disk = FileStreamProgramCache(tmp_path)
    with ProgramCacheStack((disk, tier)) as stack:
        stack[keys[0]] = CUBIN
        assert stack.fetch(keys) == 199
        assert [len(names) for names in many] == [100, 100, 49]
        assert len(disk) == 200
        assert stack.fetch(keys) == 0
        assert len(many) == 3  # the others are known to be missing
