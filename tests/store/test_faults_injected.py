# SPDX-License-Identifier: Apache-2.0
"""Every system call of every operation fails, with several errnos: no wrong value and no unexpected exception."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults_injector import CHANGES, injected
from faults_values import (
    assert_works,
    check_lookups,
    entry_path,
    publish,
    record,
    record_path,
    staged,
    value,
)

from cuda_progcache._util import files, parallel
from cuda_progcache.errors import StoreError
from cuda_progcache.store import FileStreamProgramCache, pairs

KEYS = [b"key%d" % i for i in range(4)]
CAP = 16_000
IN_TURN = ("ENOENT", "ESTALE", "ENOSPC", "EDQUOT", "EMFILE", "EROFS", "ENOMEM", "ENOTDIR")


@pytest.fixture
def root(monkeypatch):
    monkeypatch.setattr("cuda_progcache.store.judge.LOOKS", (0.0, 0.0))
    monkeypatch.setattr(pairs, "time", SimpleNamespace(**(vars(time) | {"sleep": lambda _: None})))
    monkeypatch.setattr(files, "CLOCK_TICK_NS", -1)  # the same calls each time, however soon after a write
    monkeypatch.setattr(parallel, "_SLOW", 3600.0)  # one thread makes them, however slow they are
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # thousands of small trees: kept in memory to save time
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory) / "cache"


def prepare(root, how):
    """Return a store with three of the four keys (or none if "empty"), in the state that ``how`` names."""
    shutil.rmtree(root, ignore_errors=True)
    if how == "empty":
        return FileStreamProgramCache(root, durability="full", max_size_bytes=CAP)
    writer = FileStreamProgramCache(root, durability="none")
    for who, key in enumerate(KEYS[:3]):
        publish(writer, key, who, 2)
    for path in (entry_path(root, KEYS[0]), record_path(root, KEYS[0])):
        os.utime(path, (10**9, 10**9))  # old, so that the entry is remembered as verified and its next use is recorded
    if how == "damaged":
        os.truncate(entry_path(root, KEYS[0]), 10)
    if how == "blocked":
        entry_path(root, KEYS[0]).unlink()
        entry_path(root, KEYS[0]).mkdir()
    store = FileStreamProgramCache(root, durability="full", max_size_bytes=5000 if how == "over" else CAP)
    if how == "warm":
        assert check_lookups(store, KEYS[0]) == 2
        os.utime(entry_path(root, KEYS[0]), (10**9, 10**9))
        assert check_lookups(store, KEYS[0]) == 2
    return store


def get(store):
    check_lookups(store, KEYS[0])
    check_lookups(store, KEYS[3])


def put(store):
    publish(store, KEYS[0], 7, 7)


def put_new(store):
    publish(store, KEYS[3], 7, 7)


def assign(store):
    raising(StoreError, lambda: store.__setitem__(KEYS[0], value(KEYS[0], 7, 7)))


def delete(store):
    raising((StoreError, KeyError), lambda: store.__delitem__(KEYS[0]))


def clear(store):
    raising(StoreError, store.clear)


def refuse(store):
    store.publish(KEYS[0], b"x" * (CAP + 10_000), {})


def look_around(store):
    for ask in (lambda: len(store), lambda: list(store.entries()), store.stats):
        raising(OSError, ask)


def maintain(store):
    raising((StoreError, KeyError), lambda: store.pin(KEYS[0]))
    raising(StoreError, lambda: store.verify(repair=True))
    raising(StoreError, lambda: store.prune(max_size_bytes=5000))
    raising((StoreError, KeyError), lambda: store.unpin(KEYS[0]))


def reopen(store):
    raising(StoreError, lambda: FileStreamProgramCache(store.path, max_size_bytes=CAP))


def raising(errors, operation):
    with contextlib.suppress(errors):
        operation()


OPERATIONS = {
    "get, fresh": (get, "fresh"),
    "get, warm": (get, "warm"),
    "get, damaged": (get, "damaged"),
    "get, blocked": (get, "blocked"),
    "put, into nothing": (put_new, "empty"),
    "put, a new key": (put_new, "fresh"),
    "put, replacing": (put, "fresh"),
    "put, blocked": (put, "blocked"),
    "put, evicting": (put_new, "over"),
    "put, refused": (refuse, "fresh"),
    "assign": (assign, "fresh"),
    "delete": (delete, "fresh"),
    "clear": (clear, "fresh"),
    "look around": (look_around, "fresh"),
    "maintain": (maintain, "damaged"),
    "reopen": (reopen, "fresh"),
}


@pytest.fixture(scope="module")
def tried():
    """The call stacks whose calls have already failed with each of the errors."""
    return set()


def error(name):
    code = getattr(errno, name)
    return lambda path: OSError(code, os.strerror(code), path)


def check_afterwards(root, store, *, tidy):
    """Assert that neither this store nor a new one returns a wrong value, and that the store works again."""
    for each in (store, FileStreamProgramCache(root, durability="none")):
        for key in KEYS:
            data = each.get(key)
            if data is None or data == value(KEYS[0], 7, 7):  # written by assignment, without a record
                continue
            check_lookups(each, key)
    assert staged(root) == [] or not tidy
    for key in KEYS[::3]:
        assert publish(store, key, 3, 3)
        assert store.get(key) == value(key, 3, 3)
        assert store.load(key) == (value(key, 3, 3), record(3, 3))
    store.clear()
    assert len(store) == 0


@pytest.mark.filterwarnings("ignore:.*(program|program cache|evict|counters).*:RuntimeWarning")
@pytest.mark.parametrize("mode", ["once", "from then on", "after the fact"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_each_call_fails(root, watchdog, operation, mode, tried):
    """A call fails with three errors the first time that the same lines make it, and with one of them after that."""
    operate, how = operation
    with injected(str(root)) as injector:
        store = prepare(root, how)
        injector.arm(lambda _: False, error("EIO"), trace=True)
        operate(store)
        clean, places = list(injector.calls), list(injector.places)
        assert len(clean) == len(places) > 0
        for number, (call, place) in enumerate(zip(clean, places, strict=True)):
            if mode != "once" and number % 3:
                continue  # "once" fails every call; the other modes fail a third of them
            watchdog()
            if mode == "after the fact" and call.split()[0] not in CHANGES:
                continue
            for name in errors(mode, number, known=place in tried):
                injector.disarm()
                store = prepare(root, how)
                injector.arm(
                    {"once": number.__eq__, "from then on": number.__le__, "after the fact": number.__eq__}[mode],
                    error(name), after=mode == "after the fact",
                )  # fmt: skip
                try:
                    operate(store)
                    injector.disarm()
                    # A staging file that can't be removed stays until this process has ended.
                    check_afterwards(
                        root, store, tidy=mode != "from then on" and "unlink" not in injector.calls[number]
                    )
                except BaseException as exc:
                    exc.add_note(f"{name} {mode} at call {number} of {clean}; made {injector.calls[: number + 3]}")
                    raise
            if mode == "once":
                tried.add(place)


def errors(mode, number, *, known):
    turn = IN_TURN[number % len(IN_TURN)]
    if mode == "once":
        return ("EIO", "EACCES", turn) if not known else ("EIO", "EACCES", turn)[number % 3 :][:1]
    return ("EIO",) if mode == "after the fact" else (turn,)


# Windows: another process has the file open


def sharing_violation(path):
    exc = PermissionError(errno.EACCES, "injected", path)
    exc.winerror = 32
    return exc


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "time", SimpleNamespace(**(vars(time) | {"sleep": lambda _: None})))


RETRIED = ("open entries", "open records", "replace tmp", "unlink entries", "unlink records")


@pytest.mark.parametrize(
    "operation", ["get, fresh", "get, warm", "put, a new key", "put, replacing", "put, evicting", "delete"]
)
def test_a_sharing_violation_that_passes_is_not_noticed(root, watchdog, windows, operation):
    """Each open, rename and unlink of an entry or record fails three times."""
    operate, how = OPERATIONS[operation]
    with injected(str(root)) as injector:
        store = prepare(root, how)
        operate(store)
        wanted = counted(store)
        store = prepare(root, how)
        injector.arm(lambda _: False, sharing_violation)
        operate(store)
        for number, call in enumerate(list(injector.calls)):
            if call in RETRIED:
                injector.disarm()
                store = prepare(root, how)
                injector.arm(range(number, number + 3).__contains__, sharing_violation)
                operate(store)
                injector.disarm()
                assert counted(store) == wanted, (call, number)
                check_afterwards(root, store, tidy=True)


def counted(store):
    stats = store.stats()
    return (stats.entries, stats.bytes, stats.hits, stats.misses, stats.dropped, stats.evicted, stats.read_errors)


@pytest.mark.filterwarnings("ignore:.*(program|evict).*:RuntimeWarning")
@pytest.mark.parametrize("call", RETRIED)
def test_a_sharing_violation_that_stays(root, watchdog, windows, call):
    """A put is dropped, a read is a miss, an unlink is left for later, and no unexpected exception is raised."""
    with injected(str(root)) as injector:
        for operate, how in OPERATIONS.values():
            store = prepare(root, how)
            injector.arm(lambda _: injector.calls[-1] == call, sharing_violation)
            try:
                operate(store)
                if call.startswith("open"):
                    assert check_lookups(store, KEYS[1]) == 0
            finally:
                injector.disarm()
            check_afterwards(root, store, tidy=call != "replace tmp")


# Partial reads and writes, and a process without free descriptors


def test_short_reads_and_writes(tmp_path, monkeypatch):
    """Transfers may be partial, as for files over 2 GiB; a ledger that can't be written adds no surveys to a put."""
    most = 1000
    surveys = []
    real_survey = pairs.survey
    monkeypatch.setattr(pairs, "survey", lambda *args: surveys.append(args) or real_survey(*args))
    real_read, real_write = os.read, os.write
    monkeypatch.setattr(os, "read", lambda fd, size: real_read(fd, min(size, most)))
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, bytes(data[:most])))
    store = FileStreamProgramCache(tmp_path / "cache", durability="none", max_size_bytes=100_000)
    for turn in range(2):
        for key in KEYS:
            assert publish(store, key, 1, turn)
            assert len(surveys) <= 8 * len(KEYS)
            surveys.clear()
            assert check_lookups(store, key) == 2
    os.utime(entry_path(tmp_path / "cache", KEYS[0]), (10**9, 10**9))
    assert [check_lookups(store, KEYS[0]) for _ in range(3)] == [2, 2, 2]
    assert store.stats().corrupt == 0


