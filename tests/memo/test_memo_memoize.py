# SPDX-License-Identifier: Apache-2.0
"""Memoized functions: each call runs once, and no result is wrong or lost."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import inspect
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from cuda_progcache.memo.caches import Rejected
from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import file_cache, memoize, parents
from cuda_progcache.memo.signature import Ignored, Required


class Colour(enum.Enum):
    RED = 1


def counted(cache, function, **options):
    """Return the memoized function, and the list of the arguments that it ran with."""
    runs = []

    def body(*args, **kwargs):
        runs.append((args, kwargs))
        return function(*args, **kwargs)

    body.__wrapped__, body.__signature__ = function, inspect.signature(function)
    body.__qualname__, body.__module__ = function.__qualname__, function.__module__
    return memoize(cache, body, state="runs", **options), runs


def test_positional_keyword_and_default_forms_are_one_call(cache):
    def f(a, b=2, *, c=3):
        return (a, b, c)

    memoized, runs = counted(cache, f)
    forms = [memoized(1), memoized(a=1), memoized(1, 2), memoized(1, b=2, c=3), memoized(b=2, a=1)]
    assert forms == [(1, 2, 3)] * 5
    assert len(runs) == 1
    assert memoized(1, 5) == (1, 5, 3)
    assert len(runs) == 2


def test_variable_arguments_share_keys_whatever_their_order(cache):
    def f(*args, **kwargs):
        return len(args) + len(kwargs)

    memoized, runs = counted(cache, f)
    assert memoized(1, x=1, y=2) == memoized(1, y=2, x=1) == 3
    assert len(runs) == 1


@pytest.mark.parametrize(
    "value",
    [pathlib.Path("a/b"), Colour.RED, np.arange(3), {"b": {2, 1}}, (1, [2]), 1.5, None, b"x", "x" * 100_000],
    ids=lambda value: type(value).__name__,
)
def test_arguments_of_many_types_are_cached(cache, value):
    memoized, runs = counted(cache, lambda x: 7)
    assert [memoized(value), memoized(value)] == [7, 7]
    assert len(runs) == 1 and not memoized.counters["uncached"]


@pytest.mark.parametrize(
    "value", [None, False, 0, "", (), [1, {"a": (2, {3})}], b"\0", float("inf"), 2**100, 1.0, True]
)
def test_results_come_back_equal_and_of_their_type(cache, value):
    memoized, runs = counted(cache, lambda: value)
    first, second = memoized(), memoized()
    assert first == second == value
    assert type(second) is type(value)
    assert len(runs) == 1


def test_arguments_of_one_value_and_two_types_are_two_calls(cache):
    memoized, runs = counted(cache, lambda x: type(x).__name__)
    assert [memoized(1), memoized(1.0), memoized(True), memoized(-1.0), memoized(-2.0)] == [
        "int", "float", "bool", "float", "float",
    ]  # fmt: skip
    assert len(runs) == 5


def test_two_bodies_of_one_name_are_two_functions(cache):
    made = []
    for code in ("def f(x): return x + 1", "def f(x): return x + 2"):
        space = {"__name__": "home"}
        exec(code, space)
        made.append(memoize(cache, space["f"]))
    assert [f(1) for f in made] == [2, 3]
    assert memoize(cache, code=False)(made[0].function)(1) == 2


def test_a_changed_closure_is_another_function(cache):
    def make(n):
        return memoize(cache, lambda x: x + n)

    assert [make(1)(1), make(2)(1)] == [2, 3]


def test_version_and_tags_and_ignored_arguments(cache):
    def f(x, verbose: Ignored[bool] = False, log=None):
        return x

    one, runs = counted(cache, f, version=1, ignore="log", tags={"project": "p"})
    assert one(1, verbose=True, log="a") == one(1, log="b") == 1
    assert len(runs) == 1
    two, more = counted(cache, f, version=2, ignore="log")
    two(1)
    assert len(more) == 1
    assert one.query(metadata={"tags": {"project": "p"}}).count() == 1
    with pytest.raises(ValueError, match="no parameter 'nope'"):
        memoize(cache, f, ignore="nope")


def test_required_arguments_must_be_given(cache):
    def f(x, seed: Required[int] = 0):
        return x + seed

    memoized, runs = counted(cache, f)
    memoized = memoize(cache, f)
    with pytest.warns(RuntimeWarning, match="omits seed"):
        assert memoized(1) == 1
    assert not memoized.contains(1)
    assert memoized(1, seed=0) == 1
    assert memoized.contains(1, seed=0)
    del runs


def test_exceptions_pass_and_are_not_cached(cache):
    attempts = []

    def f(x):
        attempts.append(x)
        if len(attempts) == 1:
            raise ValueError("first time")
        return x

    memoized = memoize(cache, f, state="attempts")
    with pytest.raises(ValueError, match="first time"):
        memoized(1)
    assert not memoized.contains(1)
    assert memoized(1) == memoized(1) == 1
    assert attempts == [1, 1]


def test_wrong_arguments_raise_as_the_function_would(cache):
    memoized = memoize(cache, lambda a: a)
    with pytest.raises(TypeError, match="missing 1 required"):
        memoized()
    with pytest.raises(TypeError, match="unexpected keyword"):
        memoized(1, b=2)


def test_an_uncachable_result_is_returned_counted_and_warned_of_once(cache):
    class Thing:
        pass

    memoized, runs = counted(cache, Thing)
    with pytest.warns(RuntimeWarning, match="returned but not kept"):
        assert isinstance(memoized(), Thing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(memoized(), Thing)
    assert len(runs) == 2 and memoized.counters["dropped"] == 2


def test_indigestible_arguments_run_uncached(cache):
    memoized, runs = counted(cache, sum)
    with pytest.warns(RuntimeWarning, match="isn't cached"):
        assert memoized(i for i in range(4)) == 6
    assert len(runs) == 1 and memoized.counters["uncached"] == 1


def test_trouble_in_an_arguments_digest_never_fails_a_call(cache):
    class Odd:
        def __digest__(self):
            raise ZeroDivisionError("odd")

    class Table(dict):
        def items(self):
            raise RuntimeError("no items")

    loop = []
    loop.append(loop)
    f = memoize(cache, lambda x: 7)
    with pytest.warns(RuntimeWarning, match="isn't cached"):
        assert [f(value) for value in (Odd(), Table(a=1), loop)] == [7] * 3
    assert f.counters == {"uncached": 3}


def test_a_body_that_changes_its_arguments_does_not_change_the_key(cache):
    def f(items):
        items.append(0)
        return len(items)

    memoized = memoize(cache, f)
    assert memoized([1, 2]) == 3
    assert memoized([1, 2]) == 3
    assert memoized.counters["hits"] == 1
    assert memoized.query([1, 2]).only().arguments["items"] == [1, 2]


def test_a_result_that_the_caller_changes_is_not_changed_in_the_cache(cache):
    memoized = memoize(cache, lambda: [1])
    memoized().append(2)
    memoized().append(3)
    assert memoized() == [1]


def test_eight_threads_one_run(cache, at_once):
    runs = []
    entered = threading.Event()

    def f(x):
        runs.append(x)
        entered.wait(0.2)
        return x * 2

    memoized = memoize(cache, f, state="runs")
    assert at_once(8, lambda _: memoized(21)) == [42] * 8
    assert runs == [21]


def test_threads_of_two_caches_do_not_share_a_flight(tmp_path, at_once):
    caches = [file_cache(tmp_path / str(i)) for i in range(2)]
    memoized = [memoize(cache, str, single_flight="threads") for cache in caches]
    at_once(2, lambda i: memoized[i](5))
    assert all(f.contains(5) for f in memoized)


def test_an_error_reaches_every_waiter(cache, at_once):
    def f():
        time.sleep(0.05)
        raise LookupError("none")

    memoized = memoize(cache, f)

    def call(_):
        with pytest.raises(LookupError, match="none"):
            memoized()

    at_once(4, call)


WORKER = """
import sys, os, time
from cuda_progcache.memo.memoize import memoize
def slow(x):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
    return x + 1
