# SPDX-License-Identifier: Apache-2.0
"""A damaged file is never a hit: every kind of damage is a miss, is counted, and is healed by the next write."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
from faults_values import settle

from cuda_progcache.store import FileStreamProgramCache, entry_digest, judge, removal

DATA = bytes(range(256)) * 40
RECORD = {"name": "k", "log": "warning: unused"}
KEY = b"key"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def store(root, monkeypatch):
    monkeypatch.setattr("cuda_progcache.store.judge.LOOKS", (0.0, 0.0))  # no writers to wait for in these tests
    store = FileStreamProgramCache(root, durability="none")
    store.publish(KEY, DATA, RECORD)
    return store


def entry(root, key=KEY):
    digest = entry_digest(key)
    return root / "entries" / digest[:2] / digest[2:]


def record(root, key=KEY):
    digest = entry_digest(key)
    return root / "records" / digest[:2] / digest[2:]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    with path.open("r+b") as file:  # in place: same inode, same size
        file.write(data)


def instead(path, make):
    path.unlink()
    make(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a length limit
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to_copy(path):
    copy = path.parents[3] / "elsewhere"
    copy.write_bytes(DATA)
    path.symlink_to(copy)


def swapped(root, path_of):
    """Replace this key's entry (or record) with a copy of another key's."""
    other = FileStreamProgramCache(root, durability="none")
    other.publish(b"other", DATA[::-1], {"name": "other"})
    shutil.copyfile(path_of(root, b"other"), path_of(root))


ENTRY_DAMAGE = {
    "cut": lambda root: os.truncate(entry(root), len(DATA) - 1),
    "empty": lambda root: os.truncate(entry(root), 0),
    "grown": lambda root: entry(root).write_bytes(DATA + b"\0"),
    "first byte": lambda root: flip(entry(root), 0),
    "last byte": lambda root: flip(entry(root), -1),
    "zeros": lambda root: entry(root).write_bytes(bytes(len(DATA))),
    "swapped": lambda root: swapped(root, entry),
    "link": lambda root: instead(entry(root), link_to_copy),
    "dangling link": lambda root: instead(entry(root), lambda path: path.symlink_to("nowhere")),
    "fifo": lambda root: instead(entry(root), os.mkfifo),
    "directory": lambda root: instead(entry(root), lambda path: (path.mkdir(), (path / "x").write_bytes(b"x"))),
    "socket": lambda root: instead(entry(root), make_socket),
}
RECORD_DAMAGE = {
    "record cut": lambda root: os.truncate(record(root), record(root).stat().st_size - 1),
    "record empty": lambda root: os.truncate(record(root), 0),
    "record digest": lambda root: flip(record(root), record(root).read_bytes().index(b'"digest":"') + 12),
    "record checksum": lambda root: flip(record(root), record(root).read_bytes().index(b'"checksum":"') + 14),
    "record length": lambda root: flip(record(root), record(root).read_bytes().index(b'"length":') + 9),
    "record format": lambda root: flip(record(root), record(root).read_bytes().index(b'"format":') + 9),
    "record garbage": lambda root: record(root).write_bytes(os.urandom(400)),
    "record not ours": lambda root: record(root).write_text(json.dumps({"length": len(DATA)})),
    "record swapped": lambda root: swapped(root, record),
    "record link": lambda root: instead(record(root), lambda path: path.symlink_to("nowhere")),
    "record fifo": lambda root: instead(record(root), os.mkfifo),
    "record directory": lambda root: instead(record(root), lambda path: path.mkdir()),
    "record of other record": lambda root: flip(record(root), record(root).read_bytes().index(b"warning")),
}


def lookup(store, how):
    if how == "get":
        return store.get(KEY)
    found = store.load(KEY)
    return None if found is None else found.data


@pytest.mark.parametrize("how", ["get", "load"])
@pytest.mark.parametrize("seen_before", [False, True], ids=["fresh", "verified before"])
@pytest.mark.parametrize("damage", ENTRY_DAMAGE.values(), ids=ENTRY_DAMAGE)
def test_a_damaged_entry(root, store, damage, seen_before, how):
    if seen_before:
        settle()
        assert store.get(KEY) == DATA
        assert store._verified
    damage(root)
    assert lookup(store, how) is None
    stats = store.stats()
    assert (stats.corrupt, stats.misses) == (1, 1)
    assert not os.path.lexists(entry(root)), "the culprit is out of the way"
    assert len(list((root / "quarantine").iterdir())) == 1
    assert lookup(store, how) is None
    assert store.stats().corrupt == 1
    assert store.publish(KEY, DATA, RECORD)
    assert lookup(store, how) == DATA
    assert store.load(KEY).record == RECORD


@pytest.mark.parametrize("how", ["get", "load"])
@pytest.mark.parametrize("damage", RECORD_DAMAGE.values(), ids=RECORD_DAMAGE)
def test_a_damaged_record(root, store, damage, how):
    damage(root)
    assert lookup(store, how) is None
    stats = store.stats()
    assert (stats.corrupt, stats.misses) == (1, 1)
    assert store.publish(KEY, DATA, RECORD)
    assert lookup(store, how) == DATA
    assert store.load(KEY).record == RECORD
    assert entry_digest(KEY) in {info.digest for info in store.entries()}


@pytest.mark.parametrize("write", ["publish", "mapping"])
@pytest.mark.parametrize("damage", {**ENTRY_DAMAGE, **RECORD_DAMAGE}.values(), ids={**ENTRY_DAMAGE, **RECORD_DAMAGE})
def test_a_write_heals_what_no_read_has_met(root, store, damage, write):
    damage(root)
    if write == "publish":
        assert store.publish(KEY, b"new", {"n": 1})
    else:
        store[KEY] = b"new"
    assert store[KEY] == b"new"
    assert store.load(KEY).record == ({"n": 1} if write == "publish" else {})
    assert store.stats().corrupt == 0


def test_an_entry_without_record_is_a_miss_and_stays(root, store):
    record(root).unlink()
    assert store.get(KEY) is None
    assert store.load(KEY) is None
    assert entry(root).read_bytes() == DATA, "its record may be on its way (rsync, tar)"
    assert (len(store), store.stats().entries, store.stats().corrupt) == (0, 0, 0)
    assert list(store.entries()) == []
    with pytest.raises(KeyError):
        store.resolve(entry_digest(KEY))
    with pytest.raises(KeyError):
        store.info(entry_digest(KEY))


def test_a_record_without_entry_is_a_miss(root, store):
    entry(root).unlink()
    assert store.get(KEY) is None
    assert store.load(KEY) is None
    assert len(store) == 0
    with pytest.raises(KeyError):
        del store[KEY]


def test_delete_takes_the_record_along(root, store):
    del store[KEY]
    assert not entry(root).exists()
    assert not record(root).exists()


def test_what_is_replaced_at_every_look_is_not_called_damaged(root, store, monkeypatch):
    """An entry that changes between any two reads is a miss, and isn't moved to quarantine."""
    flip(entry(root), 3)
    read = judge.read_regular

    def replaced(path, **options):
        if path == str(entry(root)):
            entry(root).write_bytes(os.urandom(100))
            os.replace(shutil.copyfile(entry(root), root / "tmp" / "copy"), entry(root))
        return read(path, **options)

    monkeypatch.setattr(judge, "read_regular", replaced)
    assert store.get(KEY) is None
    assert entry(root).exists()
    assert (store.stats().misses, store.stats().corrupt) == (1, 0)


