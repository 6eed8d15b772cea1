# SPDX-License-Identifier: Apache-2.0
"""The size cap: which entries are evicted, what a pass costs, and what it leaves alone."""

from __future__ import annotations

import os
import time

import pytest
from faults_values import settle

from cuda_progcache.store import FileStreamProgramCache, entry_digest, eviction, pairs, records, removal, size_cap
from cuda_progcache.store.eviction import (
    EXACT_STORE,
    SAMPLE,
    SMALL_STORE,
    USE_RESOLUTION_NS,
    Candidate,
    choose_victims,
    excess,
    passes_at_most,
    shards_to_look_at,
    use_is_due,
)

NOW = 1_000_000 * 10**9


def candidates(count, size=10, last_used=lambda i: i):
    return [Candidate(str(i), size, last_used(i), (i, size, 0)) for i in range(count)]


def chosen(found, excess, at_most=None):
    return [int(victim.digest) for victim in choose_victims(found, excess=excess, at_most=at_most, now=NOW)]


def test_within_the_cap_nothing_has_to_go():
    assert excess(100, 10, cap=100) == 0
    assert chosen(candidates(10), 0) == []
    assert chosen([], 100) == []


def test_a_small_store_is_evicted_just_to_the_cap():
    assert excess(120, SMALL_STORE, cap=100) == 20


def test_a_large_store_is_evicted_to_the_low_water_mark():
    assert excess(1001, SMALL_STORE + 1, cap=1000) == 101


def test_the_oldest_go_until_enough_is_free():
    assert chosen(candidates(12), 20) == [0, 1]
    assert chosen(candidates(12), 21) == [0, 1, 2]
    assert chosen(reversed(candidates(12)), 20) == [0, 1]
    assert chosen(candidates(3), 1000) == [0, 1, 2]
    assert chosen(candidates(12), 100, at_most=4) == [0, 1, 2, 3]


def test_a_pass_looks_at_all_of_a_store_or_at_a_sample():
    assert shards_to_look_at(EXACT_STORE, 256) == 256
    for entries in (EXACT_STORE + 1, 10_000, 100_000, 1_000_000, 10**8):
        shards = shards_to_look_at(entries, 256)
        assert 1 <= shards < 256
        assert shards == 1 or shards * entries / 256 <= SAMPLE


def test_more_passes_where_the_store_is_far_over_its_cap():
    assert passes_at_most(90, 100) == passes_at_most(100, 100) == passes_at_most(101, 100) == 1
    assert passes_at_most(200, 100) > passes_at_most(110, 100) > 1


def test_a_time_stamp_from_the_future_counts_as_now():
    ages = [NOW + 10**15, NOW - 1, NOW - 2]
    assert chosen(candidates(3, last_used=ages.__getitem__), 20) == [2, 1]
    # clamped to now, it is no younger than an entry used now: the order of listing decides, not the wrong clock
    ages = [NOW + 10**15, NOW, NOW - 2]
    assert chosen(candidates(3, last_used=ages.__getitem__), 20) == [2, 0]


@pytest.mark.parametrize(
    ("last_used", "written", "due"),
    [
        (NOW - 10, NOW - 10, True),  # never read since it was written
        (NOW - 20, NOW - 10, True),
        (NOW - 5, NOW - 10, False),
        (NOW - USE_RESOLUTION_NS - 1, NOW - 2 * USE_RESOLUTION_NS, True),
        (NOW - USE_RESOLUTION_NS, NOW - 2 * USE_RESOLUTION_NS, False),
        (NOW + 10**12, NOW - 10, True),  # a time in the future is corrected
    ],
)
def test_when_a_use_is_written_down(last_used, written, due):
    assert use_is_due(last_used, written, NOW) is due


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def make(root, cap=None):
    return FileStreamProgramCache(root, max_size_bytes=cap, durability="none")


def entry(root, key):
    digest = entry_digest(key)
    return root / "entries" / digest[:2] / digest[2:]


def record(root, key):
    digest = entry_digest(key)
    return root / "records" / digest[:2] / digest[2:]


def test_entry_and_record_go_together(root):
    store = make(root, 250)
    for key in (b"a", b"b", b"c"):
        store[key] = key * 100
    assert not entry(root, b"a").exists()
    assert not record(root, b"a").exists()
    assert record(root, b"b").exists()


