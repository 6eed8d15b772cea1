# SPDX-License-Identifier: Apache-2.0
"""Counters that survive processes: nothing is lost but with a kill, and nothing is counted twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading

import pytest

from cuda_progcache._util.liveness import current_owner
from cuda_progcache.store import FileStreamProgramCache, Totals, counters
from cuda_progcache.store.counters import persisted
from cuda_progcache.store.root import Root

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _never_by_the_clock(monkeypatch):
    """On a busy machine a test can take longer than the interval; what is written then is tested by moving the date."""
    monkeypatch.setattr(counters, "INTERVAL", 3600.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


def opened(path, **options):
    return FileStreamProgramCache(path, durability="none", **options)


def on_disk(path):
    return persisted(Root(str(path), shared=False))


def files(path):
    return sorted((path / "counters").iterdir()) if (path / "counters").exists() else []


def python(script, *args, code=0):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout


USE = """
import sys
from cuda_progcache.store import FileStreamProgramCache
cache = FileStreamProgramCache(sys.argv[1], durability="none")
cache[b"k"] = b"v"
for _ in range(3): cache.get(b"k")
cache.get(b"none")
"""


def test_this_process_and_all_time(path):
    with opened(path) as cache:
        cache[b"a"] = b"1"
        assert cache.get(b"a")
        assert cache.get(b"b") is None
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.stored) == (1, 1, 1)
        assert stats.all_time == Totals(hits=1, misses=1, stored=1)
    again = opened(path)
    assert again.get(b"a")
    stats = again.stats()
    assert (stats.hits, stats.misses, stats.stored) == (1, 0, 0)
    assert stats.all_time == Totals(hits=2, misses=1, stored=1)


def test_everything_is_counted_and_kept(path):
    with opened(path, max_size_bytes=200) as cache:
        cache[b"a"] = b"1" * 150
        cache[b"b"] = b"2" * 150  # evicts a
        cache[b"big"] = b"3" * 300
        (info,) = cache.entries()
        info.path.write_bytes(b"!" * 150)
        assert cache.get(b"b") is None
    assert opened(path).stats().all_time == Totals(misses=1, corrupt=1, evicted=1, refused=1, stored=2)


def test_a_lookup_writes_nothing_until_close(path):
    cache = opened(path)
    cache[b"a"] = b"1"
    cache.close()
    before = files(path)
    for _ in range(100):
        cache.get(b"a")
        cache.get(b"b")
    assert files(path) == before
    cache.close()
    assert on_disk(path) == Totals(hits=100, misses=100, stored=1)
    before = files(path)
    cache.close()  # nothing new
    assert files(path) == before


def test_looking_on_is_no_reason_to_write(path):
    opened(path).close()
    cache = opened(path)
    list(cache.entries())
    cache.stats()
    cache.close()
    assert files(path) == []


def test_writes_write_the_counters_down_now_and_then(path, monkeypatch):
    cache = opened(path)
    cache[b"a"] = b"1"
    assert files(path) == []
    monkeypatch.setattr(cache._tally, "_due", 0.0)
    cache[b"b"] = b"2"
    assert on_disk(path).stored == 2
    cache[b"c"] = b"3"
    assert on_disk(path).stored == 2


def test_exit_writes_them_down(path):
    python(USE, path)
    python(USE + "import atexit; cache = None", path)  # collected before the end
    python(USE + "raise SystemExit(3)", path, code=3)
    assert on_disk(path) == Totals(hits=9, misses=3, stored=3)


def test_a_kill_loses_what_was_not_written_and_no_more(path):
    python(USE + "cache.close(); cache.get(b'k'); import os; os.kill(os.getpid(), 9)", path, code=-signal.SIGKILL)
    totals = on_disk(path)
    assert totals == Totals(hits=3, misses=1, stored=1)
    assert opened(path).stats().all_time == totals


def test_files_of_the_dead_are_taken_in(path):
    for _ in range(4):
        python(USE, path)
    with opened(path) as cache:
        cache.get(b"k")
    (only,) = files(path)
    assert only.name.startswith(str(current_owner()))
    assert on_disk(path) == Totals(hits=13, misses=4, stored=4)


def test_many_store_objects_of_a_process_leave_one_file(path):
    for i in range(20):
        with opened(path) as cache:
            cache[b"k%d" % i] = b"v"
    assert len(files(path)) == 1
    assert on_disk(path).stored == 20


def test_a_store_object_that_is_dropped_without_close_counts(path):
    kept = opened(path)
    for i in range(5):
        opened(path)[b"%d" % i] = b"v"
    assert kept.stats().all_time.stored == 5
    kept.close()
    assert on_disk(path).stored == 5


# Forks and workers


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_at_zero(path):
    cache = opened(path)
    cache[b"a"] = b"1"
    cache.get(b"a")
    child = os.fork()
    if child == 0:
        stats = cache.stats()
        ok = (stats.hits, stats.misses, stats.stored) == (0, 0, 0)
        cache.get(b"a")
        ok = ok and cache.stats().hits == 1
        cache.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert on_disk(path) == Totals(hits=1)
    cache.close()
    assert on_disk(path) == Totals(hits=2, stored=1)


def _look(path, times):
    cache = opened(path)
    for _ in range(times):
        cache.get(b"a")
    _kept.append(cache)  # until the end of the process


_kept = []


@forks
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing_write_them_down_at_their_end(path, method):
    """They end by os._exit, and run no atexit handler."""
    with opened(path) as cache:
        cache[b"a"] = b"1"
    script = f"""
