# SPDX-License-Identifier: Apache-2.0
"""Storages: values load as they were saved; damaged and foreign files are misses."""

from __future__ import annotations

import datetime as dt
import decimal
import os
import pathlib
import pickle
import threading
import time
import uuid
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache._util.files import is_settled
from cuda_progcache.memo.caches import Cache
from cuda_progcache.memo.call import Call
from cuda_progcache.memo.digest import Digest, digest
from cuda_progcache.memo.memoize import file_cache, memoize
from cuda_progcache.memo.storage import (
    CallMemory,
    DestructuringMixin,
    FileCallStorage,
    FileValueStorage,
    HasChildDigests,
    MemoryBackend,
    PerKeyLockMixin,
    SaveError,
    SerializingMixin,
    ValueMemory,
    ValueMixin,
    codecs,
)

SECRET = b"s" * 32

# The same examples in every run, however slow the machine, so that a failure always means a regression.
EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.text(st.characters(categories=["Cs", "L"]))
)  # fmt: skip
hashable = st.integers() | st.text() | st.tuples(st.integers(), st.binary())
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(hashable, inner) | st.sets(hashable)
    | st.dictionaries(st.just("$"), inner) | st.frozensets(hashable),
    max_leaves=12,
)  # fmt: skip


def same(one, other):
    """Return whether two values are equal and have the same types throughout."""
    return digest(one) == digest(other)


@EXAMPLES
@given(values)
def test_codecs_give_back_what_they_got(value):
    codec, payload = codecs.encode(value)
    assert same(codecs.decode(codec, payload), value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6).reshape(2, 3), np.float32(1.5), np.array(3), {"a": np.arange(2)}, pathlib.Path("a/b"),
        uuid.UUID(int=3),        dt.datetime(2024, 5, 6, 7, tzinfo=dt.UTC), dt.date(2024, 1, 1), dt.time(3, 4),
        dt.timedelta(1, 2, 3), decimal.Decimal("1.10"), Fraction(1, 3), range(1, 9, 2), bytearray(b"x"),
        digest("x"),        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), float("nan"),
        complex(float("nan"), -0.0),
        -0.0, 2**200,
    ],
    ids=repr,
)  # fmt: skip
def test_files_give_back_what_they_got(tmp_path, value):
    storage = FileValueStorage(tmp_path)
    key = storage.save(value, digest(repr(value)))
    found = storage.load(key)
    assert type(found) is type(value) and same(found, value)


@dataclass
class Point:
    x: int


def test_what_no_safe_codec_takes(tmp_path):
    for value in (Point(1), object(), lambda: 1, {"a": [Point(1)]}):
        with pytest.raises(SaveError, match="pickle"):
            FileValueStorage(tmp_path).save(value, digest("key"))
    pickled = FileValueStorage(tmp_path, codec="pickle")
    assert pickled.load(pickled.save(Point(1))) == Point(1)
    with pytest.raises(SaveError, match="can't pickle"):
        pickled.save(lambda: 1, digest("key"))
    with pytest.raises(ValueError, match="codec"):
        FileValueStorage(tmp_path, codec="marshal")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (BOMB,))


BOMB = ""


@pytest.fixture
def bomb(tmp_path):
    global BOMB  # noqa: PLW0603 - what is unpickled finds it by name
    BOMB = str(tmp_path / "exploded")
    return pathlib.Path(BOMB)


def test_pickle_is_read_only_where_asked_for(tmp_path, bomb):
    key = FileValueStorage(tmp_path / "v", codec="pickle").save(Bomb(), digest("bomb"))
    safe = FileValueStorage(tmp_path / "v")
    with pytest.raises(KeyError):
        safe.load(key)
    assert not bomb.exists() and safe.counters["refused"] == 1


