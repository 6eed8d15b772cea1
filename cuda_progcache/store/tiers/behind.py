# SPDX-License-Identifier: Apache-2.0
"""The tiers behind a directory: opened on the first miss or write, and shared by all stores of a process.

They are shared so that a service that is out of order costs a process its deadline once, however many stores it makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store.base import Entry, EntryInfo, ProgramCacheResource
from cuda_progcache.store.disk_store import DiskStore
from cuda_progcache.store.stack import ProgramCacheStack
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.engine import reason
from cuda_progcache.store.tiers.remote import remote_in
from cuda_progcache.store.tiers.tally import TierTally

if TYPE_CHECKING:
    from pathlib import Path

    from cuda_progcache.store.base import Key, Value
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.tiers.remote import RemoteProgramCache
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.tally import TierStats

_opened: dict[TierSettings, ProgramCacheResource | None] = {}
_opening = ForkSafeLock()


def stores(tiers: tuple[TierSettings, ...]) -> tuple[ProgramCacheResource, ...]:
    """The stores on these tiers, the same ones each time; one that can't be opened is left out, with a warning."""
    found = [_store(settings) for settings in tiers]
    return tuple(store for store in found if store is not None)


def _store(settings: TierSettings) -> ProgramCacheResource | None:
    if settings not in _opened:
        made: ProgramCacheResource | None = None
        try:
            made = open_tier(settings)  # creates locks, and is called without holding ours
        except StoreError as exc:
            from cuda_progcache._util.warning import warn

            warn(f"the tier {settings.url} isn't used: {reason(exc)}", ProgCacheWarning)
        with _opening:
            _opened.setdefault(settings, made)
    return _opened[settings]


def in_use() -> list[TierStats]:
    """The statistics of each tier that this process has opened; no service is asked."""
    return [remote.tier() for one in list(_opened.values()) if (remote := remote_in(one)) is not None]


def stack(store: FileStreamProgramCache, tiers: tuple[TierSettings, ...], *, writes: bool) -> ProgramCacheStack | None:
    """The stack of a directory's store and the tiers behind it; None if there are no tiers.

    Parameters
    ----------
    store : FileStreamProgramCache
        It has just missed, or is about to be written.
    tiers : tuple of TierSettings
    writes : bool
        Whether anything is written, to the directory or the tiers.
    """
    found = stores(tiers)
    if not found:
        return None
    return ProgramCacheStack((_Here(store), *found), write_policy=None if writes else "skip")


def tallies(store: FileStreamProgramCache, root: Root, tiers: tuple[TierSettings, ...]) -> tuple[TierTally, ...]:
    """Tallies that write the tiers' counts to files in the store's directory, at the latest when the store ends."""
    remotes = [remote for one in stores(tiers) if (remote := remote_in(one)) is not None]
    found = [(TierTally(root, remote), remote) for remote in remotes]
    for tally, remote in found:
        weakref.finalize(store, _write_down, tally, remote)
    return tuple(tally for tally, _ in found)


def _write_down(tally: TierTally, remote: RemoteProgramCache) -> None:
    """Write down a tier's counts now, and again once its queued writes are done."""
    tally.write()
    remote.then(tally.write)


class _Here(ProgramCacheResource):
    """The directory as a level of its own stack. Lookups there have already missed; it takes copies and writes."""

    def __init__(self, store: FileStreamProgramCache) -> None:
        self._known = weakref.ref(store)  # a weak reference, since the store holds the stack

    @property
    def _store(self) -> FileStreamProgramCache:
        store = self._known()
        if store is None:
            raise StoreError("the store is gone")
        return store

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._store.path

    @property
    def directory(self) -> str:
        """The store's directory, as a string."""
        return self._store.directory

    @property
    def roots(self) -> tuple[Path, ...]:
        """The store's own directory."""
        return (self._store.path,)

    def load(self, key: Key) -> Entry | None:  # noqa: ARG002
        """None: the directory was asked before."""
        return None

    load_again = load

    def __getitem__(self, key: Key) -> NoReturn:
        raise KeyError(key)

    def __setitem__(self, key: Key, value: Value) -> None:
        self.publish(key, value, {})

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Write to the directory only."""
        return DiskStore.publish(self._store, key, data, record)

    def copy(self, key: Key, entry: Entry) -> bool:
        """Copy to the directory only."""
        return DiskStore.copy(self._store, key, entry)

    @property
    def owner(self) -> FileStreamProgramCache:
        """The store, for callers that must keep it alive."""
        return self._store

    def __delitem__(self, key: Key) -> None:
        DiskStore.__delitem__(self._store, key)

    def remove(self, digest: str) -> None:
        """Remove from the directory only."""
        self._store._delete_here(digest)

    def quarantine(self, digest: str) -> None:
        """Quarantine in the directory only."""
        self._store._quarantine_here(digest)

    def clear(self) -> None:
        """Do nothing: the store clears its directory itself."""

    def __len__(self) -> int:
        return 0

    def entries(self) -> Iterator[EntryInfo]:
        """No entries: the store lists its own."""
        return iter(())

    def info(self, digest: str) -> EntryInfo:
        """One entry of the directory."""
        found = self._store._info(digest)
        if found is None:
            raise KeyError(digest)
        return found