f = memoize(sys.argv[1], slow)
while len(sys.argv) > 3 and os.fork():
    sys.argv.pop()
os.write(1, b"%d\\n" % f(1))
"""


def test_four_processes_one_run(tmp_path):
    log = tmp_path / "log"
    script = tmp_path / "work.py"
    script.write_text(WORKER)
    arguments = [sys.executable, str(script), str(tmp_path / "cache"), str(log), "one", "two", "three"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "2\n" * 4  # of all processes, since each holds the pipe open
    assert len(log.read_text().splitlines()) == 1


def test_the_next_process_hits_under_another_hash_seed_and_directory(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from cuda_progcache.memo.memoize import memoize\n"
        "@memoize(sys.argv[1])\n"
        "def f(names, *, by={'a', 'b', 'c'}):\n"
        "    return sorted(x for x in names if x in {'a', 'b', 'd'} and (lambda y: y in by)(x))\n"
        "print(f({'a', 'b', 'd'}), dict(f.counters))\n"
    )
    printed = []
    for seed, folder in (("1", tmp_path), ("2", tmp_path / "other")):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "cache")], env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=folder, check=True, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        printed.append(done.stdout.strip())
    assert printed == ["['a', 'b'] {'misses': 1}", "['a', 'b'] {'hits': 1}"]


def test_a_recursive_function(cache):
    runs = []

    def fib(n):
        runs.append(n)
        return n if n < 2 else f(n - 1) + f(n - 2)

    f = memoize(cache, fib, state="runs")
    assert f(20) == 6765
    assert len(runs) == 21


def test_records_say_where_a_result_came_from(cache):
    @memoize(cache, tags={"job": 7})
    def inner(x):
        return x + 1

    seen = []

    @memoize(cache, state="seen")
    def outer(x):
        seen.append(parents())
        return inner(x) * 2

    started = time.time()
    assert outer(1) == 4
    child, parent = inner.query(1).only(), outer.query(1).only()
    assert child.metadata["links"]["parents"] == [parent.to_lookup_key()] == list(seen[0])
    assert parent.metadata["links"] == {"children": [child.to_lookup_key()]}
    assert child.metadata["tags"] == {"job": 7}
    assert child.metadata["runtime"]["status"] == "done"
    assert started - 1 < child.metadata["runtime"]["timestart"] <= child.metadata["runtime"]["timestop"]
    assert child.metadata["runtime"]["duration"] >= 0
    assert child.metadata["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert child.code_digest == inner.profile.code_digest
    assert parents() == ()


def test_parents_of_threads_do_not_mix(cache, at_once):
    barrier = threading.Barrier(2)

    @memoize(cache)
    def inner(x):
        return x

    @memoize(cache)
    def outer(x):
        barrier.wait(300)
        inner(x)
        barrier.wait(300)
        return x

    at_once(2, outer)
    for x in range(2):
        assert inner.query(x).only().metadata["links"]["parents"] == [outer.digest(x)]


def test_async_functions_run_once_and_keep_their_parents_apart(cache):
    runs = []

    @memoize(cache, state="runs")
    async def inner(x):
        runs.append(x)
        await asyncio.sleep(0.01)
        return x

    @memoize(cache)
    async def outer(x):
        await asyncio.sleep(0)
        return await inner(x) + 1

    async def main():
        return await asyncio.gather(outer(1), outer(2), outer(1), inner(1))

    assert asyncio.run(main()) == [2, 3, 2, 1]
    assert sorted(runs) == [1, 2]
    assert inner.query(2).only().metadata["links"]["parents"] == [outer.digest(2)]
    assert asyncio.run(main()) == [2, 3, 2, 1]
    assert len(runs) == 2


def test_rerun_runs_nested_calls_too_and_replaces_results(cache):
    answers = iter(range(10))

    @memoize(cache, code=False)
    def inner():
        return next(answers)

    @memoize(cache, code=False)
    def outer():
        return inner() * 10

    assert [outer(), outer(), outer.rerun(), outer(), inner()] == [0, 0, 10, 10, 1]


def test_helpers(cache):
    def area(r, unit="m"):
        return 3 * r * r

    f = memoize(cache, area)
    with pytest.raises(KeyError):
        f.load(1)
    assert not f.contains(1)
    f(1)
    f(2, unit="cm")
    assert f.contains(1) and f.load(1) == 3
    assert f.call(1).to_lookup_key() == f.digest(r=1) == f.query(1).only().to_lookup_key()
    assert sorted(f.query(unit="cm").results()) == [12]
    assert f.query().count() == 2
    assert f.__name__ == "area"


def test_explain_tells_what_else_is_in_a_key(cache, tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("1")
    monkeypatch.setenv("MODE", "a")
    f = memoize(cache, lambda path: 1, files="path", env="MODE")
    f(str(path))
    path.write_text("2")
    assert f.explain(str(path)) == (f"file {path} changed",)
    f(str(path))
    monkeypatch.setenv("MODE", "b")
    assert f.explain(str(path)) == ("environment variable MODE 'a' → 'b'",)


def test_explain(cache):
    def f(x, y):
        return x

    memoized = memoize(cache, f, version=1)
    assert memoized.explain(1, 2) == (f"first call of {f.__qualname__}",)
    memoized(1, 2)
    memoized(5, 6)
    assert memoized.explain(1, 3) == ("argument y 2 → 3",)
    assert memoize(cache, f, version=2).explain(5, 6) == ("version 1 → 2",)
    assert cache.explain(memoized.digest(5, 6))
    assert cache.explain(memoized.digest(1, 2)) == (f"first call of {f.__qualname__}",)

    def other(x, y):
        return y

    other.__qualname__ = f.__qualname__
    differs = "the function's code, or something it refers to, has changed"
    assert memoize(cache, other, version=1).explain(1, 2) == (differs,)


def test_a_closure_that_is_bound_anew(cache):
    step = 1
    f = memoize(cache, lambda x: x + step)
    assert f(1) == 2
    step = 5
    assert f(1) == 6
    step = 1
    assert f(1) == 2
    assert f.counters == {"misses": 2, "hits": 1}


def test_code_may_be_digested_by_another_function(cache):
    asked = []
    f = memoize(cache, lambda x: x, code=lambda function: asked.append(function) or "a" * 64)
    assert f(1) == f(1) == 1
    assert f.query().only().code_digest == "a" * 64
    assert asked == [f.function]


def test_a_memoized_function_in_a_closure_counts(cache):
    def make(body):
        inner = memoize(cache, body)
        return memoize(cache, lambda x: inner(x) + 0)

    one, two = make(lambda x: x + 1), make(lambda x: x + 2)
    assert (one(1), two(1)) == (2, 3)
    assert one.digest(1) != two.digest(1)


def test_a_digest_in_place_of_a_value(cache):
    f = memoize(cache, lambda x: [*x, 0])
    f([1, 2])
    assert f(digest([1, 2])) == [1, 2, 0]
    assert f.counters["hits"] == 1
    f2 = memoize(cache, lambda x: x + [5])  # noqa: RUF005
    assert f2(digest([1, 2])) == [1, 2, 5]
    assert f2([1, 2]) == [1, 2, 5] and f2.counters["hits"] == 1


def test_methods_have_their_instance_in_the_key(cache):
    class Shape:
        def __init__(self, sides):
            self.sides = sides

        def __digest__(self):
            return digest(("Shape", self.sides))

        @memoize(cache)
        def corners(self, extra):
            return self.sides + extra

    assert [Shape(3).corners(1), Shape(4).corners(1), Shape(3).corners(1)] == [4, 5, 4]
    assert Shape(3).corners.contains(1) and not Shape(5).corners.contains(1)


class Broken:
    """A storage whose operations all fail."""

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device")

        return fail


def test_trouble_in_the_cache_never_fails_a_call(memory_cache):
    from cuda_progcache.memo.caches import Cache

    memoized = memoize(Cache(Broken(), Broken()), lambda x: x + 1)
    with pytest.warns(RuntimeWarning):
        assert memoized(1) == 2
    assert memoized.counters["trouble"]
    refusing = memoize(memory_cache.readonly(), lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match="read-only"):
        assert refusing(1) == 2
    with pytest.raises(Rejected):
        memory_cache.readonly().save(refusing.call(1))


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    memoized = memoize(tmp_path / "file" / "cache", lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert memoized(1) == 2


def test_sets_a_callable_or_a_path_as_cache(tmp_path, memory_cache):
    assert memoize(lambda: memory_cache)(str)(1) == "1"
    assert memory_cache.query().count() == 1
    memoize(tmp_path / "here")(str)(1)
    assert file_cache(tmp_path / "here").query(name="str").only().result == "1"
    with pytest.raises(TypeError, match="memoize takes a cache"):
        memoize(5)(str)
    with pytest.raises(ValueError, match="single_flight"):
        memoize(memory_cache, single_flight="maybe")


def test_large_values_lie_in_files_of_their_own(files):
    memoized, runs = counted(files, lambda x: x * 2)
    array = np.arange(5000)
    for _ in range(2):
        assert np.array_equal(memoized(array), array * 2)
    assert len(runs) == 1
    assert len(list(files.values.list())) == 2
    assert not os.listdir(os.path.join(files.values.root, "pins"))


def test_quick_functions_take_no_lease_once_they_are_known_to_be_quick(files, monkeypatch):
    from cuda_progcache.memo import runner as module

    taken = []
    fly = module.fly
    monkeypatch.setattr(module, "fly", lambda flight, directory, *rest, **more: (
        directory and taken[-1].append(directory)) or fly(flight, directory, *rest, **more))  # fmt: skip
    f = memoize(files, lambda x: x)
    for x in range(15):
        # Run times depend on the machine, so the test sets the threshold: only the fourth run counts as slow.
        monkeypatch.setattr(module, "WORTH_A_LEASE", 0.0 if x == 3 else math.inf)
        taken.append([])
        f(x)
    leased = [bool(directories) for directories in taken]
    assert leased == [True] + [False] * 3 + [True] * 8 + [False] * 3, "eight after a slow one"


def test_parameters_may_be_called_self_and_cache(cache):
    f = memoize(cache, lambda self, cache=1: (self, cache))
    assert f(self=1, cache=2) == f(1, 2) == (1, 2)
    assert f.contains(self=1, cache=2) and f.load(self=1, cache=2) == (1, 2) and f.digest(self=1, cache=2)
    assert f.counters == {"misses": 1, "hits": 1}


def test_async_generators_are_nobodys_to_share(cache):
    async def numbers(n):
        for x in range(n):
            yield x

    async def collect():
        return [x async for x in f(3)]

    f = memoize(cache, numbers)
    with pytest.warns(RuntimeWarning, match="returned but not kept"):
        assert [asyncio.run(collect()) for _ in range(2)] == [[0, 1, 2]] * 2


def test_int_and_other_values_at_their_edges(files):
    memoized, runs = counted(files, lambda x: x)
    aware = dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    values = [10**6000, -(10**6000), -0.0, 0.0, math.nan, bytearray(b"a"), b"a", frozenset({1}), 1j, aware, range(3)]
    for value in values:
        for result in (memoized(value), memoized(value)):
            assert type(result) is type(value) and digest(result) == digest(value)
    assert len(runs) == len(values)


def test_a_file_cut_at_any_length_is_a_miss(tmp_path):
    def f(x):
        return ["r" * x]

    for size in (10, 2000):  # a result in the record, and one in its own file
        place = tmp_path / str(size)
        expected = memoize(place, f)(size)
        (kept,) = place.rglob("*.json") if size == 10 else place.rglob("*.value")
        content = kept.read_bytes()
        for length in [*range(0, len(content), 41), *range(len(content) - 5, len(content))]:
            kept.write_bytes(content[:length])
            again = memoize(place, f)
            assert again(size) == expected
            assert again.counters == {"misses": 1}, length
            assert kept.read_bytes() != content[:length]


RUNNING = """
import sys, time
from cuda_progcache.memo.memoize import memoize
def slow(text):
    print("running", flush=True)
    sys.stdin.readline()
    return [text, text]
