# SPDX-License-Identifier: Apache-2.0
"""What every store promises, asked of a tier on Redis, and of a stack before one."""

from __future__ import annotations

import pytest
from hypothesis import settings

from cuda_progcache.store import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack
from cuda_progcache.testing import RecordStoreContract, StoreMachine


class TestRedis(RecordStoreContract):
    sizes = False

    @pytest.fixture
    def make(self, redis_url, open_url):
        return lambda: open_url(redis_url)


class TestStackBeforeRedis(RecordStoreContract):
    @pytest.fixture
    def make(self, redis_url, open_url, tmp_path):
        return lambda: ProgramCacheStack(
            (FileStreamProgramCache(tmp_path / "cache", durability="none"), open_url(redis_url))
        )
