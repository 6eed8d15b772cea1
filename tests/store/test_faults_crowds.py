# SPDX-License-Identifier: Apache-2.0
"""Many processes on one directory that are killed, cleared, run out of disk space, or fork out of busy threads."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from faults_values import assert_within, assert_works, check_lookups, publish, staged

from cuda_progcache.store import FileStreamProgramCache

WORKER = Path(__file__).resolve().parent / "faults_worker.py"
DEADLINE = 600
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (mount)")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@contextlib.contextmanager
def crowd(root, **settings):
    """Run a crowd during the block; afterwards stop it and assert that it found no errors."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(root), json.dumps({"writers": 4, "readers": 4, **settings})],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline().split()
        assert said[:1] == ["ready"], process.communicate(timeout=DEADLINE)
        yield [int(pid) for pid in said[1:]]
        _, errors = process.communicate(timeout=DEADLINE)
        assert not errors, errors
        assert process.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_eight_writers_and_eight_readers_on_three_keys(root):
    """Every value read is whole, belongs to its key and has its own record; every process's counters add up."""
    with crowd(root, writers=8, readers=8, keys=3):
        time.sleep(1.5)
    assert staged(root) == []
    store = FileStreamProgramCache(root)
    for i in range(3):
        publish(store, b"key%d" % i, 0, 1)
        assert check_lookups(store, b"key%d" % i) == 2
    assert_works(root)


@pytest.mark.parametrize("how", ["rm -rf", "clear"])
@pytest.mark.parametrize("cap", [None, 60_000])
def test_removal_in_a_loop_under_writers_and_readers(root, how, cap):
    """No write is lost (each is stored, then perhaps removed), and no operation raises, in any of the open stores."""
    removals = 0
    cleaner = FileStreamProgramCache(root)
    with crowd(root, cap=cap):
        until = time.monotonic() + 1.0
        while removals < 6 or time.monotonic() < until:
            if how == "clear":
                cleaner.clear()
            else:
                shutil.rmtree(root, ignore_errors=True)
            removals += 1
            time.sleep(0.001)
    assert staged(root) == []
    assert_works(root)


@pytest.mark.parametrize("cap", [None, 100_000])
@pytest.mark.parametrize("own", [False, True], ids=["same keys", "different keys"])
def test_writers_killed_in_a_loop(root, cap, own):
    """After kill -9 no value is wrong, nothing raises, staging files are removed, and the size cap holds."""
    pick = random.Random(7)
    keys = [b"own-%d-%d" % (who, i) for who in range(3) for i in range(40)] if own else [b"key%d" % i for i in range(6)]
    found = 0
    for turn in range(6):
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(root),
             json.dumps({"writers": 3, "readers": 0, "cap": cap, "own": own, "base": turn * 10_000,
                         "durability": "none" if turn % 2 else "fsync"})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        with worker:
            said = worker.stdout.readline().split()
            time.sleep(pick.uniform(0.05, 0.25))
            for pid in [int(pid) for pid in said[1:]]:  # one by one, so that the others go on for a moment
                os.kill(pid, signal.SIGKILL)
            os.killpg(worker.pid, signal.SIGKILL)
        store = FileStreamProgramCache(root, max_size_bytes=cap)
        wait_until(lambda: FileStreamProgramCache(root) and staged(root) == [])
        found += sum(check_lookups(store, key) for key in keys)
        stats = store.stats()
        assert stats.hits + stats.misses == 2 * len(keys)
    assert found > 10
    if cap:
        assert_within(root, cap)
    assert_works(root)


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fill(filler):
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@needs_root
@pytest.mark.parametrize("cap", [None, 10_000_000])
def test_a_disk_filled_to_the_last_byte_under_a_crowd(tmp_path, cap):
    """On a full disk writes are dropped, reads are right and no staging file is left; free space heals it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k,mode=0700", "tmpfs", str(disk)], check=True)
    try:
        root, filler = disk / "cache", disk / "filler"
        with crowd(root, writers=2, readers=2, own=True, drops=True, cap=cap, evicts=False):
            for _ in range(4):
                fill(filler)
                time.sleep(0.15)
                filler.unlink()
                time.sleep(0.05)
            fill(filler)
        assert staged(root) == []
        store = FileStreamProgramCache(root)
        with pytest.warns(RuntimeWarning, match="No space left") as caught:
            stored = []
            while True in stored[-3:] or len(stored) < 3:  # a put may fit after the ledger was shortened
                fill(filler)
                stored.append(store.publish(b"full %d" % len(stored), b"x" * 9000, {}))
                assert len(stored) < 30, stored
        assert len(caught) == 1
        found = 0
        for who in range(2):
            for i in range(40):
                found += check_lookups(store, b"own-%d-%d" % (who, i))
        filler.unlink()
        if cap is None:
            assert found
        shutil.rmtree(root / "entries")  # make room
        assert_works(root)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_out_of_eight_busy_threads(root):
    """Threads create stores, read, write, evict and clear; each forked child can use the stores right away."""
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=80_000)
    publish(store, b"k", 0, 1)
    stop, errors = threading.Event(), []

    def busy(who):
        mine = FileStreamProgramCache(root, durability="none")
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                key = b"thread-%d-%d" % (who, turn % 20)
                publish(store if who % 2 else mine, key, who, turn)
                check_lookups(store, key)
                if turn % 10 == who:
                    mine = FileStreamProgramCache(root, durability="none")  # a new lock during a fork
                    len(mine)
                if turn % 50 == 10 + who:
                    mine.clear()
        except BaseException as exc:  # noqa: BLE001 - the test must see whatever it is
            errors.append(exc)

    threads = [threading.Thread(target=busy, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    stuck, failed = [], []
    try:
        for i in range(40):
            child = os.fork()
            if not child:
                status = 1
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(300)
                    fresh = FileStreamProgramCache(root, durability="none")
                    key = b"child-%d" % i
                    ok = publish(store, key, 0, i) and publish(fresh, key, 1, i)
                    check_lookups(store, key)
                    check_lookups(fresh, key)
                    fresh.stats()
                    status = 0 if ok else 2
                except BaseException:  # noqa: BLE001 - the test must see whatever it is
                    traceback.print_exc()
                finally:
                    os._exit(status)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code:
                (stuck if code == -signal.SIGALRM else failed).append((i, code))
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert (stuck, failed, errors) == ([], [], [])
    assert staged(root) == []
    assert_works(root)
