# SPDX-License-Identifier: Apache-2.0
"""A Hypothesis state machine that runs random sequences of operations on a store and on a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cuda_progcache.store.base import ProgramCacheResource, entry_digest

_KEYS = st.sampled_from(["a", b"a", "b", b"c", "d"])
_VALUES = st.binary(max_size=40)
_RECORDS = st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=8), st.integers()), max_size=3)


class StoreMachine(RuleBasedStateMachine):
    """A test that any sequence of operations, reopening included, agrees with a dictionary of (bytes, record).

    ::

        class MyStoreMachine(StoreMachine):
            def open(self):
                return MyStore(self.place)


        TestMyStoreMachine = MyStoreMachine.TestCase

    Attributes
    ----------
    lasts : bool
        Whether the store that :meth:`open` returns still has the entries of the one closed before.
    counts : bool
        Whether the store keeps records, lists its entries and has counters, as
        :class:`~cuda_progcache.testing.RecordStoreContract` demands.
    exact_sizes : bool
        As in :class:`~cuda_progcache.testing.RecordStoreContract`.
    """

    lasts = False
    counts = True
    exact_sizes = True

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, tuple[bytes, Mapping[str, Any]]] = {}
        self.lookups = self.hits = 0
        self.store = self.open()

    def open(self) -> ProgramCacheResource:
        """Make the store; must be overridden."""
        raise NotImplementedError("override open(): it returns your store")

    def _looked(self, found: object) -> None:
        self.lookups += 1
        self.hits += found is not None

    @rule(key=_KEYS, value=_VALUES)
    def set(self, key: bytes | str, value: bytes) -> None:
        """Assign a value."""
        self.store[key] = value
        self.model[_plain(key)] = (value, {})

    @rule(key=_KEYS, value=_VALUES, record=_RECORDS)
    def publish(self, key: bytes | str, value: bytes, record: Mapping[str, Any]) -> None:
        """Publish a value with a record."""
        assert self.store.publish(key, value, record)
        self.model[_plain(key)] = (value, record if self.counts else {})

    @rule(key=_KEYS)
    def get(self, key: bytes | str) -> None:
        """Look up the bytes."""
        expected = self.model.get(_plain(key))
        assert self.store.get(key) == (None if expected is None else expected[0])
        self._looked(expected)

    @rule(key=_KEYS)
    def load(self, key: bytes | str) -> None:
        """Look up the bytes and the record."""
        expected = self.model.get(_plain(key))
        assert self.store.load(key) == expected
        self._looked(expected)

    @rule(key=_KEYS)
    def delete(self, key: bytes | str) -> None:
        """Delete an entry by its key."""
        if self.model.pop(_plain(key), None) is None:
            with pytest.raises(KeyError):
                del self.store[key]
        else:
            del self.store[key]

    @precondition(lambda self: self.counts)
    @rule(key=_KEYS)
    def remove(self, key: bytes | str) -> None:
        """Delete an entry by its digest."""
        if self.model.pop(_plain(key), None) is None:
            with pytest.raises(KeyError):
                self.store.remove(entry_digest(key))
        else:
            self.store.remove(entry_digest(key))

    @rule()
    def clear(self) -> None:
        """Remove everything."""
        self.store.clear()
        self.model.clear()

    @precondition(lambda self: self.lasts)
    @rule()
    def reopen(self) -> None:
        """Close the store, and open another at the same location."""
        self.store.close()
        self.store = self.open()
        self.lookups = self.hits = 0

    @precondition(lambda self: self.model and self.counts)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        """Find a digest by its first digits."""
        digest = entry_digest(data.draw(st.sampled_from(sorted(self.model))))
        assert self.store.resolve(digest[:32]) == digest

    @invariant()
    def same_contents(self) -> None:
        """Check that the store has the dictionary's entries and has counted the operations."""
        assert len(self.store) == len(self.model)
        if not self.counts:
            return
        assert {info.digest: (info.size, info.record) for info in self.store.entries()} == {
            entry_digest(key): (len(value), record) for key, (value, record) in self.model.items()
        }
        stats = self.store.stats()
        assert stats.entries == len(self.model)
        size = sum(len(value) for value, _ in self.model.values())
        assert stats.bytes == size or (stats.bytes > size and not self.exact_sizes)
        assert (stats.hits, stats.misses) == (self.hits, self.lookups - self.hits)
        assert stats.corrupt == 0


StoreMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def _plain(key: bytes | str) -> bytes:
    return key.encode() if isinstance(key, str) else key