f = memoize(sys.argv[1], slow)
f("a" * 5000)
print(len(f.query().only().arguments["text"]), flush=True)
"""


def test_collecting_spares_the_arguments_of_a_call_that_another_process_runs(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(RUNNING)
    arguments = [sys.executable, str(script), str(tmp_path / "cache")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "running\n"
        cache = file_cache(tmp_path / "cache")
        assert list(cache.values.list()) and cache.gc() == set()
        assert worker.communicate("go\n", timeout=600)[0] == "5000\n"
    assert cache.gc() == set()


def test_threads_run_a_call_once_whether_or_not_processes_agree_about_it(files, at_once):
    """Threads that make the same call share one run, even if only some of them take a lease."""
    runs, entered, go_on = [], threading.Event(), threading.Event()

    def body(x):
        runs.append(x)
        entered.set()
        assert go_on.wait(300)
        return x

    f = memoize(files, body, state="runs")

    def call(number):
        if number:
            assert entered.wait(300)
            f._leases_left = number % 2  # as a run of another call could set it
        if number == 3:
            go_on.set()
        return f(7)

    assert at_once(4, call) == [7] * 4
    assert runs == [7]


def test_arguments_that_are_equal_and_differ_are_told_apart_however_often(memory_cache):
    f = memoize(memory_cache, lambda *, x, y=0: repr((x, y)))
    values = [0, 0.0, -0.0, False, 1, 1.0, True, "1", b"1", "", b"", None, 1j, 1 << 70, 1.0 * (1 << 70), "a" * 5000]
    for _ in range(3):
        for x in values:
            assert f(x=x) == repr((x, 0)) and f(x=1, y=x) == repr((1, x))
    assert f.counters["misses"] == 2 * len(values) - 1 and f.counters["hits"] == 4 * len(values) + 1
    assert memoize(memory_cache, lambda *, x, y=0: repr((x, y))).digest(x=1) == f.digest(x=1, y=0)


def test_memoize_without_a_cache_over_a_function_without_parameters_says_so():
    @memoize
    def f():
        return 1

    with pytest.raises(TypeError, match=r"write @memoize\(cache\) above <function .*f at"):
        f()


class Plain:
    """An object without a digest as a value; as an argument, it counts by its class and attributes."""

    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("around", [list, tuple, lambda pair: dict(enumerate(pair)), lambda pair: [pair, {"in": pair}]])
def test_containers_of_ones_own_instances_are_arguments_like_any_other(cache, around):
    f = memoize(cache, len)
    for x in (1, 1, 2):
        assert f(around([Plain(0), Plain(x)])) == 2
    assert f.counters == {"misses": 2, "hits": 1}
