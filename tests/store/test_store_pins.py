# SPDX-License-Identifier: Apache-2.0
"""pin, unpin and pins; pinned entries survive eviction, prune and, if asked, clear."""

from __future__ import annotations

import os
import time

import pytest

from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store import FileStreamProgramCache, entry_digest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def cache(path):
    return FileStreamProgramCache(path, durability="none")


def test_pin_by_key_and_by_digest(cache, path):
    cache.update({b"a": b"1", b"b": b"2", "c": b"3"})
    digests = [entry_digest(key) for key in "abc"]
    assert cache.pins() == frozenset()
    assert cache.pin(b"a") == digests[0]
    assert cache.pin(digests[1]) == digests[1]
    assert cache.pin("c") == digests[2]
    assert cache.pin("c") == digests[2]
    assert cache.pins() == set(digests)
    assert FileStreamProgramCache(path).pins() == set(digests)
    assert sorted(os.listdir(path / "pins")) == sorted(digests)
    assert cache.unpin(digests[0]) == digests[0]
    assert cache.unpin("b") == digests[1]
    assert cache.pins() == {digests[2]}


def test_what_is_not_there_cannot_be_pinned(cache):
    for wrong in (b"a", "a", "0" * 64):
        with pytest.raises(KeyError):
            cache.pin(wrong)
        with pytest.raises(KeyError):
            cache.unpin(wrong)
    assert cache.pins() == frozenset()
    with pytest.raises(TypeError, match="int"):
        cache.pin(3)


def test_eviction_spares_pinned_entries(path):
    cache = FileStreamProgramCache(path, max_size_bytes=1000, durability="none")
    cache[b"pinned"] = b"x" * 100
    cache.pin(b"pinned")
    for i in range(40):
        cache[b"%d" % i] = b"y" * 100
    assert cache[b"pinned"] == b"x" * 100
    assert cache.stats().evicted >= 30
    assert cache.stats().bytes <= 1000
    cache.unpin(b"pinned")
    for i in range(20):
        cache[b"%d" % i] = b"z" * 100
    assert cache.get(b"pinned") is None


def test_replaced_it_stays_pinned_and_removed_it_does_not(cache):
    cache.update({b"a": b"1", b"b": b"2"})
    cache.pin(b"a")
    cache.pin(b"b")
    cache.publish(b"a", b"new", {})
    assert cache.pins() == {entry_digest(b"a"), entry_digest(b"b")}
    del cache[b"a"]
    cache.remove(entry_digest(b"b"))
    assert cache.pins() == frozenset()


def test_a_pin_outlives_damage(cache):
    cache[b"a"] = b"1"
    digest = cache.pin(b"a")
    cache.info(digest).path.write_bytes(b"!")
    assert cache.get(b"a") is None
    assert cache.pins() == {digest}
    cache[b"a"] = b"1"
    assert cache.pins() == {digest}


def test_clear_empties_the_cache_and_can_spare_pinned_entries(cache, path):
    cache.update({b"%d" % i: b"v" for i in range(50)})
    cache.pin(b"7")
    cache.clear(pinned=False)
    assert [info.digest for info in cache.entries()] == [entry_digest(b"7")]
    assert cache.load(b"7") == (b"v", {})
    assert cache.pins() == {entry_digest(b"7")}
    cache.clear()
    assert (len(cache), cache.pins()) == (0, frozenset())
    assert not [
        file for file in path.rglob("*") if file.is_file() and file.parent.parent.name in {"entries", "records"}
    ]


def test_the_cap_knows_what_a_clear_left(path):
    cache = FileStreamProgramCache(path, max_size_bytes=1000, durability="none")
    cache[b"pinned"] = b"x" * 500
    cache.pin(b"pinned")
    cache[b"other"] = b"x" * 400
    cache.clear(pinned=False)
    for i in range(20):
        cache[b"%d" % i] = b"y" * 100
    assert cache.stats().bytes <= 1000
    assert cache.get(b"pinned")


# prune


def aged(cache, **seconds):
    now = time.time()
    for key, age in seconds.items():
        cache[key] = b"v" * 100
        path = cache.info(entry_digest(key)).path
        os.utime(path, (now - age, now - age))


def names(cache, *keys):
    left = {info.digest for info in cache.entries()}
    return "".join(key for key in keys if entry_digest(key) in left)


def test_prune_to_a_size_takes_the_oldest(path):
    aged(FileStreamProgramCache(path, durability="none"), a=40_000, b=30_000, c=20_000, d=10_000)
    cache = FileStreamProgramCache(path, durability="none")
    cache.pin("b")
    report = cache.prune(max_size_bytes=250)
    assert names(cache, *"abcd") == "bd"
    assert report == (2, 200, 2, 200, 1)
    assert cache.prune(max_size_bytes=250).removed == 0
    assert cache.prune(max_size_bytes=0) == (1, 100, 1, 100, 1)
    assert names(cache, *"abcd") == "b"


def test_prune_by_age(path):
    aged(FileStreamProgramCache(path, durability="none"), a=40_000, b=30_000, c=20_000, d=10_000)
    cache = FileStreamProgramCache(path, durability="none")
    cache.pin("a")
    assert cache.prune(older_than=25_000).removed == 1
    assert names(cache, *"abcd") == "acd"
    assert cache.prune(older_than=15_000, max_size_bytes=100) == (2, 200, 1, 100, 1)
    assert names(cache, *"abcd") == "a"
    assert cache.prune(older_than=10**8).removed == 0


def test_a_read_in_this_process_keeps_an_entry_from_being_old(path):
    aged(FileStreamProgramCache(path, durability="none"), a=40_000, b=40_000)
    cache = FileStreamProgramCache(path, max_size_bytes=10**6, durability="none")
    cache.get("a")
    cache.prune(older_than=25_000)
    assert names(cache, *"ab") == "a"


@pytest.mark.parametrize("options", [{}, {"max_size_bytes": -1}, {"older_than": -1.0}])
def test_prune_to_what(cache, options):
    with pytest.raises(ValueError, match=r"give prune max_size_bytes|negative"):
        cache.prune(**options)


def test_the_cap_knows_what_a_prune_removed(path):
    cache = FileStreamProgramCache(path, max_size_bytes=1000, durability="none")
    for i in range(9):
        cache[b"%d" % i] = b"y" * 100
    cache.prune(max_size_bytes=100)
    assert cache._cap.ledger.size == 100
    evicted = cache.stats().evicted
    for i in range(9):
        cache[b"new%d" % i] = b"y" * 100
    assert cache.stats().evicted == evicted
    assert len(cache) == 10


def test_memory_behind_a_root_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(ProgCacheWarning, match="memory only"):
        cache = FileStreamProgramCache()
    cache[b"a"] = b"1"
    assert cache.pins() == frozenset()
    for call in (
        lambda: cache.pin(b"a"),
        lambda: cache.unpin(b"a"),
        cache.verify,
        lambda: cache.prune(max_size_bytes=0),
        lambda: cache.adopt(__file__, b"b"),
        lambda: cache.export(tmp_path / "bundle"),
        lambda: cache.import_(tmp_path / "bundle"),
    ):
        with pytest.raises(StoreError, match="kept in memory only"):
            call()
    cache.clear(pinned=False)
    assert len(cache) == 0
