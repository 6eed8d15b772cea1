# SPDX-License-Identifier: Apache-2.0
"""Several processes on one directory: writers, readers, kills, removal of the directory, and forks."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from cuda_progcache.store import FileStreamProgramCache

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

# Every value names its key and carries its own checksum.
COMMON = """
import hashlib, os, random, sys, time, warnings
from cuda_progcache.store import FileStreamProgramCache

def value(key, i):
    body = b"%s %d " % (key, i) + random.Random(i).randbytes(i * 37 % 9000)
    return hashlib.sha256(body).digest() + body

def check(key, data):
    assert hashlib.sha256(data[32:]).digest() == data[:32], "torn"
    assert data[32:].startswith(key + b" "), "another key's"

store = FileStreamProgramCache(sys.argv[1], durability=sys.argv[2])
keys = [b"key%d" % i for i in range(8)]
contended = [b"contended%d" % i for i in range(3)]
"""


def check(key, data):
    assert hashlib.sha256(data[32:]).digest() == data[:32], "torn"
    assert data[32:].startswith(key + b" "), "another key's"


def start(script, *args):
    return subprocess.Popen(
        [sys.executable, "-c", COMMON + script, *map(str, args)],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=600):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    assert err == ""
    return out


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


WRITE = """
sys.stdin.readline()
for i in range(int(sys.argv[4])):
    mine = keys[:4] if sys.argv[3] == "1" else keys[4:]
    key = random.choice(mine + contended)
    assert store.publish(key, value(key, i), {"by": sys.argv[3], "i": i})
stats = store.stats()
assert stats.dropped == 0, stats
"""

READ = """
for key in keys:
    store[key] = value(key, 0)
print("ready", flush=True)
sys.stdin.readline()
lookups = 0
missed = 0
deadline = time.monotonic() + 60
while not os.path.exists(sys.argv[3]) and time.monotonic() < deadline:
    for key in keys + contended:
        data, entry = store.get(key), store.load(key)
        lookups += 2
        if key in keys:
            assert data and entry, "a key with one writer at a time, only ever replaced, was missing"
        missed += (data is None) + (entry is None)
        if data is not None:
            check(key, data)
        if entry is not None:
            check(key, entry.data)
            if entry.record:
                assert entry.data == value(key, entry.record["i"]), "another version's record"
stats = store.stats()
assert (stats.hits, stats.misses) == (lookups - missed, missed), (stats, lookups, missed)
print(lookups)
"""


def test_two_writers_and_a_reader(root, tmp_path):
    """Every hit is whole and has its own record. A key that has one writer at a time is never missing."""
    done = tmp_path / "done"
    reader = start(READ, root, "none", done)
    assert reader.stdout.readline() == "ready\n"
    writers = [start(WRITE, root, "none", which, 400) for which in (1, 2)]
    for process in (*writers, reader):
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in writers:
        finish(process)
    done.touch()
    assert int(finish(reader)) > 16
    store = FileStreamProgramCache(root)
    for key in [b"key%d" % i for i in range(8)] + [b"contended%d" % i for i in range(3)]:
        check(key, store[key])
        assert store.load(key).data == store[key]
    assert store.stats().corrupt == 0
    assert list((root / "tmp").iterdir()) == []


FOREVER = """
first = i = int(sys.argv[3]) * 100_000
while True:
    i += 1
    key = random.choice(keys)
    store.publish(key, value(key, i), {"i": i})
    if i == first + 1:
        print("ready", flush=True)
"""


def test_kill_in_the_middle_of_puts(root):
    store = FileStreamProgramCache(root)
    found = 0
    for turn in range(12):
        writer = start(FOREVER, root, "none" if turn % 2 else "fsync", turn)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(random.Random(turn).uniform(0.01, 0.06))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        for i in range(8):
            key = b"key%d" % i
            data = store.get(key)
            entry = store.load(key)
            assert (data is None) == (entry is None)
            if data is not None:
                found += 1
                check(key, data)
                assert entry.data == data
                assert data[32:].startswith(b"%s %d " % (key, entry.record["i"])), "another version's record"
        reopened = FileStreamProgramCache(root)
        assert list((root / "tmp").iterdir()) == [], "the dead writer's staging files"
        assert reopened.publish(b"after", b"v", {})
    assert found >= 12
    stats = store.stats()
    assert stats.hits + stats.misses == 12 * 16


def test_kill_in_the_middle_of_a_put_leaves_staging_files_that_are_reclaimed(root):
    """As above, but the writer is killed between staging and renaming, every time."""
    store = FileStreamProgramCache(root)
    store[b"key0"] = b"old"
    script = """