def test_two_caches_merge_by_copying(root, store, tmp_path):
    other = FileStreamProgramCache(tmp_path / "other", durability="none")
    other.publish(b"b", b"data of b", {"name": "b"})
    shutil.copytree(tmp_path / "other", root, dirs_exist_ok=True)
    assert store.get(KEY) == DATA
    assert store.load(b"b") == (b"data of b", {"name": "b"})
    assert len(store) == 2


def test_an_entry_is_the_binary_verbatim(root, store):
    assert entry(root).read_bytes() == DATA
    assert [path for path in (root / "entries").rglob("*") if path.is_file()] == [entry(root)]
    document = json.loads(record(root).read_bytes())
    assert document["digest"] == entry_digest(KEY)
    assert document["versions"][0]["length"] == len(DATA)
    assert document["versions"][0]["record"] == RECORD


def test_bytes_replaced_in_place_with_the_old_time_stamp(root, store):
    settle()
    assert store.get(KEY) == DATA
    status = entry(root).stat()
    flip(entry(root), 100)
    os.utime(entry(root), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.get(KEY) is None


def test_a_change_right_after_a_read_is_seen(root, store):
    for i in range(30):  # within one tick of the file system's clock, in which a time stamp may not change
        value = b"%04d" % i * 100
        store[KEY] = value
        assert store.get(KEY) == value
        flip(entry(root), 5)
        assert store.get(KEY) is None


@pytest.mark.parametrize(("age", "remembered"), [(-60, False), (-3600, False), (1, True)])
def test_a_file_changed_just_now_is_verified_but_not_remembered(root, store, age, remembered):
    """On a file system with a coarse clock, the next change could get the same time stamp."""
    moment = time.time() - age
    os.utime(entry(root), (moment, moment))
    settle()
    assert store.get(KEY) == DATA
    assert bool(store._verified) is remembered


def test_a_warm_hit_reads_the_entry_alone(root, store, monkeypatch):
    settle()
    assert store.get(KEY) == DATA
    monkeypatch.setattr("cuda_progcache.store.judge.checksum", pytest.fail)
    monkeypatch.setattr("cuda_progcache.store.judge.decode", pytest.fail)
    assert store.get(KEY) == DATA


def test_reading_an_uncapped_store_writes_nothing(root, store):
    """Only the counters are written, every few seconds."""
    settle()

    def state():
        return {
            path: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, path.lstat().st_ino) for path in root.rglob("*")
        }

    os.utime(entry(root), (1, entry(root).stat().st_mtime))  # long ago: with a cap, a hit would update it
    before = state()
    for _ in range(3):
        assert store.get(KEY) == DATA
        assert store.load(KEY)
        assert store.get(b"other") is None
    assert state() == before


