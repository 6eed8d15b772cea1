# SPDX-License-Identifier: Apache-2.0
"""A directory of cached results: its format, listing, statistics and pruning."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo import cache_dir as layout
from cuda_progcache.memo.cache_file import (
    cache_file,
    cache_info,
    cache_list,
    cache_prune,
    cache_stats,
    cache_tree_reset,
)


@pytest.fixture(autouse=True)
def _fresh():
    cache_tree_reset()
    yield
    cache_tree_reset()


@pytest.fixture
def store(tmp_path):
    store = tmp_path / "store"

    @cache_file(store)
    def add(x, y=1):
        return x + y

    @cache_file(store)
    def scale(x):
        return x * 10

    add(10)
    add(20)
    scale(3)
    return store


def test_files_are_as_other_tools_expect_them(store):
    with next(store.glob("scale.*.pkl")).open("rb") as file:
        found = pickle.load(file)
    assert found["dat"] == 30
    meta = found["meta"]
    assert meta["call"] == {"x": 3}
    assert {
        "call",
        "closure",
        "dir_states",
        "envs",
        "version",
        "depends_on_files",
        "depends_on_vars",
        "pkgs",
    } <= meta.keys()


def test_info(store, tmp_path):
    info = cache_info(next(store.glob("scale.*.pkl")))
    assert (info["value"], info["meta"]["call"], info["record"]["fname"]) == (30, {"x": 3}, "scale")
    assert info["record"]["duration"] >= 0
    bare = store / "bare.pkl"
    bare.write_bytes(pickle.dumps(123))
    assert cache_info(bare)["value"] == 123
    assert cache_info(bare)["meta"] == {"legacy": True}
    with pytest.raises(FileNotFoundError):
        cache_info(tmp_path / "none.pkl")
    bare.write_bytes(b"no pickle")
    with pytest.raises(ProgCacheError, match="can't be unpickled"):
        cache_info(bare)


class Loud:
    """An object that creates a directory when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_listing_unpickles_nothing(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (store / "loud.0123abcd.pkl").write_bytes(pickle.dumps({"dat": Loud(), "meta": {}}))
    rows = cache_list(store)
    assert [row["fname"] for row in rows] == ["add", "add", "loud", "scale"]
    assert {row["call"]["x"] for row in rows if row["fname"] == "add"} == {"10", "20"}
    for row in rows:
        assert row["size_bytes"] == (store / row["file"]).stat().st_size
        assert abs((datetime.now(UTC) - row["created"]).total_seconds()) < 600
    assert cache_stats(store)["n_entries"] == 4
    assert not (tmp_path / "unpickled").exists()


def test_stats(store, tmp_path):
    stats = cache_stats(store)
    assert (stats["n_entries"], stats["oldest"] <= stats["newest"]) == (3, True)
    assert {(g["fname"], g["n_files"]) for g in stats["by_function"]} == {("add", 2), ("scale", 1)}
    assert stats["total_size_mb"] == pytest.approx(sum(g["total_size_mb"] for g in stats["by_function"]))
    (tmp_path / "empty").mkdir()
    assert cache_stats(tmp_path / "empty")["total_size_mb"] == 0.0
    with pytest.raises(FileNotFoundError, match="not found"):
        cache_stats(tmp_path / "none")
    assert cache_list(tmp_path / "none") == []
    (store / "graph.pkl").write_bytes(b"")
    (store / "graph.rds").write_bytes(b"")
    assert cache_stats(store)["n_entries"] == 3


def aged(path, days):
    moment = time.time() - days * 86400
    os.utime(path, (moment, moment))


def test_prune_by_age(store):
    (store / "notes.txt").write_text("not ours")
    aged(store / "notes.txt", 100)
    old = next(store.glob("add.*.pkl"))
    aged(old, 60)
    assert cache_prune(store) == 1
    assert not old.exists()
    assert len(cache_list(store)) == 2
    assert cache_prune(store, days_old=0) == 2
    assert os.listdir(store) == ["notes.txt"]
    assert cache_prune(store / "none") == 0


def test_prune_leaves_what_a_process_is_at_work_on(store):
    dead = subprocess.run(
        [sys.executable, "-c", "from cuda_progcache._util.liveness import current_owner as o; print(o())"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    here = current_owner()
    elsewhere = Owner("ab" * 6, here.boot, 1, 1)
    kept, gone = [], []
    for index, (content, stays) in enumerate([(str(here), True), (str(elsewhere), True), (dead, False), ("", False)]):
        sentinel = store / f"f.{index}.pkl.computing"
        sentinel.write_text(content)
        (kept if stays else gone).append(sentinel)
        staged = store / f"f.{index}.pkl.tmp.{content or 'xyz'}-77"
        staged.touch()
        (kept if stays else gone).append(staged)
    lock = store / "f.1.pkl.lock"
    lock.touch()
    cache_prune(store, days_old=0)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in [*gone, lock])


def test_results_are_calls_of_a_cache(store):
    from cuda_progcache.memo.cache_dir import directory_cache
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.storage import CallMemory, ValueMemory

    cache = directory_cache(store)
    assert cache.query().count() == 3
    (call,) = cache.query(name="add", arguments={"x": 20})
    assert (call.result, call.arguments["y"], call.module) == (21, 1, __name__)
    assert call.metadata["runtime"]["duration"] >= 0
    key = call.to_lookup_key()
    assert cache.load(key[:8]).result == 21
    assert cache.shrink(key) == key[: len(cache.shrink(key))]
    other = Cache(ValueMemory({}), CallMemory({}))
    cache.query(name="add").transfer(other)
    assert sorted(c.result for c in other.query()) == [11, 21]
    cache.evict(key)
    assert not cache.contains(key)
    assert len(cache_list(store)) == 2
    with pytest.raises(KeyError):
        cache.load(key)
    cache.save(other.query(name="add", arguments={"x": 20}).only().fetch())
    assert cache.query(name="add", arguments={"x": 20}).only().result == 21
    cache.evict(cache.query(name="add", arguments={"x": 20}).only().to_lookup_key())
    (store / "bare.0123.pkl").write_bytes(pickle.dumps(1))
    assert cache.query().count() == 2


def test_an_entry_that_lost_any_part_is_damaged(tmp_path):
    @cache_file(tmp_path / "one")
    def f(x):
        return [1, 2]

    f("tracked")
    (path,) = (tmp_path / "one").iterdir()
    content = path.read_bytes()
    assert layout.read(str(path)).call.name == "f"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(layout.RefusedError):
            layout.read(str(path))
    place = content.rindex(b'"tracked"')
    for changed in range(place - 10, place + 20):
        path.write_bytes(content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :])
        with pytest.raises(layout.RefusedError):
            layout.read(str(path))
