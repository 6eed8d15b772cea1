# SPDX-License-Identifier: Apache-2.0
"""The contracts in ``cuda_progcache.testing``: all stores keep them, and a store that breaks one fails its tests."""

from __future__ import annotations

import tempfile

import pytest
from hypothesis import settings

from cuda_progcache.store import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgramCacheStack,
    ReadOnlyProgramCache,
)
from cuda_progcache.testing import CappedStoreContract, RecordStoreContract, StoreMachine


class TestFileStream(CappedStoreContract):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda **options: FileStreamProgramCache(tmp_path / "cache", durability="none", **options)


class TestInMemory(CappedStoreContract):
    @pytest.fixture
    def make(self):
        return InMemoryProgramCache


class TestStack(RecordStoreContract):
    """A bounded memory store above a disk store and a read-only layer."""

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


class TestReadOnly(RecordStoreContract):
    """A directory that another store writes to."""

    @pytest.fixture
    def writer(self, tmp_path):
        return FileStreamProgramCache(tmp_path / "cache", durability="none")

    @pytest.fixture
    def store(self, writer, tmp_path):
        return ReadOnlyProgramCache(tmp_path / "cache")


class TestReadOnlyView(RecordStoreContract):
    """A read-only view of a writable store."""

    @pytest.fixture
    def writer(self):
        return InMemoryProgramCache()

    @pytest.fixture
    def store(self, writer):
        return ReadOnlyProgramCache(writer)


class TestFallback(CappedStoreContract):
    """The memory fallback for a default root that can't be created."""

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


class InMemoryMachine(StoreMachine):
    def open(self):
        return InMemoryProgramCache()


class FileStreamMachine(StoreMachine):
    lasts = True

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory()
        super().__init__()

    def open(self):
        return FileStreamProgramCache(self.directory.name + "/cache", durability="none")

    def teardown(self):
        self.directory.cleanup()


class StackMachine(FileStreamMachine):
    def open(self):
        return stack_at(self.directory.name)


TestInMemoryMachine = InMemoryMachine.TestCase
TestFileStreamMachine = FileStreamMachine.TestCase
TestStackMachine = StackMachine.TestCase
# The rules are the same, but each run generates other examples.
for _machine in (InMemoryMachine, FileStreamMachine, StackMachine):
    _machine.TestCase.settings = settings(StoreMachine.TestCase.settings, max_examples=14)


# A user-defined store

OWN = """
    import pytest
    from hypothesis import settings
    from cuda_progcache.store import ProgramCacheResource
    from cuda_progcache.store.base import key_bytes, program_bytes
    from cuda_progcache.testing import StoreContract, StoreMachine

    class Own(ProgramCacheResource):
        def __init__(self):
            self.held = {}

        def __getitem__(self, key):
            try:
                return self.held[key_bytes(key)]
            except KeyError:
                raise KeyError(key) from None

        def __setitem__(self, key, value):
            self.held[key_bytes(key)] = program_bytes(value)

        def __delitem__(self, key):
            del self.held[key_bytes(key)]

        def __len__(self):
            return len(self.held)

        def clear(self):
            self.held.clear()

    class TestOwn(StoreContract):
        @pytest.fixture
        def make(self):
            return Own

    class OwnMachine(StoreMachine):
        counts = False

        def open(self):
            return Own()

    TestOwnMachine = OwnMachine.TestCase
    TestOwnMachine.settings = settings(TestOwnMachine.settings, max_examples=5)
"""
FAULTS = {
    "a str is another key": ("self.held[key_bytes(key)] = program", "self.held[key] = program"),
    "what was given is kept": ("program_bytes(value)", "value"),
    "a miss is no error": ("raise KeyError(key) from None", "return None"),
    "nothing to delete is no error": ("del self.held[key_bytes(key)]", "self.held.pop(key_bytes(key), None)"),
    "the first value stays": ("] = program_bytes(value)", "] = self.held.get(key_bytes(key), program_bytes(value))"),
    "clear forgets to": ("self.held.clear()", "pass"),
    "an empty one isn't there": ("return len(self.held)", "return sum(map(bool, self.held.values()))"),
}


def test_a_store_of_ones_own(pytester):
    pytester.makepyfile(OWN)
    pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider").assert_outcomes(passed=25)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_breaks_its_promise_is_found_out(pytester, fault):
    good, bad = FAULTS[fault]
    assert good in OWN
    pytester.makepyfile(OWN.replace(good, bad))
    result = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-k", "TestOwn and not Machine")
    assert result.parseoutcomes().get("failed", 0) > 0
