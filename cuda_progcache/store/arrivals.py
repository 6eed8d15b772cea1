# SPDX-License-Identifier: Apache-2.0
"""New entries in a store's directory, for ``watch``. Only shards that have changed are listed again."""

from __future__ import annotations

import os
import time

from cuda_progcache._util.files import is_settled
from cuda_progcache.store import pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.root import Root


class Arrivals:
    """Reports the entries that were added since the last look. The constructor takes the first look.

    Parameters
    ----------
    root : Root
        The store's directory; it may not exist yet.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}
        self._changed: dict[str, int] = {}  # modification times of the shards, when they were last listed
        self.look()

    def look(self) -> list[str]:
        """The digests of new entries, in any order within a shard. An entry that was removed and stored again counts.

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
