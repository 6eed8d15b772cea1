# SPDX-License-Identifier: Apache-2.0
"""ProgramCacheStack: several stores as one; a level that fails doesn't fail the stack."""

from __future__ import annotations

import os
import random
import threading

import pytest

from cuda_progcache.errors import ProgCacheWarning, ReadOnlyError, StoreError
from cuda_progcache.store import (
    Entry,
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheResource,
    ProgramCacheStack,
    ReadOnlyProgramCache,
    entry_digest,
)
from cuda_progcache.store.breaker import CircuitBreaker


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Fails(InMemoryProgramCache):
    """A level that raises ``error`` unless it is None, and counts its calls."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.calls = self.looks = 0

    def trip(self):
        self.calls += 1
        if self.error is not None:
            raise self.error

    def get(self, key, default=None):
        self.trip()
        return super().get(key, default)

    def load(self, key):
        self.trip()
        return super().load(key)

    def publish(self, key, data, record):
        self.trip()
        return super().publish(key, data, record)

    def __setitem__(self, key, value):
        self.trip()
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self.trip()
        super().__delitem__(key)

    def remove(self, digest):
        self.trip()
        super().remove(digest)

    def clear(self):
        self.trip()
        super().clear()

    def entries(self):
        self.trip()
        return super().entries()

    def stats(self):
        self.looks += 1
        return super().stats()

    def _digests(self, prefix):
        self.trip()
        return super()._digests(prefix)

    def info(self, digest):
        self.trip()
        return super().info(digest)


def holding(**entries):
    store = InMemoryProgramCache()
    for key, value in entries.items():
        store.publish(key, value, {"name": key})
    return store


@pytest.fixture
def disk(tmp_path):
    return FileStreamProgramCache(tmp_path / "disk", durability="none")


def test_a_hit_below_is_copied_up_with_its_record(disk):
    fast, slow = InMemoryProgramCache(), holding(a=b"1")
    stack = ProgramCacheStack((fast, disk, slow))
    assert stack[b"a"] == b"1"
    assert fast.load(b"a") == disk.load(b"a") == Entry(b"1", {"name": "a"})
    before = slow.stats().hits
    assert stack.load(b"a") == Entry(b"1", {"name": "a"})
    assert slow.stats().hits == before
    top, middle, bottom = stack.stats().levels
    assert (top.hits, top.misses, top.backfilled) == (1, 1, 1)
    assert (middle.hits, middle.misses, middle.backfilled) == (0, 1, 1)
    assert (bottom.hits, bottom.misses, bottom.backfilled, bottom.stored) == (1, 0, 0, 0)


def test_counts_add_up_on_every_level_under_threads(disk):
    """On each level hits + misses = lookups, and each miss is a lookup in the level below."""
    fast = InMemoryProgramCache(max_size_bytes=64)
    layer = holding(**{f"k{i}": b"%d" % i * 8 for i in range(20)})
    stack = ProgramCacheStack((fast, disk, ReadOnlyProgramCache(layer)))
    errors = []

    def work(seed):
        dice = random.Random(seed)
        try:
            for _ in range(150):
                i = dice.randrange(30)
                value = stack.get(f"k{i}") if dice.random() < 0.5 else (stack.load(f"k{i}") or (None,))[0]
                assert value == (b"%d" % i * 8 if i < 20 else None)
        except Exception as exc:  # noqa: BLE001 - the test must see it
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    stats = stack.stats()
    top, middle, bottom = stats.levels
    assert stats.hits + stats.misses == 6 * 150 == top.hits + top.misses
    assert middle.hits + middle.misses == top.misses
    assert bottom.hits + bottom.misses == middle.misses
    assert stats.hits == top.hits + middle.hits + bottom.hits
    assert stats.misses == bottom.misses
    assert (top.errors, top.backfill_failed, middle.errors) == (0, 0, 0)


def test_many_threads_copy_a_key_once(disk):
    class Slow(InMemoryProgramCache):
        def load(self, key):
            found = super().load(key)
            barrier.wait(300)  # all have found it below before one of them copies it
            return found

    barrier = threading.Barrier(8)
    slow = Slow()
    slow[b"a"] = b"1"
    fast = Fails()
    stack = ProgramCacheStack((fast, slow))
    threads = [threading.Thread(target=stack.get, args=(b"a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert stack.stats().levels[0].backfilled == 1
    assert fast.stats().stored == 1
    assert stack.stats().hits == 8


class Remote(InMemoryProgramCache):
    """A store that declares itself remote."""

    is_remote = True


class WrittenByAnother:
    """The lock of a key that another thread is writing: it can be acquired only by waiting."""

    def acquire(self, blocking=True):
        return blocking

    def release(self):
        pass

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


def test_what_was_missed_and_came_from_afar_lies_on_the_disk_whoever_writes_meanwhile(disk):
    """A repeated lookup copies a remote hit to the disk even if it must wait for a lock: other processes look there."""
    remote = Remote()
    stack = ProgramCacheStack([disk, remote])
    remote.publish(b"first", b"cubin", {})
    assert stack.load(b"first").data == b"cubin"  # a first lookup copies it right away
    assert stack.load(b"k") is None
    remote.publish(b"k", b"cubin", {})
    stack._stripes.locks = [WrittenByAnother()] * 64
    assert stack.load_again(b"k").data == b"cubin"
    assert disk.get(b"k") == b"cubin"


def test_a_copy_never_undoes_a_write_that_came_after_the_lookup():
    class Slow(InMemoryProgramCache):
        between = None

        def load(self, key):
            found = super().load(key)
            if self.between:
                self.between()  # another thread's write, done while this lookup is on its way up
            return found

    fast, slow = InMemoryProgramCache(), Slow()
    slow[b"a"] = b"old"
    stack = ProgramCacheStack((fast, slow))
    slow.between = lambda: stack.__delitem__(b"a")
    assert stack.get(b"a") == b"old"
    slow.between = None
    assert fast.get(b"a") is None
    assert stack.get(b"a") is None

    slow[b"a"] = b"old"
    slow.between = lambda: (setattr(slow, "between", None), stack.__setitem__(b"a", b"new"))
    assert stack.get(b"a") == b"old"
    assert stack.get(b"a") == b"new"

    slow[b"b"] = b"old"
    slow.between = lambda: (setattr(slow, "between", None), stack.clear())
    stack.get(b"b")
    assert stack.get(b"b") is None


def test_a_failed_copy_is_counted_and_the_read_is_served():
    class Full(InMemoryProgramCache):
        def publish(self, key, data, record):
            return False

    raising = Fails()
    stack = ProgramCacheStack((raising, Full(), holding(a=b"1", b=b"2")))
    assert stack.get(b"a") == b"1"
    raising.error = None

    def publish(*_):
        raise OSError("disk full")

    raising.publish = publish
    with pytest.warns(ProgCacheWarning, match="disk full"):
        assert stack.get(b"b") == b"2"
    top, full, _ = stack.stats().levels
    assert (top.backfilled, top.backfill_failed, top.errors) == (1, 1, 1)
    assert (full.backfilled, full.backfill_failed, full.errors) == (0, 2, 0)


@pytest.mark.parametrize(
    "error", [OSError(5, "I/O"), TimeoutError("slow"), ConnectionError(), RuntimeError("bug"), KeyError("k")]
)
def test_a_level_that_raises_is_skipped_and_warned_about_once(error):
    stack = ProgramCacheStack((Fails(error), holding(a=b"1")), failures=100)
    with pytest.warns(ProgCacheWarning, match="continues without it") as caught:
        assert stack.get(b"a") == b"1"
        assert stack.load(b"a").data == b"1"
        assert stack.get(b"none") is None
        stack[b"b"] = b"2"
        assert stack.publish(b"c", b"3", {}) is True
        assert (len(stack), len(list(stack.entries()))) == (3, 3)
        assert stack.info(entry_digest(b"b")).size == 1
    assert len(caught) == 1
    stats = stack.stats()
    assert (stats.hits, stats.misses, stats.stored) == (2, 1, 2)
    level = stats.levels[0]
    assert level.errors + level.skipped > 5
    assert level.errors == 1 if isinstance(error, TimeoutError) else level.errors > 5  # it isn't called again


def test_interrupts_are_not_swallowed():
    stack = ProgramCacheStack((Fails(KeyboardInterrupt()), holding(a=b"1")))
    with pytest.raises(KeyboardInterrupt):
        stack.get(b"a")


@pytest.mark.filterwarnings("ignore:.*the stack continues:cuda_progcache.errors.ProgCacheWarning")
def test_the_breaker_spares_a_failing_level_and_tries_it_again():
    clock, failing = Clock(), Fails(OSError("down"))
    stack = ProgramCacheStack((failing, holding(a=b"1")), failures=3, rest=30, clock=clock)

    def state():
        return stack.stats().levels[0].state

    for _ in range(3):
        assert state() == "closed"
        assert stack.get(b"x") is None
    assert state() == "open"
    calls = failing.calls
    for _ in range(10):
        assert stack.get(b"a") == b"1"
        stack[b"b"] = b"2"
    assert failing.calls == calls
    assert stack.stats().levels[0].skipped >= 20

    stack.close()
    list(stack.stats().levels)
    assert failing.looks == 3  # none since the breaker opened

    clock.now += 31
    assert state() == "half-open"
    assert stack.get(b"a") == b"1"  # the probe, which fails
    assert failing.calls == calls + 1
    assert state() == "open"
    assert stack.get(b"a") == b"1"
    assert failing.calls == calls + 1

    clock.now += 31
    assert state() == "open"  # a failed probe doubles the rest
    clock.now += 30
    failing.error = None
    assert stack.get(b"a") == b"1"  # the level misses, which closes the breaker, and takes the copy
    assert state() == "closed"
    assert failing.load(b"a") == Entry(b"1", {"name": "a"})


@pytest.mark.filterwarnings("ignore:.*the stack continues:cuda_progcache.errors.ProgCacheWarning")
def test_a_level_that_takes_too_long_counts_as_failing_and_its_answer_is_used():
    clock = Clock()

    class Slow(InMemoryProgramCache):
        def load(self, key):
            clock.now += 2
            return super().load(key)

    slow = Slow()
    slow[b"a"] = b"1"
    stack = ProgramCacheStack((InMemoryProgramCache(max_size_bytes=1), slow), failures=2, timeout=1, clock=clock)
    slow[b"b"] = b"22"
    assert stack.get(b"b") == b"22"
    assert stack.get(b"b") == b"22"
    assert stack.get(b"b") is None  # the level is skipped
    assert (stack.stats().levels[1].state, stack.stats().levels[1].errors) == ("open", 2)


def test_a_breaker_lets_one_probe_through_and_gives_up_one_that_never_reports():
    clock = Clock()
    breaker = CircuitBreaker(threshold=2, rest=10, clock=clock)
    assert breaker.allows()
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "closed"  # only failures in a row count
    breaker.failed()
    assert (breaker.state, breaker.allows()) == ("open", False)
    clock.now += 10
    assert (breaker.state, breaker.allows(), breaker.allows()) == ("half-open", True, False)
    clock.now += 10
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.state == "closed"
    for wrong in ({"threshold": 0}, {"rest": -1}):
        with pytest.raises(ValueError, match=r"threshold|rest"):
            CircuitBreaker(**wrong)


def from_elsewhere(call):
    """Return the result of a call made in another thread."""
    given = []
    thread = threading.Thread(target=lambda: given.append(call()))
    thread.start()
    thread.join()
    return given[0]


def test_a_breaker_rests_twice_as_long_after_each_probe_that_fails():
    clock = Clock()
    breaker = CircuitBreaker(threshold=2, rest=10, longest_rest=25, clock=clock)
    for rests in ([10, 20, 25, 25], [10, 20]):  # after a success the rests start over
        breaker.failed(timed_out=True)
        for rest in rests:
            clock.now += rest - 1
            assert (breaker.state, breaker.allows()) == ("open", False)
            clock.now += 1
            assert (breaker.state, breaker.allows()) == ("half-open", True)
            from_elsewhere(lambda: breaker.failed(timed_out=True))  # a call that began before the breaker opened
            clock.now += 1  # the duration of the probe
            breaker.failed()
        breaker.succeeded()
        assert breaker.state == "closed"


def test_nobody_joins_a_call_that_has_been_under_way_for_long():
    clock = Clock()
    breaker = CircuitBreaker(threshold=2, patience=0.5, clock=clock)
    for end in (breaker.succeeded, breaker.failed, breaker.forget_threads):
        assert breaker.allows()
        clock.now += 0.5
        assert from_elsewhere(lambda: (breaker.allows(), breaker.succeeded())[0])
        clock.now += 0.25
        assert not from_elsewhere(breaker.allows)
        end()
        assert from_elsewhere(lambda: (breaker.allows(), breaker.succeeded())[0])


# Writes


def test_writes_go_to_every_level_that_takes_them(disk):
    fast, skipped, layer = InMemoryProgramCache(), InMemoryProgramCache(), InMemoryProgramCache()
    stack = ProgramCacheStack(
        (fast, skipped, disk, ReadOnlyProgramCache(layer)), write_policy=("through", "skip", "through", "skip")
    )
    stack[b"a"] = b"1"
    assert stack.publish(b"b", b"2", {"n": 1}) is True
    assert [len(store) for store in (fast, skipped, disk, layer)] == [2, 0, 2, 0]
    layer[b"c"] = b"3"
    assert stack[b"c"] == b"3"
    assert [len(store) for store in (fast, skipped, disk)] == [3, 0, 3]
    assert [level.policy for level in stack.stats().levels] == ["through", "skip", "through", "read-only"]
    del stack[b"a"]
    stack.remove(entry_digest(b"b"))
    assert [len(store) for store in (fast, skipped, disk, layer)] == [1, 0, 1, 1]
    stack.clear()
    assert [len(store) for store in (fast, skipped, disk, layer)] == [0, 0, 0, 1]


def test_removal_where_only_a_read_only_level_has_it(disk):
    stack = ProgramCacheStack((disk, ReadOnlyProgramCache(holding(a=b"1"))))
    for remove in (lambda: stack.__delitem__(b"a"), lambda: stack.remove(entry_digest(b"a"))):
        with pytest.raises(ReadOnlyError, match="isn't writable"):
            remove()
    with pytest.raises(KeyError) as excinfo:
        del stack[b"none"]
    assert excinfo.value.args == (b"none",)
    stack.get(b"a")
    del stack[b"a"]  # removes the copy on the disk
    assert disk.get(b"a") is None
    assert stack.get(b"a") == b"1"


def test_a_write_needs_one_level_to_take_it():
    good = InMemoryProgramCache()
    stack = ProgramCacheStack((Fails(OSError(28, "full")), good), failures=100)
    with pytest.warns(ProgCacheWarning, match="full"):
        stack[b"a"] = b"1"
    assert good[b"a"] == b"1"
    broken = ProgramCacheStack((Fails(OSError(28, "full")), Fails(OSError(5, "I/O"))), failures=1)
    with pytest.warns(ProgCacheWarning), pytest.raises(StoreError, match=r"full.*I/O") as excinfo:
        broken[b"a"] = b"1"
    assert excinfo.value.errno == 28
    assert broken.publish(b"a", b"1", {}) is False
    assert broken.get(b"a") is None


@pytest.mark.filterwarnings("ignore:.*the stack continues:cuda_progcache.errors.ProgCacheWarning")
def test_a_removal_that_a_level_could_not_do_is_an_error():
    good = InMemoryProgramCache()
    failing = Fails()
    stack = ProgramCacheStack((good, failing), failures=100)
    stack[b"a"] = b"1"
    failing.error = OSError(5, "I/O")
    for remove in (lambda: stack.__delitem__(b"a"), stack.clear, lambda: stack.remove(entry_digest(b"a"))):
        with pytest.raises(StoreError, match="I/O"):
            remove()
    assert good.get(b"a") is None


def test_a_stack_that_takes_no_writes_skips_them():
    stack = ProgramCacheStack((ReadOnlyProgramCache(holding(a=b"1")),))
    stack[b"b"] = b"2"
    assert stack.publish(b"b", b"2", {}) is False
    assert stack.get(b"b") is None
    for removal in (stack.clear, lambda: stack.__delitem__(b"a")):
        with pytest.raises(ReadOnlyError):
            removal()


def test_wrong_keys_values_and_records_are_the_callers_and_not_the_levels(disk):
    stack = ProgramCacheStack((InMemoryProgramCache(), disk))
    for call in (lambda: stack.get(3), lambda: stack.publish(b"a", 3, {}), lambda: stack.publish(b"a", b"1", [])):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(FileNotFoundError, match="path-backed"):
        from cuda.core import ObjectCode

        stack[b"a"] = ObjectCode.from_cubin("/none/such.cubin", name="k")
    assert [level.errors for level in stack.stats().levels] == [0, 0]


# Levels of a stack


def test_what_cannot_be_a_stack(disk):
    memory = InMemoryProgramCache()
    inner = ProgramCacheStack((memory,))
    for levels, error, match in (
        ((), ValueError, "level"),
        ((inner,), ValueError, "stack can't contain a stack"),
        ((ReadOnlyProgramCache(inner),), ValueError, "stack can't contain a stack"),
        ((memory, memory), ValueError, "two levels"),
        ((memory, {}), TypeError, "dict"),
    ):
        with pytest.raises(error, match=match):
            ProgramCacheStack(levels)
    for policy, match in (
        (("through",), "1 policies for 2"),
        (("through", "sometimes"), "sometimes"),
        ("around", "around"),
    ):
        with pytest.raises(ValueError, match=match):
            ProgramCacheStack((memory, disk), write_policy=policy)
    with pytest.raises(ValueError, match="read-only level"):
        ProgramCacheStack((ReadOnlyProgramCache(disk),), write_policy=("through",))


def test_where_the_compile_path_keeps_what_is_derived(disk, tmp_path):
    layer = FileStreamProgramCache(tmp_path / "layer")
    other = FileStreamProgramCache(tmp_path / "other")
    memory = InMemoryProgramCache()
    stack = ProgramCacheStack((memory, disk, ReadOnlyProgramCache(layer)))
    assert (stack.path, stack.settings) == (disk.path, disk.settings)
    assert stack.roots == (disk.path, layer.path)
    assert stack.levels[:2] == (memory, disk)
    assert ProgramCacheStack((memory,)).path is None
    assert ProgramCacheStack((memory,)).settings is None
    assert ProgramCacheStack((ReadOnlyProgramCache(layer), disk)).path == disk.path
    assert ProgramCacheStack((disk, other), write_policy=("skip", "through")).path == other.path
    # The settings describe one directory, and a worker process with them would miss the other.
    assert ProgramCacheStack((memory, disk, other)).settings is None


def test_the_faster_level_is_right(disk):
    fast = holding(a=b"fast")
    disk.publish(b"a", b"slower", {})
    stack = ProgramCacheStack((fast, disk))
    assert stack[b"a"] == b"fast"
    (info,) = stack.entries()
    assert (info.size, stack.info(info.digest).size, len(stack), stack.stats().bytes) == (4, 4, 1, 4)


def test_a_plain_store_as_a_level(disk):
    class Plain(ProgramCacheResource):
        """A user-defined store with only the five abstract methods."""

        def __init__(self):
            self.kept = {}

        def __getitem__(self, key):
            return self.kept[key]

        def __setitem__(self, key, value):
            self.kept[key] = value

        def __delitem__(self, key):
            del self.kept[key]

        def __len__(self):
            return len(self.kept)

        def clear(self):
            self.kept.clear()

    plain = Plain()
    stack = ProgramCacheStack((InMemoryProgramCache(), plain), failures=1)
    stack[b"a"] = b"1"
    assert plain.kept == {b"a": b"1"}
    assert (len(stack), stack.stats().entries) == (1, 1)  # only entries that can be listed
    stack.levels[0].clear()
    assert stack[b"a"] == b"1"
    assert stack.stats().levels[1].errors == 0
    del stack[b"a"]
    assert stack.get(b"a") is None


def test_close_closes_the_levels(disk):
    with ProgramCacheStack((InMemoryProgramCache(), disk)) as stack:
        stack[b"a"] = b"1"
        assert not (disk.path / "counters.log").exists()
    assert (disk.path / "counters.log").exists()
    assert stack[b"a"] == b"1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_a_level_writes(disk):
    """The locks that order writes are held while levels write; a forked child must not find one of them locked."""
    entered, go = threading.Event(), threading.Event()

    class Slow(InMemoryProgramCache):
        def __setitem__(self, key, value):
            entered.set()
            go.wait(300)
            super().__setitem__(key, value)

    stack = ProgramCacheStack((Slow(), disk))
    thread = threading.Thread(target=stack.__setitem__, args=(b"a", b"1"))
    thread.start()
    assert entered.wait(300)
    child = os.fork()
    if child == 0:
        go.set()
        stack[b"a"] = b"2"
        os._exit(0 if stack[b"a"] == b"2" else 1)
    go.set()
    thread.join(300)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Under the compilers


SOURCE = '#include <cuda_fp16.h>\nextern "C" __global__ void k(__half* a) { *a = __float2half(1.f); }'


def test_a_program_with_headers_is_found_in_a_layer_that_is_only_read(tmp_path):
    """The lookup uses the layer's header manifests: without them the key isn't known before a compile."""
    from cuda_progcache import CompileService, ProgramOptions
    from cuda_progcache.keys.toolchain import header_root

    options = ProgramOptions(arch="sm_90", include_path=header_root("cuda"))
    layer = FileStreamProgramCache(tmp_path / "layer")
    first = CompileService(layer).compile(SOURCE, options=options)
    assert (first.hit, first.record["manifest"] != "") == (False, True)
    layer.close()
    os.rename(layer.path, tmp_path / "moved")  # what this process remembers about the old path can't help
    before = sorted(os.walk(tmp_path / "moved"))
    disk = FileStreamProgramCache(tmp_path / "disk")
    for cache in (
        ProgramCacheStack((InMemoryProgramCache(), disk, ReadOnlyProgramCache(tmp_path / "moved"))),
        ReadOnlyProgramCache(tmp_path / "moved"),
    ):
        found = CompileService(cache).compile(SOURCE, options=options)
        assert found.hit
        assert found.data == first.data
    assert len(disk) == 1
    assert sorted(os.walk(tmp_path / "moved")) == before


def test_cuda_core_takes_a_stack(tmp_path):
    import cuda.core.utils
    from cuda.core import Program, ProgramOptions

    disk = FileStreamProgramCache(tmp_path / "disk")
    stack = ProgramCacheStack((InMemoryProgramCache(), disk))
    assert isinstance(stack, cuda.core.utils.ProgramCacheResource)
    codes = []
    for _ in range(2):
        program = Program('extern "C" __global__ void k(int* a) { *a = 1; }', "c++", ProgramOptions(arch="sm_90"))
        codes.append(bytes(program.compile("cubin", cache=stack).code))
    assert codes[0] == codes[1]
    assert (stack.stats().hits, stack.stats().misses, len(disk)) == (1, 1, 1)
    layer = ProgramCacheStack((ReadOnlyProgramCache(disk),))
    program = Program('extern "C" __global__ void l(int* a) { *a = 1; }', "c++", ProgramOptions(arch="sm_90"))
    assert bytes(program.compile("cubin", cache=layer).code)[:4] == b"\x7fELF"  # compiled, but stored nowhere
