# SPDX-License-Identifier: Apache-2.0
"""The index of a cache: it is derived from the records, follows their changes, and can be deleted at any time."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import subprocess
import sys

import pytest

from cuda_progcache.memo.call import Call
from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import file_cache


def call(x, name="f", result=None):
    return Call(name, {"x": x, "even": x % 2 == 0}, result=result)


@pytest.fixture
def filled(tmp_path):
    cache = file_cache(tmp_path / "memo")
    for x in range(40):
        cache.save(call(x, "g" if x % 4 == 0 else "f", x))
    return cache


def index_file(cache):
    return pathlib.Path(cache.calls.index.path)


def listed(cache, **fields):
    return sorted(c.arguments["x"] for c in cache.query(**fields))


def by_looking(cache, name):
    """Return the x of each call named `name`, read from the records without the index."""
    calls = [cache.calls.load(key).fetch(cache) for key in cache.calls.list()]
    return sorted(c.arguments["x"] for c in calls if c.name == name)


def test_answers_are_those_of_the_records(filled):
    assert listed(filled, name="g") == by_looking(filled, "g") == list(range(0, 40, 4))
    assert listed(filled, name="f", arguments={"even": True}) == list(range(2, 40, 4))
    assert listed(filled) == list(range(40))


def test_it_sees_what_comes_goes_and_is_replaced(filled):
    assert len(listed(filled)) == 40
    filled.save(call(100))
    assert 100 in listed(filled, name="f")
    filled.evict(call(100).to_lookup_key())
    assert 100 not in listed(filled, name="f")
    key = filled.save(call(5, "f", "replaced"))
    assert filled.query(name="f", arguments={"x": 5}).only().result == "replaced"
    assert filled.query(result="replaced").only().to_lookup_key() == key
    other = file_cache(pathlib.Path(filled.calls.root).parent)
    other.save(call(200))
    assert 200 in listed(filled) and 200 in listed(other)


def test_each_of_many_changes_is_seen_at_once(filled):
    for x in range(1000, 1060):  # faster than directory timestamps tick
        filled.save(call(x))
        assert filled.query(arguments={"x": x}).count() == 1
        if x % 2:
            filled.save(call(x, result="again"))
            assert filled.query(arguments={"x": x}).only().result == "again"
        if x % 3 == 0:
            filled.evict(call(x).to_lookup_key())
            assert filled.query(arguments={"x": x}).empty()


def test_a_change_within_a_tick_of_the_clock_is_seen(filled):
    import time

    first = filled.calls.load(next(iter(filled.calls.list()))).to_lookup_key()
    shard = os.path.join(filled.calls.root, first[:2])
    second = next(x for x in range(1000, 10_000) if call(x).to_lookup_key()[:2] == first[:2])
    tick = time.time_ns() + 3600 * 10**9  # in the future, so that it stays recent however slow this process is
    os.utime(shard, ns=(tick, tick))
    assert second not in listed(filled)
    assert call(second).to_lookup_key() not in filled.calls.list()
    filled.save(call(second))
    os.utime(shard, ns=(tick, tick))
    assert second in listed(filled)
    assert call(second).to_lookup_key() in filled.calls.list()


def test_only_what_moved_is_read(filled, monkeypatch):
    import time

    listed(filled)
    deadline = time.monotonic() + 300
    read = []
    scan = filled.calls.scan
    monkeypatch.setattr(type(filled.calls), "scan", lambda self, shard: read.append(shard) or scan(shard))
    while time.monotonic() < deadline:  # until no directory's mtime is too recent to be trusted
        read.clear()
        listed(filled)
        if not read:
            break
    assert not read
    filled.save(call(77))
    listed(filled)
    assert read == [call(77).to_lookup_key()[:2]]


@pytest.mark.parametrize("how", ["deleted", "truncated", "junk", "empty", "another version", "no tables"])
def test_it_is_made_anew(filled, how):
    expected = listed(filled, name="f")
    path = index_file(filled)
    filled.calls.index.close()
    if how == "deleted":
        for file in path.parent.glob("index.sqlite*"):
            file.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "junk":
        path.write_bytes(b"this is no database" * 1000)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        with sqlite3.connect(path) as connection:
            if how == "another version":
                connection.execute("PRAGMA user_version = 77")
            else:
                connection.execute("DROP TABLE calls")
        connection.close()
    again = file_cache(path.parent.parent)
    assert listed(again, name="f") == expected
    assert listed(again, name="f", arguments={"x": 5}) == [5]


def test_it_is_made_anew_when_damaged_under_a_reader(filled):
    expected = listed(filled, name="f")
    path = index_file(filled)
    for file in path.parent.glob("index.sqlite*"):
        file.write_bytes(b"\xff" * max(4096, file.stat().st_size))
    assert listed(filled, name="f") == expected
    filled.save(call(500))
    assert 500 in listed(filled, name="f")


def test_a_damaged_record_is_left_out(filled):
    key = call(5).to_lookup_key()
    path = pathlib.Path(filled.calls.tree.path(key))
    path.write_bytes(path.read_bytes()[:-9] + b"garbage!!")
    os.utime(path.parent)
    assert 5 not in listed(filled)


def test_a_directory_that_cannot_be_written_is_indexed_in_memory(tmp_path, filled, monkeypatch):
    path = index_file(filled)
    filled.calls.index.close()
    for file in path.parent.glob("index.sqlite*"):
        file.unlink()
    path.mkdir()  # not even root can write a file there
    again = file_cache(path.parent.parent)
    assert listed(again, name="g") == list(range(0, 40, 4))
    again.save(call(8, "new"))
    assert listed(again, name="new") == [8]


def test_a_cache_that_is_not_there_yet(tmp_path):
    cache = file_cache(tmp_path / "later")
    assert cache.query().empty() and not (tmp_path / "later").exists()
    cache.save(call(1))
    assert listed(cache) == [1]
    assert index_file(cache).exists()


def test_nothing_on_the_call_path_touches_it(tmp_path):
    from cuda_progcache.memo.memoize import memoize

    f = memoize(tmp_path, lambda x: x)
    f(1)
    f(1)
    assert f.contains(1) and f.load(1) == 1
    assert not (tmp_path / "calls" / "index.sqlite").exists()


WORKER = """
import os, sys
from cuda_progcache.memo.call import Call
from cuda_progcache.memo.memoize import file_cache

