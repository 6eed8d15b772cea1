# SPDX-License-Identifier: Apache-2.0
"""The calls that made a store's programs, and those around them, as a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuda_progcache.memo.caches.cache import Cache
from cuda_progcache.memo.steps import kind_of

if TYPE_CHECKING:
    from cuda_progcache.memo.call import LazyCall
    from cuda_progcache.memo.digest import Digest
    from cuda_progcache.memo.storage.programs import ProgramCallStorage


@dataclass(frozen=True)
class ProgramCalls(Cache):
    """What :func:`~cuda_progcache.memo.storage.program_cache` makes.

    Attributes
    ----------
    values : ProgramValueStorage
    calls : ProgramCallStorage
    """

    calls: ProgramCallStorage

    def _transfer_one(self, call: LazyCall, *, overwrite: bool = False) -> bool:
        if kind_of(call) is None:
            return super()._transfer_one(call, overwrite=overwrite)
        key = call.to_lookup_key()
        with self._operation_context(key):
            if not overwrite and self.contains(key):
                return False
            self.calls.save(call.detach())  # as it is recorded: nothing of it lies elsewhere
            return True

    def gc(self) -> set[Digest]:
        """Remove renderings, analyses and prewarm runs of which no program is left.

        Returns
        -------
        set of Digest
            The keys of the calls that were removed.
        """
        programs: set[str] = set()
        needed: set[str] = set()
        steps: dict[Digest, LazyCall] = {}
        for call in self.query():
            if kind_of(call) is not None:
                steps[call.to_lookup_key()] = call
            elif "record" in call.metadata:
                programs.add(call.to_lookup_key())
                needed.update((call.metadata.get("links") or {}).get("parents") or ())
        removed = set()
        for key, call in steps.items():
            links = call.metadata.get("links") or {}
            about = {*links.get("children", ()), *links.get("parents", ())}
            if key not in needed and not about & programs and self.calls.steps.remove(key):
                removed.add(key)
        return removed
