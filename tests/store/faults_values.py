# SPDX-License-Identifier: Apache-2.0
"""Values that name their key, writer and turn, and carry a checksum of themselves."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

from cuda_progcache._util.files import CLOCK_TICK_NS
from cuda_progcache.store import FileStreamProgramCache, entry_digest


def settle() -> None:
    """Wait until any later change of a file changes its time stamps, so that the store remembers what it verifies."""
    time.sleep(CLOCK_TICK_NS * 1.3e-9)


def value(key: bytes, who: int, turn: int) -> bytes:
    """Return the value that writer ``who`` publishes under ``key`` in turn ``turn``: 50 bytes to 8 kB."""
    length = random.Random(f"{who}/{turn}").choice((0, 40, 700, 4096, 8000))
    body = b"%s %d %d " % (key, who, turn) + random.Random(turn * 1000 + who).randbytes(length)
    return hashlib.sha256(body).digest() + body


def record(who: int, turn: int) -> dict[str, object]:
    """Return the record that is published with :func:`value`."""
    return {"name": "k", "who": who, "turn": turn, "log": "x" * (turn % 5 * 100)}


def check(key: bytes, data: bytes) -> tuple[int, int]:
    """Assert that ``data`` is a whole value of ``key``; return (who, turn)."""
    assert hashlib.sha256(data[32:]).digest() == data[:32], "torn"
    name, who, turn, _ = data[32:].split(b" ", 3)
    assert name == key, "another key's"
    return int(who), int(turn)


def check_lookups(store: FileStreamProgramCache, key: bytes) -> int:
    """Assert that ``get`` and ``load`` return a correct value or None; return the number of hits (0 to 2)."""
    data, entry = store.get(key), store.load(key)
    if data is not None:
        check(key, data)
    if entry is not None:
        who, turn = check(key, entry.data)
        assert dict(entry.record) == record(who, turn), "another version's record"
    return (data is not None) + (entry is not None)


def publish(store: FileStreamProgramCache, key: bytes, who: int, turn: int) -> bool:
    """Publish :func:`value` with its :func:`record`; return whether it was stored."""
    return store.publish(key, value(key, who, turn), record(who, turn))


def entry_path(root: Path, key: bytes) -> Path:
    """Return the path of the entry of ``key``."""
    digest = entry_digest(key)
    return root / "entries" / digest[:2] / digest[2:]


def record_path(root: Path, key: bytes) -> Path:
    """Return the path of the record of ``key``."""
    digest = entry_digest(key)
    return root / "records" / digest[:2] / digest[2:]


def staged(root: Path) -> list[str]:
    """Return the names in the staging directory."""
    try:
        return sorted(path.name for path in (root / "tmp").iterdir())
    except FileNotFoundError:
        return []


def assert_works(root: Path, **settings: object) -> None:
    """Assert that a new store on ``root`` can write, read, replace and remove an entry."""
    store = FileStreamProgramCache(root, durability="none", **settings)  # type: ignore[arg-type]
    key = b"afterwards"
    for turn in (1, 2):
        assert publish(store, key, 0, turn)
        assert store.get(key) == value(key, 0, turn)
        assert store.load(key) == (value(key, 0, turn), record(0, turn))
    del store[key]
    assert store.get(key) is None
    assert store.stats().dropped == 0


def assert_within(root: Path, cap: int) -> None:
    """Assert that after three more writes the entries fit within the cap."""
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=cap)
    for turn in range(3):
        assert publish(store, b"settle %d" % turn, 0, turn)
    entries = [path for path in (root / "entries").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in entries) <= cap
    assert store.stats().bytes <= cap