def test_the_cap_holds_over_a_reopening(root):
    make(root).update((str(i), b"x" * 100) for i in range(20))
    store = make(root, 1000)
    assert len(store) == 20, "opening evicts nothing"
    store[b"new"] = b"x" * 100
    assert store.stats().bytes <= 1000
    assert store[b"new"]


def test_uses_are_remembered_over_a_reopening(root):
    store = make(root, 10_000)
    for i, key in enumerate((b"a", b"b", b"c")):
        store[key] = key * 100
        long_ago = time.time_ns() - (100 - i) * USE_RESOLUTION_NS
        os.utime(entry(root, key), ns=(long_ago, long_ago))
    assert store[b"a"]
    reopened = make(root, 300)
    reopened[b"d"] = b"d" * 100
    assert reopened.get(b"b") is None
    assert reopened.get(b"a") is not None


def test_a_read_is_written_down_once_in_minutes(root):
    store = make(root, 10_000)
    store[b"k"] = b"v"
    settle()
    written = entry(root, b"k").stat()
    assert store[b"k"]
    first = entry(root, b"k").stat()
    assert first.st_atime_ns > written.st_atime_ns, "the first read after a write counts"
    assert first.st_mtime_ns == written.st_mtime_ns
    for _ in range(3):
        time.sleep(0.01)
        assert store[b"k"]
        assert store.load(b"k")
    again = entry(root, b"k").stat()
    assert (again.st_atime_ns, again.st_ctime_ns) == (first.st_atime_ns, first.st_ctime_ns), "no inode is dirtied"
    old = time.time_ns() - 2 * USE_RESOLUTION_NS
    os.utime(entry(root, b"k"), ns=(old, old - 10**9))
    assert store[b"k"]
    assert entry(root, b"k").stat().st_atime_ns > old + USE_RESOLUTION_NS
    assert store._verified, "writing down a use doesn't cost another verification"
    before = dict(store._verified)
    assert store[b"k"]
    assert store._verified == before


def test_what_is_replaced_after_the_scan_is_spared(root, monkeypatch):
    store, writer = make(root, 5000), make(root)
    store[b"a"] = b"A" * 2000
    store[b"b"] = b"B" * 2000
    choose = choose_victims

    def racing(*args, **kwargs):
        victims = choose(*args, **kwargs)
        assert entry_digest(b"a") in [victim.digest for victim in victims]
        writer.publish(b"a", b"fresh", {"n": 1})
        return victims

    monkeypatch.setattr("cuda_progcache.store.size_cap.choose_victims", racing)
    store[b"c"] = b"C" * 2000
    assert store.load(b"a") == (b"fresh", {"n": 1})
    assert store.stats().evicted == 0


def test_entries_that_vanish_are_credited(root):
    store = make(root, 1000)
    store[b"a"] = b"a" * 400
    store[b"b"] = b"b" * 400
    entry(root, b"a").unlink()
    store[b"c"] = b"c" * 500
    assert store.get(b"b") is not None, "the scan saw that there is room"
    assert store.stats().evicted == 0
    assert (store._cap.ledger.entries, store._cap.ledger.size) == (2, 900)


@pytest.fixture
def looked(monkeypatch):
    """The number of entries that each survey has looked at."""
    seen = []
    real = pairs.survey

    def counting(*args):
        found = real(*args)
        seen.append(len(found.candidates))
        return found

    monkeypatch.setattr(pairs, "survey", counting)
    return seen


def test_a_scan_is_paid_for_by_many_puts(root, looked):
    count = 400
    store = make(root, count * 100)
    for i in range(count):
        store[str(i)] = b"x" * 100
    audits = sum(looked)
    assert audits < 10 * count, "no scans under the cap, but for a look at a shard now and then"
    for i in range(count, count + 200):
        store[str(i)] = b"x" * 100
        assert store._cap.ledger.size <= count * 100
    assert sum(looked) - audits <= (200 // (count // 10) + 1) * count + 10 * 200
    assert store.stats().bytes <= count * 100


def fill(root, count, size=10):
    """Write entries as a store does, but faster; return their digests, the oldest first."""
    data, now = b"x" * size, time.time()
    made = []
    for i in range(count):
        digest = entry_digest(str(i))
        for tree, content in (
            ("entries", data),
            ("records", records.encode(digest, [records.Version.of(data, b"{}", now)])),
        ):
            path = root / tree / digest[:2] / digest[2:]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (now - count + i, now - count + i))
        made.append(digest)
    return made


