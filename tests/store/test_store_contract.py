# SPDX-License-Identifier: Apache-2.0
"""What every store promises, checked through its API; each store inherits the same class."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.store import (
    Entry,
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheResource,
    ProgramCacheStack,
    ReadOnlyProgramCache,
    entry_digest,
)

CUBIN = b"\x7fELF\x02\x01\x01\x33" + bytes(range(256)) * 8


class StoreContract:
    @pytest.fixture
    def make(self):
        """Make a store with these options; fixtures of the inheriting class override this."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, make):
        with make() as store:
            yield store

    def test_is_a_resource(self, store):
        assert isinstance(store, ProgramCacheResource)

    def test_a_miss(self, store):
        default = object()
        assert store.get(b"k") is None
        assert store.get(b"k", default) is default
        assert store.get(b"k", default=b"d") == b"d"
        assert store.load(b"k") is None
        with pytest.raises(KeyError) as excinfo:
            store[b"k"]
        assert excinfo.value.args == (b"k",)
        with pytest.raises(KeyError):
            del store[b"k"]

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_bytes_come_back_as_bytes(self, store, wrap):
        store[b"k"] = wrap(CUBIN)
        assert store[b"k"] == CUBIN
        assert type(store[b"k"]) is bytes
        assert store.get(b"k") == CUBIN
        assert store.load(b"k") == Entry(CUBIN, {})

    def test_an_empty_value_is_a_value(self, store):
        store[b"k"] = b""
        assert store.get(b"k") == b""
        assert len(store) == 1

    def test_str_and_bytes_are_one_key(self, store):
        store["clé"] = b"1"
        assert store["clé".encode()] == b"1"
        assert store[bytearray("clé".encode())] == b"1"
        store["clé".encode()] = b"2"
        assert store["clé"] == b"2"
        assert len(store) == 1

    def test_keys_of_any_length(self, store):
        keys = [b"", b"a", b"/", b"..", b"x" * 5000, "y" * 5000]
        for i, key in enumerate(keys):
            store[key] = b"%d" % i
        assert [store[key] for key in keys] == [b"%d" % i for i in range(len(keys))]

    @pytest.mark.parametrize("key", [1, None, 1.5, ("k",)])
    def test_a_wrong_key_is_named(self, store, key):
        for call in (
            lambda: store[key],
            lambda: store.get(key),
            lambda: store.load(key),
            lambda: store.__setitem__(key, b"v"),
            lambda: store.__delitem__(key),
            lambda: store.publish(key, b"v", {}),
        ):
            with pytest.raises(TypeError, match=type(key).__name__):
                call()

    @pytest.mark.parametrize("value", ["text", None, 3, object()])
    def test_a_wrong_value_is_named(self, store, value):
        with pytest.raises(TypeError, match=f"bytes-like or ObjectCode, got {type(value).__name__}"):
            store[b"k"] = value
        with pytest.raises(TypeError, match="bytes-like or ObjectCode"):
            store.publish(b"k", value, {})
        assert store.get(b"k") is None

    def test_in_says_to_use_get(self, store):
        store[b"k"] = b"v"
        with pytest.raises(TypeError, match="get"):
            assert b"k" in store

    def test_no_iteration_by_the_sequence_protocol(self, store):
        with pytest.raises(TypeError):
            iter(store)

    def test_an_empty_store_is_true(self, store):
        assert store

    def test_replace(self, store):
        store[b"k"] = b"old" * 100
        store.publish(b"k", b"new", {"n": 1})
        assert store[b"k"] == b"new"
        assert store.load(b"k") == Entry(b"new", {"n": 1})
        store[b"k"] = b"newer"
        assert store.load(b"k") == Entry(b"newer", {})
        assert len(store) == 1

    def test_delete(self, store):
        store[b"k"] = b"v"
        del store[b"k"]
        assert store.get(b"k") is None
        assert len(store) == 0
        with pytest.raises(KeyError):
            del store[b"k"]

    def test_update(self, store):
        store.update({b"a": b"1", "b": b"2"})
        store.update([(b"b", b"3"), (b"c", b"4")])
        assert [store[key] for key in "abc"] == [b"1", b"3", b"4"]

    def test_clear(self, store):
        store.update({b"a": b"1", b"b": b"2"})
        store.clear()
        assert len(store) == 0
        assert store.get(b"a") is None
        assert list(store.entries()) == []
        store[b"a"] = b"3"
        assert store[b"a"] == b"3"

    def test_close_is_no_end(self, make):
        with make() as store:
            store[b"k"] = b"v"
        store.close()
        assert store[b"k"] == b"v"

    def test_a_record_comes_back_as_json(self, store):
        record = {
            "name": "axpby",
            "components": [["schema", "1"], ["arch", "sm_90"]],
            "log": 'line 1\nline 2\r\n"quoted" \\ \u20ac \udc80 \x00',
            "symbol_mapping": {"f<int>": "_Z1fIiEvv"},
            "duration": 0.1,
            "resource_usage": None,
            "nested": {"list": [1, 2.5, True, None, {}], "empty": []},
        }
        assert store.publish(b"k", CUBIN, record) is True
        assert store.load(b"k") == Entry(CUBIN, record)
        assert store.load("k").record == record

    def test_a_record_is_no_longer_the_callers(self, store):
        record = {"headers": ["a.h"]}
        store.publish(b"k", CUBIN, record)
        record["headers"].append("b.h")
        store.load(b"k").record["headers"].append("c.h")
        assert store.load(b"k").record == {"headers": ["a.h"]}

    @pytest.mark.parametrize("record", [{"a": object()}, {"a": b"x"}, {"a": float("nan")}, [], None])
    def test_a_record_that_is_no_json_object_is_refused(self, store, record):
        with pytest.raises((TypeError, ValueError), match="a record must be a JSON object"):
            store.publish(b"k", CUBIN, record)
        assert store.get(b"k") is None

    def test_entries_and_info(self, store):
        before = time.time()
        store.publish(b"a", b"1" * 10, {"name": "a"})
        store[b"b"] = b"2" * 20
        infos = {info.digest: info for info in store.entries()}
        assert set(infos) == {hashlib.sha256(key).hexdigest() for key in (b"a", b"b")}
        info = infos[entry_digest(b"a")]
        assert (info.size, info.record) == (10, {"name": "a"})
        assert before - 0.1 <= info.created <= time.time()
        assert before - 0.1 <= info.last_used <= time.time()
        assert len(info.checksum) == 32
        assert store.info(info.digest) == info
        for wrong in ("0" * 64, "", "../../etc/passwd", info.digest[:-1], info.digest.upper()):
            with pytest.raises(KeyError):
                store.info(wrong)

    def test_resolve(self, store):
        digests = {}
        for i in range(3000):  # enough for two that share 4 digits
            digests.setdefault(entry_digest(str(i))[:4], []).append(i)
        shared = next(group for group in digests.values() if len(group) > 1)
        for i in shared[:2]:
            store[str(i)] = b"v"
        first, second = (entry_digest(str(i)) for i in shared[:2])
        assert store.resolve(first) == first
        assert store.resolve(second[:40].upper()) == second
        with pytest.raises(AmbiguousDigestError) as excinfo:
            store.resolve(first[:4])
        assert set(excinfo.value.matches) == {first, second}
        for wrong in ("", "abc", "xyzw", first + "0", "0" * 64, first[:3] + "/" + first[4:]):
            with pytest.raises(KeyError):
                store.resolve(wrong)

    def test_remove(self, store):
        store[b"k"] = b"v"
        store.remove(entry_digest(b"k"))
        assert store.get(b"k") is None
        for wrong in (entry_digest(b"k"), "", "..", "0" * 64):
            with pytest.raises(KeyError):
                store.remove(wrong)

    def test_stats_add_up(self, store):
        store[b"a"] = b"x" * 10
        store[b"b"] = b"y" * 20
        for key in (b"a", b"b", b"a", b"c"):
            store.get(key)
        store.load(b"a")
        store.load(b"c")
        store.get(b"d", b"default")
        with pytest.raises(KeyError):
            store[b"c"]
        assert store[b"b"] == b"y" * 20
        stats = store.stats()
        assert (stats.entries, stats.bytes) == (2, 30)
        assert (stats.hits, stats.misses) == (5, 4)
        assert (stats.corrupt, stats.evicted, stats.dropped, stats.refused, stats.read_errors) == (0, 0, 0, 0, 0)


