# SPDX-License-Identifier: Apache-2.0
"""The store contract, for a tier on each kind of server and for a stack with a tier."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from cuda_progcache.store import FileStreamProgramCache, ProgramCacheStack
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier
from cuda_progcache.testing import RecordStoreContract, StoreMachine


class TestTier(RecordStoreContract):
    exact_sizes = False

    @pytest.fixture
    def make(self, tier_url, open_url):
        return lambda: open_url(tier_url)


class TestStackBeforeRedis(RecordStoreContract):
    @pytest.fixture
    def make(self, redis_url, open_url, tmp_path):
        return lambda: ProgramCacheStack(
            (FileStreamProgramCache(tmp_path / "cache", durability="none"), open_url(redis_url))
        )

    def test_clear(self, store, writer):
        """clear empties only what is on this machine; the tier is shared."""
        writer[b"a"] = b"1"
        writer.clear()
        assert len(store) == 0
        assert store.get(b"a") == b"1"


class RedisMachine(StoreMachine):
    lasts = True
    exact_sizes = False
    url = ""

    def open(self):
        return open_tier(parse_tier(self.url))

    def teardown(self):
        self.store.clear()
        self.store.close()


def test_anything_in_any_order(redis_url):
    RedisMachine.url = redis_url
    run_state_machine_as_test(RedisMachine, settings=settings(max_examples=10, stateful_step_count=15, deadline=None))
