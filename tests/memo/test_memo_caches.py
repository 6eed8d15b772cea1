# SPDX-License-Identifier: Apache-2.0
"""The cache hierarchy: the promises of each kind of cache."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time

import numpy as np
import pytest

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.memo.caches import (
    Cache,
    CachePool,
    CacheStack,
    FilteredCache,
    LRUCache,
    ReadOnlyMixin,
    RefreshingCache,
    Rejected,
    SizeLimitedCache,
    SizeLimitedMixin,
    _combine_expand,
    _combine_shrink,
)
from cuda_progcache.memo.call import NONE, Call, LazyCall, QueryCall
from cuda_progcache.memo.digest import Digest, digest
from cuda_progcache.memo.memoize import file_cache, memoize
from cuda_progcache.memo.storage import (
    CallMemory,
    FileCallStorage,
    FileValueStorage,
    PerKeyLockMixin,
    SerializingMixin,
    ValueMemory,
)


def memory():
    return Cache(ValueMemory({}), CallMemory({}))


def call(name="f", result=1, **arguments):
    return Call(name, arguments, result=result, module="m")


class Slow(Cache):
    """A cache that records its saves and is slow at each."""

    def save(self, one):
        self.__dict__.setdefault("saves", []).append(one)
        time.sleep(0.05)
        return super().save(one)


def test_save_and_load(cache):
    key = cache.save(call(x=[1, 2], result={"a": (1, 2)}))
    loaded = cache.load(key)
    assert isinstance(loaded, LazyCall)
    assert (loaded.name, loaded.module, loaded.result) == ("f", "m", {"a": (1, 2)})
    assert dict(loaded.arguments) == {"x": [1, 2]}
    assert loaded.fetch() == call(x=[1, 2], result={"a": (1, 2)})
    assert loaded.to_lookup_key() == key == call(x=[1, 2]).to_lookup_key()
    assert digest(loaded) == digest(call(x=[1, 2], result={"a": (1, 2)}))
    assert cache.load(key[:8]).to_lookup_key() == key
    for missing in ("f" * 64, "0" * 8):
        with pytest.raises(KeyError, match=missing):
            cache.load(missing)


def test_values_load_by_digest_wherever_they_lie(cache):
    cache.save(call(x=[1, 2], result="small"))
    assert cache.load_value(digest([1, 2])) == [1, 2]
    assert cache.load_value(digest("small")[:10]) == "small"
    with pytest.raises(KeyError):
        cache.load_value(digest("other"))


def test_a_value_that_is_gone_raises(tmp_path):
    cache = Cache(FileValueStorage(tmp_path / "v"), FileCallStorage(tmp_path / "c", inline_limit=0))
    loaded = cache.load(cache.save(call(x=5, result=6)))
    cache.values.evict(digest(5))
    cache.values.evict(digest(6))
    with pytest.raises(KeyError):
        loaded.arguments["x"]
    with pytest.raises(KeyError):
        _ = loaded.result
    with pytest.raises(KeyError):
        loaded.fetch()


def test_an_argument_that_was_never_stored_is_its_digest(files):
    class Odd:
        def __digest__(self):
            return digest("odd")

    key = files.save(call(x=Odd()))
    assert files.load(key).arguments["x"] == digest("odd")
    other = memory()
    files.transfer(other)
    assert other.contains(key)


def test_expand_and_shrink(cache):
    keys = [cache.save(call(x=x, result=None)) for x in range(50)]
    short = cache.shrink(*keys)
    assert isinstance(short, tuple) and all(len(prefix) >= 4 for prefix in short)
    assert [cache.expand(prefix) for prefix in short] == keys
    assert cache.expand(cache.shrink(keys[0])) == keys[0]
    with pytest.raises(KeyError):
        cache.expand(keys[0][:3])
    with pytest.raises(KeyError):
        cache.shrink("0" * 64)
    with pytest.raises(TypeError):
        cache.shrink()
    assert cache.expand(digest(7)[:12]) == digest(7)


def test_prefixes_that_fit_several(tmp_path):
    storage = FileValueStorage(tmp_path)
    for last in "01":
        storage.save(last, Digest("a" * 63 + last))
    with pytest.raises(AmbiguousDigestError, match="aaaa"):
        storage.expand("aaaa")
    with pytest.raises(AmbiguousDigestError):
        storage.shrink("a" * 63 + "0")
    assert _combine_expand("a", [Digest("ab"), Digest("ab")]) == "ab"
    assert _combine_shrink("a", [Digest("ab"), Digest("abc")]) == "abc"
    with pytest.raises(AmbiguousDigestError):
        _combine_expand("a", [Digest("ab"), Digest("ac")])
    for combine in (_combine_expand, _combine_shrink):
        with pytest.raises(KeyError, match="q"):
            combine("q", [])


def test_listing_once_for_many_keys(tmp_path):
    listed = []

    class Listing(FileCallStorage):
        def list(self):
            listed.append(1)
            return super().list()

    cache = Cache(FileValueStorage(tmp_path / "v"), Listing(tmp_path / "c"))
    keys = [cache.save(call(x=x)) for x in range(5)]
    cache.shrink(*keys)
    assert len(listed) == 1


def test_query_by_any_field(cache):
    for x in range(4):
        cache.save(Call("f", {"x": x, "y": [x]}, {"g": {"n": x}}, "m", version=x % 2, result=x * 10))
    cache.save(Call("f", {"x": 9, "y": None}, {}, "m", result=None))
    cache.save(Call("g", {"x": 1}, {}, "other", result=10))

    def found(**fields):
        return sorted((c.name, c.arguments["x"]) for c in cache.query(**fields))

    assert len(found()) == 6
    assert found(name="g") == [("g", 1)]
    assert found(module="m", arguments={"x": 1}) == [("f", 1)]
    assert found(arguments={"x": digest(1)}) == [("f", 1), ("g", 1)]
    assert found(arguments={"y": [2]}) == [("f", 2)]
    assert found(arguments={"y": None}) == [("f", x) for x in (0, 1, 2, 3, 9)]
    assert found(arguments={"y": NONE}) == [("f", 9)]
    assert found(result=10) == [("f", 1), ("g", 1)]
    assert found(result=NONE) == [("f", 9)]
    assert found(version=1) == [("f", 1), ("f", 3)]
    assert found(metadata={"g": {"n": 2}}) == [("f", 2)]
    assert found(metadata={"g": {"n": None}}) == [("f", x) for x in range(4)]
    assert found(arguments={"nope": 1}) == []
    assert cache.query(QueryCall("g")).only().name == "g"
    with pytest.raises(TypeError):
        cache.query(QueryCall("g"), name="f")
    with pytest.raises(TypeError):
        cache.query(nonsense=1)


def test_what_a_query_gives(cache):
    for x, stop in enumerate((5.0, 9.0, 7.0)):
        cache.save(Call("f", {"x": x, "odd": x % 2}, {"runtime": {"timestop": stop}}, result=x))
    found = cache.query(name="f")
    assert found.count() == len(list(found)) == 3
    assert not found.empty() and cache.query(name="g").empty() and cache.query(name="g").any() is None
    assert [c.result for c in found.sorted("x", reverse=True)] == [2, 1, 0]
    assert [c.result for c in found.sorted("x").skip(1).take(1)] == [1]
    assert [c.result for c in found.sorted("x").unique("odd")] == [0, 1]
    assert {key: group.count() for key, group in found.groupby("odd").items()} == {0: 2, 1: 1}
    assert found.latest().result == 1 and found.oldest().result == 0
    assert sorted(found.filter(lambda c: c.result > 0).results()) == [1, 2]
    with pytest.raises(ValueError, match="more than one"):
        found.only()
    with pytest.raises(IndexError):
        cache.query(name="g").only()
    cache.save(Call("plain", {}, result=1))
    with pytest.raises(ValueError, match="timestop"):
        cache.query(name="plain").latest()
    found.filter(lambda c: c.result == 0).evict()
    assert sorted(found.results()) == [1, 2]  # the same query, run again


def test_table(cache):
    pd = pytest.importorskip("pandas")
    key = cache.save(Call("f", {"x": 1, "name": "n"}, {"runtime": {"timestart": 0.0, "duration": 2.0}}, "m", result=3))
    cache.save(Call("g", {"x": 2}, {}, "m", result=4))
    table = cache.table(arguments=True, results=True)
    assert len(table) == 2 and all(key.startswith(short) for short in table.index[table["name"] == "f"])
    row = table[table["name"] == "f"].iloc[0]
    assert (row["module"], row["x"], row["a_name"], row["result"], row["duration"]) == ("m", 1, "n", 3, 2.0)
    assert row["timestart"] == pd.Timestamp(0, tz="UTC")
    plain = cache.query(name="g").table(arguments="x", shrink_keys=False)
    assert list(plain.columns) == ["name", "module", "x"] and len(plain.index[0]) == 64
    assert cache.query(name="none").table().empty


def test_transfer(cache):
    other = memory()
    keys = [cache.save(call(x=x, result=x)) for x in range(3)]
    other.save(call(x=0, result="other"))
    cache.transfer(other)
    assert [other.load(key).result for key in keys] == ["other", 1, 2]
    cache.transfer(other, pop=True)
    assert all(cache.contains(key) for key in keys)
    cache.transfer(other, pop=True, overwrite=True)
    assert not any(cache.contains(key) for key in keys) and other.load(keys[0]).result == 0


def test_read_only(cache):
    key = cache.save(call())
    view = cache.readonly()
    assert view.load(key).result == 1 and view.contains(key) and view.query().count() == 1
    assert isinstance(view, ReadOnlyMixin)
    for write in (lambda: view.save(call(x=1)), lambda: view.evict(key)):
        with pytest.raises(Rejected, match="read-only"):
            write()
    assert cache.contains(key)


def test_a_filtered_cache_leaks_nothing(cache):
    shown = cache.save(call("shown", x=[1, [2]], result="yes"))
    hidden = cache.save(call("hidden", x=[3, [4]], result="no"))
    view = cache.filter(QueryCall("shown"))
    assert isinstance(view, FilteredCache)
    assert view.contains(shown) and not view.contains(hidden)
    assert view.load_value(digest("yes")) == "yes" and view.load_value(digest([1, [2]])) == [1, [2]]
    for look in (view.load, view.find, view.expand, view.shrink):
        with pytest.raises(KeyError):
            look(hidden)
    for value in ("no", [3, [4]]):
        with pytest.raises(KeyError):
            view.load_value(digest(value))
        with pytest.raises(KeyError):
            view.expand(digest(value)[:10])
    assert [c.name for c in view.query()] == ["shown"]
    assert view.expand(shown[:8]) == shown
    with pytest.raises(Rejected):
        view.save(call())
    assert cache.filter(lambda c: c.result == "no").query().only().name == "hidden"


def test_refreshing(cache):
    key = cache.save(call(result=1))
    fresh = RefreshingCache(cache)
    assert not fresh.contains(key)
    for load in (fresh.load, fresh.find):
        with pytest.raises(KeyError):
            load(key)
    fresh.save(call(result=2))
    assert cache.load(key).result == 2


def test_a_stack_loads_from_the_nearest_and_fills_every_level_below(files):
    bottom, middle = memory(), memory()
    stack = CacheStack((bottom, middle, files))
    key = files.save(call(x=np.arange(3), result="r"))
    assert stack.load(key).result == "r"
    assert bottom.load(key).result == middle.load(key).result == "r"
    assert stack.save(call("new")) and bottom.query(name="new").count() == 1 and middle.query(name="new").empty()
    assert sorted(c.name for c in stack.query()) == ["f", "new"]
    assert stack.expand(key[:8]) == key and key.startswith(stack.shrink(key))
    stack.evict(key)
    assert not any(cache.contains(key) for cache in (bottom, middle, files, stack))
    with pytest.raises(KeyError, match=key):
        stack.load(key)
    with pytest.raises(ValueError, match="nested"):
        CacheStack((stack,))
    assert bottom.push(middle).stack == (middle, bottom)
    assert stack.push(memory()).stack[1:] == stack.stack


def test_what_programs_of_the_design_it_follows_call_by_keyword():
    one, other = (Cache(ValueMemory({}), CallMemory({})) for _ in range(2))
    key = other.save(Call("f", {"x": 1}, result=2))
    stack = CacheStack(stack=(one, other))
    assert _combine_expand(key="ab", results=[Digest("abcd")]) == _combine_shrink(key="ab", results=[Digest("abcd")])
    assert stack._first_hit(op=lambda cache: cache.load(key)).result == 2
    stack._backfill(key=key, lc=other.load(key))
    assert one.load(key).result == 2


@pytest.mark.parametrize("mixin", [PerKeyLockMixin, SerializingMixin])
def test_locks_go_before_any_storage_and_a_limit_before_any_cache(mixin):
    class Values(mixin, ValueMemory):
        __hash__ = object.__hash__

    class Calls(mixin, CallMemory):
        __hash__ = object.__hash__

    @dataclasses.dataclass(frozen=True)
    class Limited(SizeLimitedMixin, Cache):
        max_size: int

        def _pick_eviction_target(self, keys):
            return min(keys)

    cache = Limited(Values({}), Calls({}), 1)
    for x in range(6):
        key = cache.save(Call("f", {"x": x}, result=x))
        assert [call.to_lookup_key() for call in cache.query()] == [key]  # the new call is never evicted
    assert not issubclass(SizeLimitedMixin, Cache)  # it can be mixed into other caches, too


def test_a_backfill_happens_once_under_concurrency(at_once):
    bottom, top = Slow(ValueMemory({}), CallMemory({})), memory()
    stack = CacheStack((bottom, top))
    key = top.save(call(result="r"))
    assert at_once(8, lambda _: stack.load(key).result) == ["r"] * 8
    assert len(bottom.saves) == 1


def test_a_failing_backfill_is_logged_and_the_hit_is_a_hit(caplog):
    class Full(Cache):
        def save(self, one):
            raise OSError(28, "No space left on device")

    top = memory()
    key = top.save(call(result="r"))
    middle = memory()
    stack = CacheStack((memory().readonly(), Full(ValueMemory({}), CallMemory({})), middle, top))
    with caplog.at_level(logging.WARNING):
        assert stack.load(key).result == "r"
    assert sum("Failed to transfer" in message for message in caplog.messages) == 2
    assert middle.contains(key)


def test_the_three_ways_through_a_stack():
    one, two = memory(), memory()
    key = two.save(call())
    stack = CacheStack((one, two.readonly()))
    assert stack._first_hit(lambda cache: cache.load(key)).name == "f"
    assert len(stack._collect(lambda cache: cache.load(key))) == 1
    stack._foreach(lambda cache: cache.evict(key))  # a refusal by one level is no error
    assert two.contains(key)
    with pytest.raises(KeyError, match="nope"):
        stack._first_hit(lambda cache: cache.load("nope" * 16))
    with pytest.raises(ZeroDivisionError):
        stack._foreach(lambda cache: 1 / 0)


def test_a_pool_reads_and_never_writes(files):
    one = memory()
    key = files.save(call(result="r"))
    pool = CachePool((one, files))
    assert pool.load(key).result == "r" and not one.contains(key)
    assert pool.contains(key) and pool.query().count() == 1
    with pytest.raises(Rejected):
        pool.save(call())
    with pytest.raises(KeyError, match="f" * 64):
        pool.load("f" * 64)


def test_a_size_limit_holds_for_all_instances_on_a_directory(tmp_path):
    def limited():
        plain = file_cache(tmp_path)
        return SizeLimitedCache(plain.values, plain.calls, max_size=3)

    one, two = limited(), limited()
    for x in range(4):
        one.save(call(x=x, owner="one"))
        two.save(call(x=x, owner="two"))
    assert file_cache(tmp_path).query().count() == 3
    assert hash(one) and len(one._keys) == 3


def test_values_go_with_the_calls_that_are_evicted(tmp_path):
    for values, calls in (
        (ValueMemory({}), CallMemory({})),
        (FileValueStorage(tmp_path / "v"), FileCallStorage(tmp_path / "c", inline_limit=0)),
    ):
        cache = SizeLimitedCache(values, calls, max_size=2)
        for x in range(6):
            cache.save(call(x=[x, [x]], result=f"r{x}", shared="s"))
        kept = {digest(value) for c in cache.query() for value in (*c.arguments.values(), c.result)}
        assert kept <= set(values.list())
        assert digest("s") in kept and cache.query().count() == 2
        assert sum(digest(f"r{x}") in set(values.list()) for x in range(6)) == 2


def test_which_call_goes(memory_cache):
    class Oldest(SizeLimitedCache):
        def _pick_eviction_target(self, keys):
            return min(keys, key=lambda key: self.load(key).arguments["x"])

    cache = Oldest(ValueMemory({}), CallMemory({}), max_size=2)
    for x in range(5):
        cache.save(call(x=x))
    assert sorted(c.arguments["x"] for c in cache.query()) == [3, 4]
    lru = LRUCache(ValueMemory({}), CallMemory({}), max_size=2)
    keys = [lru.save(call(x=x)) for x in range(2)]
    lru.find(keys[0])
    lru.save(call(x=2))
    assert sorted(c.arguments["x"] for c in lru.query()) == [0, 2]


def test_redigest_files_calls_under_their_new_keys(cache, monkeypatch):
    from cuda_progcache.memo import digest as module

    old = cache.save(call(x=1, result=2))
    kept = cache.save(call(x="a", result="b"))
    original = module._digest_bytes
    monkeypatch.setattr(module, "_digest_bytes", lambda v: original(f"new {v}") if type(v) is int else original(v))
    cache.redigest()
    new = call(x=1).to_lookup_key()
    assert new != old and not cache.contains(old) and cache.contains(kept)
    assert (cache.load(new).arguments["x"], cache.load(new).result) == (1, 2)


class TestCollection:
    """Tests of ``gc``: it removes values that no call refers to, except those of calls in flight."""

    @pytest.fixture(params=["memory", "files", "destructured files"])
    def cache(self, request, tmp_path):
        if request.param == "memory":
            return Cache(ValueMemory({}, remaining_depth=0), CallMemory({}))
        depth = float("inf") if request.param == "files" else 0
        return Cache(
            FileValueStorage(tmp_path / "v", remaining_depth=depth), FileCallStorage(tmp_path / "c", inline_limit=0)
        )

    def test_only_orphans_go(self, cache):
        key = cache.save(call(x=[1, [2, 3]], result=[4]))
        orphan = cache.values.save("orphan")
        assert cache.gc() == {orphan}
        assert cache.load(key).fetch() == call(x=[1, [2, 3]], result=[4])
        assert cache.gc() == set()
        cache.evict(key)
        assert cache.gc() and not list(cache.values.list())

    def test_never_an_argument_of_a_running_call(self, cache):
        removed = []

        def body(x):
            removed.append(cache.gc())
            return len(x)

        f = memoize(cache, body, state=("removed", "cache"))
        f([1, [2, 3]])
        assert removed == [set()]
        assert f.query().only().arguments["x"] == [1, [2, 3]]
        assert cache.gc() == set()

    def test_an_abandoned_call_lets_its_values_go(self, cache):
        def body(x):
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            memoize(cache, body)([1, [2]])
        assert cache.gc() and not list(cache.values.list())

    def test_while_others_save(self, cache, at_once):
        stop = threading.Event()

        def collect():
            while not stop.is_set():
                cache.gc()

        collector = threading.Thread(target=collect)
        collector.start()
        try:
            at_once(3, lambda t: [cache.save(call(x=[t, [i]], result=[t, i % 3])) for i in range(15)])
        finally:
            stop.set()
            collector.join(300)
        assert len([c.fetch() for c in cache.query()]) == 45


def test_pins_of_dead_processes_are_removed(files):
    import os

    pins = os.path.join(files.values.root, "pins")
    os.makedirs(pins)
    orphan = files.values.save("orphan")
    with open(os.path.join(pins, "000000000000-0-1-1.1-1"), "w") as stranger:
        stranger.write(f"{orphan}\n")
    assert files.gc() == set()  # a pin of another machine: whether its process is alive is unknown
    os.unlink(os.path.join(pins, "000000000000-0-1-1.1-1"))
    from cuda_progcache._util.liveness import current_owner

    dead = current_owner()._replace(start=1)
    with open(os.path.join(pins, f"{dead}.1-1"), "w") as left:
        left.write(f"{orphan}\n")
    assert files.gc() == {orphan} and not os.listdir(pins)


def test_a_shrunk_key_is_unambiguous_among_values_too(memory_cache):
    key = memory_cache.save(call())
    memory_cache.values.save("stranger", Digest(key[:9] + ("0" if key[9] != "0" else "1") * 55))
    assert memory_cache.shrink(key) == key[:10]
    assert memory_cache.expand(key[:10]) == key


def test_a_subclass_with_a_load_of_its_own_is_asked_by_it(tmp_path):
    asked = []

    class Counting:
        def load(self, key):
            asked.append(key)
            return super().load(key)

    class CountingCache(Counting, Cache):
        pass

    class CountingStack(CacheStack):
        def load(self, key):
            asked.append(key)
            return super().load(key)

    for cache in (CountingCache(ValueMemory({}), CallMemory({})), CountingStack((memory(),))):
        f = memoize(cache, lambda x: x + 1)
        asked.clear()
        assert f(1) == f(1) == 2 and f.counters["hits"] == 1
        assert asked == [f.digest(1)] * len(asked) != []


def test_a_stack_asks_a_level_only_for_the_keys_that_it_has(memory_cache):
    class Counted(Cache):
        asked = ()

        def _shrink(self, *keys):
            object.__setattr__(self, "asked", (*self.asked, keys))
            return super()._shrink(*keys)

    near, far = (Counted(ValueMemory({}), CallMemory({})) for _ in range(2))
    one, two = (cache.save(Call("f", {"x": n}, result="value")) for n, cache in enumerate((near, far)))
    value = digest("value")
    stack = CacheStack((near, far))
    assert all(key.startswith(short) for key, short in zip((one, two), stack.shrink(one, two), strict=True))
    assert (near.asked, far.asked) == (((one,),), ((two,),))
    assert all(key.startswith(short) for key, short in zip((one, value), stack.shrink(one, value), strict=True))
    with pytest.raises(KeyError):
        stack.shrink(one, "0" * 64)
