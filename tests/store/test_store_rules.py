# SPDX-License-Identifier: Apache-2.0
"""Single rules of the stores: the verdict on an entry, removal, the ledger, stacks, errors, and bounds on memory."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import sys
import tarfile
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
from faults_values import settle

from cuda_progcache import events, subscribe
from cuda_progcache._util import files, parallel, user_dirs
from cuda_progcache._util.liveness import current_owner
from cuda_progcache.errors import BundleError, ProgCacheWarning, StoreError
from cuda_progcache.store import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheStack,
    ReadOnlyProgramCache,
    default_cap,
    entry_digest,
    eviction,
    judge,
    removal,
)
from cuda_progcache.store.records import Version, encode

OLD = (1_000_000_000, 1_000_000_000)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make(root):
    return lambda **options: FileStreamProgramCache(root, **{"durability": "none", **options})


def paths(root, key):
    digest = entry_digest(key)
    return [root / tree / digest[:2] / digest[2:] for tree in ("entries", "records")]


def on_disk(root, *trees):
    return sum(p.stat().st_size for tree in trees for p in (root / tree).rglob("*") if p.is_file())


# The verdict on an entry


def test_an_entry_of_any_size_has_one_verdict(root, make, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1000)
    monkeypatch.setattr(judge, "LARGE", 1000)
    monkeypatch.setattr(files.read_regular, "__kwdefaults__", {"largest": 1000, "quietly": False})
    cache = make()
    cache.publish(b"k", b"x" * 5000, {"n": 1})
    assert make().get(b"k") == b"x" * 5000
    assert cache.verify(repair=True) == (1, 5000, ())
    assert cache.export(tmp_path / "b.tar")[1:4:2] == (1, 0)
    assert cache.import_(tmp_path / "b.tar").present == 1
    assert [info.size for info in cache.entries()] == [5000]
    paths(root, b"k")[0].write_bytes(b"y" * 6000)  # no record vouches for it, so it isn't read
    assert make().get(b"k") is None


@pytest.mark.parametrize("record", [b"[]", b'"ab"', b"3", b"null", b"{oops", b'{"a":NaN}', b"{}{}", b"[" * 5000])
def test_a_record_that_is_no_object_is_damage_for_everybody(root, make, tmp_path, record):
    cache = make()
    cache[b"other"] = b"OTHER"
    cache[b"k"] = b"DATA"
    paths(root, b"k")[1].write_bytes(encode(entry_digest(b"k"), [Version.of(b"DATA", record, 1.0)]))
    for path in paths(root, b"k"):
        os.utime(path, OLD)
    assert [info.size for info in cache.entries()] == [5]
    assert [finding.kind for finding in cache.verify().findings] == ["damaged-record"]
    report = cache.export(tmp_path / "b.tar", archs=None)
    assert (report.entries, report.damaged) == (1, 1)
    for look in (cache.get, cache.load):
        assert look(b"k") is None
    assert cache.stats().corrupt == 1
    with pytest.raises(BundleError, match="record"):
        make().import_(bundle(tmp_path / "hand.tar", record))


def bundle(path, record):
    import hashlib

    digest, data = entry_digest(b"k"), b"DATA"
    names = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            names[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        add(f"entries/{digest[:2]}/{digest[2:]}", data)
        add(f"records/{digest[:2]}/{digest[2:]}", encode(digest, [Version.of(data, record, 1.0)]))
        add("bundle.json", json.dumps({"format": 1, "files": dict(names)}).encode())
    return path


@pytest.mark.parametrize(
    ("nanoseconds", "age", "settled"),
    [(5, 10**7, False), (5, 3 * 10**7, True), (0, 10**9, False), (0, 2 * 10**9, False), (0, 2 * 10**9 + 1, True)],
)
def test_a_time_stamp_in_whole_seconds_is_trusted_later(nanoseconds, age, settled):
    stamp = 1_700_000_000 * 10**9 + nanoseconds
    for mtime, ctime in ((stamp, stamp), (stamp - 5 * 10**9, stamp)):
        status = SimpleNamespace(st_mtime_ns=mtime, st_ctime_ns=ctime)
        assert files.is_settled(status, stamp + age) is settled


def test_looking_is_no_use(root, make, tmp_path):
    """verify, export, import and listings don't count as uses of an entry."""
    cache = make()
    for path in [cache.publish(b"k", b"v", {}) and p for p in paths(root, b"k")]:
        os.utime(path, ns=(10**18, 2 * 10**18 // 2 + 10**9))
    before = paths(root, b"k")[0].stat().st_atime_ns
    cache.verify()
    cache.export(tmp_path / "b.tar")
    cache.import_(tmp_path / "b.tar")
    list(cache.entries())
    assert paths(root, b"k")[0].stat().st_atime_ns == before


def test_a_bundle_whose_name_is_as_long_as_can_be(make, tmp_path):
    cache = make()
    cache[b"k"] = b"v"
    target = tmp_path / ("b" * 251 + ".tar")
    assert cache.export(target).entries == 1
    assert target.is_file()


def test_an_import_says_what_differs(make, tmp_path):
    cache = make()
    cache.update({b"a": b"1", b"b": b"2"})
    cache.export(tmp_path / "b.tar")
    cache[b"a"] = b"other"
    report = cache.import_(tmp_path / "b.tar")
    assert (report.present, report.differing, report.imported) == (2, 1, 0)
    assert cache[b"a"] == b"other"


# Removal


def test_a_pin_that_returned_holds_against_a_prune_that_runs(make, monkeypatch):
    cache, other = make(), make()
    for i in range(40):
        cache[b"%d" % i] = b"x"
    real, pinned, turn = removal.take_away, [], threading.Lock()

    def late(root, digest, seen, **options):  # called by several threads if the machine is slow
        with turn:
            if len(pinned) < 10:
                pinned.append(other.pin(digest))
        return real(root, digest, seen, **options)

    monkeypatch.setattr(removal, "take_away", late)
    report = cache.prune(max_size_bytes=0)
    assert report.removed == 30
    assert {info.digest for info in cache.entries()} == set(pinned) == other.pins()


def test_a_repair_beside_the_first_write_of_a_shard(make, monkeypatch):
    """A directory that is created after the listing isn't reported as foreign."""
    cache, writer = make(), make()
    cache[b"a"] = b"1"
    real = removal.foreign

    def late(root):
        for i in range(30):
            writer[b"new %d" % i] = b"x"
        return real(root)

    monkeypatch.setattr("cuda_progcache.store.removal.foreign", late)
    assert cache.verify(repair=True).findings == ()
    assert all(writer[b"new %d" % i] == b"x" for i in range(30))


def test_what_a_dead_process_had_moved_aside_is_put_back_or_goes(root, make):
    cache = make()
    cache[b"k"] = b"v"
    dead = current_owner()._replace(start=current_owner().start + 1)
    entry, record = paths(root, b"k")
    (root / "removed").mkdir()
    entry.rename(root / "removed" / f"{dead}-1.e{entry_digest(b'k')}")
    assert make()[b"k"] == b"v"
    record.rename(root / "removed" / f"{dead}-2.r{entry_digest(b'k')}")
    assert make()[b"k"] == b"v"
    entry.rename(root / "removed" / f"{dead}-3.e{entry_digest(b'k')}")
    cache[b"k"] = b"newer"
    (root / "removed" / f"{dead}-4" / "ab").mkdir(parents=True)
    (root / "removed" / f"{dead}-4" / "ab" / "file").write_bytes(b"x")
    assert make()[b"k"] == b"newer"
    assert list((root / "removed").iterdir()) == []


def test_leases_of_dead_processes_go(root, make):
    cache = make()
    (root / "leases").mkdir()
    dead = current_owner()._replace(start=current_owner().start + 1)
    for _ in range(2):
        (root / "leases" / "dead").write_text(str(dead))
        (root / "leases" / "mine").write_text(str(current_owner()))
        report = cache.verify(repair=True) if not _ else cache.clear()
        assert [path.name for path in (root / "leases").iterdir()] == ["mine"]
        assert report is None or [f.kind for f in report.findings] == ["stale-staging"]


def test_names_made_anew_after_anothers_clear_are_synced_again(root, monkeypatch):
    """A directory that was removed and created again needs a new sync."""
    from cuda_progcache.store import root as module

    synced, real = [], module.sync_directory
    monkeypatch.setattr(module, "sync_directory", lambda path: (synced.append(path.rstrip("/")), real(path)))
    cache = FileStreamProgramCache(root, durability="full")
    cache[b"k"] = b"v"
    needed = {str(path) for file in paths(root, b"k") for path in (file.parent, file.parent.parent)} | {str(root)}
    assert needed <= set(synced)
    settle()
    FileStreamProgramCache(root).clear()
    synced.clear()
    cache[b"k"] = b"v"
    assert needed <= set(synced)


# The ledger


def test_the_quarantine_is_within_the_cap(root, make):
    cap = 200_000
    cache = make(max_size_bytes=cap)
    for i in range(40):
        key = b"%d" % i
        cache[key] = os.urandom(9000 if i % 2 else 150_000)
        entry, record = paths(root, key)
        if not entry.exists():
            continue
        with entry.open("r+b") as file:
            file.write(b"damaged!")
        for path in (entry, record):
            os.utime(path, OLD)
        assert cache.get(key) is None
        assert on_disk(root, "entries", "quarantine") <= cap


def test_damage_is_told_to_the_account(root, make):
    cache = make(max_size_bytes=1_000_000)
    for i in range(60):
        cache[b"%d" % i] = b"%03d" % i * 300
    for i in range(40):
        for path in paths(root, b"%d" % i):
            os.truncate(path, 3)
            os.utime(path, OLD)
        assert make(max_size_bytes=1_000_000).get(b"%d" % i) is None
    cache[b"last"] = b"x"
    stats = cache.stats()
    assert (cache._cap.ledger.entries, cache._cap.ledger.size) == (stats.entries, stats.bytes) == (21, 20 * 900 + 1)


def test_a_prune_that_fails_on_the_way_is_accounted(make, monkeypatch):
    cache = make(max_size_bytes=1_000_000)
    for i in range(100):
        cache[b"%d" % i] = b"x" * 1000
    real, calls = removal.take_away, itertools.count()

    def failing(*args, **options):  # called by several threads if the machine is slow
        if next(calls) >= 59:
            raise OSError(errno.EIO, "I/O error")
        return real(*args, **options)

    monkeypatch.setattr(removal, "take_away", failing)
    with pytest.raises(StoreError, match="I/O"):
        cache.prune(max_size_bytes=0)
    assert cache._cap.ledger.size == cache.stats().bytes == 41_000
    assert cache._cap.ledger.doubts


def test_what_is_remembered_of_uses_has_a_bound(monkeypatch):
    monkeypatch.setattr(eviction, "REMEMBERED", 100)
    uses = eviction.LastUse()
    for i in range(1000):
        uses.note(str(i), i + 1)
        assert len(uses) <= 101
    assert uses["999"] == 1000
    uses.note("again", 5)
    assert uses["again"] == 1001, "their order stays where the clock is set back"


def test_the_account_is_as_open_as_the_root(root):
    root.mkdir()
    root.chmod(0o2770)
    before = os.umask(0o077)
    try:
        cache = FileStreamProgramCache(root, max_size_bytes=10_000)
        cache[b"k"] = b"v"
        cache.close()
    finally:
        os.umask(before)
    assert [(root / name).stat().st_mode & 0o777 for name in ("ledger", "counters.log")] == [0o660, 0o660]
    assert [path.stat().st_mode & 0o777 for path in paths(root, b"k")] == [0o640, 0o640], "the group reads"


def test_no_umask_shuts_the_owner_out(root):
    before = os.umask(0o777)
    try:
        FileStreamProgramCache(root)[b"k"] = b"v"
    finally:
        os.umask(before)
    assert root.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in paths(root, b"k")] == [0o600, 0o600]


# Stacks


class Full(InMemoryProgramCache):
    def __setitem__(self, key, value):
        raise OSError(errno.ENOSPC, "full")


@pytest.mark.filterwarnings("ignore:.*the stack continues without it:cuda_progcache.errors.ProgCacheWarning")
def test_a_refusal_is_not_stored():
    memory = InMemoryProgramCache(max_size_bytes=10)
    stack = ProgramCacheStack((memory, Full()))
    with pytest.raises(StoreError, match="full"):
        stack[b"k"] = b"x" * 100
    stats = stack.stats()
    assert (stats.stored, [(level.stored, level.store_failed) for level in stats.levels]) == (0, [(0, 1), (0, 1)])
    alone = ProgramCacheStack((memory,))
    alone[b"k"] = b"x" * 100  # refused, but no level has failed
    assert (alone.stats().stored, alone.get(b"k")) == (0, None)


@pytest.mark.filterwarnings("ignore:.*the stack continues without it:cuda_progcache.errors.ProgCacheWarning")
def test_what_cannot_be_written_can_be_read():
    disk = Full()
    InMemoryProgramCache._assign(disk, b"there", b"v")
    stack = ProgramCacheStack((InMemoryProgramCache(max_size_bytes=1), disk))
    for i in range(5):
        with pytest.raises(StoreError):
            stack[b"%d" % i] = b"xx"
    assert stack.stats().levels[1].state == "open"
    assert stack.get(b"there") == b"v"


@pytest.mark.filterwarnings("ignore:.*the stack continues without it:cuda_progcache.errors.ProgCacheWarning")
def test_a_level_that_is_out_of_use_is_closed():
    closed = []

    class Failing(InMemoryProgramCache):
        def load(self, key):
            raise OSError(errno.EIO, "I/O")

        def get(self, key, default=None):
            raise OSError(errno.EIO, "I/O")

        def close(self):
            closed.append(self)
            raise OSError(errno.EIO, "I/O")

    stack = ProgramCacheStack((Failing(), InMemoryProgramCache()), failures=1)
    assert stack.get(b"k") is None
    stack.close()
    assert len(closed) == 1


def test_a_subscriber_may_clear_the_stack_that_evicts():
    stack = ProgramCacheStack((InMemoryProgramCache(max_size_bytes=10), InMemoryProgramCache()))
    unsubscribe = subscribe(lambda event: stack.clear() if event.kind == "evict" else None)
    thread = threading.Thread(target=lambda: stack.update({b"a": b"12345678", b"b": b"12345678"}), daemon=True)
    thread.start()
    thread.join(300)
    unsubscribe()
    assert not thread.is_alive()
    assert len(stack) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_counts_from_zero_in_every_store(root, make):
    disk, memory = make(), InMemoryProgramCache()
    disk[b"k"] = memory[b"k"] = b"v"
    stack = ProgramCacheStack((InMemoryProgramCache(), make()))
    stores = (disk, memory, stack, ReadOnlyProgramCache(root))
    for store in stores:
        assert store.get(b"k") == b"v"
    child = os.fork()
    if not child:
        stats = [store.stats() for store in stores]
        os._exit(int(any(s.hits or s.misses or any(lv.hits or lv.misses for lv in s.levels) for s in stats)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(store.stats().hits == 1 for store in stores)


# Events


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_a_stderr_that_is_gone_costs_no_write(monkeypatch, stderr):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stderr is None else closed)
    monkeypatch.setattr(events, "_asked", lambda: "all")
    memory = InMemoryProgramCache(max_size_bytes=10)
    memory.update({b"a": b"12345678", b"b": b"12345678"})
    assert memory[b"b"] == b"12345678"


def test_each_subscription_ends_once_and_alone():
    heard = []
    first, second = subscribe(heard.append), subscribe(heard.append)
    first()
    first()
    events.emit(events.Event("evict", "", "", ""))
    assert len(heard) == 1
    second()
    events.emit(events.Event("evict", "", "", ""))
    assert len(heard) == 1


# The cache directory and its default size cap


def test_a_relative_xdg_directory_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_dirs.user_cache_dir() == str(tmp_path / ".cache")


def test_without_a_home_programs_are_kept_in_memory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_PROGCACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that is unknown to the system
    with pytest.warns(ProgCacheWarning, match="no home directory"):
        cache = FileStreamProgramCache()
    cache[b"k"] = b"v"
    assert cache[b"k"] == b"v"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("told", "cap"), [(None, 5 * 10**9), ("20GB", 20 * 10**9), ("0", None), ("1.5 MiB", 3 << 19), ("", 5 * 10**9)]
)
def test_the_default_root_has_a_cap(monkeypatch, tmp_path, told, cap):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "default"))
    if told is not None:
        monkeypatch.setenv("CUDA_PROGCACHE_MAX_SIZE", told)
    assert FileStreamProgramCache().settings["max_size_bytes"] == cap
    assert FileStreamProgramCache(max_size_bytes=77).settings["max_size_bytes"] == 77
    assert FileStreamProgramCache(tmp_path / "given").settings["max_size_bytes"] is None