def work(me):
    cache = file_cache(sys.argv[1])
    for x in range(40):
        cache.save(Call("f", {"x": x, "me": me}, result=x))
        assert cache.query(name="f", arguments={"me": me}).count() == x + 1
    assert cache.query(name="f").count() >= 40

children = []
for me in range(3):
    if not (child := os.fork()):
        try:
            work(me)
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_processes_refresh_at_once(tmp_path):
    arguments = [sys.executable, "-c", WORKER, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=600)
    assert (done.stdout, done.stderr) == ("[0, 0, 0]\n", "")
    assert file_cache(tmp_path).query(name="f").count() == 120


def test_threads_query_and_save_at_once(filled, at_once):
    def work(number):
        for x in range(10):
            filled.save(call(1000 * number + x, "t"))
            assert filled.query(name="t", arguments={"x": 1000 * number + x}).count() == 1

    at_once(4, work)
    assert filled.query(name="t").count() == 40


def test_values_that_lie_in_records_are_found(filled):
    filled.save(call(7, "h", "a small result"))
    assert filled.load_value(digest("a small result")) == "a small result"
    assert filled.expand(digest("a small result")[:9]) == digest("a small result")
    with pytest.raises(KeyError):
        filled.load_value(digest("nowhere"))
    assert [call.arguments["x"] for call in filled.query(result="a small result")] == [7]


def test_an_index_with_flipped_or_missing_bytes_never_fails_a_query(tmp_path):
    import random
    import shutil

    from cuda_progcache.memo.memoize import file_cache, memoize

    f = memoize(file_cache(tmp_path / "kept"), lambda x: x, code=False)
    for number in range(20):
        f(number)
    assert f.cache.query().count() == 20
    index = tmp_path / "kept" / "calls" / "index.sqlite"
    f.cache.calls.index.close()
    whole = index.read_bytes()
    rng = random.Random(5)
    for trial in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 50))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged[: rng.randrange(len(damaged))] if trial % 5 == 4 else bytes(damaged))
        fresh = file_cache(tmp_path / "kept")
        assert fresh.query().count() <= 20
        list(fresh.query(name=f.profile.qualname))
        fresh.calls.index.close()
    shutil.rmtree(tmp_path / "kept" / "calls" / "quarantine", ignore_errors=True)
    index.unlink(missing_ok=True)
    assert file_cache(tmp_path / "kept").query().count() == 20
