# SPDX-License-Identifier: Apache-2.0
"""ReadOnlyProgramCache: reads leave no trace, and writes raise an error that names the store."""

from __future__ import annotations

import os

import pytest

from cuda_progcache._util.liveness import current_owner
from cuda_progcache.errors import AmbiguousDigestError, ProgCacheWarning, ReadOnlyError, StoreError, UnsafeRootError
from cuda_progcache.store import (
    Entry,
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheResource,
    ReadOnlyProgramCache,
    entry_digest,
)


@pytest.fixture
def inner(tmp_path):
    cache = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=10**6, durability="none")
    cache.publish(b"a", b"1" * 10, {"name": "a"})
    cache[b"b"] = b"2" * 20
    cache.close()
    return cache


def snapshot(root):
    """Return the inode, size, times, mode and link count of every file and directory under ``root``."""
    found = {}
    for folder, _, names in os.walk(root):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            st = os.lstat(path)
            found[path] = (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_mode, st.st_nlink)
    return found


@pytest.fixture(params=["path", "store", "memory", "twice"])
def store(request, inner):
    if request.param == "path":
        return ReadOnlyProgramCache(inner.path)
    if request.param == "twice":
        return ReadOnlyProgramCache(ReadOnlyProgramCache(inner))
    if request.param == "store":
        return ReadOnlyProgramCache(inner)
    memory = InMemoryProgramCache()
    memory.publish(b"a", b"1" * 10, {"name": "a"})
    memory[b"b"] = b"2" * 20
    return ReadOnlyProgramCache(memory)


def test_reads_pass(store):
    assert isinstance(store, ProgramCacheResource)
    assert store
    assert (store[b"a"], store.get("b"), store.get(b"c"), store.get(b"c", b"d")) == (b"1" * 10, b"2" * 20, None, b"d")
    assert store.load(b"a") == Entry(b"1" * 10, {"name": "a"})
    assert store.load(b"c") is None is store.load_again(b"c")
    assert len(store) == 2
    digest = entry_digest(b"a")
    assert {info.digest for info in store.entries()} == {digest, entry_digest(b"b")}
    assert store.info(digest).record == {"name": "a"}
    assert store.resolve(digest[:8]) == digest
    with pytest.raises(KeyError):
        store[b"c"]
    with pytest.raises(TypeError, match="int"):
        store.get(3)
    stats = store.stats()
    assert (stats.entries, stats.bytes, stats.hits, stats.misses) == (2, 30, 3, 4)
    with pytest.raises((KeyError, AmbiguousDigestError)):
        store.resolve("0000")


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.__setitem__(b"c", b"3"),
        lambda s: s.update({b"c": b"3"}),
        lambda s: s.__delitem__(b"a"),
        lambda s: s.__delitem__(b"c"),
        lambda s: s.remove(entry_digest(b"a")),
        lambda s: s.clear(),
    ],
)
def test_writes_raise_and_say_which_store(store, write):
    with pytest.raises(ReadOnlyError, match="read-only") as excinfo:
        write(store)
    assert isinstance(excinfo.value, (StoreError, OSError))
    assert excinfo.value.filename == store.name
    assert len(store) == 2


def test_the_compile_path_is_told_no_and_not_stopped(store):
    assert store.publish(b"c", b"3", {}) is False
    assert store.get(b"c") is None


def test_reading_leaves_no_trace(inner):
    long_ago = 1_600_000_000
    for info in inner.entries():
        os.utime(info.path, (long_ago, long_ago))
    (inner.path / "tmp" / f"{current_owner()._replace(start=1)}-0").write_bytes(b"left by the dead")
    before = snapshot(inner.path)
    with ReadOnlyProgramCache(inner) as store:
        for _ in range(2):
            assert store.get(b"a") is not None
            assert store.load(b"b") is not None
            assert store.get(b"c") is None
        list(store.entries())
        store.stats()
        len(store)
    assert snapshot(inner.path) == before


def test_what_is_damaged_is_a_miss_and_stays_where_it_is(inner):
    path = inner.info(entry_digest(b"a")).path
    path.write_bytes(b"!" * 10)
    before = snapshot(inner.path)
    store = ReadOnlyProgramCache(inner.path)
    assert store.get(b"a") is None
    assert store.load(b"a") is None
    assert store.stats().corrupt == 2
    assert snapshot(inner.path) == before


def test_the_inner_store_stays_writable(inner):
    store = ReadOnlyProgramCache(inner)
    inner[b"c"] = b"3"
    assert store[b"c"] == b"3"


def test_a_directory_that_is_not_there_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(StoreError):
        ReadOnlyProgramCache(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="not a directory"):
        ReadOnlyProgramCache(tmp_path / "file")


def test_a_directory_without_anything_in_it_is_empty(tmp_path):
    store = ReadOnlyProgramCache(tmp_path)
    assert (len(store), list(store.entries()), store.get(b"a"), store.stats().entries) == (0, [], None, 0)
    assert list(tmp_path.iterdir()) == []


def test_who_may_write_there_is_asked_as_ever(inner):
    inner.path.chmod(0o777)
    with pytest.raises(UnsafeRootError):
        ReadOnlyProgramCache(inner.path)
    assert ReadOnlyProgramCache(inner.path, shared=True).get(b"a") == b"1" * 10


def test_all_time_counts_of_a_layer_are_read_and_added_to_in_memory(inner):
    written = inner.stats().all_time
    store = ReadOnlyProgramCache(inner)
    store.get(b"a")
    store.close()
    assert store.stats().all_time == written._replace(hits=written.hits + 1)
    assert inner.stats().all_time == written


@pytest.mark.parametrize("wrong", [None, 3, {}])
def test_what_is_no_store_is_named(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        ReadOnlyProgramCache(wrong)


def test_memory_behind_a_root_that_cannot_be_made_is_read_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(ProgCacheWarning, match="memory only"):
        inner = FileStreamProgramCache()
    inner[b"a"] = b"1"
    assert ReadOnlyProgramCache(inner)[b"a"] == b"1"
