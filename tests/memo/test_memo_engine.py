# SPDX-License-Identifier: Apache-2.0
"""The engine under both front ends: both give the same promises, and a call that works uncached works cached."""

from __future__ import annotations

import asyncio
import collections
import functools
import gc
import inspect
import multiprocessing
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cuda_progcache.memo.cache_dir import directory_cache
from cuda_progcache.memo.cache_file import cache_file, cache_tree_nodes, cache_tree_reset, track_file
from cuda_progcache.memo.call import Call
from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import file_cache, memoize


@pytest.fixture(params=["memoize", "cache_file"])
def keep(request, tmp_path):
    """``keep(name, **options)`` returns a decorator of one of the front ends, over a directory of that name."""
    if request.param == "memoize":
        return lambda name="kept", **options: memoize(file_cache(tmp_path / name, codec="pickle"), **options)
    return lambda name="kept", **options: cache_file(tmp_path / name)(**options)


@pytest.fixture
def recorded(tmp_path):
    """``recorded(name)`` returns the cache in a directory that either front end wrote."""

    def calls(name="kept"):
        place = tmp_path / name
        return file_cache(place) if (place / "calls").exists() else directory_cache(place)

    return calls


def test_files_compose_across_front_ends(tmp_path):
    """A call depends on the files of the calls that it makes, whichever front end caches them."""
    data = tmp_path / "data"
    data.write_text("1")
    name = [str(data)]

    @cache_file(tmp_path / "a")
    def inner(x):
        return track_file("".join(name)).read_text()

    @memoize(tmp_path / "b")
    def middle(x):
        return inner(x)

    @cache_file(tmp_path / "c")
    def outer(x):
        return middle(x)

    @memoize(tmp_path / "d")
    def direct(x):
        return track_file("".join(name)).read_text()

    functions = (inner, middle, outer, direct)
    assert [f(1) for f in functions] == ["1"] * 4 == [f(1) for f in functions]
    assert [f.counters["hits"] > 0 for f in functions] == [True] * 4
    data.write_text("2")
    assert [f(1) for f in functions] == ["2"] * 4
    (call,) = file_cache(tmp_path / "b").query(name=middle.profile.qualname)
    assert list(call.metadata["files"]) == [str(data)]


