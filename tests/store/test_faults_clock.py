# SPDX-License-Identifier: Apache-2.0
"""Clocks that jump: time stamps in the future, and a clock that is set back."""

from __future__ import annotations

import os
import time

import pytest
from faults_values import assert_works, check_lookups, entry_path, publish, record_path, settle, staged

from cuda_progcache._util.liveness import current_owner
from cuda_progcache.store import FileStreamProgramCache

YEAR = 365 * 86400.0
HOUR = 3600.0


class Clock:
    """This process's clock, shifted by ``off`` seconds."""

    def __init__(self, monkeypatch):
        real, real_ns = time.time, time.time_ns
        self.off = 0.0
        monkeypatch.setattr(time, "time", lambda: real() + self.off)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(self.off * 1e9))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def make(root, cap=None):
    return FileStreamProgramCache(root, durability="none", max_size_bytes=cap)


def stamp(path, off):
    moment = time.time() + off
    os.utime(path, (moment, moment))


def test_entries_of_the_future_do_not_stay_for_ever(root):
    """Entries written by a machine whose clock was years ahead are evicted like any others."""
    store = make(root)
    for i in range(10):
        store[b"future %d" % i] = b"x" * 1000
        stamp(entry_path(root, b"future %d" % i), 10 * YEAR + i)
    store = make(root, 10_000)
    for i in range(15):
        store[b"new %d" % i] = b"y" * 1000
        assert store.get(b"new %d" % i) is not None, "evicted for one of the future"

    assert [i for i in range(10) if store.get(b"future %d" % i)] == []
    assert make(root).get(b"new 14") is not None


def test_a_read_brings_a_time_of_the_future_back_and_writes_once(root):
    store = make(root, 100_000)
    publish(store, b"k", 1, 1)
    stamp(entry_path(root, b"k"), 10 * YEAR)
    assert check_lookups(store, b"k") == 2
    first = entry_path(root, b"k").stat()
    assert first.st_mtime <= time.time()
    settle()
    for _ in range(3):
        assert check_lookups(store, b"k") == 2
    again = entry_path(root, b"k").stat()
    assert again.st_mtime_ns == first.st_mtime_ns
    assert again.st_atime - first.st_atime < 60
    settle()
    before = entry_path(root, b"k").stat().st_ctime_ns
    assert check_lookups(store, b"k") == 2
    assert entry_path(root, b"k").stat().st_ctime_ns == before, "a hit doesn't write"


@pytest.mark.parametrize("off", [-10 * YEAR, -HOUR, HOUR, 10 * YEAR])
def test_the_order_of_uses_outlives_a_jump(root, clock, off):
    store = make(root, 4000)
    for key in (b"a", b"b", b"c", b"d"):
        store[key] = key * 1000
        time.sleep(0.002)
    clock.off = off
    assert store.get(b"a")
    store[b"e"] = b"e" * 1000
    assert store.get(b"b") is None, "the least recently used"
    assert store.get(b"a") is not None
    clock.off = 0
    assert store.get(b"c")
    store[b"f"] = b"f" * 1000
    assert store.get(b"d") is None
    assert [key for key in (b"a", b"c", b"e", b"f") if store.get(key) is None] == []


@pytest.mark.parametrize("off", [-10 * YEAR, -HOUR, HOUR, 10 * YEAR])
def test_lookups_and_writes_at_another_time(root, clock, off):
    """Lookups stay correct when the clock jumps, and no listed entry was last used in the future."""
    store = make(root, 100_000)
    publish(store, b"k", 1, 1)
    settle()
    assert check_lookups(store, b"k") == 2
    clock.off = off
    for each in (store, make(root, 100_000)):
        assert check_lookups(each, b"k") == 2
        with entry_path(root, b"k").open("r+b") as file:
            file.write(b"!")
        assert each.get(b"k") is None
        assert publish(each, b"k", 1, 2)
        assert check_lookups(each, b"k") == 2
        assert all(info.last_used <= time.time() for info in each.entries())
    assert store.stats().hits + store.stats().misses == 7
    clock.off = 0
    assert check_lookups(make(root), b"k") == 2
    assert_works(root)


@pytest.mark.parametrize("off", [-10 * YEAR, -HOUR / 2, HOUR / 2, 10 * YEAR])
def test_a_live_writers_file_is_not_reclaimed_for_its_age(root, off):
    """A staging file is kept while its owner lives, whatever its age; a dead owner's is removed, however young."""
    make(root)
    me = current_owner()
    mine, dead = root / "tmp" / f"{me}-9", root / "tmp" / f"{me._replace(start=me.start + 1)}-9"
    for path in (mine, dead):
        path.write_bytes(b"x")
        stamp(path, off)
    make(root)
    assert staged(root) == [mine.name]


@pytest.mark.parametrize("lost", ["before the record", "before the entry"])
def test_a_put_survives_the_loss_of_its_staging_file(root, monkeypatch, lost):
    """A machine whose clock is a day ahead can remove a staging file in use because it looks abandoned."""
    from cuda_progcache.store import pairs

    store = make(root)
    publish(store, b"k", 1, 1)
    real, lost_files = pairs.replace, []

    def replace(source, target):
        if len(lost_files) < 2 and ("records" in target) == (lost == "before the record"):
            lost_files.append(source)
            os.unlink(source)
        real(source, target)

    monkeypatch.setattr(pairs, "replace", replace)
    monkeypatch.setattr("cuda_progcache._util.files.replace", replace)
    assert publish(store, b"k", 1, 2)
    assert len(lost_files) == 2
    assert check_lookups(store, b"k") == 2
    assert staged(root) == []


def test_old_records_without_an_entry_are_litter_whatever_jumps(root, clock):
    """A record that is removed as abandoned just before its entry arrives is written again."""
    store = make(root, 100_000)
    publish(store, b"orphan", 1, 1)
    entry_path(root, b"orphan").unlink()
    clock.off = 10 * YEAR
    for i in range(40):
        assert publish(store, b"k%d" % i, 1, i)
        assert check_lookups(store, b"k%d" % i) == 2
    store.clear()
    assert not record_path(root, b"orphan").exists()
