# SPDX-License-Identifier: Apache-2.0
"""The promises of a store as test classes: inherit from one, override its fixture ``make``, and run pytest."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.store.base import Entry, ProgramCacheResource, entry_digest

#: Bytes that look like a cubin.
CUBIN = b"\x7fELF\x02\x01\x01\x33" + bytes(range(256)) * 8

Make = Callable[..., ProgramCacheResource]


class StoreContract:
    """The promises of every store: the five abstract methods, and the methods built on them.

    Fixtures to override:

    ``make``
        A function that makes a store. Within a test, each call opens the same location, if the store has one.
    ``store``
        The store to test. Default: ``make()``.
    ``writer``
        The store that writes programs. Default: ``store`` itself; another store if ``store`` is read-only.
    """

    @pytest.fixture
    def make(self) -> Make:
        """Return a function that makes a store, and takes options if the contract has any."""
        raise NotImplementedError("override the fixture 'make': it returns a function that makes your store")

    @pytest.fixture
    def store(self, make: Make) -> Iterator[ProgramCacheResource]:
        """Yield the store to test."""
        with make() as store:
            yield store

    @pytest.fixture
    def writer(self, store: ProgramCacheResource) -> ProgramCacheResource:
        """Return the store that writes programs."""
        return store

    def test_is_a_resource(self, store: ProgramCacheResource) -> None:
        assert isinstance(store, ProgramCacheResource)

    def test_a_miss(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        default = object()
        assert store.get(b"k") is None
        assert store.get(b"k", default) is default
        assert store.get(b"k", default=b"d") == b"d"
        assert store.load(b"k") is None
        with pytest.raises(KeyError) as excinfo:
            store[b"k"]
        assert excinfo.value.args == (b"k",)
        with pytest.raises(KeyError):
            del writer[b"k"]

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_bytes_come_back_as_bytes(
        self, store: ProgramCacheResource, writer: ProgramCacheResource, wrap: Callable[[bytes], Any]
    ) -> None:
        writer[b"k"] = wrap(CUBIN)
        assert store[b"k"] == CUBIN
        assert type(store[b"k"]) is bytes
        assert store.get(b"k") == CUBIN
        assert store.load(b"k") == Entry(CUBIN, {})

    def test_an_empty_value_is_a_value(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"k"] = b""
        assert store.get(b"k") == b""
        assert len(store) == 1

    def test_str_and_bytes_are_one_key(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer["clé"] = b"1"
        assert store["clé".encode()] == b"1"
        assert store[bytearray("clé".encode())] == b"1"  # type: ignore[index]
        writer["clé".encode()] = b"2"
        assert store["clé"] == b"2"
        assert len(store) == 1

    def test_keys_of_any_length(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        keys: list[bytes | str] = [b"", b"a", b"/", b"..", b"x" * 5000, "y" * 5000]
        for i, key in enumerate(keys):
            writer[key] = b"%d" % i
        assert [store[key] for key in keys] == [b"%d" % i for i in range(len(keys))]

    @pytest.mark.parametrize("key", [1, None, 1.5, ("k",)])
    def test_a_wrong_key_is_named(self, store: ProgramCacheResource, writer: ProgramCacheResource, key: Any) -> None:
        for call in (
            lambda: store[key],
            lambda: store.get(key),
            lambda: store.load(key),
            lambda: writer.__setitem__(key, b"v"),
            lambda: writer.__delitem__(key),
            lambda: writer.publish(key, b"v", {}),
        ):
            with pytest.raises(TypeError, match=type(key).__name__):
                call()

    @pytest.mark.parametrize("value", ["text", None, 3, object()])
    def test_a_wrong_value_is_named(
        self, store: ProgramCacheResource, writer: ProgramCacheResource, value: Any
    ) -> None:
        with pytest.raises(TypeError, match=f"bytes-like or ObjectCode, got {type(value).__name__}"):
            writer[b"k"] = value
        with pytest.raises(TypeError, match="bytes-like or ObjectCode"):
            writer.publish(b"k", value, {})
        assert store.get(b"k") is None

    def test_in_says_to_use_get(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"k"] = b"v"
        with pytest.raises(TypeError, match="get"):
            assert b"k" in store

    def test_no_iteration_by_the_sequence_protocol(self, store: ProgramCacheResource) -> None:
        with pytest.raises(TypeError):
            iter(store)  # type: ignore[call-overload]

    def test_an_empty_store_is_true(self, store: ProgramCacheResource) -> None:
        assert store

    def test_replace(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"k"] = b"old" * 100
        assert store[b"k"] == b"old" * 100
        assert writer.publish(b"k", b"new", {"n": 1}) is True
        assert store[b"k"] == b"new"
        writer[b"k"] = b"newer"
        assert store.load(b"k") == Entry(b"newer", {})
        assert len(store) == 1

    def test_delete(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"k"] = b"v"
        del writer[b"k"]
        assert store.get(b"k") is None
        assert len(store) == 0
        with pytest.raises(KeyError):
            del writer[b"k"]

    def test_update(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        pairs: dict[bytes | str, bytes] = {b"a": b"1", "b": b"2"}
        writer.update(pairs)
        writer.update([(b"b", b"3"), (b"c", b"4")])
        assert [store[key] for key in "abc"] == [b"1", b"3", b"4"]

    def test_clear(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"a"] = b"1"
        writer[b"b"] = b"2"
        assert store.get(b"a") == b"1"
        writer.clear()
        assert len(store) == 0
        assert store.get(b"a") is None
        writer[b"a"] = b"3"
        assert store[b"a"] == b"3"

    def test_close_is_no_end(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        with store, writer:
            writer[b"k"] = b"v"
        store.close()
        assert store[b"k"] == b"v"


class RecordStoreContract(StoreContract):
    """The promises of a store that keeps a record beside each entry, lists its entries, and has counters.

    Attributes
    ----------
    exact_sizes : bool
        Whether ``stats().bytes`` is exactly the size of the entries' bytes; if False, it may be larger.
    """

    exact_sizes = True

    def test_a_record_comes_back_as_json(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        record = {
            "name": "axpby",
            "components": [["schema", "1"], ["arch", "sm_90"]],
            "log": 'line 1\nline 2\r\n"quoted" \\ \u20ac \udc80 \x00',
            "symbol_mapping": {"f<int>": "_Z1fIiEvv"},
            "duration": 0.1,
            "resource_usage": None,
            "nested": {"list": [1, 2.5, True, None, {}], "empty": []},
        }
        assert writer.publish(b"k", CUBIN, record) is True
        assert store.load(b"k") == Entry(CUBIN, record)
        assert _loaded(store, "k").record == record

    def test_a_record_goes_with_its_entry(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer.publish(b"k", b"old", {"n": 1})
        assert store.load(b"k") == Entry(b"old", {"n": 1})
        writer.publish(b"k", b"new", {"n": 2})
        assert store.load(b"k") == Entry(b"new", {"n": 2})
        writer[b"k"] = b"newer"
        assert store.load(b"k") == Entry(b"newer", {})

    def test_a_record_is_no_longer_the_callers(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        headers = ["a.h"]
        writer.publish(b"k", CUBIN, {"headers": headers})
        headers.append("b.h")
        _loaded(store, b"k").record["headers"].append("c.h")
        assert _loaded(store, b"k").record == {"headers": ["a.h"]}

    @pytest.mark.parametrize("record", [{"a": object()}, {"a": b"x"}, {"a": float("nan")}, [], None])
    def test_a_record_that_is_no_json_object_is_refused(
        self, store: ProgramCacheResource, writer: ProgramCacheResource, record: Any
    ) -> None:
        with pytest.raises((TypeError, ValueError), match="a record must be a JSON object"):
            writer.publish(b"k", CUBIN, record)
        assert store.get(b"k") is None

    def test_entries_and_info(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        before = time.time()
        writer.publish(b"a", b"1" * 10, {"name": "a"})
        writer[b"b"] = b"2" * 20
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
        writer.clear()
        assert list(store.entries()) == []

    def test_resolve(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        digests: dict[str, list[int]] = {}
        for i in range(3000):  # enough for two digests that share 4 digits
            digests.setdefault(entry_digest(str(i))[:4], []).append(i)
        shared = next(group for group in digests.values() if len(group) > 1)
        for i in shared[:2]:
            writer[str(i)] = b"v"
        first, second = (entry_digest(str(i)) for i in shared[:2])
        assert store.resolve(first) == first
        assert store.resolve(second[:40].upper()) == second
        with pytest.raises(AmbiguousDigestError) as excinfo:
            store.resolve(first[:4])
        assert set(excinfo.value.matches) == {first, second}
        for wrong in ("", "abc", "xyzw", first + "0", "0" * 64, first[:3] + "/" + first[4:]):
            with pytest.raises(KeyError):
                store.resolve(wrong)

    def test_remove(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"k"] = b"v"
        writer.remove(entry_digest(b"k"))
        assert store.get(b"k") is None
        for wrong in (entry_digest(b"k"), "", "..", "0" * 64):
            with pytest.raises(KeyError):
                writer.remove(wrong)

    def test_stats_add_up(self, store: ProgramCacheResource, writer: ProgramCacheResource) -> None:
        writer[b"a"] = b"x" * 10
        writer[b"b"] = b"y" * 20
        for key in (b"a", b"b", b"a", b"c"):
            store.get(key)
        store.load(b"a")
        store.load(b"c")
        store.get(b"d", b"default")
        with pytest.raises(KeyError):
            store[b"c"]
        assert store[b"b"] == b"y" * 20
        stats = store.stats()
        assert stats.entries == 2
        assert stats.bytes == 30 or (stats.bytes > 30 and not self.exact_sizes)
        assert (stats.hits, stats.misses) == (5, 4)
        assert (stats.corrupt, stats.evicted, stats.dropped, stats.refused, stats.read_errors) == (0, 0, 0, 0, 0)


class CappedStoreContract(RecordStoreContract):
    """The promises of a store with ``max_size_bytes``; ``make`` takes it and makes a separate store."""

    @pytest.mark.parametrize("cap", [0, -1])
    def test_a_cap_must_be_positive(self, make: Make, cap: int) -> None:
        with pytest.raises(ValueError, match="positive"):
            make(max_size_bytes=cap)

    def test_the_least_recently_used_goes(self, make: Make) -> None:
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"b"] = b"b" * 100
        assert store[b"a"]
        store[b"c"] = b"c" * 100
        assert store.get(b"b") is None
        assert store.get(b"a") is not None
        assert store.get(b"c") is not None
        assert store.stats().evicted == 1

    def test_the_order_of_reads_is_exact(self, make: Make) -> None:
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

    def test_what_is_larger_than_the_cap_is_refused_and_evicts_nothing(self, make: Make) -> None:
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"big"] = b"x" * 251
        assert store.publish(b"big", b"x" * 251, {}) is False
        assert store.get(b"big") is None
        assert store.get(b"a") == b"a" * 100
        stats = store.stats()
        assert (stats.refused, stats.evicted, stats.dropped) == (2, 0, 0)
        assert store.publish(b"exact", b"x" * 250, {}) is True

    def test_a_refused_value_leaves_no_old_one(self, make: Make) -> None:
        store = make(max_size_bytes=250)
        store[b"a"] = b"a" * 100
        store[b"a"] = b"x" * 300
        assert store.get(b"a") is None

    def test_a_long_record_counts_towards_the_cap(self, make: Make) -> None:
        store = make(max_size_bytes=5000)
        store.publish(b"a", b"a", {"log": "x" * 4000})
        store.publish(b"b", b"b", {"log": "x" * 4000})
        assert store.get(b"a") is None
        assert store.get(b"b") == b"b"

    def test_replacing_does_not_count_twice(self, make: Make) -> None:
        store = make(max_size_bytes=250)
        store[b"keep"] = b"k" * 100
        for i in range(50):
            store[b"a"] = b"%03d" % i * 40
        assert store.get(b"keep") is not None
        assert store.stats().evicted == 0

    def test_threads(self, make: Make) -> None:
        store = make(max_size_bytes=64 * 40)
        errors: list[BaseException] = []
        barrier = threading.Barrier(6)

        def work(which: int) -> None:
            barrier.wait()
            try:
                for i in range(60):
                    key = b"%d" % (i % 50)
                    if which % 2:
                        store[key] = key.ljust(64)
                    else:
                        assert store.get(key) in {None, key.ljust(64)}
            except Exception as exc:  # noqa: BLE001 - the test must see every error
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert errors == []
        stats = store.stats()
        assert stats.hits + stats.misses == 3 * 60
        assert stats.corrupt == stats.dropped == 0
        store[b"last"] = b"x"
        assert store.stats().bytes <= 64 * 40


def _loaded(store: ProgramCacheResource, key: bytes | str) -> Entry:
    entry = store.load(key)
    assert entry is not None
    return entry