import multiprocessing, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_store_counters import _look
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    workers = [context.Process(target=_look, args=(sys.argv[1], 5)) for _ in range(3)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
"""
    file = path.parent / "main.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, file, path], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert on_disk(path) == Totals(hits=15, stored=1)


def _fork_worker(cache, times):
    for _ in range(times):
        cache.get(b"a")


@forks
def test_a_worker_forked_with_an_open_store(path):
    cache = opened(path)
    cache[b"a"] = b"1"
    worker = multiprocessing.get_context("fork").Process(target=_fork_worker, args=(cache, 7))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    cache.close()
    assert on_disk(path) == Totals(hits=7, stored=1)


# Exactly once


def test_eight_processes_that_come_and_go(path):
    """Each writes down often, takes in the files of the dead, and dies at some point; the sum is exact all along."""
    script = """
import random, sys
from cuda_progcache.store import FileStreamProgramCache
dice = random.Random(int(sys.argv[2]))
for _ in range(6):
    cache = FileStreamProgramCache(sys.argv[1], durability="none")
    for _ in range(10):
        cache.get(b"a"); cache.get(b"none")
        if dice.random() < 0.5: cache.close()
    seen = cache.stats().all_time
    assert seen.hits == seen.misses, seen
"""
    with opened(path) as cache:
        cache[b"a"] = b"1"
    for _ in range(2):
        running = [
            subprocess.Popen([sys.executable, "-c", script, path, str(i)], env=ENVIRONMENT, stderr=subprocess.PIPE)
            for i in range(8)
        ]
        for process in running:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error.decode()
    assert on_disk(path) == Totals(hits=2 * 8 * 60, misses=2 * 8 * 60, stored=1)


class Killed(BaseException):
    """As if by a signal: nothing after it runs."""


@pytest.mark.parametrize("seed", range(25))
def test_a_death_at_any_step_counts_nothing_twice(path, monkeypatch, seed):
    """Takers die between the steps (each system call that changes something); the files of the dead go on."""
    dice = random.Random(seed)
    dead = set()
    real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "mkdir")}
    fuse = None

    def fused(name):
        def call(*args, **kwargs):
            nonlocal fuse
            if fuse is not None and "counters" in str(args[0]) + str(args[-1]):
                fuse -= 1
                if fuse < 0:
                    raise Killed
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, fused(name))
    monkeypatch.setattr(counters, "replace", fused("replace"))
    monkeypatch.setattr(counters, "unlink_quietly", fused("unlink"))
    monkeypatch.setattr("cuda_progcache._util.liveness.Owner.is_alive", lambda owner: owner not in dead)
    expected = Totals()
    opened(path)
    for process in range(12):
        owner = current_owner()._replace(pid=100_000 + process)
        monkeypatch.setattr(counters, "current_owner", lambda owner=owner: owner)
        counters._tallies.clear()
        cache = opened(path)
        for _ in range(dice.randrange(1, 4)):
            delta = Totals(hits=dice.randrange(5), misses=dice.randrange(1, 5))
            cache._counters.hits += delta.hits
            cache._counters.misses += delta.misses
            fuse = dice.choice([None, *range(8)])
            before = set(files(path))
            try:
                cache.close()
            except Killed:
                fuse = None
                written = [f for f in files(path) if f not in before and json.loads(f.read_text())["id"] == f.name]
                if written:  # it died after its file was in place
                    expected = expected.plus(delta)
                dead.add(owner)
                assert on_disk(path) == expected
                break
            fuse = None
            expected = expected.plus(delta)
            assert on_disk(path) == expected
        if dice.random() < 0.7:
            dead.add(owner)
    counters._tallies.clear()
    assert on_disk(path) == expected


def test_a_reader_beside_takers_sees_every_count(path):
    """The sum never drops while files are taken in."""
    with opened(path) as cache:
        for i in range(5):
            cache[b"%d" % i] = b"v"
    stop = threading.Event()
    seen, errors = [], []

    def read():
        while not stop.is_set():
            seen.append(on_disk(path).stored)

    def write():
        try:
            cache = opened(path)
            for i in range(60):
                cache[b"w%d" % i] = b"v"
                cache.close()
        except Exception as exc:  # noqa: BLE001 - the test must see it
            errors.append(exc)

    reader, writer = threading.Thread(target=read), threading.Thread(target=write)
    reader.start()
    writer.start()
    writer.join()
    stop.set()
    reader.join()
    assert errors == []
    assert seen == sorted(seen)
    assert on_disk(path).stored == 65


def test_a_file_seen_under_two_names_counts_once(path):
    """A listing that runs beside a taker's rename can show both."""
    with opened(path) as cache:
        cache[b"a"] = b"1"
    (file,) = files(path)
    file.with_name(file.name + "1").write_bytes(file.read_bytes())
    assert on_disk(path).stored == 1


def test_what_else_lies_there_is_left_alone(path):
    with opened(path) as cache:
        cache[b"a"] = b"1"
    (path / "counters" / "README").write_text("mine")
    (path / "counters" / f"{current_owner()}-x").write_text('{"format": 1}')
    (path / "counters" / "dir").mkdir()
    with opened(path) as cache:
        cache.get(b"a")
        assert cache.stats().all_time == Totals(hits=1, stored=1)
    assert (path / "counters" / "README").read_text() == "mine"
    assert on_disk(path) == Totals(hits=1, stored=1)


def test_files_of_other_versions_are_read(path):
    """JSON is JSON: with blanks elsewhere, a counter that isn't known yet, or one that isn't known any more."""
    name = f"{current_owner()}-9"
    file = {"taken": [], "counts": {"stored": 2, "hits": 1, "of_the_future": 5}, "id": name, "format": 1}
    with opened(path) as cache:
        cache[b"a"] = b"1"
    (own,) = files(path)
    assert json.loads(own.read_text()) == {
        "format": 1,
        "id": own.name,
        "counts": {**dict.fromkeys(Totals._fields, 0), "stored": 1},
        "taken": [],
    }
    for written in (json.dumps(file), json.dumps(file, indent=1), json.dumps(file, separators=(",", ":"))):
        own.with_name(name).write_text(written)
        assert on_disk(path) == Totals(hits=1, stored=3)
    for other in (('"format": 1', '"format": 2'), ('"hits": 0', '"goals": 1'), ('"hits": 0, "misses": 0', '"hits": 1')):
        own.with_name(name).write_text(own.read_text().replace(own.name, name).replace(*other))
        assert on_disk(path) == Totals(stored=1 if "2" in other[1] else 2, hits=int("hits" in other[1]))
    for damaged in ({**file, "id": 'a"b'}, {**file, "format": 2}, {**file, "counts": 1}, {**file, "taken": ["x/y"]}):
        own.with_name(name).write_text(json.dumps(damaged))
        assert on_disk(path) == Totals(stored=1)


def test_a_directory_that_is_gone_or_cannot_be_written_is_no_trouble(path):
    import shutil

    cache = opened(path)
    cache[b"a"] = b"1"
    shutil.rmtree(path)
    cache.close()
    assert not path.exists()
    cache[b"a"] = b"1"
    (path / "counters").write_bytes(b"")  # a file in its place
    cache.close()
    assert cache.stats().all_time.stored == 2
    (path / "counters").unlink()
    cache.close()
    assert on_disk(path).stored == 2


def test_clear_keeps_the_counts(path):
    with opened(path) as cache:
        cache[b"a"] = b"1"
        cache.clear()
        assert cache.stats().all_time.stored == 1
    assert on_disk(path).stored == 1


def test_memory_has_no_all_time():
    from cuda_progcache.store import InMemoryProgramCache

    cache = InMemoryProgramCache()
    cache[b"a"] = b"1"
    assert (cache.stats().stored, cache.stats().all_time) == (1, None)
