# SPDX-License-Identifier: Apache-2.0
"""``cache_file``: hits and misses, alone and among many recorded calls."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, Benchmark, Goal, Refused, Sides, at_most, ratio

JOBLIB = "joblib"
CROWD = 100_000


def _add(x: int, y: int = 2) -> int:
    return x + y


def _joblib(directory: Path) -> Callable[..., Any] | Refused:
    try:
        joblib = import_module("joblib")
    except ImportError:
        return Refused(lambda: import_module("joblib"), ImportError)
    cached: Callable[..., Any] = joblib.Memory(directory / "joblib", verbose=0).cache(_add)
    return cached


@contextmanager
def _hit(directory: Path) -> Iterator[Sides]:
    from cuda_progcache.memo.cache_file import cache_file

    ours, peer = cache_file(directory / "ours")(_add), _joblib(directory)
    assert ours(1) == ours(1) == 3
    if isinstance(peer, Refused):
        yield {OURS: lambda: ours(1), JOBLIB: peer}
    else:
        assert peer(1) == 3
        yield {OURS: lambda: ours(1), JOBLIB: lambda: peer(1)}


@contextmanager
def _miss(directory: Path) -> Iterator[Sides]:
    from cuda_progcache.memo.cache_file import cache_file

    ours, peer = cache_file(directory / "ours")(_add), _joblib(directory)
    numbers, others = itertools.count(), itertools.count()
    if isinstance(peer, Refused):
        yield {OURS: lambda: ours(next(numbers)), JOBLIB: peer}
    else:
        yield {OURS: lambda: ours(next(numbers)), JOBLIB: lambda: peer(next(others))}


@contextmanager
def _crowd(directory: Path) -> Iterator[Sides]:
    from cuda_progcache.memo import call_tree
    from cuda_progcache.memo.cache_file import cache_file, cache_tree_reset

    alone, among = cache_file(directory / "alone")(_add), cache_file(directory / "among")(_add)
    cache_tree_reset()
    alone(1)
    among(1)
    for index in range(2_000):
        Path(directory / "among" / f"_add.{index:016x}.pkl").write_bytes(b"")
    for index in range(CROWD - 10):
        call_tree.register(f"_add.{index:016x}", "_add", f"{index:016x}", os.devnull)
    assert among(1) == alone(1) == 3
    try:
        yield {OURS: lambda: among(1), "alone": lambda: alone(1)}
    finally:
        cache_tree_reset()


BENCHMARKS = (
    Benchmark(
        "cache_file.hit",
        "cache_file, a hit with an int argument, files; the peer: joblib",
        Goal("≤ 1× joblib, where it is installed", lambda medians: medians[OURS] <= medians.get(JOBLIB, 1.0)),
        _hit,
    ),
    Benchmark("cache_file.miss", "the same, a miss", at_most(2e-3), _miss, rounds=20, calls=10),
    Benchmark(
        "cache_file.crowd",
        "a hit among 100,000 recorded calls; the other side: among two",
        ratio(1.25, "alone"),
        _crowd,
    ),
)
