# SPDX-License-Identifier: Apache-2.0
"""``census`` and ``first``: sums over a store and its first few entries, without reading every record."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter

import pytest
from faults_values import settle

from cuda_progcache.store import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    ReadOnlyProgramCache,
    entry_digest,
    judge,
    maintenance,
    pairs,
)

ORDERS = {"used": lambda e: e.last_used, "created": lambda e: e.created, "size": lambda e: e.size}


@pytest.fixture
def cache(tmp_path):
    return FileStreamProgramCache(tmp_path / "cache", durability="none")


@pytest.fixture
def read(monkeypatch):
    """The digests whose records were read."""
    seen, real = [], judge.glance

    def glance(root, digest):
        seen.append(digest)
        return real(root, digest)

    monkeypatch.setattr(judge, "glance", glance)
    return seen


def put(cache, dice, number):
    record = {"duration": dice.randrange(100) / 4, "target_type": dice.choice(["cubin", "ptx"]), "arch": "sm_80"}
    cache.publish(b"%d" % number, bytes(dice.randrange(300)), record if dice.random() < 0.9 else {})


def expected(cache):
    entries = list(cache.entries())
    return (
        len(entries),
        sum(entry.size for entry in entries),
        sum(entry.record.get("duration", 0.0) for entry in entries),
        Counter(entry.record.get("target_type", "unknown") for entry in entries),
        Counter(entry.record.get("arch", "unknown") for entry in entries),
    )


def test_a_census_is_what_the_entries_sum_up_to(cache):
    dice = random.Random(3)
    assert cache.census() == expected(cache)
    for _ in range(12):
        for _ in range(25):
            number = dice.randrange(60)
            if dice.random() < 0.7:
                put(cache, dice, number)
            elif cache.get(b"%d" % number) is not None:
                del cache[b"%d" % number]
        if dice.random() < 0.5:
            settle()
        assert cache.census() == expected(cache)
    cache.clear()
    assert cache.census() == (0, 0, 0.0, Counter(), Counter())


def test_only_what_has_changed_is_read(cache, read):
    dice = random.Random(4)
    for number in range(200):
        put(cache, dice, number)
    settle()
    assert cache.census() == expected(cache)
    read.clear()
    sums = FileStreamProgramCache(cache.path).census()
    assert read == []
    put(cache, dice, 7)
    settle()
    FileStreamProgramCache(cache.path).census()
    assert entry_digest(b"7") in read
    assert {digest[:2] for digest in read} == {entry_digest(b"7")[:2]}
    assert sums.entries == 200


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b"{oops", b'{"format":1}', b'{"format":1,"shards":{"00":3}}', b"\xff"]
)
def test_a_damaged_census_is_taken_anew(cache, damage):
    dice = random.Random(5)
    for number in range(20):
        put(cache, dice, number)
    settle()
    cache.census()
    (cache.path / "census").write_bytes(damage)
    assert cache.census() == expected(cache)
    assert json.loads((cache.path / "census").read_bytes())["format"] == 1
    assert cache.verify().clean


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_the_first_in_an_order(cache, by, count):
    dice = random.Random(6)
    for number in range(80):
        put(cache, dice, number)
        if by == "used":
            age = dice.randrange(10**6)
            path = cache.info(entry_digest(b"%d" % number)).path
            os.utime(path, (time.time() - age * dice.random(), time.time() - age))
    for matches in (lambda _: True, lambda e: e.record.get("target_type") == "ptx"):
        given = cache.first(count, by=by, matches=matches)
        wanted = sorted(filter(matches, cache.entries()), key=ORDERS[by], reverse=True)[:count]
        assert [ORDERS[by](e) for e in given] == [ORDERS[by](e) for e in wanted]
        assert all(map(matches, given))


def test_the_last_created_are_found_among_imported_ones(cache, tmp_path):
    """The creation time of an imported entry comes from its record, not from its file."""
    other = FileStreamProgramCache(tmp_path / "other", durability="none")
    for number in range(20):
        other._put(entry_digest(b"%d" % number), b"x", b"{}", time.time() - 1000 + number)
    other.export(tmp_path / "bundle.tar")
    cache[b"new"] = b"x"
    cache.import_(tmp_path / "bundle.tar")
    assert [e.digest for e in cache.first(3, by="created")] == [entry_digest(k) for k in (b"new", b"19", b"18")]


@pytest.mark.parametrize("by", ORDERS)
def test_the_first_few_read_few_records(cache, read, by):
    now = time.time()
    for number in range(300):  # entry 0 is the last used and the last created
        cache._put(entry_digest(b"%d" % number), bytes(number), b"{}", now - 10 * number)
        path = cache.info(entry_digest(b"%d" % number)).path
        os.utime(path, (now - 10 * number, now - 10 * number))
    read.clear()
    wanted = [b"299", b"298"] if by == "size" else [b"0", b"1"]
    assert [e.digest for e in cache.first(2, by=by)] == [entry_digest(key) for key in wanted]
    assert len(read) <= 4


def test_every_store_gives_its_first(cache, tmp_path):
    memory = InMemoryProgramCache()
    for store in (memory, cache):
        for number in range(5):
            store.publish(b"%d" % number, bytes(number + 1), {})
    for store in (memory, ReadOnlyProgramCache(cache), ReadOnlyProgramCache(memory)):
        assert [e.size for e in store.first(2, by="size")] == [5, 4]
        assert set(store.digests()) == {entry_digest(b"%d" % number) for number in range(5)}


def test_of_the_last_created_few_shards_are_looked_at(cache, monkeypatch):
    """Copying a cache over another sets back the modification times of directories, but not their change times."""
    monkeypatch.setattr(maintenance, "_SLACK", 0.02)
    keys = [b"%d" % i for i in range(30)]
    for key in keys:
        cache[key] = b"v"
    settle()
    settle()
    cache[b"last"] = b"v"
    for shard in (cache.path / "entries").iterdir():
        os.utime(shard, (1, 1))
    settle()
    settle()
    cache[keys[0]] = b"again"
    looked = []
    real = pairs.glimpses
    monkeypatch.setattr(pairs, "glimpses", lambda root, shards: looked.extend(shards) or real(root, shards))
    assert [e.digest for e in cache.first(1, by="created")] == [entry_digest(keys[0])]
    assert looked == [entry_digest(keys[0])[:2]]
    assert [e.digest for e in cache.first(2, by="created")] == [entry_digest(key) for key in (keys[0], b"last")]