class CappedStoreContract(StoreContract):
    @pytest.mark.parametrize("cap", [0, -1])
    def test_a_cap_must_be_positive(self, make, cap):
        with pytest.raises(ValueError, match="positive"):
            make(max_size_bytes=cap)

    def test_the_least_recently_used_goes(self, make):
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"b"] = b"b" * 100
        assert store[b"a"]
        store[b"c"] = b"c" * 100
        assert store.get(b"b") is None
        assert store.get(b"a") is not None
        assert store.get(b"c") is not None
        assert store.stats().evicted == 1

    def test_the_order_of_reads_is_exact(self, make):
        store = make(max_size_bytes=1000)
        keys = [b"%d" % i for i in range(10)]
        for key in keys:
            store[key] = b"v" * 100
        order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
        for i in order:
            assert store.load(keys[i]) if i % 2 else store.get(keys[i])
        for gone, i in enumerate(order):
            store[b"new%d" % gone] = b"v" * 100
            left = {info.digest for info in store.entries()}
            assert entry_digest(keys[i]) not in left
            assert {entry_digest(keys[j]) for j in order[gone + 1 :]} <= left

    def test_what_is_larger_than_the_cap_is_refused_and_evicts_nothing(self, make):
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"big"] = b"x" * 251
        assert store.publish(b"big", b"x" * 251, {}) is False
        assert store.get(b"big") is None
        assert store.get(b"a") == b"a" * 100
        stats = store.stats()
        assert (stats.refused, stats.evicted, stats.dropped) == (2, 0, 0)
        assert store.publish(b"exact", b"x" * 250, {}) is True

    def test_a_refused_value_leaves_no_old_one(self, make):
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"a"] = b"x" * 300
        assert store.get(b"a") is None

    def test_a_long_record_counts_towards_the_cap(self, make):
        store = make(max_size_bytes=5000)
        store.publish(b"a", b"a", {"log": "x" * 4000})
        store.publish(b"b", b"b", {"log": "x" * 4000})
        assert store.get(b"a") is None
        assert store.get(b"b") == b"b"

    def test_replacing_does_not_count_twice(self, make):
        store = make(max_size_bytes=250)
        store[b"keep"] = b"k" * 100
        for i in range(50):
            store[b"a"] = b"%03d" % i * 40
        assert store.get(b"keep") is not None
        assert store.stats().evicted == 0

    def test_threads(self, make):
        store = make(max_size_bytes=64 * 40)
        errors = []
        lookups = 0
        barrier = threading.Barrier(6)

        def work(which):
            nonlocal lookups
            barrier.wait()
            try:
                for i in range(60):
                    key = b"%d" % (i % 50)
                    if which % 2:
                        store[key] = key.ljust(64)
                    else:
                        value = store.get(key)
                        assert value in {None, key.ljust(64)}
            except Exception as exc:  # noqa: BLE001 - whatever it is, the test must see it
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        stats = store.stats()
        assert stats.hits + stats.misses == 3 * 60
        assert stats.corrupt == stats.dropped == 0
        store[b"last"] = b"x"
        assert store.stats().bytes <= 64 * 40