@pytest.fixture
def large(monkeypatch):
    """Lower the thresholds for sampling, and return a number of entries above them."""
    monkeypatch.setattr(eviction, "EXACT_STORE", 500)
    monkeypatch.setattr(eviction, "SAMPLE", 250)
    monkeypatch.setattr(size_cap, "COUNT_SLICE", 100)
    return 1000


def test_a_large_store_is_counted_in_slices_and_evicted_by_samples(root, looked, large):
    count = large
    make(root)
    fill(root, count)
    store = make(root, count * 10)
    assert looked == [], "opening counts nothing"
    puts = 0
    while not store._cap.ledger.complete:
        store[f"new {puts}"] = b"y" * 10
        puts += 1
        assert sum(looked) <= puts * (100 + 30 + 250), "no put pays for the whole"
    del looked[:]
    for i in range(100):
        store[f"later {i}"] = b"y" * 10
        assert store._cap.ledger.size <= count * 10
    assert sum(looked) < 6 * 250 + 100 * 10, "one pass makes room for many puts"
    total = sum(path.stat().st_size for path in (root / "entries").rglob("*") if path.is_file())
    assert store._cap.ledger.size == total <= count * 10
    assert store._cap.ledger.entries == len(store)


def test_a_sample_evicts_old_entries(root, large):
    count = large
    make(root)
    digests = fill(root, count)
    store = make(root, count * 9)
    for i in range(40):
        store[f"new {i}"] = b"y" * 10
    assert store._cap.ledger.size <= count * 9
    gone = [i for i, digest in enumerate(digests) if not (root / "entries" / digest[:2] / digest[2:]).exists()]
    assert len(gone) > count // 11
    assert sum(gone) / len(gone) < count / 8, "the oldest of all, nearly"
    assert max(gone) < count / 2
    assert all(store.get(f"new {i}") for i in range(40))


def test_what_is_pinned_stays(root):
    store = make(root, 1000)
    (root / "pins").mkdir()
    for key in (b"a", b"b"):
        store[key] = b"1" * 300
        (root / "pins" / entry_digest(key)).touch()
    for i in range(5):
        store[str(i)] = b"2" * 300
    assert store.get(b"a")
    assert store.get(b"b")
    assert store.get("4")
    assert len(store) == 3
    assert store.stats().bytes <= 1000


def test_pins_that_exceed_the_cap_are_told_once_and_do_not_stop_writes(root, looked):
    store = make(root, 10_000)
    (root / "pins").mkdir()
    for i in range(90):
        store[str(i)] = b"1" * 100
        (root / "pins" / entry_digest(str(i))).touch()
    small = make(root, 5000)
    with pytest.warns(RuntimeWarning, match="pinned programs take 9000 bytes .* its size cap of 5000 bytes"):
        small[b"more"] = b"2" * 100
    del looked[:]
    for i in range(20):
        small[f"more {i}"] = b"2" * 100  # a second warning would fail the test
    assert sum(looked) < 20 * 64, "a pass that finds nothing isn't run again by the next put"
    assert all(store.get(str(i)) for i in range(90))


def test_an_old_record_without_entry_is_litter(root):
    store = make(root, 1000)
    store[b"old"] = b"1"
    store[b"young"] = b"2"
    for key in (b"old", b"young"):
        entry(root, key).unlink()
    hours_ago = time.time() - 7300
    os.utime(record(root, b"old"), (hours_ago, hours_ago))
    store[b"big"] = b"x" * 900
    store[b"bigger"] = b"x" * 950
    assert not record(root, b"old").exists()
    assert record(root, b"young").exists()


def test_eviction_that_fails_does_not_fail_the_write(root, monkeypatch):
    store = make(root, 250)
    store[b"a"] = b"a" * 200

    def fail(root, digest, *_, **__):
        raise PermissionError(13, "Permission denied", digest)

    monkeypatch.setattr(removal, "take_away", fail)
    with pytest.warns(RuntimeWarning, match="can't evict"):
        store[b"b"] = b"b" * 200
    assert store[b"b"] == b"b" * 200
    monkeypatch.undo()
    store[b"c"] = b"c" * 200
    assert len(store) == 1
