# SPDX-License-Identifier: Apache-2.0
"""Tests that every program store must pass. They test this package's stores and can test your own.

::

    # test_my_store.py
    import pytest
    from cuda_progcache.testing import StoreContract


    class TestMyStore(StoreContract):
        @pytest.fixture
        def make(self, tmp_path):
            return lambda: MyStore(tmp_path)

:class:`StoreContract` tests the methods that :class:`~cuda_progcache.store.ProgramCacheResource` leaves abstract.
:class:`RecordStoreContract` also tests records, listings and counters, and :class:`CappedStoreContract` a size cap.
:class:`StoreMachine` runs random sequences of operations and compares the store with a dictionary. The tests need
pytest, and the machine also Hypothesis: ``pip install 'cuda-progcache[testing]'``.
"""

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.testing.contract import CappedStoreContract, RecordStoreContract, StoreContract
    from cuda_progcache.testing.machine import StoreMachine

_HOME = {
    "CappedStoreContract": "contract",
    "RecordStoreContract": "contract",
    "StoreContract": "contract",
    "StoreMachine": "machine",
}

__all__ = ["CappedStoreContract", "RecordStoreContract", "StoreContract", "StoreMachine"]


def __getattr__(name: str) -> "Any":
    return take(globals(), _HOME, name)