class TestFileStream(CappedStoreContract):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda **options: FileStreamProgramCache(tmp_path / "cache", durability="none", **options)


class TestInMemory(CappedStoreContract):
    @pytest.fixture
    def make(self):
        return InMemoryProgramCache


class TestStack(StoreContract):
    """Memory that forgets, a disk, and a layer that is only read."""

    @pytest.fixture
    def make(self, tmp_path):
        return lambda: stack_at(str(tmp_path))


def stack_at(directory):
    layer = FileStreamProgramCache(directory + "/layer", durability="none")
    return ProgramCacheStack(
        (
            InMemoryProgramCache(max_size_bytes=60),
            FileStreamProgramCache(directory + "/disk", durability="none"),
            ReadOnlyProgramCache(layer),
        )
    )


class TestFallback(CappedStoreContract):
    """The memory behind a default root that can't be made keeps the same promises."""

    @pytest.fixture
    def make(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "file" / "cache"))

        def make(**options):
            with pytest.warns(RuntimeWarning, match="kept in memory only"):
                return FileStreamProgramCache(**options)

        return make

    def test_a_cap_must_be_positive(self):
        with pytest.raises(ValueError, match="positive"):
            FileStreamProgramCache(max_size_bytes=0)


class LikeADict(RuleBasedStateMachine):
    """Any sequence of operations gives what a dict of (bytes, record) gives, reopened at any time or not."""

    keys = st.sampled_from(["a", b"a", "b", b"c", "d"])
    values = st.binary(max_size=40)
    records = st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=8), st.integers()), max_size=3)

    def __init__(self):
        super().__init__()
        self.model = {}
        self.lookups = self.hits = 0
        self.store = self.open()

    def open(self):
        raise NotImplementedError

    @staticmethod
    def plain(key):
        return key.encode() if isinstance(key, str) else key

    def looked(self, found):
        self.lookups += 1
        self.hits += bool(found)

    @rule(key=keys, value=values)
    def set(self, key, value):
        self.store[key] = value
        self.model[self.plain(key)] = (value, {})

    @rule(key=keys, value=values, record=records)
    def publish(self, key, value, record):
        assert self.store.publish(key, value, record)
        self.model[self.plain(key)] = (value, record)

    @rule(key=keys)
    def get(self, key):
        expected = self.model.get(self.plain(key))
        assert self.store.get(key) == (None if expected is None else expected[0])
        self.looked(expected)

    @rule(key=keys)
    def load(self, key):
        assert self.store.load(key) == self.model.get(self.plain(key))
        self.looked(self.plain(key) in self.model)

    @rule(key=keys)
    def delete(self, key):
        if self.model.pop(self.plain(key), None) is None:
            with pytest.raises(KeyError):
                del self.store[key]
        else:
            del self.store[key]

    @rule(key=keys)
    def remove(self, key):
        digest = entry_digest(key)
        if self.model.pop(self.plain(key), None) is None:
            with pytest.raises(KeyError):
                self.store.remove(digest)
        else:
            self.store.remove(digest)

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def resolve(self, data):
        digest = entry_digest(data.draw(st.sampled_from(sorted(self.model))))
        assert self.store.resolve(digest[:32]) == digest

    @invariant()
    def same_contents(self):
        assert len(self.store) == len(self.model)
        assert {info.digest: (info.size, info.record) for info in self.store.entries()} == {
            entry_digest(key): (len(value), record) for key, (value, record) in self.model.items()
        }
        stats = self.store.stats()
        assert stats.entries == len(self.model)
        assert stats.bytes == sum(len(value) for value, _ in self.model.values())
        assert (stats.hits, stats.misses) == (self.hits, self.lookups - self.hits)
        assert stats.corrupt == 0


class InMemoryLikeADict(LikeADict):
    def open(self):
        return InMemoryProgramCache()


class FileStreamLikeADict(LikeADict):
    root = None

    def __init__(self):
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        super().__init__()

    def open(self):
        return FileStreamProgramCache(self.directory.name + "/cache", durability="none")

    @rule()
    def reopen(self):
        self.store.close()
        self.store = self.open()
        self.lookups = self.hits = 0

    def teardown(self):
        self.directory.cleanup()


class StackLikeADict(FileStreamLikeADict):
    def open(self):
        return stack_at(self.directory.name)


_SETTINGS = settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
TestInMemoryLikeADict = InMemoryLikeADict.TestCase
TestInMemoryLikeADict.settings = _SETTINGS
TestFileStreamLikeADict = FileStreamLikeADict.TestCase
TestFileStreamLikeADict.settings = _SETTINGS
TestStackLikeADict = StackLikeADict.TestCase
TestStackLikeADict.settings = _SETTINGS
