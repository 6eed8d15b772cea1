# SPDX-License-Identifier: Apache-2.0
"""Arbitrary damage: lookups return the right value or miss, nothing raises or hangs, and the next write heals it."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
from pathlib import Path

import pytest
from faults_values import check_lookups, entry_path, publish, record, record_path, settle, value

from cuda_progcache._util.liveness import current_owner
from cuda_progcache.store import FileStreamProgramCache, entry_digest, verification

pytestmark = pytest.mark.usefixtures("watchdog")

KEY, OTHER = b"key", b"other"
SHARD = entry_digest(KEY)[:2]
AS_ROOT = os.geteuid() == 0


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("cuda_progcache.store.judge.LOOKS", (0.0, 0.0))  # no writers to wait for in these tests
    monkeypatch.setattr("cuda_progcache.store.verification._PATIENCE", 0.0)
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root, durability="none")
    for key in (KEY, OTHER):
        assert publish(store, key, 1, 1)
    return root


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a length limit
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_directory(path):
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def link_loop(path):
    path.symlink_to(path.name)


def link_elsewhere(path):
    """Link to a copy, outside the cache, of what was at ``path``."""
    elsewhere = Path(os.environ["FAULTS_ELSEWHERE"])
    path.symlink_to(elsewhere)


INSTEAD = {
    "empty file": lambda path: path.write_bytes(b""),
    "file": lambda path: path.write_bytes(b"some text\n" * 50),
    "unreadable file": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
    "fifo": os.mkfifo,
    "socket": make_socket,
    "directory": make_directory,
    "empty directory": lambda path: path.mkdir(),
    "dangling link": lambda path: path.symlink_to("nowhere/at/all"),
    "link to itself": link_loop,
    "link to a copy": link_elsewhere,
    "nothing": lambda _: None,
}
if AS_ROOT:
    INSTEAD["null device"] = lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    INSTEAD["zero device"] = lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    INSTEAD["tty device"] = lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(5, 0))
    INSTEAD["block device"] = lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(240, 77))

PLACES = {
    "entry": lambda root: entry_path(root, KEY),
    "record": lambda root: record_path(root, KEY),
    "shard of entries": lambda root: root / "entries" / SHARD,
    "shard of records": lambda root: root / "records" / SHARD,
    "entries": lambda root: root / "entries",
    "records": lambda root: root / "records",
    "tmp": lambda root: root / "tmp",
    "quarantine": lambda root: root / "quarantine",
    "tag": lambda root: root / "CACHEDIR.TAG",
    "ledger": lambda root: root / "ledger",
    "pins": lambda root: root / "pins",
    "counters": lambda root: root / "counters",
}


def put_instead(path, make, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("FAULTS_ELSEWHERE", str(elsewhere))
    if path.is_dir():
        shutil.copytree(path, elsewhere)
    elif path.is_file():
        shutil.copyfile(path, elsewhere)
    else:
        elsewhere.mkdir()
    remove(path)
    make(path)


def walk_through(store):
    """Call every operation of a store: none raises or warns, and what is written can be read."""
    check_lookups(store, KEY)
    check_lookups(store, OTHER)
    assert store.get(b"never written") is None
    for ask in (lambda: len(store), lambda: list(store.entries()), store.stats, store.verify, store.pins):
        ask()
    for turn in (2, 3):
        assert publish(store, KEY, 1, turn)
        assert store.get(KEY) == value(KEY, 1, turn)
        assert store.load(KEY) == (value(KEY, 1, turn), record(1, turn))
    store[OTHER] = value(OTHER, 1, 3)
    assert store.get(OTHER) == value(OTHER, 1, 3)
    del store[OTHER]
    assert store.get(OTHER) is None


@pytest.mark.parametrize("make", INSTEAD.values(), ids=INSTEAD)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_instead(root, tmp_path, monkeypatch, place, make):
    path = place(root)
    used = FileStreamProgramCache(root, durability="none", max_size_bytes=100_000)
    assert publish(used, KEY, 1, 1)
    settle()
    assert check_lookups(used, KEY) == 2
    put_instead(path, make, tmp_path, monkeypatch)
    walk_through(used)
    (tmp_path / "again").mkdir()
    put_instead(path, make, tmp_path / "again", monkeypatch)
    fresh = FileStreamProgramCache(root, durability="none")
    walk_through(fresh)
    fresh.clear()
    assert len(fresh) == 0
    assert fresh.get(KEY) is None
    assert publish(fresh, KEY, 1, 4)
    assert check_lookups(fresh, KEY) == 2
    fresh.close()
    used.close()


@pytest.mark.parametrize("seen_before", [False, True], ids=["fresh", "verified before"])
def test_bits_flipped_anywhere_in_an_entry_or_a_record(root, seen_before):
    """Bits are flipped at 120 random places each. Some do no harm in a record (in its time, say): the hit is right."""
    pick = random.Random(5)
    store = FileStreamProgramCache(root, durability="none")
    misses = 0
    for turn in range(240):
        path = (entry_path, record_path)[turn % 2](root, KEY)
        assert publish(store, KEY, 1, 1)
        if seen_before:
            assert check_lookups(store, KEY) == 2
        data = bytearray(path.read_bytes())
        data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        with path.open("r+b") as file:
            file.write(data)
        hits = check_lookups(store, KEY)
        list(store.entries()), store.stats()
        if turn % 2 == 0:
            assert hits == 0
        misses += 2 - hits
    assert misses > 300


def test_truncated_anywhere(root):
    store = FileStreamProgramCache(root, durability="none")
    for of in (entry_path, record_path):
        size = of(root, KEY).stat().st_size
        for length in (*range(0, size, 37), size - 1):
            assert publish(store, KEY, 1, 1)
            os.truncate(of(root, KEY), min(length, of(root, KEY).stat().st_size - 1))
            assert check_lookups(store, KEY) == 0
            assert publish(store, KEY, 1, 1)
            assert check_lookups(store, KEY) == 2


@pytest.mark.parametrize("of", [entry_path, record_path], ids=["entry", "record"])
@pytest.mark.parametrize("size", [1 << 33, 1 << 43], ids=["8 GB", "8 TB"])
def test_grown_beyond_memory(root, of, size):
    """A file that was extended far beyond its size (``truncate -s``) isn't read whole before its length is checked."""
    store = FileStreamProgramCache(root, durability="none")
    os.truncate(of(root, KEY), size)
    assert check_lookups(store, KEY) == 0
    assert publish(store, KEY, 1, 2)
    assert check_lookups(store, KEY) == 2
    os.truncate(of(root, KEY), size)
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=100_000)
    assert publish(store, KEY, 1, 3), "also where no read has met it"
    assert check_lookups(store, KEY) == 2
    assert list(store.entries())


