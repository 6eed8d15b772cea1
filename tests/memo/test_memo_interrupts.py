# SPDX-License-Identifier: Apache-2.0
"""Interrupted calls: others that wait for the same call get a result, not the interrupt and not None."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cuda_progcache.memo.cache_file import cache_file
from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import file_cache, memoize

DEADLINE = 300.0
INTERRUPTS = [KeyboardInterrupt, SystemExit, GeneratorExit]


class Interrupted:
    """A function body whose first run raises an interrupt once `go_on` is set."""

    def __init__(self, interrupt):
        self.interrupt = interrupt
        self.runs = []
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __digest__(self):
        return digest("what it has seen is no part of it")

    def __call__(self, x):
        self.runs.append(x)
        if len(self.runs) == 1:
            self.entered.set()
            assert self.go_on.wait(DEADLINE)
            raise self.interrupt


def race(function, body):
    """Call the function in a thread that is interrupted, and in three more during its run; return the outcomes."""
    got = []

    def call():
        try:
            got.append(function(1))
        except body.interrupt as error:
            got.append(type(error))

    leader = threading.Thread(target=call)
    leader.start()
    assert body.entered.wait(DEADLINE)
    others = [threading.Thread(target=call) for _ in range(3)]
    for thread in others:
        thread.start()
    time.sleep(0.05)  # usually they wait by then; a late thread must get the same outcome
    body.go_on.set()
    for thread in (leader, *others):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    return got


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("single_flight", ["threads", "processes"])
def test_memoized_calls_in_threads(cache, interrupt, single_flight):
    body = Interrupted(interrupt)
    f = memoize(cache, body, single_flight=single_flight, code=False)
    got = race(f, body)
    assert sorted(got, key=str) == sorted([interrupt, None, None, None], key=str)
    assert len(body.runs) == 2 and f.contains(1)


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_cache_file_in_threads(tmp_path, interrupt):
    body = Interrupted(interrupt)

    def work(x):
        return body(x)

    got = race(cache_file(tmp_path / "store")(work), body)
    assert sorted(got, key=str) == sorted([interrupt, None, None, None], key=str)
    assert not list((tmp_path / "store").glob("*.computing"))


WORKER = """
import os, sys, time
from cuda_progcache.memo.memoize import memoize

def slow(x):
    with open(sys.argv[2], "a") as log:
        log.write("run\\n")
    if sys.argv[3:] == ["leader"]:
        time.sleep(600)
    return x + 1

def start(*role):
    if child := os.fork():
        return child
    result = 99
    try:
        sys.argv[3:] = role
        result = memoize(sys.argv[1], slow)(1)
    finally:
        os._exit(result)

leader = start("leader")
end = time.monotonic() + 300
while not os.path.exists(sys.argv[2]) and time.monotonic() < end:
    time.sleep(0.01)
followers = [start(), start()]
time.sleep(0.3)
os.kill(leader, int(sys.argv[3]))
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (leader, *followers)))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes(tmp_path, how):
    """Processes that wait for another process's run get a result after that process is interrupted or killed."""
    script, log = tmp_path / "work.py", tmp_path / "log"
    script.write_text(WORKER)
    arguments = [sys.executable, str(script), str(tmp_path / "cache"), str(log), str(int(how))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE, check=True)
    leader, *followers = done.stdout.split()
    assert followers == ["2", "2"] and leader in {"99", str(-how)}
    leases = tmp_path / "cache" / "calls" / "leases"
    assert not os.listdir(leases)


def test_a_cancelled_task_hands_over(cache):
    runs, entered = [], []

    @memoize(cache, code=False)
    async def f(x):
        runs.append(x)
        entered[0].set()
        if len(runs) == 1:
            await asyncio.sleep(600)
        return x * 2

    async def main():
        entered.append(asyncio.Event())
        leader = asyncio.create_task(f(1))
        await entered[0].wait()
        waiters = [asyncio.create_task(f(1)) for _ in range(3)]
        given_up = asyncio.create_task(f(1))
        await asyncio.sleep(0)
        given_up.cancel()
        leader.cancel()
        results = await asyncio.wait_for(asyncio.gather(*waiters), DEADLINE)
        gone = await asyncio.gather(leader, given_up, return_exceptions=True)
        return results, [type(error) for error in gone]

    assert asyncio.run(main()) == ([2, 2, 2], [asyncio.CancelledError] * 2)
    assert runs == [1, 1] and f.contains(1)


def test_a_cancelled_waiter_leaves_the_run_alone(cache):
    runs = []

    @memoize(cache, code=False)
    async def f(x):
        runs.append(x)
        await asyncio.sleep(0.05)
        return x * 2

    async def main():
        leader = asyncio.create_task(f(1))
        await asyncio.sleep(0)
        waiter = asyncio.create_task(f(1))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        return await leader

    assert asyncio.run(main()) == 2
    assert runs == [1] and f.contains(1)


def test_an_interrupted_call_leaves_no_pins_and_no_record(tmp_path):
    cache = file_cache(tmp_path)

    def body(x):
        raise KeyboardInterrupt

    f = memoize(cache, body)
    with pytest.raises(KeyboardInterrupt):
        f("a" * 5000)
    assert not f.contains("a" * 5000)
    assert cache.gc() and not os.listdir(tmp_path / "values" / "pins")