@pytest.mark.parametrize("text", ["lots", "5 parsecs", "-1", "1e9", "", "GB", "1.2.3", "٣"])
def test_what_is_no_size(monkeypatch, text):
    with pytest.raises(ValueError, match="isn't a size"):
        default_cap.parse_size(text)
    if text:
        monkeypatch.setenv("CUDA_PROGCACHE_MAX_SIZE", text)
        with pytest.raises(ValueError, match="CUDA_PROGCACHE_MAX_SIZE"):
            FileStreamProgramCache()


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs root")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_set_uid_program_sees_what_its_effective_user_may(root, make):
    make()[b"k"] = b"v"
    child = os.fork()
    if not child:
        os.setresuid(20001, 0, 0)
        os._exit(0 if make().get(b"k") == b"v" and make().get(b"none") is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Errors of writes


@pytest.mark.parametrize("strict", [False, True])
def test_a_disk_in_trouble(make, monkeypatch, strict):
    cache = make(strict=strict)
    cache[b"there"] = b"v"

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    monkeypatch.setattr(os, "replace", full)
    writes = (lambda: cache.__setitem__(b"k", b"v"), lambda: cache.update({b"k": b"v"}))
    removals = (lambda: cache.__delitem__(b"there"), lambda: cache.remove(entry_digest(b"there")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for action in (*writes, *removals):
            if strict:
                with pytest.raises(StoreError, match="No space"):
                    action()
            else:
                action()
        assert cache.publish(b"k", b"v", {}) is False
    assert len(caught) == 1
    monkeypatch.undo()
    assert (cache.stats().dropped, cache.stats().failed, cache.get(b"there")) == (3, 2, b"v")
    for wrong in (lambda: cache.__setitem__(1, b"v"), lambda: cache.__setitem__(b"k", "text")):
        with pytest.raises(TypeError):
            wrong()


def test_a_value_is_in_no_frame_that_raises(make, monkeypatch):
    """The repr of cuda.core's ObjectCode deadlocks without a driver, and debugging tools print the locals of frames."""
    value = memoryview(b"stands for it")
    cache = make(strict=True)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StoreError) as excinfo:
        cache[b"k"] = value
    frames = []
    trace = excinfo.tb.tb_next
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert len(frames) >= 2
    assert not [frame for frame in frames if any(held is value for held in frame.f_locals.values())]


# Bounds on memory, and errors in helper threads


def test_long_keys_are_not_kept(make):
    import tracemalloc

    memory = InMemoryProgramCache(max_size_bytes=10_000)
    tracemalloc.start()
    try:
        for i in range(40):
            key = b"%08d" % i + bytes(1 << 20)
            entry_digest(key)
            memory[key] = b"v"
            assert memory[key] == b"v"
        assert tracemalloc.get_traced_memory()[0] < 5 << 20
    finally:
        tracemalloc.stop()
    assert len(memory) == 40
    memory.remove(entry_digest(b"%08d" % 3 + bytes(1 << 20)))
    assert len(memory) == 39


@pytest.mark.parametrize("error", [ValueError, StopIteration, OSError])
def test_what_a_helper_raises_is_raised(error):
    def act(item):
        time.sleep(0.001)
        if item > 20:
            raise error(item)

    with pytest.raises(error):
        parallel.for_each(range(200), act)
