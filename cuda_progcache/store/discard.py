# SPDX-License-Identifier: Apache-2.0
"""Removal of programs from a store's directory and from its size account."""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import nullcontext

from cuda_progcache._util.files import identity
from cuda_progcache.store import judge, pairs, removal
from cuda_progcache.store.derived import DIRECTORIES, clear_derived

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.disk_store import DiskStore

#: Seconds before each attempt to remove an entry that is still, or again, in its place.
_PAUSES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)


def discard(store: DiskStore, digest: str, *, keep: bool) -> bool:
    """Remove an entry; return whether there was one.

    Parameters
    ----------
    store : DiskStore
    digest : str
    keep : bool
        Move it to the quarantine instead of deleting it.

    Raises
    ------
    OSError
        The directory can't be written, or another process has the entry open.
    """
    path = store._root.entry_path(digest)
    entry = None
    for pause in _PAUSES:
        time.sleep(pause)
        entry = judge.lstat(path)
        if entry is not None:
            if _discard_seen(store, digest, entry, keep=keep):
                return not stat.S_ISDIR(entry.st_mode)
            there = judge.lstat(path)
            if there is not None and identity(there) != identity(entry):
                return True  # a writer has replaced it: the old entry is gone
        # It is there again, or may be soon: another remover has put it back, or the whole tree is being removed.
        if not removal.is_there(store._root, digest):
            return False
    if entry is None:
        return False
    raise PermissionError(errno.EACCES, "another process has it open", path)


def _discard_seen(store: DiskStore, digest: str, entry: os.stat_result, *, keep: bool) -> bool:
    """Remove exactly this file as the entry; return whether it was there."""
    with store._cap.operation(digest) if store._accounted() else nullcontext() as operation:
        charged = pairs.charged(entry, judge.lstat(store._root.record_path(digest)))
        keep = keep or stat.S_ISDIR(entry.st_mode)
        if not removal.take_away(store._root, digest, identity(entry), keep=keep):
            return False
        if operation is not None:
            operation.done(-1, -charged)
    store._last_use.pop(digest, None)
    store._unpin_removed(digest)
    return True


def clear(store: DiskStore, *, pinned: bool) -> None:
    """Remove all entries, or those that aren't pinned; see :meth:`DiskStore.clear`."""
    root = store._root
    try:
        spared = frozenset() if pinned else store.pins()
        removal.clear(root, spared=spared)
        for digest in store.pins() - spared:
            store._unpin_removed(digest)
        clear_derived(root.path, names=("failures",) if spared else DIRECTORIES)
        removal.trim_quarantine(root)
        removal.reclaim(root)
    except OSError as exc:
        store._failed("clear the program cache", exc, root.path)
    finally:
        store._verified.clear()
        store._recent.clear()
        store._last_use.clear()
        if store._accounted():
            store._cap.cleared()
