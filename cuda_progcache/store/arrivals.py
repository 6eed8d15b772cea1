# SPDX-License-Identifier: Apache-2.0
"""What comes into a store's directory, for who watches it: only shards that have changed are looked at again."""

from __future__ import annotations

import os
import time

from cuda_progcache._util.files import is_settled
from cuda_progcache.store import pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.root import Root


class Arrivals:
    """The entries that have come since the last look; the first is made by the constructor.

    Parameters
    ----------
    root : Root
        The store's directory, which need not be there yet.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}
        self._changed: dict[str, int] = {}  # when the shards did that have been looked at since
        self.look()

    def look(self) -> list[str]:
        """The digests of the entries that have come, those of one shard in any order. What went and came back counts.

        Raises
        ------
        OSError
            The directory can't be read.
        """
        found: list[str] = []
        for shard in self._root.shards():
            try:
                st = os.stat(self._root.entries + shard)
            except FileNotFoundError:
                continue
            if self._changed.get(shard) == st.st_mtime_ns:
                continue
            settled = is_settled(st, time.time_ns())
            known, now = self._known.get(shard, frozenset()), frozenset(pairs.digests(self._root, shard))
            self._known[shard] = now
            if settled:
                self._changed[shard] = st.st_mtime_ns
            found += now - known
        return found
