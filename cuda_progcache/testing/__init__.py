# SPDX-License-Identifier: Apache-2.0
"""Tests that every program store has to pass, for stores of your own; our stores' tests are these.

::

    # test_my_store.py
    import pytest
    from cuda_progcache.testing import StoreContract


    class TestMyStore(StoreContract):
        @pytest.fixture
        def make(self, tmp_path):
            return lambda: MyStore(tmp_path)

:class:`StoreContract` asks for what :class:`~cuda_progcache.store.ProgramCacheResource` leaves abstract, and
:class:`RecordStoreContract` for records, listings and counters as well; :class:`CappedStoreContract` adds a size cap.
:class:`StoreMachine` does anything in any order, and compares with a dictionary. Needs pytest, and Hypothesis for the
machine: ``pip install 'cuda-progcache[testing]'``.
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
