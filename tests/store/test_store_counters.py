# SPDX-License-Identifier: Apache-2.0
"""Counters that survive processes: only a kill loses counts, and nothing is counted twice."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cuda_progcache._util.forks import _methods
from cuda_progcache.store import FileStreamProgramCache, Totals, append_log, counters, stats
from cuda_progcache.store.counters import _COUNTED, _Log, persisted
from cuda_progcache.store.root import Root

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache"


def opened(path, **options):
    return FileStreamProgramCache(path, durability="none", **options)


def on_disk(path):
    return stats.total(persisted(Root(str(path), shared=False)))


def files(path):
    log = path / "counters.log"
    return log.read_bytes() if log.exists() else b""


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
    assert files(path) == b""


def test_writes_write_the_counters_down_now_and_then(path, monkeypatch):
    cache = opened(path)
    cache[b"a"] = b"1"
    assert files(path) == b""
    monkeypatch.setattr(cache._tally, "_due", 0.0)
    cache[b"b"] = b"2"
    assert on_disk(path).stored == 2
    cache[b"c"] = b"3"
    assert on_disk(path).stored == 2


@pytest.mark.parametrize("lookup", ["get", "load"])
@pytest.mark.parametrize("key", [b"a", b"none"])
def test_lookups_write_the_counters_down_now_and_then(path, monkeypatch, lookup, key):
    """The counters of a process that only reads, and never ends, are written as well."""
    with opened(path) as cache:
        cache[b"a"] = b"1"
    reader = opened(path)
    monkeypatch.setattr(reader._tally, "_due", 0.0)
    for _ in range(counters.LOOK + 1):
        getattr(reader, lookup)(key)
    counted = on_disk(path)
    assert 0 < counted.hits + counted.misses <= counters.LOOK + 1
    assert (counted.hits == 0) == (key == b"none")


def spans(path):
    return [(span.start, span.counted) for span in opened(path).over_time()]


def test_counts_are_told_by_the_hour_then_by_the_day_then_as_one(path, monkeypatch):
    """Counts of three months are kept by the hour, then by the day, then as one sum, through all rewrites."""
    monkeypatch.setattr(append_log, "LONG", 20_000)
    day = 86400 * 20_000
    for hour in range(0, 24 * 90, 5):
        monkeypatch.setattr(counters.time, "time", lambda hour=hour: day + 3600.0 * hour + 1800)
        with opened(path) as cache:
            cache.get(b"none")
    seen = spans(path)
    last = day + 3600 * hour
    assert sum(counted.misses for _, counted in seen) == len(range(0, 24 * 90, 5))
    assert [start for start, _ in seen] == sorted(start for start, _ in seen)
    hours = [start for start, _ in seen if start > last - 48 * 3600]
    assert hours == [last - 3600 * ago for ago in range(45, -1, -5)]
    older, *days = [start for start, _ in seen if start <= last - 48 * 3600]
    assert older == 0.0
    assert days == [day + 86400 * number for number in range(30, 88)]
    assert all(counted.misses in {4, 5} for start, counted in seen if start in days[:-1])
    assert len(files(path)) < 30_000


def test_clocks_that_are_wrong_make_the_file_no_longer(path, monkeypatch):
    monkeypatch.setattr(append_log, "LONG", 20_000)
    for hour in range(0, 300_000, 1000):
        monkeypatch.setattr(counters.time, "time", lambda hour=hour: 1e9 + 3600.0 * hour)
        with opened(path) as cache:
            cache.get(b"none")
    monkeypatch.setattr(counters.time, "time", lambda: 1e9)
    seen = spans(path)
    assert sum(counted.misses for _, counted in seen) == 300
    assert len(seen) <= counters._SPANS + 1


def test_counts_of_a_version_that_knew_no_hours_are_the_oldest(path):
    with opened(path) as cache:
        cache.get(b"none")
        log = cache._tally._file()
        log.exchange(lambda _: [(_COUNTED, append_log.new_ref(), 5, 7, *[0] * 10)])
    (start, oldest), (_, newest) = spans(path)
    assert (start, oldest, newest) == (0.0, Totals(hits=5, misses=7), Totals(misses=1))


def test_exit_writes_them_down(path):
    python(USE, path)
    python(USE + "import atexit; cache = None", path)  # collected before the process ends
    python(USE + "raise SystemExit(3)", path, code=3)
    assert on_disk(path) == Totals(hits=9, misses=3, stored=3)


def test_a_kill_loses_what_was_not_written_and_no_more(path):
    python(USE + "cache.close(); cache.get(b'k'); import os; os.kill(os.getpid(), 9)", path, code=-signal.SIGKILL)
    totals = on_disk(path)
    assert totals == Totals(hits=3, misses=1, stored=1)
    assert opened(path).stats().all_time == totals


def test_the_file_stays_short_and_the_sum_exact(path):
    cache = opened(path)
    tally = cache._tally
    for i in range(1, 2000):
        cache.get(b"none")
        tally.write()
        assert len(files(path)) < append_log.LONG + 200
        if i % 500 == 0:
            assert on_disk(path).misses == i


@pytest.mark.parametrize("what", ["one name", "two names"])
def test_threads_that_open_use_and_drop_stores(path, monkeypatch, what):
    """Each lookup counts once, whether the directory is opened by one name or by two (one of them a symlink)."""
    monkeypatch.setattr(counters, "_MOMENT", 60.0)  # the process that rewrites the file may be preempted
    opened(path).close()
    other = path.with_name("other")
    other.symlink_to(path)
    names = [path, path if what == "one name" else other]

    def work(which):
        for _ in range(60):
            cache = opened(names[which % 2])
            cache.get(b"none")
            if which < 2:
                cache.close()
            assert cache.stats().all_time.misses <= 4 * 60

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert on_disk(path).misses == 4 * 60
    assert opened(path).stats().all_time.misses == 4 * 60


def test_a_store_that_is_gone_leaves_nothing_in_memory(path):
    kept = opened(path)
    gc.collect()
    living, methods = list(counters._living), dict(_methods)
    for _ in range(300):
        opened(path).get(b"k")
    gc.collect()
    assert set(counters._living) <= set(living)  # stores of other tests may be collected meanwhile
    assert _methods.keys() <= methods.keys()
    assert kept.stats().all_time.misses == 300


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
    _kept.append(cache)  # kept until the process ends


_kept = []


@forks
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_multiprocessing_write_them_down_at_their_end(path, method):
    """The workers end with os._exit, which runs no atexit handlers."""
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
        [sys.executable, file, path], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600
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
    worker.join(600)
    assert worker.exitcode == 0
    cache.close()
    assert on_disk(path) == Totals(hits=7, stored=1)


# Exactly once


def test_a_writer_that_comes_between_a_renaming_and_its_closing_writes_once(path):
    """Otherwise its line could be appended to a later file, which doesn't know that the line was already counted."""
    opened(path).close()
    root = Root(str(path), shared=False)
    root.open()
    writer, other = _Log(root), _Log(root)
    assert writer.add(Totals(hits=1))
    place, placed = root.place, threading.Event()

    def slowly(*args, **kwargs):
        place(*args, **kwargs)
        placed.set()
        time.sleep(0.05)  # the old file is closed only after this

    root.place = slowly

    def rewrite():
        fd = os.open(path / _Log.NAME, os.O_RDWR | os.O_APPEND)
        other._rewrite(fd, os.fstat(fd), os.read(fd, 24))
        os.close(fd)

    threads = []
    really = writer._is

    def is_there(status):
        if not threads:  # the line has just been written
            threads.append(threading.Thread(target=rewrite))
            threads[0].start()
            assert placed.wait(300)
        return really(status)

    writer._is = is_there
    assert writer.add(Totals(hits=1))
    threads[0].join()
    lines = writer._lines((path / _Log.NAME).read_bytes()[24:])
    assert [line[0] for line in lines].count(_COUNTED) == 1  # the sum; the writer's own line isn't repeated
    assert on_disk(path) == Totals(hits=2)