def test_the_quarantine_is_bounded_and_cleared(root, store):
    for i in range(40):
        store[KEY] = DATA
        os.truncate(entry(root), i)
        assert store.get(KEY) is None
    assert len(list((root / "quarantine").iterdir())) == 16
    store[KEY] = DATA
    entry(root).unlink()
    entry(root).mkdir()
    assert store.get(KEY) is None
    store.clear()
    assert list((root / "quarantine").iterdir()) == []


def test_a_fresh_publish_is_never_quarantined(root, store, monkeypatch):
    """A writer replaces the damaged entry after a reader has read it and before the reader moves it away."""
    flip(entry(root), 3)
    writer = FileStreamProgramCache(root, durability="none")
    take_away = removal.take_away

    def late(*args, **options):
        writer.publish(KEY, b"fresh", {})
        return take_away(*args, **options)

    monkeypatch.setattr(removal, "take_away", late)
    assert store.get(KEY) is None
    assert store.get(KEY) == b"fresh"


def test_a_reader_between_the_two_renames_gets_the_old_bytes(root, store, monkeypatch):
    """While the new record is in place and the new entry isn't, the old entry is still a hit with its own record."""
    writer = FileStreamProgramCache(root, durability="none")
    seen = []

    def between(source, target):
        if "entries" in target:
            seen.append((store.get(KEY), store.load(KEY), store.info(entry_digest(KEY)).record))
        os.replace(source, target)

    monkeypatch.setattr("cuda_progcache.store.pairs.replace", between)
    writer.publish(KEY, b"new", {"n": 2})
    assert seen == [(DATA, (DATA, RECORD), RECORD)]
    assert store.load(KEY) == (b"new", {"n": 2})
    assert store.stats().corrupt == 0


