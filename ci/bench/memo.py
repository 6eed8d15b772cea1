# SPDX-License-Identifier: Apache-2.0
"""Memoized functions compared with functools, diskcache, joblib and fleche; queries over many recorded calls.

The peers are in the ``bench`` extra; a peer that isn't installed appears as a side that refuses.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, Benchmark, Goal, Refused, Sides, at_most, duration

FUNCTOOLS, DISKCACHE, JOBLIB, FLECHE = "functools", "diskcache", "joblib", "fleche"
#: Recorded calls for the benchmarks of queries; fewer with less ``--effort``.
LARGE = 100_000
#: Recorded calls for fleche in these benchmarks: it reads every one, so its time grows with them.
FLECHE_SIZE = 1_000
#: Functions among the recorded calls: a query by name selects 1 %.
NAMES = 100

Samples = dict[str, list[float]]
Entered = dict[str, "Callable[[int], int] | Refused"]


def _double(x: int) -> int:
    return x * 2


def _missing(package: str) -> Refused | None:
    try:
        importlib.import_module(package)
    except ImportError:
        return Refused(lambda: importlib.import_module(package), ImportError)
    return None


def _fleche(directory: Path | None, stack: ExitStack) -> Callable[[int], int] | Refused:
    refused = _missing("fleche")
    if refused is not None:
        return refused
    import fleche
    from fleche.caches import Cache
    from fleche.storage import CallMemory, CallPickleFile, ValueMemory, ValuePickleFile

    if directory is None:
        cache = Cache(ValueMemory({}), CallMemory({}))
    else:
        cache = Cache(
            ValuePickleFile.with_pickle(root=directory / "fleche" / "values"),
            CallPickleFile.with_pickle(root=directory / "fleche" / "calls"),
        )
    stack.enter_context(fleche.cache(cache))
    memoized: Callable[[int], int] = fleche.fleche(_double)
    return memoized


def _in_memory(stack: ExitStack) -> Entered:
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.memoize import memoize
    from cuda_progcache.memo.storage import CallMemory, ValueMemory

    return {
        OURS: memoize(Cache(ValueMemory({}), CallMemory({})), _double),
        FUNCTOOLS: functools.lru_cache(maxsize=None)(_double),
        FLECHE: _fleche(None, stack),
    }


def _in_files(directory: Path, stack: ExitStack) -> Entered:
    from cuda_progcache.memo.memoize import memoize

    sides: Entered = {OURS: memoize(directory / "ours", _double)}
    refused = _missing("diskcache")
    if refused is not None:
        sides[DISKCACHE] = refused
    else:
        import diskcache

        sides[DISKCACHE] = stack.enter_context(diskcache.FanoutCache(str(directory / "diskcache"))).memoize()(_double)
    refused = _missing("joblib")
    if refused is not None:
        sides[JOBLIB] = refused
    else:
        import joblib

        sides[JOBLIB] = joblib.Memory(directory / "joblib", verbose=0).cache(_double)
    sides[FLECHE] = _fleche(directory, stack)
    return sides


@contextmanager
def _calls(directory: Path, *, files: bool, fresh: bool) -> Iterator[Sides]:
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # joblib warns about a function of a script
        entered = _in_files(directory, stack) if files else _in_memory(stack)
        sides: dict[str, Callable[[], object] | Refused] = {}
        for name, function in entered.items():
            if isinstance(function, Refused):
                sides[name] = function
                continue
            assert function(21) == function(21) == 42
            arguments: Iterator[int] = itertools.count(1000) if fresh else itertools.repeat(21)
            sides[name] = functools.partial(_next, function, arguments)
        yield sides


def _next(function: Callable[[int], int], arguments: Iterator[int]) -> int:
    return function(next(arguments))


def _below(seconds: float, side: str) -> Goal:
    """Return the goal that ours takes at most ``seconds``, and less than a side if that side was measured."""
    return Goal(
        f"≤ {duration(seconds)}, < {side}",
        lambda medians: medians[OURS] <= seconds and medians[OURS] < medians.get(side, float("inf")),
    )


# Many recorded calls


def _size(effort: float) -> int:
    return max(FLECHE_SIZE, int(LARGE * min(1.0, effort)))


def _recorded(directory: Path, effort: float) -> Any:
    """Return a cache of many recorded calls, which the benchmarks of a run share."""
    from cuda_progcache.memo.call import Call
    from cuda_progcache.memo.memoize import file_cache

    place = directory.parent / "memo.recorded"
    cache: Any = file_cache(place)
    size = _size(effort)
    if not place.exists():
        for number in range(size):
            cache.calls.save(_call(number, Call).digest())
        time.sleep(0.1)  # each query reads directories again whose time stamps are this young
    assert cache.calls.index.count() == size
    return cache


def _call(number: int, kind: Any) -> Any:
    metadata = {"runtime": {"status": "done", "timestart": float(number), "timestop": number + 0.5, "duration": 0.5}}
    return kind(f"function_{number % NAMES}", {"x": number, "y": number % 7}, metadata, "benchmark", result=number)


def _timed(calls: int, side: Callable[[], object]) -> list[float]:
    found = []
    gc.collect()
    gc.disable()  # as the harness does for sides
    try:
        for _ in range(calls):
            start = time.perf_counter()
            side()
            found.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return found


def _rounds(effort: float, most: int = 40) -> int:
    return max(2, round(most * effort))


def _fleche_recorded(directory: Path) -> Any:
    """Return a fleche cache with fewer recorded calls, which the benchmarks share; None if fleche isn't installed."""
    if _missing("fleche") is not None:
        return None
    from fleche.caches import Cache
    from fleche.call import Call
    from fleche.storage import CallPickleFile, ValuePickleFile

    place = directory.parent / "memo.fleche"
    made = place.exists()
    cache = Cache(ValuePickleFile.with_pickle(root=place / "values"), CallPickleFile.with_pickle(root=place / "calls"))
    if not made:
        for number in range(FLECHE_SIZE):
            cache.calls.save(_call(number, Call).digest())
    return cache