def test_eight_processes_that_come_and_go(path):
    """Each process writes its counters often and the file is rewritten often; the sum is exact at all times."""
    script = """
import random, sys
from cuda_progcache.store import append_log, counters
append_log.LONG = 1000
counters._MOMENT = 60.0
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
            _, error = process.communicate(timeout=600)
            assert process.returncode == 0, error.decode()
    assert on_disk(path) == Totals(hits=2 * 8 * 60, misses=2 * 8 * 60, stored=1)


@pytest.mark.parametrize("stops", ["encode", "_is"])
@pytest.mark.parametrize("rewritings", [1, 2, 3, 5])
def test_a_writer_that_stops_before_its_line_or_after_it_counts_once(path, monkeypatch, rewritings, stops):
    """Other stores rewrite the file meanwhile, once or several times; the line counts once even so."""
    monkeypatch.setattr(append_log, "LONG", 1000)
    other, headers = opened(path), set()

    def miss():
        other.get(b"none")
        other.close()
        headers.add((path / "counters.log").read_bytes()[:24])

    miss()
    slow = opened(path)
    slow[b"k"] = b"v"
    real, stopped = getattr(append_log.AppendLog, stops), []

    def late(*args):
        if not stopped:
            stopped.append(True)
            while len(headers) <= rewritings:
                miss()
        return real(*args)

    monkeypatch.setattr(append_log.AppendLog, stops, late)
    slow.close()
    assert on_disk(path) == Totals(stored=1, misses=other.stats().misses)
    assert len(headers) == rewritings + 1


def test_a_reader_beside_writers_sees_every_count(path, monkeypatch):
    """The sum never drops while the file is rewritten."""
    monkeypatch.setattr(counters, "_MOMENT", 60.0)  # the thread that rewrites the file may be preempted
    monkeypatch.setattr(append_log, "LONG", 1000)
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

    reader, *writers = [threading.Thread(target=work) for work in (read, write, write)]
    for thread in (reader, *writers):
        thread.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert errors == []
    assert seen == sorted(seen)
    assert on_disk(path).stored == 125


@pytest.mark.parametrize("damage", [b"\0" * 40, b"x" * 107, b"half a line"])
def test_what_is_no_line_counts_nothing_and_hides_nothing(path, damage):
    for i in range(3):
        with opened(path) as cache:
            cache[b"%d" % i] = b"v"
        with (path / "counters.log").open("ab") as file:
            file.write(damage)
    with opened(path) as cache:
        cache[b"last"] = b"v"
    assert on_disk(path).stored == 4


@pytest.mark.parametrize("instead", [b"", b"something else" * 10, None])
def test_a_file_that_is_none_of_ours_is_begun_anew(path, instead):
    with opened(path) as cache:
        cache[b"a"] = b"1"
    (path / "counters.log").unlink()
    if instead is None:
        (path / "counters.log").mkdir()
    else:
        (path / "counters.log").write_bytes(instead)
    with opened(path) as cache:
        cache[b"b"] = b"1"
    assert on_disk(path).stored == 1


def test_a_directory_that_is_gone_or_cannot_be_written_is_no_trouble(path):
    import shutil

    cache = opened(path)
    cache[b"a"] = b"1"
    shutil.rmtree(path)
    cache.close()
    assert not path.exists()
    cache[b"a"] = b"1"
    assert cache.stats().all_time.stored == 2
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
