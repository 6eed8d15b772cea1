# SPDX-License-Identifier: Apache-2.0
"""The account of a store that processes share: it adds up, and whatever happens to its file it is soon right again."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from cuda_progcache.store import FileStreamProgramCache, entry_digest
from cuda_progcache.store import ledger as module
from cuda_progcache.store.ledger import LONG, SHARDS, Ledger
from cuda_progcache.store.root import Root


@pytest.fixture
def root(tmp_path):
    root = Root(str(tmp_path / "cache"), shared=False)
    root.open()
    return root


def counted(root, entries=0, size=0):
    """A ledger that knows every shard."""
    ledger = Ledger(root)
    ledger.count((shard, entries, size) for shard in range(SHARDS))
    return ledger


def path(root):
    return os.path.join(root.path, "ledger")


def test_what_one_tells_the_others_hear(root):
    one = counted(root)
    other = Ledger(root)
    one.change([(3, 1, 100), (4, 1, 50)])
    other.change([(3, 1, 10)])
    assert (other.entries, other.size) == (3, 160)
    one.change([(4, -1, -50)])
    assert (one.entries, one.size) == (2, 110)
    other.count([(3, 1, 7)])
    assert (other.entries, other.size) == (1, 7)
    one.change([])
    assert (one.entries, one.size) == (1, 7)


def test_uncounted_shards_are_guessed_from_the_others(root):
    ledger = Ledger(root)
    assert (ledger.entries, ledger.size) == (0, 0)
    ledger.change([(9, 1, 100)])
    assert (ledger.entries, ledger.size) == (0, 0), "the count of that shard will contain it"
    ledger.count([(0, 3, 300), (1, 5, 500)])
    assert (ledger.entries, ledger.size) == (4 * SHARDS, 400 * SHARDS)
    assert ledger.uncounted() == list(range(2, SHARDS))
    assert not ledger.complete
    ledger.count((shard, 0, 0) for shard in range(2, SHARDS))
    assert ledger.complete
    assert (ledger.entries, ledger.size) == (8, 800)
    assert not ledger.is_empty(0)
    assert ledger.is_empty(2)


def test_never_less_than_nothing(root):
    ledger = counted(root)
    ledger.change([(0, -1, -100)])
    assert (ledger.entries, ledger.size) == (0, 0)


def test_it_stays_short_and_nothing_gets_lost(root):
    ledgers = [counted(root) for _ in range(3)]
    for i in range(3 * LONG // 16):
        ledgers[i % 3].change([(i % SHARDS, 1, i)])
        assert os.path.getsize(path(root)) <= LONG + 64
    for ledger in ledgers:
        ledger.change([])
        assert ledger.entries == 3 * LONG // 16
        assert ledger.size == sum(range(3 * LONG // 16))
    fresh = Ledger(root)
    fresh.change([])
    assert fresh.entries == 3 * LONG // 16


def test_what_is_appended_while_it_is_shortened_is_handed_on(root, monkeypatch):
    one, other = counted(root), Ledger(root)
    for _ in range(LONG // 16 - SHARDS - 2):
        one.change([(0, 1, 10)])
    other.change([])
    before = one.entries
    real = module.replace

    def late(source, target):
        monkeypatch.setattr(module, "replace", real)
        fd = os.open(path(root), os.O_WRONLY | os.O_APPEND)
        os.write(fd, module._line(7, module._CHANGE, 1, 10))
        os.close(fd)
        real(source, target)

    monkeypatch.setattr(module, "replace", late)
    inode = os.stat(path(root)).st_ino
    for _ in range(2 * SHARDS):
        one.change([(0, 1, 10)])
    assert os.stat(path(root)).st_ino != inode
    assert module.replace is real, "it was shortened"
    assert one.entries == before + 2 * SHARDS + 1
    other.change([])
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
    fresh.change([])
    assert (fresh.entries, fresh.complete) == (0, False)
    assert len(fresh.uncounted()) == SHARDS


def test_without_its_file_the_account_is_this_process_s(root, monkeypatch):
    ledger = counted(root, 1, 100)

    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "open", refuse)
    ledger.change([(0, 1, 50)])
    assert (ledger.entries, ledger.size) == (SHARDS + 1, SHARDS * 100 + 50)


def test_what_another_thread_has_read_meanwhile_is_not_taken_twice(root, monkeypatch):
    ledger, other = counted(root), Ledger(root)
    other.change([(0, 1, 10)])
    real, calls = os.read, []

    def read(fd, size):
        calls.append(size)
        if len(calls) == 2:  # after the header: the lines since the last look
            ledger.change([(1, 1, 10)])
        return real(fd, size)

    monkeypatch.setattr(module.os, "read", read)
    ledger.change([])
    assert len(calls) > 4
    assert (ledger.entries, ledger.size) == (2, 20)


def test_threads_of_one_store_do_not_count_twice(root):
    ledger = counted(root)

    def work(shard):
        for _ in range(300):
            ledger.change([(shard, 1, 10)])

    threads = [threading.Thread(target=work, args=(shard,)) for shard in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (ledger.entries, ledger.size) == (1200, 12_000)


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "cache"


def make(path, cap=None):
    return FileStreamProgramCache(path, max_size_bytes=cap, durability="none")


def account(store):
    store._cap.ledger.change([])
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
    """A copied directory, an ``rm``: the account is told by nobody, and heals."""
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
