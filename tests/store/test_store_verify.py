# SPDX-License-Identifier: Apache-2.0
"""verify(): everything that can be wrong with a cache directory, and how it is repaired."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time

import pytest

from cuda_progcache._util.liveness import current_owner
from cuda_progcache.errors import StoreError
from cuda_progcache.store import FileStreamProgramCache, entry_digest, verification

CUBIN = b"\x7fELF" + bytes(range(256)) * 4
LONG_AGO = time.time() - 10_000


@pytest.fixture
def cache(tmp_path):
    cache = FileStreamProgramCache(tmp_path / "cache", durability="none")
    for key in "abcdef":
        cache.publish(key, CUBIN + key.encode(), {"name": key})
    return cache


def entry(cache, key):
    digest = entry_digest(key)
    return cache.path / "entries" / digest[:2] / digest[2:]


def record(cache, key):
    digest = entry_digest(key)
    return cache.path / "records" / digest[:2] / digest[2:]


def kinds(report):
    return sorted((finding.kind, finding.path) for finding in report.findings)


def test_a_whole_cache(cache):
    cache[b"plain"] = b""
    report = cache.verify()
    assert (report.ok, report.bytes, report.findings, report.clean) == (7, 6 * (len(CUBIN) + 1), (), True)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(one, other):
    aside = one.with_name("x" * 62)
    os.rename(one, aside)
    os.rename(other, one)
    os.rename(aside, other)


def instead(path, make):
    path.unlink()
    make(path)


DAMAGE = {
    "cut": lambda c: entry(c, "a").write_bytes(CUBIN[:10]),
    "empty": lambda c: entry(c, "a").write_bytes(b""),
    "flipped": lambda c: flip(entry(c, "a")),
    "link": lambda c: instead(entry(c, "a"), lambda p: p.symlink_to(entry(c, "b"))),
    "fifo": lambda c: instead(entry(c, "a"), os.mkfifo),
    "directory": lambda c: instead(entry(c, "a"), os.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry(cache, damage, watchdog):
    damage(cache)
    report = cache.verify()
    assert kinds(report) == [("corrupt", str(entry(cache, "a")))]
    assert (report.ok, report.clean) == (5, False)
    assert report.findings[0].digest == entry_digest("a")
    assert "quarantine" in report.findings[0].advice
    assert os.path.lexists(entry(cache, "a"))  # without repair nothing is touched

    repaired = cache.verify(repair=True)
    assert kinds(repaired) == kinds(report)
    assert repaired.clean
    assert not os.path.lexists(entry(cache, "a"))
    assert cache.verify().findings == ()
    assert cache.get("a") is None
    cache["a"] = CUBIN
    assert cache["a"] == CUBIN
    assert cache.verify().ok == 6


def test_swapped_entries_are_both_wrong(cache):
    swap(entry(cache, "a"), entry(cache, "b"))
    assert kinds(cache.verify()) == sorted(("corrupt", str(entry(cache, key))) for key in "ab")


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "fifo"])
def test_a_damaged_record(cache, damage, watchdog):
    path = record(cache, "a")
    expected = {str(path)}
    if damage == "flip":
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"name":"a"', b'"name":"z"'))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "fifo":
        instead(path, os.mkfifo)
    else:
        swap(path, record(cache, "b"))
        expected.add(str(record(cache, "b")))
    report = cache.verify()
    assert {(finding.kind, finding.path) for finding in report.findings} == {("damaged-record", p) for p in expected}
    assert cache.verify(repair=True).clean
    assert cache.verify().findings == ()
    assert cache.get("a") is None


def test_halves(cache):
    record(cache, "a").unlink()
    entry(cache, "b").unlink()
    report = cache.verify()
    assert kinds(report) == sorted([("no-record", str(entry(cache, "a"))), ("no-entry", str(record(cache, "b")))])
    assert not list(cache.path.glob("quarantine/*"))  # without repair nothing is touched
    assert cache.verify(repair=True).clean
    assert cache.verify() == (4, 4 * (len(CUBIN) + 1), ())
    (kept,) = (cache.path / "quarantine").iterdir()
    assert kept.read_bytes() == CUBIN + b"a"


def test_foreign_files(cache):
    shard = entry(cache, "a").parent
    places = [
        shard / "notes.txt",
        cache.path / "entries" / "README",
        cache.path / "entries" / "zz",
        cache.path / "records" / ".nfs000",
        shard / ("g" * 62),
    ]
    for place in places:
        place.write_text("mine")
    (cache.path / "entries" / "backup").mkdir()
    (cache.path / "elsewhere").write_text("not looked at")
    report = cache.verify()
    assert [finding.kind for finding in report.findings] == ["foreign"] * 6
    assert {finding.path for finding in report.findings} == {str(cache.path / "entries" / "backup"), *map(str, places)}
    assert cache.verify(repair=True).clean
    assert cache.verify() == (6, 6 * (len(CUBIN) + 1), ())
    assert (cache.path / "elsewhere").exists()


def test_staging_files_of_the_dead(cache):
    dead = current_owner()._replace(start=1)
    staging = cache.path / "tmp"
    (staging / f"{dead}-0").write_bytes(b"x" * 10)
    (staging / f"{current_owner()}-9999").write_bytes(b"at work")
    (staging / "other").write_bytes(b"who knows, but young")
    (staging / "old").write_bytes(b"o")
    os.utime(staging / "old", (LONG_AGO, LONG_AGO))
    report = cache.verify()
    assert kinds(report) == [("stale-staging", str(staging / f"{dead}-0")), ("stale-staging", str(staging / "old"))]
    assert cache.verify(repair=True).clean
    assert sorted(os.listdir(staging)) == sorted([f"{current_owner()}-9999", "other"])


def test_nothing_is_counted_as_a_lookup(cache):
    flip(entry(cache, "a"))
    cache.verify(repair=True)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.corrupt) == (0, 0, 0)


def test_a_repair_credits_the_size_cap(tmp_path):
    cache = FileStreamProgramCache(tmp_path / "capped", max_size_bytes=1000, durability="none")
    for i in range(9):
        cache[b"%d" % i] = b"y" * 100
    for i in range(8):
        flip(entry(cache, b"%d" % i))
    assert cache.verify(repair=True).clean
    assert cache._cap.ledger.size == 100
    for i in range(9):
        cache[b"new%d" % i] = b"y" * 100
    assert cache.stats().evicted == 0


def test_a_writer_between_its_two_renames_is_given_time(cache, monkeypatch):
    from cuda_progcache._util import files

    torn = {str(entry(cache, "a")), str(record(cache, "b"))}

    def read(path, **options):
        data, status = files.read_regular(path, **options)
        if path in torn:
            torn.discard(path)
            return b"of another version", status
        return data, status

    monkeypatch.setattr("cuda_progcache.store.judge.read_regular", read)
    assert cache.verify(repair=True) == (6, 6 * (len(CUBIN) + 1), ())
    assert torn == set()


def test_a_writer_that_stands_still_is_waited_for_once(cache, monkeypatch):
    """The wait isn't repeated for each damaged entry."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(verification, "time", clock)
    (cache.path / "tmp" / f"{current_owner()}-1.staged").write_bytes(b"half of an entry")
    for name in "abc":
        entry(cache, name).write_bytes(b"damaged")
    assert [kind for kind, _ in kinds(cache.verify())] == ["corrupt"] * 3
    assert verification._PATIENCE < clock.now < 1.1 * verification._PATIENCE


