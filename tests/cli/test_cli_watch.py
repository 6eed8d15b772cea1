# SPDX-License-Identifier: Apache-2.0
"""``watch`` beside a process that compiles, hits and can't keep; what it sees is what the store and the records say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import history
from cuda_progcache.service import watch as service_watch
from cuda_progcache.service.watch import Watch

SOURCE = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= 2; }'


def compiled(source, cache, name="scale.cu", arch="sm_90"):
    options = ProgramOptions(name=name, arch=arch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Program(source, "c++", options).compiled("ptx", cache=cache)


@pytest.fixture
def watching(root):
    """A ``watch`` in a process of its own, which sees a cache that isn't there yet."""
    command = [sys.executable, "-m", "cuda_progcache", "watch", "--interval", "0.05", "--json", "--cache-dir", root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "waiting for one" in process.stderr.readline()
    yield process
    process.kill()
    process.communicate()


def until(process, counted, stored=0):
    """Read a watch's lines until it has shown so many counts of a kind, and so many programs; it may split counts."""
    name, count = counted
    lines = []
    while (
        sum(one[name] for one in lines if one["event"] == "counted") < count
        or sum(one["event"] == "stored" for one in lines) < stored
    ):
        lines.append(json.loads(process.stdout.readline()))
    return lines


def test_another_process_sees_a_compile_and_a_hit_as_they_come(watching, root):
    root.mkdir(mode=0o700, parents=True)
    assert f"watching {root}" in watching.stderr.readline()
    with FileStreamProgramCache(root, durability="none") as cache:
        digest = compiled(SOURCE, cache).digest
    (stored,) = (one for one in until(watching, ("stored", 1), stored=1) if one["event"] == "stored")
    assert (stored["digest"], stored["name"], stored["made_by"]["pid"]) == (digest, "scale.cu", os.getpid())
    assert stored["reasons"] == ["first compile of this program"]
    with FileStreamProgramCache(root, durability="none") as cache:
        compiled(SOURCE, cache)
    assert [one["event"] for one in until(watching, ("hits", 1))] == ["counted"]
    watching.send_signal(signal.SIGINT)
    assert watching.wait(600) == 0
    assert watching.stdout.read() == ""


def test_each_look_gives_what_came_since(root, tmp_path):
    cache = FileStreamProgramCache(root, durability="none")
    compiled(SOURCE, cache)
    watch = Watch(FileStreamProgramCache(root, durability="none"))
    assert watch.look() == ((), (), watch.look().counted)
    first = compiled(SOURCE.replace("2", "3"), cache)
    second = compiled(SOURCE, cache, arch="sm_80")
    compiled(SOURCE.replace("2", "__TIME__[1]"), cache)
    cache.export(tmp_path / "bundle.tar")
    seen = watch.look()
    assert [one.entry.digest for one in seen.stored] == [first.digest, second.digest]
    assert [("source" in one.reasons[0], "arch" in one.reasons[0]) for one in seen.stored] == [
        (True, False),
        (False, True),
    ]
    assert [(one.name, one.kind) for one in seen.unkept] == [("scale.cu", "time_macro")]
    assert (seen.counted.hits, seen.counted.stored, seen.counted.unkeyed) == (0, 2, 1)
    # What is removed and comes back is seen again; who made it isn't known of an import.
    cache.remove(first.digest)
    assert watch.look().stored == ()
    cache.import_(tmp_path / "bundle.tar")
    (again,) = watch.look().stored
    assert again.entry.digest == first.digest
    compiled(SOURCE, cache)
    assert watch.look().counted.hits == 1
    assert not any((*watch.look().stored, *watch.look().unkept, *watch.look().counted))


def test_a_program_is_seen_once_its_process_has_noted_it(root, monkeypatch):
    cache = FileStreamProgramCache(root, durability="none")
    watch = Watch(FileStreamProgramCache(root, durability="none"))
    between = []
    note = history.note

    def noted(*arguments, **more):
        between.append(watch.look().stored)
        note(*arguments, **more)

    monkeypatch.setattr(history, "note", noted)
    digest = compiled(SOURCE, cache).digest
    assert between == [()], "it was stored, and its process not known yet"
    (seen,) = watch.look().stored
    assert (seen.entry.digest, seen.made_by["pid"]) == (digest, os.getpid())
    # A process may be killed in between.
    monkeypatch.setattr(history, "note", lambda *_, **__: None)
    other = compiled(SOURCE, cache, name="other.cu").digest
    assert watch.look().stored == watch.look().stored == ()
    (seen,) = watch.look(last=True).stored
    assert (seen.entry.digest, seen.made_by) == (other, None)
    third = compiled(SOURCE, cache, name="third.cu").digest
    assert watch.look().stored == ()
    monkeypatch.setattr(service_watch, "_PATIENCE", 0.0)
    assert [one.entry.digest for one in watch.look().stored] == [third]
    assert watch.look().stored == ()


def test_it_ends_after_a_while_and_is_read_by_people(cli, root, kept, monkeypatch):
    from cuda_progcache.cli import watch

    clock = [0.0]

    def look_on(seconds):
        clock[0] += seconds
        with FileStreamProgramCache(root) as cache:
            cache.publish(b"four", b"4", {"name": "four\x1b[2J.cu", "target_type": "ptx", "arch": "sm_90"})
            cache.get(b"four")
            cache.get(b"five")

    # Not time.sleep itself, which other threads call as well.
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=look_on, monotonic=lambda: clock[0], time=time.time))
    told = cli("watch", "--for", "0.2s", "--interval", "0.2")
    assert "four\\x1b[2J.cu (ptx, sm_90), 1 B" in told.stdout
    assert "1 hit, 1 miss (50.0%), 1 stored" in told.stdout
    assert "the cache is off" in cli("watch", "--mode", "off", code=2).stderr