def test_declared_files_and_variables_count_in_memoize(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.write_text("1")
    monkeypatch.setenv("MODE", "a")

    def body(path, part):
        with open(path) as file:
            return file.read() + os.environ["".join(part)]

    f = memoize(tmp_path / "kept", body, files="path", env="MODE", ignore=())
    name = ("MO", "DE")
    assert (f(str(data), name), f(str(data), name)) == ("1a", "1a") and f.counters["hits"] == 1
    data.write_text("2")
    assert f(str(data), name) == "2a"
    monkeypatch.setenv("MODE", "b")
    assert f(str(data), name) == "2b"


def test_a_file_tracked_in_a_thread_of_the_body_counts(keep, tmp_path):
    data = tmp_path / "data"
    data.write_text("1")

    def body(parts):
        path = "".join(parts)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(track_file, path).result()
        return Path(path).read_text()

    f = keep()(body)
    assert f(list(str(data))) == "1"
    data.write_text("2")
    assert f(list(str(data))) == "2"
    assert track_file("no call runs here") == Path("no call runs here")


def test_a_result_that_the_state_of_the_code_went_into_never_lies_under_another_states_key(keep):
    class Config:
        k = 1

    config = Config()

    def body(x):
        return x * config.k

    f = keep()(body)
    assert f(2) == 2
    config.k = 5
    assert (f(2), f(3)) == (10, 15)
    config.k = 1
    assert (f(3), f(2)) == (3, 2)


def test_a_run_that_changes_what_counts_is_not_kept_and_says_what(keep, recorded):
    stats = {"n": 0}

    def body(x):
        stats["n"] += 1
        return x

    f = keep()(body)
    with pytest.warns(RuntimeWarning, match=r"the run changed stats, which counts; .* state=\('stats',\)"):
        assert [f(1), f(1)] == [1, 1]
    assert stats["n"] == 2 and f.counters["changed"] == 2
    g = keep("declared", state=("stats",))(body)
    assert [g(1), g(1)] == [1, 1] and stats["n"] == 3


def test_decorated_functions_take_what_their_decorator_takes(keep):
    def verbose(f):
        @functools.wraps(f)
        def wrapper(*args, loud=False, **kwargs):
            return (loud, f(*args, **kwargs))

        return wrapper

    def injecting(f):
        @functools.wraps(f)
        def wrapper(*args):
            return f("injected", *args)

        return wrapper

    def other_default(f):
        @functools.wraps(f)
        def wrapper(x=10):
            return f(x)

        return wrapper

    @keep()
    @verbose
    def one(x):
        return x

    @keep()
    @injecting
    def two(first, x):
        return (first, x)

    @keep()
    @other_default
    def three(x=0):
        return x

    for _ in range(2):
        assert (one(1, loud=True), one(1), two(1)) == ((True, 1), (False, 1), ("injected", 1))
        assert (three(0), three()) == (0, 10)
    assert not one.counters["uncached"]


def test_static_and_class_methods_in_either_order(keep):
    class Thing:
        @keep()
        @staticmethod
        def a(x):
            return x

        @staticmethod
        @keep()
        def b(x):
            return x

        @keep()
        @classmethod
        def c(cls, x):
            return (cls.__name__, x)

        @classmethod
        @keep()
        def d(cls, x):
            return (cls.__name__, x)

    for _ in range(2):
        assert (Thing.a(1), Thing().a(1), Thing.b(1)) == (1, 1, 1)
        assert (Thing.c(1), Thing().c(1), Thing.d(1)) == (("Thing", 1),) * 3


@pytest.fixture
def recursion_limit():
    """It is set back; and nobody's objects are collected where there is no room for it on the stack."""
    before = sys.getrecursionlimit()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    sys.setrecursionlimit(before)


def test_recursion_goes_as_deep_as_without_us(keep, recursion_limit):
    names = []
    sys.setrecursionlimit(len(inspect.stack()) + 400)  # Python's default of 1,000 would take longer

    def body(n, all_new):
        return 0 if n == 0 else 1 + names[0](n - 1, all_new)

    def deepest(function):
        names[:] = [function]
        depth = 50
        while depth < 3000:
            try:
                function(depth, depth)
            except RecursionError:
                break
            depth += 50
        return depth

    plain = deepest(body)
    names[:] = [keep(state=("names",))(body)]
    assert names[0](plain - 100, 0) == plain - 100
    with pytest.raises(RecursionError):
        names[0](plain + 200, 1)


def test_a_forked_worker_is_no_child_of_the_call_that_runs_in_its_parent(keep, recorded):
    def leaf(x):
        return x

    kept_leaf = keep()(leaf)

    def work(queue):
        kept_leaf(7)
        queue.put(True)

    def parent(x):
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        process.join(300)
        return queue.get()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of a fork while threads run
        assert keep(state=("work",))(parent)(1)
    leaves = [call for call in recorded().query() if "leaf" in call.name]
    assert len(leaves) == 1
    assert "parents" not in leaves[0].metadata.get("links", {})


def test_a_failed_child_is_nobodys_child(keep, recorded):
    def fails(x):
        raise ValueError

    kept = keep()(fails)

    def parent(x):
        try:
            return kept(x)
        except ValueError:
            return 0

    keep()(parent)(1)
    (call,) = recorded().query()
    assert "children" not in call.metadata.get("links", {})


def test_records_have_arguments_in_the_order_of_the_signature(keep, recorded):
    def f(a, b=1, *, c=2):
        return a

    keep()(f)(b=5, a=1)
    (call,) = recorded().query()
    assert list(call.arguments) == ["a", "b", "c"]


def test_results_are_what_the_call_returned_in_their_order(cache):
    numbers = {f"key{i:04d}": i for i in range(200)}

    @memoize(cache, code=False)
    def forward():
        return dict(numbers)

    @memoize(cache, code=False)
    def backward():
        return dict(reversed(numbers.items()))

    @memoize(cache, code=False)
    def a_digest():
        return digest([1, 2, 3])

    @memoize(cache, code=False)
    def listed():
        return [list(range(1000))]

    @memoize(cache, code=False)
    def digests():
        return [digest(list(range(1000)))]

    functions = (forward, backward, a_digest, listed, digests)
    first = [f() for f in functions]
    second = [f() for f in functions]
    assert first == second and [list(r) for r in first[:2]] == [list(r) for r in second[:2]]
    assert list(first[0]) != list(first[1])
    assert [f.counters for f in functions] == [{"misses": 1, "hits": 1}] * 5
    assert cache.gc() == set() and [f() for f in functions] == first


def test_async_calls_run_once_over_the_event_loops_of_all_threads(cache, at_once):
    runs = []

    @memoize(cache, state="runs")
    async def f(x):
        runs.append(x)
        await asyncio.sleep(0.2)
        return [x]

    results = at_once(4, lambda _: asyncio.run(f(1)))
    assert results == [[1]] * 4 and runs == [1]
    assert len({id(result) for result in results}) == 4, "each has its own list"


def test_async_rerun_runs_what_it_calls_again(cache):
    runs = []

    @memoize(cache, state="runs")
    async def inner(x):
        runs.append("inner")
        return x

    @memoize(cache, state="runs")
    async def outer(x):
        runs.append("outer")
        return await inner(x)

    async def main():
        await outer(1)
        return await outer.rerun(1)

    assert asyncio.run(main()) == 1
    assert runs == ["outer", "inner"] * 2


def test_decorators_without_their_cache_say_so():
    with pytest.raises(TypeError, match=r"write @memoize\(cache\)"):

        @memoize
        def f(x):
            return x

    with pytest.raises(TypeError, match=r"write @cache_file\(\)"):

        @cache_file
        def g(x):
            return x


def test_calls_keep_no_function_alive():
    import weakref

    def make():
        def f(x):
            return x

        Call.from_call(f, 1)
        return weakref.ref(f)

    alive = make()
    gc.collect()
    assert alive() is None


def test_texts_that_look_like_themselves_are_digested():
    assert digest(collections.UserString("a")) != digest(collections.UserString("b"))


def test_pickled_values_where_others_can_write_are_refused_and_it_is_said(tmp_path):
    store = file_cache(tmp_path / "kept", codec="pickle")
    f = memoize(store, lambda x: np.dtype("i4"))
    f(1)
    for folder in [tmp_path / "kept" / "values", *(tmp_path / "kept" / "values").iterdir()]:
        folder.chmod(0o775)
    if not hasattr(os, "getuid"):
        pytest.skip("needs Unix permissions")
    with pytest.warns(RuntimeWarning, match="are ignored: others can write there"):
        assert f(1) == np.dtype("i4")


def test_the_tree_of_calls_has_the_ids_of_the_seed(tmp_path):
    cache_tree_reset()

    @cache_file(tmp_path)
    def f(x):
        return x

    f(1)
    (name,) = cache_tree_nodes()
    (entry,) = tmp_path.iterdir()
    assert name == f"f:{entry.name.split('.')[1]}"
    cache_tree_reset()


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f = cache_file("kept", backend="PICKLE")(len)
    assert (tmp_path / "kept").is_dir()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    f("abc")
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize(
    ("pattern", "fits", "not_"),
    [
        ("a.csv", "a.csv", "ba.csv"), ("csv", "x.csv", "x.txt"), ("data_.*|x.*", "x.csv", "a.csv"),
        ("*.csv", "a.csv", "a.csv.gz"), (r"\.csv$", "a.csv", "a.csv.gz"), ("data_*.csv", "data_1.csv", "1.csv"),
    ],
)  # fmt: skip
def test_patterns(pattern, fits, not_):
    from cuda_progcache.memo.files import name_filter

    assert name_filter(pattern)(fits) and not name_filter(pattern)(not_)


def test_threads_share_nothing_that_the_engine_allows(tmp_path):
    """Once all calls in threads have ended, the recursion limit is as it was before."""
    import sys

    before = sys.getrecursionlimit()
    f = memoize(tmp_path, lambda x: x, code=False)
    threads = [threading.Thread(target=lambda n=n: [f(n * 100 + i) for i in range(20)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert sys.getrecursionlimit() == before
