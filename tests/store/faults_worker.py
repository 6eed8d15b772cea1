# SPDX-License-Identifier: Apache-2.0
"""Concurrent writers and readers on one cache directory: ``faults_worker.py ROOT '{"writers": 4, ...}'``.

One interpreter forks all of them. It prints "ready" when each has done its first turn and stops them at an end of file
on standard input. It exits with 0 if none met a wrong value, an exception, a warning or inconsistent counters.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from faults_values import check_lookups, publish  # noqa: E402

from cuda_progcache.errors import StoreError  # noqa: E402
from cuda_progcache.store import FileStreamProgramCache  # noqa: E402


def crowd(root: str, settings: dict) -> int:
    """Fork the workers, wait for the end of standard input, and return the highest exit code."""
    keys = [b"key%d" % i for i in range(settings.get("keys", 6))]
    stop_read, stop_write = os.pipe()
    ready_read, ready_write = os.pipe()
    kinds = [(write, who) for write in (True, False) for who in range(settings["writers" if write else "readers"])]
    children = []
    for write, who in kinds:
        child = os.fork()
        if not child:
            os.close(stop_write)
            status = 1
            try:
                os.set_blocking(stop_read, False)
                work(root, settings, write=write, who=who, keys=keys, stop=stop_read, ready=ready_write)
                status = 0
            except BaseException:  # noqa: BLE001 - the test must see whatever it is
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    os.close(ready_write)
    for _ in kinds:
        os.read(ready_read, 1)  # end of file if every worker died
    print("ready", *children, flush=True)
    sys.stdin.read()
    os.close(stop_write)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def work(root: str, settings: dict, *, write: bool, who: int, keys: list[bytes], stop: int, ready: int) -> None:
    """Read and write until the stop pipe closes; check every value, and the counters at the end."""
    if not settings.get("drops"):
        warnings.simplefilter("error")
    else:
        warnings.simplefilter("ignore")
    pick = random.Random(who)
    made, lookups, hits, drops, turn = [], 0, 0, 0, 0
    while True:
        if turn % 20 == 0:  # stores are also opened while the others are in use
            store = FileStreamProgramCache(root, durability=settings.get("durability", "none"),
                                           max_size_bytes=settings.get("cap"))  # fmt: skip
            made.append(store)
        turn += 1
        if write:
            key = b"own-%d-%d" % (who, turn % 40) if settings.get("own") else pick.choice(keys)
            number = settings.get("base", 0) + turn
            if turn % 3:
                drops += not publish(store, key, who, number)
            else:
                try:
                    del store[key]
                except KeyError:
                    pass
                except StoreError:
                    assert settings.get("drops")
        key = pick.choice(keys)
        hits += check_lookups(store, key)
        lookups += 2
        if turn == 1:
            os.write(ready, b".")
        try:
            if os.read(stop, 1) == b"":
                break
        except BlockingIOError:
            continue
    stats = [store.stats() for store in made]
    assert sum(each.hits for each in stats) == hits, (stats, hits)
    assert sum(each.hits + each.misses for each in stats) == lookups, (stats, lookups)
    assert sum(each.read_errors for each in stats) == 0, stats
    assert sum(each.dropped for each in stats) == drops, (stats, drops)
    assert settings.get("drops") or not drops, "a write was lost"
    assert settings.get("evicts", True) or not any(each.evicted for each in stats), "evicted where there was room"


if __name__ == "__main__":
    sys.exit(crowd(sys.argv[1], json.loads(sys.argv[2])))