@pytest.mark.parametrize("place", ["root", "shard", "file"])
def test_pickle_is_not_read_where_others_can_write(tmp_path, bomb, place):
    storage = FileValueStorage(tmp_path / "v", codec="pickle")
    key = storage.save(Bomb(), digest("bomb"))
    path = storage.tree.path(key)
    os.chmod({"root": storage.root, "shard": os.path.dirname(path), "file": path}[place], 0o777)
    with pytest.warns(RuntimeWarning, match="others can write there"), pytest.raises(KeyError):
        storage.load(key)
    assert not bomb.exists() and storage.counters["refused"] == 1


def test_signed_values_are_read_where_others_can_write(tmp_path):
    storage = FileValueStorage(tmp_path / "v", SECRET, codec="pickle")
    key = storage.save(Point(1))
    os.chmod(storage.root, 0o777)
    assert storage.load(key) == Point(1)
    for other in (b"other", b""):
        with pytest.raises(KeyError):
            FileValueStorage(tmp_path / "v", other, codec="pickle").load(key)


def test_a_signature_is_bound_to_key_codec_and_payload(tmp_path):
    storage = FileValueStorage(tmp_path / "v", SECRET, codec="pickle")
    one, two = storage.save(Point(1)), storage.save(Point(2))
    data = pathlib.Path(storage.tree.path(one)).read_bytes()
    pathlib.Path(storage.tree.path(two)).write_bytes(data.replace(one.encode(), two.encode()))
    with pytest.raises(KeyError):
        storage.load(two)
    assert storage.counters["refused"] == 1 and storage.load(one) == Point(1)
    signature = codecs.sign(SECRET, "k", "json", b"1")
    assert codecs.is_signed(SECRET, "k", "json", b"1", signature)
    for key, codec, payload in (("l", "json", b"1"), ("k", "npy", b"1"), ("k", "json", b"2"), ("kj", "son", b"1")):
        assert not codecs.is_signed(SECRET, key, codec, payload, signature)
    assert not codecs.is_signed(SECRET, "k", "json", b"1", None)


def test_signed_records_too(tmp_path):
    signed = file_cache(tmp_path, secret=SECRET)
    key = signed.save(Call("f", {"x": 1}, result=2))
    assert signed.load(key).result == 2 and signed.query(name="f").count() == 1
    for secret in (b"other",):
        stranger = file_cache(tmp_path, secret=secret)
        assert not stranger.query().count()
        with pytest.raises(KeyError):
            stranger.load(key)
        assert stranger.calls.counters["refused"]
    plain = file_cache(tmp_path)
    unsigned = plain.save(Call("f", {"x": 5}, result=6))
    with pytest.raises(KeyError):
        signed.load(unsigned)


