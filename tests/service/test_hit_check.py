# SPDX-License-Identifier: Apache-2.0
"""Hits that are compiled again: the right ones are confirmed, the wrong ones put away and told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgCacheWarning,
    ProgramCacheStack,
    ProgramOptions,
    ReadOnlyProgramCache,
    subscribe,
)
from cuda_progcache.service import hit_check
from cuda_progcache.service.hit_check import HitCheck, HitCheckStats

SOURCE = '#include "value.h"\nextern "C" __global__ void k(int *a) { *a = VALUE; }\n'
DEADLINE = 600.0


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def value(number):
        path = folder / "value.h"
        path.write_text(f"#define VALUE {number}\n")
        os.utime(path, (1, 1))

    value(1)
    return value


@pytest.fixture
def cache(tmp_path):
    return FileStreamProgramCache(tmp_path / "cache", durability="none")


@pytest.fixture
def heard():
    events = []
    unsubscribe = subscribe(events.append)
    yield lambda kind: [event for event in events if event.kind == kind]
    unsubscribe()


def compile_(service, source=SOURCE):
    return service.compile(source, options=ProgramOptions(arch="sm_80"))


def poison(store, digest_of, data=b"\x7fELF not what the compiler made"):
    """Publish other bytes under a program's key, well formed, as a mistake in the key or a bad neighbour would."""
    record = dict(digest_of.record)
    assert store.publish(bytes.fromhex(record["key"]), data, record)


def stats(service):
    assert service.hit_check.wait(DEADLINE)
    return service.hit_check.stats


def test_right_hits_are_confirmed(cache, project, library_dir, heard):
    service = CompileService(cache, library=library_dir, verify_rate=1.0)
    for _ in range(2):
        compile_(service)
        service.kernel("typed", arch="sm_80")
        service.kernel("pair", arch=["sm_80", "sm_90"])
        service.kernel("ir", arch="sm_80")
    assert stats(service) == HitCheckStats(confirmed=5)
    assert not heard("mismatch")


@pytest.mark.parametrize("kind", ["disk", "memory", "stack"])
def test_a_wrong_hit_is_put_away(cache, project, heard, kind):
    memory = InMemoryProgramCache()
    store = {"disk": cache, "memory": memory, "stack": ProgramCacheStack([memory, cache])}[kind]
    service = CompileService(store, verify_rate=1.0)
    first = compile_(service)
    poison(store, first)
    with pytest.warns(ProgCacheWarning, match=r"hit was wrong: default_program for sm_80.*moved to the quarantine"):
        wrong = compile_(service)
        assert wrong.hit
        assert wrong.data != first.data
        assert stats(service) == HitCheckStats(mismatched=1)
    (event,) = heard("mismatch")
    assert (event.digest, event.arch) == (first.digest, "sm_80")
    assert "differs from a fresh compile" in event.reasons[0]
    healed = compile_(service)
    assert (healed.hit, healed.data) == (False, first.data)
    if kind == "disk":
        assert cache.stats().corrupt == 1
        assert len(list((cache.path / "quarantine").iterdir())) == 2, "the entry and its record"


def test_a_wrong_hit_of_a_library_kernel(cache, library_dir):
    service = CompileService(cache, library=library_dir, verify_rate=1.0)
    first = service.kernel("pair", arch="sm_80")
    poison(cache, first)
    with pytest.warns(ProgCacheWarning, match="pair for sm_80"):
        service.kernel("pair", arch="sm_80")
        assert stats(service).mismatched == 1
    assert service.kernel("pair", arch="sm_80").data == first.data


def test_where_nothing_can_be_moved_it_is_said(cache, project):
    first = compile_(CompileService(cache))
    poison(cache, first)
    service = CompileService(ReadOnlyProgramCache(cache.path), verify_rate=1.0)
    with pytest.warns(ProgCacheWarning, match="could not be moved to the quarantine"):
        compile_(service)
        assert stats(service).mismatched == 1


def test_a_header_that_changes_meanwhile_proves_nothing(cache, project, heard):
    service = CompileService(cache, verify_rate=1.0)
    compile_(service)
    check = service.hit_check
    original = check._check

    def edited_first(*arguments):
        project(2)
        return original(*arguments)

    check._check = edited_first
    assert compile_(service).hit
    assert stats(service) == HitCheckStats(inconclusive=1)
    assert not heard("mismatch")


