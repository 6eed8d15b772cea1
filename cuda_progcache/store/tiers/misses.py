# SPDX-License-Identifier: Apache-2.0
"""The objects that a tier has just been found not to have."""

from __future__ import annotations

import time
from collections import OrderedDict

from cuda_progcache._util.locks import ForkSafeLock

#: Seconds for which a miss is remembered, and how many are.
_REMEMBERED_FOR, _MOST = 2.0, 4096


class RecentMisses:
    """Names of objects that weren't there, each remembered for a moment."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._until: OrderedDict[str, float] = OrderedDict()  # by name

    def __contains__(self, name: str) -> bool:
        until = self._until.get(name)
        return until is not None and time.monotonic() < until

    def add(self, name: str) -> None:
        """Remember one."""
        with self._lock:
            self._until[name] = time.monotonic() + _REMEMBERED_FOR
            self._until.move_to_end(name)
            if len(self._until) > _MOST:
                self._until.popitem(last=False)

    def forget(self, name: str) -> None:
        """Forget one: it is about to be written."""
        with self._lock:
            self._until.pop(name, None)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._until.clear()
