# SPDX-License-Identifier: Apache-2.0
"""The size cap under several writers: the directory's peak size, and that it settles within the cap."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cuda_progcache.store import FileStreamProgramCache

DEADLINE = 600

#: argv: root, settings. Prints "ready", waits for a line, writes, and prints how many entries it stored.
WRITER = """
import json, os, random, sys
from cuda_progcache.store import FileStreamProgramCache
root, settings = sys.argv[1], json.loads(sys.argv[2])
pick = random.Random(settings["who"])
store = FileStreamProgramCache(root, durability="none", max_size_bytes=settings["cap"])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(settings["turns"]):
    key = b"key %d" % pick.randrange(settings["keys"]) if settings["keys"] else os.urandom(16)
    data = bytes(pick.randrange(200, settings["largest"]))
    if settings["removes"] and turn % 5 == 4:
        try:
            del store[key]
        except KeyError:
            pass
    else:
        assert store.publish(key, data, {"turn": turn})
stats = store.stats()
assert stats.dropped == 0
print(stats.stored, flush=True)
"""


def start(root, **settings):
    settings = {"cap": None, "turns": 50, "keys": 0, "largest": 8000, "removes": False, **settings}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def on_disk(root):
    """Return the bytes under ``entries`` and ``tmp`` while writers rename and remove files there."""
    total = 0
    for folder in ("entries", "tmp"):
        for path in (root / folder).rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
    return total


def run(root, writers):
    """Let the writers run at once; return the peak number of bytes on disk."""
    peak = 0
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    deadline = time.monotonic() + DEADLINE
    while any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        peak = max(peak, on_disk(root))
        time.sleep(0.001)
    for writer in writers:
        said, _ = writer.communicate(timeout=DEADLINE)
        assert writer.returncode == 0
        assert int(said) > 0
    return peak


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "settings",
    [{}, {"keys": 60}, {"removes": True, "keys": 300}, {"largest": 1000}],
    ids=["own keys", "same keys", "removals", "small"],
)
def test_eight_writers_stay_near_the_cap_and_settle_within_it(root, settings):
    """No write follows: the last writer has enforced the cap, and the ledger holds the exact size."""
    cap = 75 * settings.get("largest", 8000)
    peak = run(root, [start(root, who=who, cap=cap, **settings) for who in range(8)])
    assert peak <= 1.3 * cap
    total = on_disk(root)
    assert cap * 0.2 < total <= cap
    ledger = FileStreamProgramCache(root, max_size_bytes=cap)._cap.ledger
    ledger.mark()
    assert ledger.size == total, (ledger.announced, ledger.doubts, ledger.doubtful())
    assert ledger.entries == sum(path.is_file() for path in (root / "entries").rglob("*"))


def test_a_cap_that_was_lowered_is_kept_by_all(root):
    run(root, [start(root, who=who, cap=600_000) for who in range(2)])
    run(root, [start(root, who=who, cap=100_000, turns=3) for who in range(2)])
    assert 20_000 < FileStreamProgramCache(root).stats().bytes <= 100_000


def test_writers_without_a_cap_beside_one_that_has_it(root):
    """Uncapped writers record their writes in the ledger as soon as there is one."""
    free = [start(root, who=who, turns=40) for who in range(3)]
    run(root, [*free, start(root, who=9, cap=200_000, turns=100)])
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=200_000)
    store[b"last"] = b"x"
    assert on_disk(root) <= 200_000


@pytest.mark.parametrize("turn", range(3))
def test_after_a_kill_the_next_write_settles(root, turn):
    cap = 150_000
    writers = [start(root, who=who, cap=cap, turns=100_000) for who in range(4)]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    deadline = time.monotonic() + DEADLINE
    while on_disk(root) < cap * 0.9:
        assert time.monotonic() < deadline
    time.sleep(0.05 * turn)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    for writer in writers:
        writer.communicate(timeout=DEADLINE)
    store = FileStreamProgramCache(root, durability="none", max_size_bytes=cap)
    store[b"next"] = b"x" * 100
    assert store.stats().bytes <= cap
    assert Path(root / "ledger").is_file()