from cuda_progcache.store import pairs
def stop(source, target):
    print("staged", flush=True)
    time.sleep(600)
pairs.replace = stop
store[b"key0"] = b"new" * 1000
"""
    writer = start(script, root, "fsync")
    assert writer.stdout.readline() == "staged\n"
    assert len(list((root / "tmp").iterdir())) == 1
    FileStreamProgramCache(root)
    assert len(list((root / "tmp").iterdir())) == 1, "its owner lives"
    writer.kill()
    writer.communicate()
    FileStreamProgramCache(root)
    assert list((root / "tmp").iterdir()) == []
    assert store[b"key0"] == b"old"


REMOVED = """
print("ready", flush=True)
warnings.simplefilter("error")
puts = 0
while puts < 16 or not os.path.exists(sys.argv[3]):
    for key in keys:
        puts += 1
        data = value(key, puts)
        if puts % 2:
            store[key] = data
        else:
            assert store.publish(key, data, {})
        found = store.get(key)
        if found is not None:
            check(key, found)
stats = store.stats()
assert stats.dropped == 0, stats
assert stats.hits + stats.misses == puts, stats
print(puts)
"""


@pytest.mark.parametrize("how", ["rm -rf", "clear"])
def test_puts_survive_removal_beside_them(root, tmp_path, how):
    done = tmp_path / "done"
    writers = [start(REMOVED, root, "none", done) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    until = time.monotonic() + 1.5
    removals = 0
    while removals < 6 or time.monotonic() < until:
        if how == "clear":
            FileStreamProgramCache(root).clear()
        else:
            shutil.rmtree(root, ignore_errors=True)
        removals += 1
        time.sleep(0.002)
    done.touch()
    for writer in writers:
        assert int(finish(writer)) >= 16
    store = FileStreamProgramCache(root)
    store[b"k"] = b"v"
    assert store[b"k"] == b"v"


CAPPED = """
store = FileStreamProgramCache(sys.argv[1], durability="none", max_size_bytes=200_000)
for i in range(120):
    key = b"%s-%d" % (sys.argv[3].encode(), i)
    store[key] = value(key, 1 + i)
    found = store.get(key)
    if found is not None:
        check(key, found)
stats = store.stats()
assert (stats.dropped, stats.corrupt, stats.hits + stats.misses) == (0, 0, 120), stats
"""


def test_two_capped_writers(root):
    writers = [start(CAPPED, root, "none", which) for which in range(2)]
    for writer in writers:
        finish(writer)
    store = FileStreamProgramCache(root, max_size_bytes=200_000)
    store[b"last"] = b"x"
    assert store.stats().bytes <= 200_000
    entries = {path.relative_to(root / "entries") for path in (root / "entries").rglob("*") if path.is_file()}
    records = {path.relative_to(root / "records") for path in (root / "records").rglob("*") if path.is_file()}
    assert entries == records


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_other_threads_work(root):
    """No lock is held across a fork: each child can look up, write and count right away."""
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=1_000_000)
    store[b"k"] = b"v"
    stop = threading.Event()
    errors = []

    def hammer():
        i = 0
        while not stop.is_set():
            i += 1
            try:
                store[b"%d" % (i % 20)] = b"x" * 100
                assert store.get(b"k") == b"v"
            except Exception as exc:  # noqa: BLE001 - the test must see whatever it is
                errors.append(exc)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(30):
            child = os.fork()
            if not child:
                status = 1
                try:
                    signal.alarm(300)
                    store[b"child %d" % i] = b"%d" % i
                    before = store._counters.hits
                    ok = store.get(b"k") == b"v" and store.get(b"child %d" % i) == b"%d" % i
                    status = 0 if ok and store._counters.hits == before + 2 else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert [store[b"child %d" % i] for i in range(30)] == [b"%d" % i for i in range(30)]
    assert list((root / "tmp").iterdir()) == []


def test_an_interrupted_put_leaves_nothing_staged(root):
    """A put is interrupted with Ctrl-C between staging and rename."""
    store = FileStreamProgramCache(root)
    from cuda_progcache.store import pairs

    real = pairs.replace

    def interrupted(source, target):
        raise KeyboardInterrupt

    pairs.replace = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            store[b"k"] = b"v"
    finally:
        pairs.replace = real
    assert list((root / "tmp").iterdir()) == []
    assert store.get(b"k") is None
