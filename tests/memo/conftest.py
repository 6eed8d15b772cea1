# SPDX-License-Identifier: Apache-2.0
"""Fixtures: caches in memory and in files, and threads that start together."""

from __future__ import annotations

import threading

import pytest

from cuda_progcache.memo.caches import Cache
from cuda_progcache.memo.memoize import file_cache
from cuda_progcache.memo.storage import CallMemory, ValueMemory


@pytest.fixture
def memory_cache():
    return Cache(ValueMemory({}), CallMemory({}))


@pytest.fixture(params=["memory", "files"])
def cache(request, tmp_path):
    """A cache in memory or in files."""
    return Cache(ValueMemory({}), CallMemory({})) if request.param == "memory" else file_cache(tmp_path / "memo")


@pytest.fixture
def files(tmp_path):
    """A cache in files."""
    return file_cache(tmp_path / "memo")


@pytest.fixture
def at_once():
    """``at_once(n, work)`` runs ``work(i)`` in n threads that start together.

    It returns the results in order, or raises the first error.
    """

    def run(count, work):
        barrier = threading.Barrier(count)
        results, errors = {}, []

        def one(number):
            barrier.wait(300)
            try:
                results[number] = work(number)
            except BaseException as error:  # noqa: BLE001 - raised again in the test
                errors.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
        if errors:
            raise errors[0]
        return [results[number] for number in range(count)]

    return run