def test_beside_writers_everything_is_whole(cache, monkeypatch):
    monkeypatch.setattr("cuda_progcache.store.verification._PATIENCE", 600.0)  # a writer may be preempted
    stop = threading.Event()

    def write(which):
        i = 0
        while not stop.is_set():
            i += 1
            cache.publish(b"k%d" % (i % 5), b"%d" % which * (i % 300), {"i": i})
            if i % 7 == 0:
                with contextlib.suppress(KeyError):
                    del cache[b"k%d" % (i % 5)]

    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        reports = [cache.verify(repair=i % 2 == 1) for i in range(10)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [kinds(report) for report in reports] == [[]] * 10
    assert cache.verify().findings == ()


def test_a_directory_that_is_gone_is_empty(cache):
    import shutil

    shutil.rmtree(cache.path)
    assert cache.verify() == (0, 0, ())


def test_what_cannot_be_read_is_reported_and_left(cache, monkeypatch):
    from cuda_progcache._util import files

    def read(path, **options):
        if path == str(entry(cache, "a")):
            raise OSError(errno.EIO, "I/O error", path)
        return files.read_regular(path, **options)

    monkeypatch.setattr("cuda_progcache.store.judge.read_regular", read)
    for repair in (False, True):
        report = cache.verify(repair=repair)
        assert kinds(report) == [("unreadable", str(entry(cache, "a")))]
        assert (report.ok, report.clean) == (5, False)


def test_what_cannot_be_repaired_says_so(cache, monkeypatch):
    flip(entry(cache, "a"))
    monkeypatch.setattr("cuda_progcache.store.removal.take_away", lambda *_, **__: False)
    report = cache.verify(repair=True)
    assert [(finding.kind, finding.repaired) for finding in report.findings] == [("corrupt", False)]
    assert not report.clean


# adopt


def test_adopt_takes_a_binary_in(cache, tmp_path):
    binary = tmp_path / "k.cubin"
    binary.write_bytes(CUBIN)
    info = cache.adopt(binary, b"k", {"name": "k", "arch": "sm_90"})
    assert (info.digest, info.size, info.record) == (entry_digest(b"k"), len(CUBIN), {"name": "k", "arch": "sm_90"})
    assert cache.load(b"k") == (CUBIN, {"name": "k", "arch": "sm_90"})
    assert info.path.read_bytes() == CUBIN
    assert cache.adopt(str(binary), "plain").record == {}
    binary.write_bytes(b"changed")
    assert cache["plain"] == CUBIN


def test_adopt_an_entry_that_lies_there_without_a_record(cache):
    record(cache, "a").unlink()
    assert cache.get("a") is None
    cache.adopt(entry(cache, "a"), "a")
    assert cache["a"] == CUBIN + b"a"
    assert cache.verify().clean


def test_what_cannot_be_adopted(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        cache.adopt(tmp_path / "none", b"k")
    with pytest.raises(TypeError, match="JSON"):
        cache.adopt(__file__, b"k", {"a": object()})
    capped = FileStreamProgramCache(tmp_path / "capped", max_size_bytes=10)
    with pytest.raises(StoreError, match="size cap"):
        capped.adopt(__file__, b"k")
    assert (cache.get(b"k"), capped.get(b"k")) == (None, None)
