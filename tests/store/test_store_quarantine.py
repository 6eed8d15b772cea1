# SPDX-License-Identifier: Apache-2.0
"""``quarantine``: an entry that proved wrong is no longer a hit, in any store."""

from __future__ import annotations

import pytest

from cuda_progcache import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheStack,
    ReadOnlyError,
    ReadOnlyProgramCache,
)
from cuda_progcache.store.base import entry_digest

KEY, OTHER = b"key", b"other"
DIGEST = entry_digest(KEY)


@pytest.fixture(params=["disk", "capped", "memory", "stack"])
def store(request, tmp_path):
    made = {
        "disk": lambda: FileStreamProgramCache(tmp_path / "c"),
        "capped": lambda: FileStreamProgramCache(tmp_path / "c", max_size_bytes=1 << 20),
        "memory": InMemoryProgramCache,
        "stack": lambda: ProgramCacheStack([InMemoryProgramCache(), FileStreamProgramCache(tmp_path / "c")]),
    }[request.param]()
    made[OTHER] = b"right"
    made.publish(KEY, b"wrong", {"name": "k"})
    return made


def test_it_is_a_miss_and_can_be_stored_again(store):
    assert store.get(KEY) == b"wrong"
    store.quarantine(DIGEST)
    assert store.get(KEY) is None
    assert store.load(KEY) is None
    assert (store.get(OTHER), len(store)) == (b"right", 1)
    store[KEY] = b"healed"
    assert store.get(KEY) == b"healed"


@pytest.mark.parametrize("digest", ["0" * 64, "", "../../etc/passwd", DIGEST[:12]])
def test_there_is_none(store, digest):
    with pytest.raises(KeyError):
        store.quarantine(digest)
    store.quarantine(DIGEST)
    with pytest.raises(KeyError):
        store.quarantine(DIGEST)


def test_on_disk_it_can_be_looked_at(tmp_path):
    store = FileStreamProgramCache(tmp_path / "c", max_size_bytes=1 << 20)
    store.publish(KEY, b"wrong", {"name": "k"})
    store.pin(DIGEST)
    store.quarantine(DIGEST)
    contents = [path.read_bytes() for path in (store.path / "quarantine").iterdir()]
    assert len(contents) == 2
    assert b"wrong" in contents
    assert store.stats().corrupt == 1
    assert store.pins() == set()
    assert store.verify().ok == 0
    assert not store.verify().findings


def test_where_nothing_may_be_written(tmp_path):
    writable = FileStreamProgramCache(tmp_path / "c")
    writable[KEY] = b"wrong"
    read_only = ReadOnlyProgramCache(tmp_path / "c")
    for store in (read_only, ProgramCacheStack([InMemoryProgramCache(), read_only])):
        with pytest.raises(ReadOnlyError):
            store.quarantine(DIGEST)
    assert writable.get(KEY) == b"wrong"
