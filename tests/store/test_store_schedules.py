# SPDX-License-Identifier: Apache-2.0
"""Pairs of operations on one key, in a sample of the orders of their calls; ``ci.schedules`` tries all that matter."""

from __future__ import annotations

import errno
import os

import pytest

from ci.schedules.disk import FIRST, MOUNT, Disk, on
from ci.schedules.explore import Count, every_schedule
from ci.schedules.scenarios import (
    BEFORE,
    PAIRS,
    TRIPLES,
    Scenario,
    Simulation,
    ViolationError,
    random_triples,
    try_killed,
    try_pair,
    walk,
)

#: Pairs that differ from these only in the bytes they write are left to ``ci.schedules``.
CORE = [names for names in PAIRS if not {"put again", "put other", "import"} & set(names)]
AT_MOST = 30


@pytest.fixture
def simulation():
    with Simulation().running() as simulation:
        yield simulation


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("names", CORE, ids=" | ".join)
def test_orders_of_two(simulation, before, names, record_property):
    count = Count()
    found = try_pair(simulation, before, names, count, at_most=AT_MOST)
    record_property("schedules", count.complete)
    assert found is None, found
    assert count.complete


@pytest.mark.parametrize("names", [("put", "get"), ("del", "put"), ("prune", "put"), ("clear", "put"), ("get", "put")])
def test_the_first_is_killed_at_each_of_its_calls(simulation, names):
    for before in BEFORE:
        found = try_killed(simulation, before, names, Count(), at_most=8)
        assert found is None, found


@pytest.mark.parametrize("triple", TRIPLES, ids=lambda triple: " | ".join(triple[1]) + " on " + triple[0])
def test_what_takes_three(simulation, triple):
    found, walked = walk(simulation, [triple], 80)
    assert not found, found[0]
    assert walked == 80


def test_three_at_random(simulation):
    found, walked = walk(simulation, random_triples(["put", "del", "prune", "clear", "get"], 8), 15)
    assert not found, found[0]
    assert walked == 8 * 15


def test_a_removal_that_looks_first_and_unlinks_in_place_is_found_out(simulation, monkeypatch):
    """The explorer finds the race in a check that is followed by a separate change."""
    from cuda_progcache.store import file_stream, removal

    def careless(root, digest, seen, **_):
        path = root.entry_path(digest)
        if (os.lstat(path).st_ino, os.lstat(path).st_size) != seen[:2]:
            return False
        os.unlink(path)
        os.unlink(root.record_path(digest))
        return True

    monkeypatch.setattr(removal, "take_away", careless)
    assert file_stream.FileStreamProgramCache is type(simulation.open())
    found = try_pair(simulation, "an entry", ("put", "del"), Count(), at_most=500)
    assert isinstance(found, ViolationError)


def test_it_counts_each_class_of_schedules_once(simulation):
    """Actors on different paths have one class of schedules; two actors that check and change one path have four."""
    scenario = Scenario(simulation, "nothing", ("put",))

    def make(*paths):
        def of():
            disk, _ = scenario.make()
            os.makedirs(f"{MOUNT}/cache", exist_ok=True)
            return disk, [lambda path=path: os.rmdir(path) if os.path.isdir(path) else os.mkdir(path) for path in paths]

        return of

    for paths, classes in (((f"{MOUNT}/a", f"{MOUNT}/b"), 1), ((f"{MOUNT}/a", f"{MOUNT}/a"), 4)):
        count = Count()
        seen = [[step.actor for step in e.steps] for e in every_schedule(make(*paths), count) if e]
        assert len(seen) == count.complete == classes, seen


def test_the_disk_keeps_the_rules_of_posix(tmp_path):
    """The same calls give the same results on the simulated disk and on a real one."""

    def calls(root):
        said = []

        def do(function, *args):
            try:
                result = function(*args)
                said.append(result if isinstance(result, (int, list, bytes)) and not isinstance(result, bool) else None)
            except OSError as exc:
                said.append(exc.errno)
                return None
            return result

        do(os.mkdir, f"{root}/d")
        do(os.mkdir, f"{root}/d")
        fd = os.open(f"{root}/d/f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        do(os.write, fd, b"abc")
        os.close(fd)
        do(os.open, f"{root}/d/f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        do(os.link, f"{root}/d/f", f"{root}/g")
        do(os.link, f"{root}/d/f", f"{root}/g")
        do(os.rmdir, f"{root}/d")
        reader = os.open(f"{root}/g", os.O_RDONLY)
        do(os.unlink, f"{root}/g")
        do(os.read, reader, 10)
        os.close(reader)
        do(os.rename, f"{root}/d", f"{root}/e")
        do(os.lstat, f"{root}/d/f")
        do(lambda: sorted(os.listdir(f"{root}/e")) == ["f"])
        do(os.replace, f"{root}/e", f"{root}/e/f/x")
        do(os.unlink, f"{root}/e")
        do(os.mkdir, f"{root}/e/f/x")
        return said

    real = calls(str(tmp_path))
    disk = Disk()
    with on(lambda: disk):
        assert [FIRST if isinstance(one, int) and one >= FIRST else one for one in calls(MOUNT)] == real
    assert errno.EEXIST in real


@pytest.mark.parametrize(
    ("kept", "lost", "left"), [(0, "kept", None), (9, "gone", b""), (9, "zeros", b"\0\0"), (9, "kept", b"ab")]
)
def test_a_power_cut_loses_what_was_not_synced(kept, lost, left):
    disk = Disk()
    with on(lambda: disk):
        fd = os.open(f"{MOUNT}/f", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"ab")
        os.close(fd)
    assert disk.after_power_cut(kept, lost).tree().get(f"{MOUNT}/f") == left