@pytest.mark.parametrize("left", range(4))
def test_no_more_descriptors(tmp_path, left):
    """With no free descriptors reads are misses and writes are dropped with a warning; later everything works again."""
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root, durability="full", max_size_bytes=100_000)
    for key in KEYS[:3]:
        assert publish(store, key, 1, 1)
    fresh = FileStreamProgramCache(root, max_size_bytes=100_000)
    os.truncate(entry_path(root, KEYS[2]), 3)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(left):
            os.close(taken.pop())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in (store, fresh):
                for key in KEYS:
                    hits = check_lookups(each, key)
                    assert left or not hits
                    published = publish(each, key, 1, 2)
                    assert left or not published
                raising(StoreError, lambda each=each: each.__setitem__(KEYS[3], value(KEYS[3], 1, 3)))
                raising((StoreError, KeyError), lambda each=each: each.__delitem__(KEYS[3]))
                raising(OSError, each.stats)
                raising(StoreError, each.clear)
        raising(StoreError, lambda: FileStreamProgramCache(root))
        assert len([warning for warning in caught if "not kept" in str(warning.message)]) <= 2
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for each in (store, fresh):
        stats = each.stats()
        assert stats.hits + stats.misses == 2 * len(KEYS)
        for key in KEYS:
            assert publish(each, key, 1, 5)
            assert check_lookups(each, key) == 2
    assert staged(root) == []
    assert_works(root)