def _fleche_query(directory: Path, fields: Mapping[str, Any]) -> Samples:
    cache = _fleche_recorded(directory)
    if cache is None:
        return {}
    assert cache.query(**fields).count()
    return {f"{FLECHE}, {FLECHE_SIZE:,} calls": _timed(2, lambda: cache.query(**fields).count())}


def _query(directory: Path, effort: float) -> Samples:
    cache = _recorded(directory, effort)
    fields = {"name": "function_21", "arguments": {"x": 521}}
    assert cache.query(**fields).only().to_lookup_key()
    return {OURS: _timed(_rounds(effort), lambda: cache.query(**fields).only())} | _fleche_query(directory, fields)


def _select(directory: Path, effort: float) -> Samples:
    cache = _recorded(directory, effort)
    fields = {"name": "function_21"}
    assert cache.query(**fields).count() == _size(effort) // NAMES
    return {OURS: _timed(_rounds(effort), lambda: list(cache.query(**fields)))} | _fleche_query(directory, fields)


def _expand(directory: Path, effort: float) -> Samples:
    cache = _recorded(directory, effort)
    keys = list(itertools.islice(cache.calls.list(), 0, None, 97))
    cache.expand(keys[0][:12])
    turns = itertools.cycle(keys)
    found = {OURS: _timed(_rounds(effort, 1000), lambda: cache.expand(next(turns)[:12]))}
    peer = _fleche_recorded(directory)
    if peer is not None:
        key = next(iter(peer.calls.list()))
        found[f"{FLECHE}, {FLECHE_SIZE:,} calls"] = _timed(_rounds(effort, 20), lambda: peer.expand(key[:12]))
    return found


def _refresh(directory: Path, effort: float) -> Samples:
    from cuda_progcache.memo.call import Call

    cache = _recorded(directory, effort)
    found = []
    for number in range(_rounds(effort)):
        key = cache.calls.save(_call(10 * LARGE + number, Call).digest())
        found += _timed(1, lambda: cache.calls.index.values_with_prefix("none"))  # any query updates the index
        assert cache.calls.index.count() == _size(effort) + 1
        cache.evict(key)
        time.sleep(0.06)  # until the directory's time stamp is old enough to be trusted
        cache.calls.index.values_with_prefix("none")
    return {OURS: found}


def _rebuild(directory: Path, effort: float) -> Samples:
    cache = _recorded(directory, effort)
    cache.calls.index.close()
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (Path(cache.calls.root) / name).unlink(missing_ok=True)
    return {OURS: _timed(1, lambda: cache.calls.index.values_with_prefix("none"))}


def _hit_among_many(directory: Path, effort: float) -> Samples:
    """Time hits in a cache of many calls and hits in a cache of one call, in turns."""
    from cuda_progcache.memo.memoize import memoize

    many, one = memoize(_recorded(directory, effort), _double), memoize(directory / "one", _double)
    found: Samples = {OURS: [], "one call": []}
    assert many(21) == one(21) == 42
    for _ in range(_rounds(effort, 40)):
        found[OURS] += _timed(25, lambda: many(21))
        found["one call"] += _timed(25, lambda: one(21))
    many.cache.evict(many.digest(21))
    return found


def _grows_not() -> Goal:
    return Goal("≤ one call + 20%", lambda medians: medians[OURS] <= 1.2 * medians["one call"])


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "memo.hit_memory",
        "a memoized call with an int that hits, in memory",
        at_most(10e-6),
        functools.partial(_calls, files=False, fresh=False),
    ),
    Benchmark(
        "memo.hit_files",
        "a memoized call with an int that hits, in files",
        _below(25e-6, DISKCACHE),
        functools.partial(_calls, files=True, fresh=False),
    ),
    Benchmark(
        "memo.miss_memory",
        "a memoized call with an int that runs, in memory",
        at_most(150e-6),
        functools.partial(_calls, files=False, fresh=True),
        rounds=20,
    ),
    Benchmark(
        "memo.miss_files",
        "a memoized call with an int that runs, in files",
        at_most(150e-6),
        functools.partial(_calls, files=True, fresh=True),
        rounds=20,
    ),
    Benchmark(
        "memo.query_name_argument",
        "one call of 100,000, by name and argument",
        at_most(2e-3),
        samples=_query,
    ),
    Benchmark("memo.query_select", "1 % of 100,000 calls, by name", at_most(20e-3), samples=_select),
    Benchmark("memo.expand", "a prefix of 12 digits among 100,000 keys", at_most(0.1e-3), samples=_expand),
    Benchmark("memo.hit_among_many", "a hit among 100,000 recorded calls", _grows_not(), samples=_hit_among_many),
    Benchmark("memo.index_refresh", "the index of 100,000 calls after one more", at_most(5e-3), samples=_refresh),
    Benchmark("memo.index_rebuild", "the index of 100,000 calls, made anew", at_most(30.0), samples=_rebuild),
)