def damage(path, how):
    data = pathlib.Path(path).read_bytes()
    changed = {
        "empty": b"", "truncated": data[: len(data) // 2], "flipped": data[:-4] + bytes([data[-4] ^ 1]) + data[-3:],
        "junk": b"\x00\xff" * 50, "one byte more": data + b"x", "head alone": data.split(b"\n")[0] + b"\n",
        "another format": data.replace(b'"format":1', b'"format":9'),
    }  # fmt: skip
    pathlib.Path(path).write_bytes(changed[how])


DAMAGE = ("empty", "truncated", "flipped", "junk", "one byte more", "another format")


@pytest.mark.parametrize(
    ("which", "how"), [*(("values", how) for how in (*DAMAGE, "head alone")), *(("calls", how) for how in DAMAGE)]
)
def test_a_damaged_file_is_a_miss_set_aside_and_counted(tmp_path, which, how):
    cache = Cache(FileValueStorage(tmp_path / "values"), FileCallStorage(tmp_path / "calls", inline_limit=0))
    f = memoize(cache, lambda x: [x] * 50)
    f(1)
    storage = getattr(cache, which)
    for key in list(storage.list()):
        damage(storage.tree.path(key), how)
    assert f(1) == [1] * 50
    assert storage.counters["corrupt"] and len(os.listdir(tmp_path / which / "quarantine")) >= 1
    assert f(1) == [1] * 50 and f.counters["hits"] == 1


def test_a_file_under_another_key_is_damage(tmp_path):
    for storage, save in (
        (FileValueStorage(tmp_path / "v"), lambda s, x: s.save(x)),
        (FileCallStorage(tmp_path / "c"), lambda s, x: s.save(Call("f", {"x": x}).digest())),
    ):
        one, two = save(storage, 1), save(storage, 2)
        os.replace(storage.tree.path(one), storage.tree.path(two))
        with pytest.raises(KeyError):
            storage.load(two)


def test_what_is_no_file_is_a_miss(tmp_path):
    storage = FileValueStorage(tmp_path / "v")
    key = storage.save(1)
    path = storage.tree.path(key)
    os.unlink(path)
    os.symlink("/dev/zero", path)
    with pytest.raises(KeyError):
        storage.load(key)
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(KeyError):
        storage.load(key)


def test_names_never_leave_the_directory(tmp_path):
    storage = FileValueStorage(tmp_path / "v")
    for key in ("../" * 20 + "abcd", "/" * 64, "." * 64):
        with pytest.raises(SaveError):
            storage.save(1, Digest(key))
        with pytest.raises(KeyError):
            storage.load(key)
    assert not (tmp_path / "v").exists()


def test_two_trees_merge_by_copying(tmp_path):
    import shutil

    for name, x in (("one", 1), ("two", 2)):
        memoize(tmp_path / name, lambda x: np.arange(1000) + x)(x)
    shutil.copytree(tmp_path / "two", tmp_path / "one", dirs_exist_ok=True)
    merged = memoize(tmp_path / "one", lambda x: np.arange(1000) + x)
    assert merged(1)[0] == 1 and merged(2)[0] == 2
    assert merged.counters["hits"] == 2 and merged.query().count() == 2


def test_directories_are_private_and_files_are_whole(tmp_path):
    cache = file_cache(tmp_path / "new")
    cache.save(Call("f", {}, result=list(range(2000))))
    for storage in (cache.values, cache.calls):
        assert os.stat(storage.root).st_mode & 0o077 == 0
        names = [name for shard in storage.tree.shards() for name in os.listdir(os.path.join(storage.root, shard))]
        assert names and not any(name.startswith(".") for name in names)


def test_what_a_crash_left_is_swept(tmp_path):
    storage = FileValueStorage(tmp_path / "v")
    key = storage.save(1)
    left = os.path.join(os.path.dirname(storage.tree.path(key)), ".1-2-3")
    pathlib.Path(left).write_bytes(b"half")
    assert list(storage.list()) == [key] and storage.tree.sweep() == 0


def test_expand_asks_only_its_shard(tmp_path):
    storage = FileValueStorage(tmp_path)
    keys = [storage.save(x) for x in range(300)]
    assert [storage.expand(key[:12]) for key in keys] == keys
    new = storage.save("new")
    assert storage.expand(new[:12]) == new
    storage.evict(new)
    with pytest.raises(KeyError):
        storage.expand(new[:12])


def test_concurrent_writers_of_one_key(tmp_path, at_once):
    storage = FileValueStorage(tmp_path)
    value = list(range(5000))
    keys = set(at_once(6, lambda _: next(storage.save(value) for _ in range(5))))
    assert storage.load(keys.pop()) == value


@given(values, st.sampled_from([0, 1, 2, float("inf")]))
@EXAMPLES
def test_containers_taken_apart_come_back_whole(value, depth):
    storage = ValueMemory({}, remaining_depth=depth)
    assert same(storage.load(storage.save(value)), value)


def test_shared_elements_are_stored_once(tmp_path):
    for storage in (ValueMemory({}, remaining_depth=0), FileValueStorage(tmp_path, remaining_depth=0)):
        assert isinstance(storage, HasChildDigests) and isinstance(storage, DestructuringMixin)
        shared = ["s", ("t",)]
        one, two = storage.save([1, shared]), storage.save({"k": shared})
        assert storage.child_digests(one) == {digest(1), digest(shared)}
        assert storage.count_reuses()[digest(shared)] == 2
        assert storage.load(two) == {"k": shared}


def test_locks_are_per_key():
    @dataclass(frozen=True)
    class Locked(PerKeyLockMixin, ValueMixin, MemoryBackend):
        __hash__ = object.__hash__

    @dataclass(frozen=True)
    class Serial(SerializingMixin, ValueMixin, MemoryBackend):
        __hash__ = object.__hash__

    for storage, free in ((Locked({}), True), (Serial({}), False)):
        entered = threading.Event()
        with storage._operation_context("a"), storage._operation_context("a"):  # the lock is reentrant
            thread = threading.Thread(target=lambda s=storage, e=entered: (s.save(1, Digest("b" * 64)), e.set()))
            thread.start()
            assert entered.wait(300 if free else 0.1) is free
        thread.join(300)
        assert entered.is_set() and not storage.__dict__.get("_key_locks")._locks


def test_storages_can_be_pickled(tmp_path):
    cache = Cache(ValueMemory({}), CallMemory({}))
    key = cache.save(Call("f", {"x": 1}, result=2))
    assert pickle.loads(pickle.dumps(cache)).load(key).result == 2
    files = file_cache(tmp_path)
    key = files.save(Call("f", {"x": 1}, result=2))
    again = pickle.loads(pickle.dumps(files))
    assert again.load(key).result == 2 and again.query(name="f").count() == 1


def test_a_forked_child_finds_free_locks(tmp_path):
    cache = file_cache(tmp_path)
    cache.save(Call("f", {"x": 1}, result=2))
    assert cache.query().count() == 1
    with cache.calls._operation_context("k"):
        pid = os.fork()
        if not pid:
            try:
                with cache.calls._operation_context("k"):
                    cache.save(Call("f", {"x": 2}, result=3))
                os._exit(0 if cache.query().count() == 2 else 1)
            except BaseException:  # noqa: BLE001 - the child must not go on with the tests
                os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert cache.query().count() == 2


def test_transform(tmp_path):
    from dataclasses import replace

    storage = FileCallStorage(tmp_path)
    old = storage.save(Call("f", {"x": 1}, result=2).digest())
    storage.transform(lambda call: replace(call, name="g"))
    assert not storage.contains(old)
    assert [call.name for call in map(storage.load, storage.list())] == ["g"]


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_call_storages_take_calls_with_live_values_too(tmp_path, kind):
    storage = CallMemory({}) if kind == "memory" else FileCallStorage(tmp_path)
    call = Call("f", {"x": 1}, {"tags": {"a": [1]}}, result=2)
    key = storage.save(call)
    call.metadata["tags"]["a"].append(2)
    assert key == call.to_lookup_key() and storage.contains(key)
    assert storage.load(key).metadata == {"tags": {"a": [1]}}
    storage.evict(key)
    assert not storage.contains(key)


def test_a_record_that_another_replaced_removed_or_damaged_is_looked_at_again(tmp_path):
    ours, theirs = file_cache(tmp_path), file_cache(tmp_path)
    call = Call("f", {"x": 1}, result=1)
    key = ours.save(call)
    path = next((tmp_path / "calls").rglob("*.json"))

    def rested():
        while not is_settled(path.stat(), time.time_ns()):
            time.sleep(0.001)
        return [ours.find(key)[0] for _ in range(3)]

    assert rested() == [1, 1, 1]
    theirs.save(Call("f", {"x": 1}, result=2))
    assert rested() == [2, 2, 2]
    path.write_bytes(path.read_bytes().replace(b'"record"', b'"rekord"'))
    with pytest.raises(KeyError):
        rested()
    theirs.save(call)
    assert rested() == [1, 1, 1]
    theirs.evict(key)
    with pytest.raises(KeyError):
        ours.find(key)
