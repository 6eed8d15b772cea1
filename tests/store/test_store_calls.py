# SPDX-License-Identifier: Apache-2.0
"""The cost of lookups and writes: file system calls, counted one by one, and memory."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from faults_injector import injected
from faults_values import settle

from cuda_progcache._util import files
from cuda_progcache.store import FileStreamProgramCache, entry_digest


@pytest.fixture
def calls(tmp_path):
    """A function that runs an action and returns the calls it makes on the store's directory."""
    root = str(tmp_path / "cache")
    with injected(root) as injector:

        def of(action):
            injector.arm(lambda _: False, OSError)
            action()
            return injector.calls

        yield of


READ = ["open entries", "fstat descriptor", "read descriptor", "close descriptor"]
CREATE = ["write descriptor", "fstat descriptor", "close descriptor"]
PUT = ["open tmp", *CREATE, "open records", *CREATE, "replace tmp", "lstat records"]


def but_questions(calls):
    """Return the calls without those that check whether a store with a size cap keeps a ledger."""
    return [call for call in calls if call != "access"]


def in_one_shard(count):
    """Return ``count`` keys whose digests begin with the same two characters."""
    first = entry_digest(b"0")[:2]
    keys = (b"%d" % i for i in range(100_000))
    return [key for key in keys if entry_digest(key).startswith(first)][:count]


def test_a_put_of_a_new_key(tmp_path, calls):
    a, b, c = in_one_shard(3)
    store = FileStreamProgramCache(tmp_path / "cache", durability="none")
    assert [call for call in calls(lambda: store.__setitem__(a, b"v")) if "mkdir" in call] == [
        "mkdir entries",
        "mkdir records",
    ]
    assert but_questions(calls(lambda: store.__setitem__(b, b"v"))) == PUT
    store = FileStreamProgramCache(tmp_path / "cache", durability="none")
    assert but_questions(calls(lambda: store.__setitem__(c, b"v"))) == PUT, "another store object has made them"


def test_a_put_is_synced_once(tmp_path, calls):
    a, b = in_one_shard(2)
    store = FileStreamProgramCache(tmp_path / "cache")
    store[a] = b"v"
    assert but_questions(calls(lambda: store.__setitem__(b, b"v"))) == [*PUT[:2], "fsync descriptor", *PUT[2:]]


@pytest.mark.parametrize("cap", [None, 100_000])
def test_a_warm_hit_opens_one_file(tmp_path, calls, cap):
    store = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=cap)
    assert store.publish(b"k", b"v", {"n": 1})
    settle()
    assert store.load(b"k") == (b"v", {"n": 1})
    for _ in range(2):
        assert calls(lambda: store.get(b"k")) == READ
        assert calls(lambda: store.load(b"k")) == ["lstat records", *READ]


@pytest.mark.parametrize("cap", [None, 100_000])
def test_the_first_hit_of_a_process_opens_two(tmp_path, calls, cap):
    """A size cap adds no calls if another process has just recorded the use."""
    writer = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=100_000)
    assert writer.publish(b"k", b"v", {"n": 1})
    settle()
    assert writer[b"k"] == b"v"
    settle()
    store = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=cap)
    record = [call.replace("entries", "records") for call in READ]
    assert calls(lambda: store.get(b"k")) == ["access", *READ, *record]
    assert calls(lambda: store.get(b"k")) == READ


def test_a_miss_asks_once(tmp_path, calls):
    store = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=100_000)
    assert calls(lambda: store.get(b"k")) == ["access"]


# Memory

LARGE = 24_000_000


def peak(action):
    """Return the peak of the memory that Python allocates during the action, in bytes."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cap", [None, 10 * LARGE])
def test_a_large_entry_is_held_once(tmp_path, cap):
    data = os.urandom(LARGE)
    store = FileStreamProgramCache(tmp_path / "cache", durability="none", max_size_bytes=cap)
    assert peak(lambda: store.publish(b"k", data, {"n": 1})) < LARGE / 10, "written from where it is"
    for fresh in (store, FileStreamProgramCache(tmp_path / "cache", max_size_bytes=cap)):
        for look in (fresh.load, fresh.get):
            assert peak(lambda look=look: look(b"k")) < 1.1 * LARGE


def test_a_large_damaged_entry_is_held_once(tmp_path):
    """The entry is read again before it is declared damaged."""
    store = FileStreamProgramCache(tmp_path / "cache", durability="none")
    store[b"k"] = bytes(LARGE)
    digest = entry_digest(b"k")
    path = tmp_path / "cache" / "entries" / digest[:2] / digest[2:]
    with path.open("r+b") as file:
        file.write(b"x")
    assert peak(lambda: store.get(b"k")) < 1.1 * LARGE
    assert store.stats().corrupt == 1


def test_a_read_that_comes_in_parts_is_held_once(tmp_path, monkeypatch):
    """Reads of more than 2 GiB come in parts; the result includes what the file grew by meanwhile."""
    path = tmp_path / "file"
    data = os.urandom(LARGE)
    path.write_bytes(data + b"more")
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real(fd, min(size, LARGE // 3)))
    fd = os.open(path, files.READ_FLAGS)
    try:
        read = []
        assert peak(lambda: read.append(files.read_descriptor(fd, LARGE))) < 1.1 * LARGE
    finally:
        os.close(fd)
    assert read == [data + b"more"]


def test_a_write_that_goes_in_parts(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:7]))
    files.write_new(str(tmp_path / "file"), bytes(range(100)), mode=0o600, sync=False)
    assert (tmp_path / "file").read_bytes() == bytes(range(100))
