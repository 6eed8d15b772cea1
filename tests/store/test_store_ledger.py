# SPDX-License-Identifier: Apache-2.0
"""The ledger of entries and bytes that processes share: it adds up, and recovers from any damage to its file."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuda_progcache.store import FileStreamProgramCache, entry_digest
from cuda_progcache.store import append_log as module
from cuda_progcache.store import ledger as ledgers
from cuda_progcache.store.append_log import LONG
from cuda_progcache.store.ledger import SHARDS, Ledger
from cuda_progcache.store.root import Root


@pytest.fixture(autouse=True)
def _no_operation_is_given_up_for_a_busy_machine(monkeypatch):
    for each in (module, ledgers):
        monkeypatch.setattr(each, "GIVE_UP_AFTER", 3600.0)


@pytest.fixture
def root(tmp_path):
    root = Root(str(tmp_path / "cache"), shared=False)
    root.open()
    return root


def counted(root, entries=0, size=0):
    """Return a ledger in which every shard is counted as ``entries`` entries of ``size`` bytes."""
    ledger = Ledger(root)
    ledger.count([(shard, entries, size) for shard in range(SHARDS)], ledger.mark())
    return ledger


def move(ledger, *changes):
    """Record changes, with no other operation in between."""
    ledger.end(ledger.begin([shard for shard, _, _ in changes]), changes)


def hear(ledger):
    ledger.mark()


def path(root):
    return os.path.join(root.path, "ledger")


def test_what_one_tells_the_others_hear(root):
    one = counted(root)
    other = Ledger(root)
    move(one, (3, 1, 100), (4, 1, 50))
    move(other, (3, 1, 10))
    assert (other.entries, other.size) == (3, 160)
    move(one, (4, -1, -50))
    assert (one.entries, one.size) == (2, 110)
    other.count([(3, 1, 7)], other.mark())
    assert (other.entries, other.size) == (1, 7)
    hear(one)
    assert (one.entries, one.size) == (1, 7)
    assert not one.doubts


def test_what_is_announced_counts_until_it_is_done(root):
    one, other = counted(root), Ledger(root)
    write = one.begin([5], 1000)
    hear(other)
    assert (other.entries, other.size, other.announced) == (0, 1000, 1000)
    one.end(write, [(5, 1, 400)])
    hear(other)
    assert (other.entries, other.size, other.announced) == (1, 400, 0)
    failed = one.begin([5], 1000)
    one.end(failed, [(5, 0, 0)], sure=False)
    hear(other)
    assert (other.size, other.doubtful()) == (400, [5])


def test_two_operations_on_a_shard_at_a_time_leave_a_doubt_until_a_count(root):
    """The two operations may be on one key and have seen the same entry."""
    one, other = counted(root), Ledger(root)
    first, second = one.begin([5], 100), other.begin([5], 200)
    apart = other.begin([6], 50)
    one.end(first, [(5, 1, 100)])
    assert one.doubts == 1
    assert one.doubtful() == [], "who ends last makes sure"
    other.end(second, [(5, 1, 200)])
    other.end(apart, [(6, 1, 50)])
    assert other.doubtful() == [5]
    other.count([(5, 1, 200)], other.mark())
    hear(one)
    assert (one.entries, one.size, one.doubts) == (2, 250, 0)


@pytest.mark.parametrize("when", ["open at the scan", "begun during the scan", "ended during the scan"])
def test_a_count_beside_an_operation_is_not_exact(root, when):
    one, other = counted(root), Ledger(root)
    if when == "open at the scan":
        move_on = one.begin([5], 100)
        since = other.mark()
        other.count([(5, 7, 700)], since)
        assert other.size == 100, "the shard was exact before: what is known is better"
        one.end(move_on, [(5, 1, 100)])
    else:
        move_on = one.begin([5], 100) if when == "ended during the scan" else None
        since = other.mark()
        one.end(move_on or one.begin([5], 100), [(5, 1, 100)])
        other.count([(5, 7, 700)], since)
    hear(other)
    assert (other.size, other.doubts) == (100, 0)
    one.doubt([(5, 0, 0)])
    move_on = one.begin([5], 100)
    other.count([(5, 7, 700)], other.mark())
    assert (other.size - other.announced, other.doubts) == (700, 1), "better than a number in doubt, and in doubt"
    one.end(move_on, [(5, 0, 0)])
    other.count([(5, 2, 200)], other.mark())
    assert (other.size, other.doubts) == (200, 0)


def test_an_operation_that_does_not_end_is_given_up(root, monkeypatch):
    one, other = counted(root), Ledger(root)
    killed = one.begin([5], 100)
    hear(other)
    assert (other.size, other.doubtful()) == (100, [])
    later = time.monotonic() + module.GIVE_UP_AFTER + 1
    monkeypatch.setattr(ledgers, "time", SimpleNamespace(monotonic=lambda: later))
    assert other.doubtful() == [5]
    assert other.size == 0
    one.end(killed, [(5, 1, 100)])  # the writer was slow, not dead
    hear(other)
    assert other.size == 0
    assert other.doubtful() == [5], "a count will find it"


def test_an_end_without_its_beginning_is_a_doubt(root):
    one, other = counted(root), Ledger(root)
    write = one.begin([5], 100)
    one.discard()
    counted(root)
    one.end(write, [(5, 1, 100)])
    hear(other)
    assert (other.size, other.doubtful()) == (100, [5])


def test_uncounted_shards_are_guessed_from_the_others(root):
    ledger = Ledger(root)
    assert (ledger.entries, ledger.size) == (0, 0)
    move(ledger, (9, 1, 100))
    assert (ledger.entries, ledger.size) == (0, 0), "the count of that shard will contain it"
    ledger.count([(0, 3, 300), (1, 5, 500)], ledger.mark())
    assert (ledger.entries, ledger.size) == (4 * SHARDS, 400 * SHARDS)
    assert ledger.uncounted() == list(range(2, SHARDS))
    assert not ledger.complete
    ledger.count([(shard, 0, 0) for shard in range(2, SHARDS)], ledger.mark())
    assert ledger.complete
    assert (ledger.entries, ledger.size) == (8, 800)
    assert not ledger.is_empty(0)
    assert ledger.is_empty(2)


def test_never_less_than_nothing(root):
    ledger = counted(root)
    move(ledger, (0, -1, -100))
    assert (ledger.entries, ledger.size) == (0, 0)


def test_it_stays_short_and_nothing_gets_lost(root):
    three = [counted(root) for _ in range(3)]
    count = 3 * LONG // 26
    slow = three[0].begin([200], 5000)
    three[1].doubt([(201, 0, 0)])
    for i in range(count):
        move(three[i % 3], (i % 200, 1, i))
        assert os.path.getsize(path(root)) <= LONG + 100
    for ledger in (*three, Ledger(root)):
        hear(ledger)
        assert ledger.entries == count
        assert ledger.size == sum(range(count)) + 5000
        assert ledger.doubtful() == [201], "and nothing else: operations of other shards don't trouble it"
    three[0].end(slow, [(200, 1, 4000)])
    assert three[0].size == sum(range(count)) + 4000
    assert three[0].doubtful() == [201]


@pytest.mark.parametrize("seen", ["handed on", "appended again"])
def test_what_is_appended_while_it_is_shortened_is_not_lost(root, monkeypatch, seen):
    """A line appended before the rename is carried over; a writer that appends after it notices and repeats it."""
    one, other = counted(root), Ledger(root)
    while os.path.getsize(path(root)) < LONG - 100:
        move(one, (0, 1, 10))
    hear(other)
    before = one.entries
    real, placed = root.place, []

    def late(target, data):
        if seen == "handed on":
            late.write = other.begin([7], 10)
            other.count([(3, 5, 50)], other.mark())
            real(target, data)
        else:
            opened, write = os.open(path(root), os.O_RDWR | os.O_APPEND), os.write
            monkeypatch.setattr(module.os, "open", lambda *_args: opened)

            def too_late(fd, appended):
                monkeypatch.undo()
                real(target, data)
                return write(fd, appended)

            monkeypatch.setattr(module.os, "write", too_late)
            late.write = other.begin([7], 10)
        placed.append(target)
        monkeypatch.setattr(root, "place", real)

    monkeypatch.setattr(root, "place", late)
    inode = os.stat(path(root)).st_ino
    turns = 0
    while not placed:
        move(one, (0, 1, 10))
        turns += 1
    assert os.stat(path(root)).st_ino != inode, "it was shortened"
    hear(one)
    assert one.announced == 10
    other.end(late.write, [(7, 1, 10)])
    hear(one)
    assert one.entries == before + turns + 1, "a count that began in the file before is worth nothing in this one"
    hear(other)
    assert other.entries == one.entries


def appended(data):
    def damage(ledger):
        with ledger.open("ab") as file:
            file.write(data)

    return damage


def replaced(make):
    def damage(ledger):
        ledger.unlink()
        make(ledger)

    return damage


def full_directory(ledger):
    ledger.mkdir()
    (ledger / "file").touch()


DAMAGES = {
    "gone": Path.unlink,
    "empty": lambda ledger: os.truncate(ledger, 0),
    "header cut": lambda ledger: os.truncate(ledger, 7),
    "huge": lambda ledger: os.truncate(ledger, 1 << 31),
    "zeros appended": appended(bytes(64)),
    "append cut": appended(b"12345678"),
    "noise appended": appended(random.Random(1).randbytes(1600)),
    "directory": replaced(Path.mkdir),
    "full directory": replaced(full_directory),
    "fifo": replaced(os.mkfifo),
    "link": replaced(lambda ledger: ledger.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_and_mended(tmp_path, damage):
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root, max_size_bytes=1000, durability="none")
    for i in range(8):
        store[str(i)] = b"x" * 100
    damage(root / "ledger")
    for opened in (store, FileStreamProgramCache(root, max_size_bytes=1000, durability="none")):
        for i in range(3):
            opened[f"{i} more"] = b"x" * 100
        assert opened._cap.ledger.complete
        assert opened._cap.ledger.entries == len(opened) == 10
        assert opened._cap.ledger.size == 1000
    assert (root / "ledger").is_file()


def test_damage_in_the_middle_is_noticed_by_who_reads_it(root):
    counted(root, 1, 100)
    with open(path(root), "r+b") as file:
        file.seek(800)
        file.write(b"\xff" * 5)
    fresh = Ledger(root)
    hear(fresh)
    assert (fresh.entries, fresh.complete) == (0, False)
    assert len(fresh.uncounted()) == SHARDS


def test_without_its_file_the_account_is_this_process_s(root, monkeypatch):
    ledger = counted(root, 1, 100)

    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuse)
    move(ledger, (0, 1, 50))
    for _ in range(1000):
        move(ledger, (0, 0, 0))
    assert not ledger._ended, "nothing grows with the number of operations"
    assert (ledger.entries, ledger.size) == (SHARDS + 1, SHARDS * 100 + 50)
    monkeypatch.undo()
    hear(ledger)
    assert (ledger.entries, ledger.doubtful()) == (SHARDS, [0]), "with the file back, what it couldn't say is a doubt"
    ledger.count([(0, 2, 150)], ledger.mark())
    assert (ledger.entries, ledger.size, ledger.doubts) == (SHARDS + 1, SHARDS * 100 + 50, 0)


def test_what_another_thread_has_read_meanwhile_is_not_taken_twice(root, monkeypatch):
    ledger, other = counted(root), Ledger(root)
    move(other, (0, 1, 10))
    real, calls = os.read, []

    def read(fd, size):
        calls.append(size)
        if len(calls) == 2:  # after the header, the lines since the last read
            move(ledger, (1, 1, 10))
        return real(fd, size)

    monkeypatch.setattr(module.os, "read", read)
    hear(ledger)
    assert len(calls) > 4
    assert (ledger.entries, ledger.size) == (2, 20)


def test_threads_of_one_store_do_not_count_twice(root):
    ledger = counted(root)

    def work(shard):
        for _ in range(300):
            move(ledger, (shard, 1, 10))

    threads = [threading.Thread(target=work, args=(shard,)) for shard in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    # A rewrite can come between a line and the check that it arrived; the line is then repeated, its shard in doubt.
    ledger.count([(shard, 300, 3000) for shard in ledger.doubtful()], ledger.mark())
    assert (ledger.entries, ledger.size, ledger.doubts) == (1200, 12_000, 0)


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "cache"


def make(path, cap=None):
    return FileStreamProgramCache(path, max_size_bytes=cap, durability="none")


def account(store):
    hear(store._cap.ledger)
    return store._cap.ledger.entries, store._cap.ledger.size


def test_a_store_without_a_cap_keeps_no_account(store_path):
    store = make(store_path)
    store[b"k"] = b"v"
    assert not (store_path / "ledger").exists()


def test_but_takes_part_in_one_that_others_keep(store_path):
    capped = make(store_path, 10_000)
    capped[b"a"] = b"1" * 100
    free = make(store_path)
    free[b"b"] = b"2" * 100
    free[b"a"] = b"3" * 150
    assert account(capped) == (2, 250)
    del free[b"b"]
    assert account(capped) == (1, 150)
    free.clear()
    capped[b"c"] = b"4" * 100
    assert account(capped) == (1, 100)


def test_replacing_removing_and_long_records_are_accounted(store_path):
    store = make(store_path, 100_000)
    store[b"a"] = b"1" * 100
    store[b"a"] = b"2" * 300
    assert account(store) == (1, 300)
    store.publish(b"b", b"3" * 100, {"log": "x" * 5000})
    entries, size = account(store)
    assert entries == 2
    assert 4450 < size - 400 < 4550, "a record beyond 512 bytes"
    del store[b"b"]
    assert account(store) == (1, 300)
    store[b"a"] = b"4" * 50
    assert account(store) == (1, 50)
    with pytest.raises(KeyError):
        del store[b"nothing"]
    assert account(store) == (1, 50)


def test_files_that_come_and_go_by_hand_are_found(store_path):
    """The ledger isn't told about files copied or removed by hand; later writes recount shards and correct it."""
    store = make(store_path, 10_000_000)
    for i in range(30):
        store[f"kept {i}"] = b"x" * 10
    other = make(store_path.parent / "other")
    for i in range(60):
        other[f"copied {i}"] = b"y" * 100
        digest = entry_digest(f"copied {i}")
        for tree in ("entries", "records"):
            target = store_path / tree / digest[:2] / digest[2:]
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((other.path / tree / digest[:2] / digest[2:]).read_bytes())
    for i in range(10):
        digest = entry_digest(f"kept {i}")
        (store_path / "entries" / digest[:2] / digest[2:]).unlink()
    assert account(store) == (30, 300)
    for i in range(60_000):
        store._cap._enforce(10_000_000, entry_digest(f"some write {i}"))
        if i % 100 == 0 and account(store) == (80, 6200):
            break
    assert account(store) == (80, 6200)