@pytest.mark.parametrize("crash_at", ["entries", "records"])
@pytest.mark.parametrize("first", [True, False], ids=["new key", "replacement"])
def test_a_crash_at_either_rename_is_a_miss_or_the_old_entry(root, store, monkeypatch, crash_at, first):
    key = b"new key" if first else KEY

    def crash(source, target):
        if crash_at in target:
            raise RuntimeError("crash")
        os.replace(source, target)

    monkeypatch.setattr("cuda_progcache.store.pairs.replace", crash)
    monkeypatch.setattr("cuda_progcache._util.files.replace", crash)
    if first and crash_at == "records":
        store.publish(key, b"new", {})  # a new record is created in place, without a rename that could fail
    else:
        with pytest.raises(RuntimeError, match="crash"):
            store.publish(key, b"new", {})
    monkeypatch.undo()
    expected = (b"new" if crash_at == "records" else None) if first else DATA
    assert FileStreamProgramCache(root).get(key) == expected
    assert list((root / "tmp").iterdir()) == [], "nothing staged is left"
    assert store.publish(key, b"newer", {})
    assert store.get(key) == b"newer"


@pytest.mark.parametrize("age", [0.0, 7200.0], ids=["young", "old"])
def test_a_reader_is_patient_with_young_files_alone(root, monkeypatch, age):
    """Only the record of B and the entry of A are in place, as when two writers are half done."""
    monkeypatch.setattr(judge, "YOUNG", 3600.0)  # longer than any delay on a busy machine
    store = FileStreamProgramCache(root, durability="none")
    store.publish(KEY, b"A", {"by": "A"})
    entry_of_a = entry(root).read_bytes()
    record(root).unlink()
    store.publish(KEY, b"B", {"by": "B"})
    entry(root).write_bytes(entry_of_a)
    for path in (entry(root), record(root)):
        os.utime(path, (time.time() - age, time.time() - age))
    pauses = []

    def writer_goes_on(pause):
        pauses.append(pause)
        if len(pauses) == 3:
            entry(root).write_bytes(b"B")

    monkeypatch.setattr(judge, "time", SimpleNamespace(time=time.time, sleep=writer_goes_on))
    assert store.get(KEY) == (None if age else b"B")
    assert len(pauses) == (0 if age else 3)


def test_two_writers_whose_renames_interleave_leave_a_hit(root, store, monkeypatch):
    """The order is: record of A, record of B, entry of B, entry of A. No mismatch is left."""
    other = FileStreamProgramCache(root, durability="none")
    interleaved = []

    def between(source, target):
        if "entries" in target and not interleaved:
            interleaved.append(True)
            other.publish(KEY, b"B" * 100, {"by": "B"})
        os.replace(source, target)

    monkeypatch.setattr("cuda_progcache.store.pairs.replace", between)
    store.publish(KEY, b"A" * 100, {"by": "A"})
    monkeypatch.undo()
    fresh = FileStreamProgramCache(root)
    assert fresh.get(KEY) == b"A" * 100
    assert fresh.load(KEY) == (b"A" * 100, {"by": "A"})
    assert fresh.info(entry_digest(KEY)).record == {"by": "A"}


def test_a_record_lost_between_the_renames_is_written_again(root, store, monkeypatch):
    """A concurrent clear() removes the new record before its entry arrives."""

    cleared = []

    def between(source, target):
        if "entries" in target and not cleared:
            cleared.append(FileStreamProgramCache(root).clear())
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.makedirs(os.path.dirname(target).replace("entries", "records"), exist_ok=True)
        os.replace(source, target)

    monkeypatch.setattr("cuda_progcache.store.pairs.replace", between)
    store.publish(KEY, b"new", {"n": 1})
    assert store.load(KEY) == (b"new", {"n": 1})


@pytest.mark.parametrize("blocked", ["entries", "records", "tmp", "entries/xx", "records/xx"])
def test_a_file_where_a_directory_should_be_is_moved_away(root, store, blocked):
    path = root / blocked.replace("xx", entry_digest(KEY)[:2])
    shutil.rmtree(path)
    path.write_bytes(b"in the way")
    if blocked.startswith("entries"):
        assert store.get(KEY) is None
    FileStreamProgramCache(root, durability="none")[KEY] = b"new"
    assert store.get(KEY) == b"new"
    store[KEY] = b"newer"
    assert store.get(KEY) == b"newer"