PAIRS = {"entries": (entry_path,), "records": (record_path,), "both": (entry_path, record_path)}


@pytest.mark.parametrize("of", PAIRS.values(), ids=PAIRS)
def test_swapped_with_another_keys(root, tmp_path, of):
    store = FileStreamProgramCache(root, durability="none")
    settle()
    assert check_lookups(store, KEY) == check_lookups(store, OTHER) == 2
    for path in of:
        one, other, parked = path(root, KEY), path(root, OTHER), tmp_path / "parked"
        one.rename(parked)
        other.rename(one)
        parked.rename(other)
    if of != (record_path,):  # after a swap of the records alone, the verified entries are still unchanged
        assert check_lookups(store, KEY) == check_lookups(store, OTHER) == 0
    fresh = FileStreamProgramCache(root)
    assert check_lookups(fresh, KEY) == check_lookups(fresh, OTHER) == 0
    for key in (KEY, OTHER):
        assert publish(store, key, 1, 2)
        assert check_lookups(store, key) == 2


def test_two_names_of_one_file(root):
    """The entry of one key is a hard link to the entry of another."""
    store = FileStreamProgramCache(root, durability="none")
    entry_path(root, OTHER).unlink()
    os.link(entry_path(root, KEY), entry_path(root, OTHER))
    assert check_lookups(store, OTHER) == 0
    assert check_lookups(store, KEY) == 2
    assert publish(store, OTHER, 1, 2)
    assert check_lookups(store, OTHER) == check_lookups(store, KEY) == 2


RECORDS = {
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "huge number": b'{"length":' + b"9" * 10_000 + b"}",
    "no object": b"[1,2,3]",
    "null": b"null",
    "not text": bytes(range(256)),
    "wrong types": json.dumps({"length": "1", "checksum": 7, "created": [], "record_length": 2.5}).encode(),
    "infinite": b'{"length":Infinity,"checksum":NaN,"created":-Infinity,"record_length":2,"record_checksum":""}',
}


@pytest.mark.parametrize("head", RECORDS.values(), ids=RECORDS)
def test_a_record_whose_head_makes_no_sense(root, head):
    path = record_path(root, KEY)
    first = path.read_bytes().split(b"\n")[0]
    for raw in (
        b"\n".join([first, head, b"{}}", b"]}", b""]),
        b"\n".join([first, head.removesuffix(b"}") + b',"record":', b"{}}", b"]}", b""]),
    ):
        path.write_bytes(raw)
        store = FileStreamProgramCache(root, durability="none")
        assert check_lookups(store, KEY) == 0
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        list(store.entries()), store.stats()
        assert publish(store, KEY, 1, 2)
        assert check_lookups(store, KEY) == 2


def test_foreign_names_everywhere(root, monkeypatch):
    """Files with foreign names, in every directory of the tree, are left alone and do no harm."""
    monkeypatch.setattr(verification, "_PATIENCE", 0.1)  # one name looks like a file that this process is writing
    me = current_owner()
    huge = f"{me.host}-{me.boot}-{'9' * 60}-1-0"
    names = ["x", "x" * 255, "zz", "\n", "\udcff", "A" * 62, "0" * 62, "-", "a-b-1-2-3", huge, f"{me}-x", ".hidden"]
    tree = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for directory in tree:
        for name in names:
            if not (directory / name).exists():
                (directory / name).write_bytes(b"foreign")
        (directory / "a directory").mkdir()
    for cap in (None, 100_000):
        store = FileStreamProgramCache(root, durability="none", max_size_bytes=cap)
        assert check_lookups(store, KEY) == 2
        assert {info.digest for info in store.entries()} == {entry_digest(KEY), entry_digest(OTHER)}
        walk_through(store)
        assert publish(store, OTHER, 1, 1)
        store.close()
    store.clear()
    assert check_lookups(store, KEY) == 0
    assert publish(store, KEY, 1, 4)
    assert check_lookups(store, KEY) == 2