def test_off_by_default(cache):
    assert CompileService(cache).hit_check is None
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="verify_rate"):
            CompileService(cache, verify_rate=rate)


def test_one_of_so_many(cache, project):
    hit = compile_(CompileService(cache))
    for rate, hits, drawn in ((0.25, 100, 25), (0.1, 100, 10), (1.0, 7, 7)):
        check = HitCheck(cache, rate)
        made = []
        for _ in range(hits):
            check.saw(hit, lambda made=made: made.append(1) or hit, lambda: hit)
            assert check.wait(DEADLINE)
        assert check.stats == HitCheckStats(confirmed=len(made))
        assert len(made) == drawn


def test_the_caller_does_not_wait(cache, project):
    """Hits come back while the check of an earlier one is under way; those that come too fast are passed over."""
    hit = compile_(CompileService(cache))
    check, go_on = HitCheck(cache, 1.0), threading.Event()
    for _ in range(100):
        check.saw(hit, lambda: go_on.wait(DEADLINE) and hit, lambda: hit)
    assert not check.wait(0.01)
    go_on.set()
    assert check.wait(DEADLINE)
    assert check.stats.confirmed + check.stats.passed_over == 100
    assert check.stats.passed_over >= 80


def test_a_process_ends_in_order(tmp_path):
    code = (
        "from cuda_progcache import CompileService, ProgramOptions\n"
        f"service = CompileService({str(tmp_path / 'c')!r}, verify_rate=1.0)\n"
        "for _ in range(30):\n"
        "    made = service.compile('extern \"C\" __global__ void k() {}', options=ProgramOptions(arch='sm_80'))\n"
        "print(made.hit)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_process_that_ends_finishes_the_check_under_way(cache, tmp_path):
    """A daemon thread would be abandoned in the middle of the compiler, and what it was about to find be lost."""
    source = 'extern "C" __global__ void k() {}'
    first = compile_(CompileService(cache), source)
    poison(cache, first)
    code = (
        "import threading\n"
        "from cuda_progcache import CompileService, ProgramOptions\n"
        f"service = CompileService({str(cache.path)!r}, verify_rate=1.0)\n"
        "check, began = service.hit_check._check, threading.Event()\n"
        "def at_the_end(*arguments):\n"
        "    began.set()\n"
        "    threading.main_thread().join()\n"
        "    return check(*arguments)\n"
        "service.hit_check._check = at_the_end\n"
        f"assert service.compile({source!r}, options=ProgramOptions(arch='sm_80')).hit\n"
        "assert began.wait(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert "a cache hit was wrong" in done.stderr
    assert "moved to the quarantine" in done.stderr
    assert len(cache) == 0


def test_a_forked_child_checks_its_own(cache, project):
    """In the middle of a check, too: the thread that does it isn't in the child."""
    hit = compile_(CompileService(cache))
    check, inside, go_on = HitCheck(cache, 1.0), threading.Event(), threading.Event()
    check.saw(hit, lambda: inside.set() or (go_on.wait(DEADLINE) and hit), lambda: hit)
    assert inside.wait(DEADLINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, as the test means to
        child = os.fork()
    if child == 0:
        check.saw(hit, lambda: hit, lambda: hit)
        os._exit(0 if check.wait(DEADLINE) and check.stats == HitCheckStats(confirmed=1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()
    assert check.wait(DEADLINE)
    assert check.stats == HitCheckStats(confirmed=1)


def test_without_a_thread_to_check_it_a_hit_is_used_all_the_same(cache, project, monkeypatch):
    class Threading:
        def __getattr__(self, name):
            return getattr(threading, name)

        def Thread(self, **_):  # noqa: N802 - as the module has it
            raise RuntimeError("can't start new thread")

    service = CompileService(cache, verify_rate=1.0)
    compile_(service)
    with monkeypatch.context() as patch:
        patch.setattr(hit_check, "threading", Threading())
        assert compile_(service).hit
    assert stats(service) == HitCheckStats(passed_over=1)
    assert compile_(service).hit
    assert stats(service) == HitCheckStats(passed_over=1, confirmed=1)
