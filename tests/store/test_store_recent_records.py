# SPDX-License-Identifier: Apache-2.0
"""Warm loads: they read only the entry and the record's status, and return what a cold load returns."""

from __future__ import annotations

import os

import pytest
from faults_values import settle

from cuda_progcache.store import FileStreamProgramCache, entry_digest, judge

RECORD = {"name": "k", "components": [["a", "1"], ["b", None]], "nested": {"list": [1, 2.5, True]}, "log": "\udc80 é"}


@pytest.fixture
def store(tmp_path):
    return FileStreamProgramCache(tmp_path / "cache", durability="none")


def warm(store, key, *published):
    """Publish, load until the record is remembered, and return the results of two loads."""
    assert store.publish(key, *published)
    settle()
    return store.load(key), store.load(key)


@pytest.fixture
def reads(monkeypatch):
    """The list of files that are read whole and parsed."""
    seen = []
    real = judge.read_regular
    monkeypatch.setattr(judge, "read_regular", lambda path, **given: (seen.append(path), real(path, **given))[1])
    return seen


def files(store, key):
    digest = entry_digest(key)
    return store.path / "entries" / digest[:2] / digest[2:], store.path / "records" / digest[:2] / digest[2:]


def test_the_second_load_reads_no_record(store, reads):
    cold, again = warm(store, b"k", b"data", RECORD)
    assert cold == again == (b"data", RECORD)
    assert type(again.record) is dict
    assert len(reads) == 2
    assert store.stats().hits == 2


def test_callers_cannot_alter_what_is_remembered(store):
    for loaded in warm(store, b"k", b"data", RECORD):
        loaded.record["nested"]["list"].append("altered")
        loaded.record["components"].clear()
        loaded.record["more"] = 1
    assert store.load(b"k") == (b"data", RECORD)


def test_another_process_s_record_is_seen(store, tmp_path):
    warm(store, b"k", b"data", RECORD)
    other = FileStreamProgramCache(tmp_path / "cache", durability="none")
    other.publish(b"k", b"data", {"n": 2})  # the same data, so the entry's checksum stays the same
    assert store.load(b"k") == (b"data", {"n": 2})
    other.publish(b"k", b"other data", {"n": 3})
    assert store.load(b"k") == (b"other data", {"n": 3})


def test_the_record_of_a_version_goes_with_that_version(store):
    """A record file can cover two versions of an entry. The test restores the old entry, as between two renames."""
    warm(store, b"k", b"old", {"n": "old"})
    entry, _ = files(store, b"k")
    kept = entry.with_name("kept")
    os.link(entry, kept)
    store.publish(b"k", b"new", {"n": "new"})
    settle()
    assert store.load(b"k") == store.load(b"k") == (b"new", {"n": "new"})
    os.replace(kept, entry)
    assert store.get(b"k") == b"old"
    assert store.load(b"k") == (b"old", {"n": "old"})
    assert store.load(b"k") == (b"old", {"n": "old"})


@pytest.mark.parametrize("damage", ["gone", "altered", "swapped"])
def test_damage_to_the_record_is_seen_by_a_warm_load(store, damage):
    warm(store, b"k", b"data", RECORD)
    warm(store, b"other", b"data", {"other": True})
    _, record = files(store, b"k")
    if damage == "gone":
        record.unlink()
    elif damage == "altered":
        status = record.stat()
        content = bytearray(record.read_bytes())
        content[-20] ^= 1
        record.write_bytes(content)
        os.utime(record, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.replace(files(store, b"other")[1], record)
    assert store.load(b"k") is None
    assert store.stats().misses == 1


def test_damage_to_the_entry_is_seen_by_a_warm_load(store):
    warm(store, b"k", b"data", RECORD)
    files(store, b"k")[0].write_bytes(b"dada")
    assert store.load(b"k") is None


def test_cleared_and_removed(store):
    warm(store, b"k", b"data", RECORD)
    del store[b"k"]
    assert store.load(b"k") is None
    warm(store, b"k", b"data", RECORD)
    store.clear()
    assert store.load(b"k") is None


def test_huge_records_are_not_kept(store, reads):
    huge = {"log": "x" * 100_000}
    assert warm(store, b"k", b"data", huge) == ((b"data", huge), (b"data", huge))
    assert len(reads) == 4
