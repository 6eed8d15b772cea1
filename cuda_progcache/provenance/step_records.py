# SPDX-License-Identifier: Apache-2.0
"""Storage of the calls that belong to a program store but made no program (:mod:`cuda_progcache.provenance.steps`).

A store on disk keeps them as files below ``steps/`` in its directory, beside ``records/``, in the usual format of call
records; the steps of all its levels and layers are found. For a store in memory, they are in the process's memory.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from cuda_progcache._util import files
from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.storage import records
from cuda_progcache.memo.storage.tree import FileTree, Signature
from cuda_progcache.store.derived import write_beside

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import ProgramCacheResource

_logger = logging.getLogger(__name__)

#: The most calls that one of the 256 shards, or a store in memory, may hold; the oldest are evicted first. Programs
#: don't need them: their own records say what they were made from.
MOST = 128
MOST_IN_MEMORY = 4096

_lock = threading.Lock()
_in_memory: WeakKeyDictionary[ProgramCacheResource, dict[Digest, bytes]] = WeakKeyDictionary()


class Steps:
    """The calls beside a store's programs; ``counters`` counts failures: ``corrupt`` and ``dropped``."""

    def __init__(self, store: ProgramCacheResource) -> None:
        place = getattr(store, "path", None)
        roots = dict.fromkeys(map(str, [*([] if place is None else [place]), *store.roots]))
        self._memory = _in_memory.setdefault(store, {})
        self._trees = [FileTree(os.path.join(root, "steps"), ".json") for root in roots]
        #: The tree that is written; the others are only read.
        self._own = None if place is None else self._trees[0]
        self.counters: Counter[str] = Counter()

    def save(self, call: DigestedCall) -> Digest:
        """Save a call; keep it in memory if the directory can't be written."""
        key = call.to_lookup_key()
        body = records.encode(call, key)
        if self._own is not None:
            try:
                write_beside(os.path.dirname(self._own.root), self._own.path(key), records.seal(body, key, None))
            except OSError as error:
                self.counters["dropped"] += 1
                _logger.info("the call of %s is kept in memory only: %s", call.name, error)
            else:
                self._trim(self._own, key[:2])
                return key
        with _lock:
            self._memory.pop(key, None)
            self._memory[key] = body
            while len(self._memory) > MOST_IN_MEMORY:
                del self._memory[next(iter(self._memory))]
        return key

    @staticmethod
    def _trim(tree: FileTree, shard: str) -> None:
        """Evict the oldest calls of a shard that has too many."""
        if len(tree.keys_of(shard)) > MOST:
            by_age = sorted(tree.scan(shard).items(), key=lambda item: item[1].mtime_ns)
            for key, _ in by_age[: len(by_age) - MOST * 3 // 4]:
                files.unlink_quietly(tree.path(key))

    def record(self, key: str) -> bytes | None:
        """Return the JSON of a call's record; None if there is none or it is corrupt."""
        body = self._memory.get(Digest(key))
        if body is not None:
            return body
        for tree in self._trees:
            try:
                return records.unseal(tree.read(key), key, None)
            except KeyError:
                continue
            except ValueError:
                self.counters["corrupt"] += 1
                if tree is self._own:
                    tree.set_aside(key)
        return None

    def load(self, key: str) -> DigestedCall:
        """Return a call; raise KeyError if there is none."""
        body = self.record(key)
        if body is None:
            raise KeyError(key)
        return records.decode(body)

    def contains(self, key: str) -> bool:
        """Return whether there is a call with this key."""
        return key in self._memory or any(tree.contains(key) for tree in self._trees)

    def remove(self, key: Digest) -> bool:
        """Remove a call from memory and the writable directory; return whether there was one."""
        with _lock:
            found = self._memory.pop(key, None) is not None
        return found | (self._own is not None and self._own.remove(key))

    def all(self) -> Iterable[Digest]:
        """Return the keys of all calls."""
        return {*tuple(self._memory), *itertools.chain.from_iterable(tree.keys() for tree in self._trees)}

    def with_prefix(self, prefix: str) -> list[Digest]:
        """Return keys with a prefix of at least 2 characters; at most two from each directory."""
        here = [key for key in tuple(self._memory) if key.startswith(prefix)]
        return [*here, *(key for tree in self._trees for key in tree.with_prefix(prefix))]

    def calls(self) -> Iterator[DigestedCall]:
        """Yield every call that can be read."""
        bodies = map(self.record, self.all())
        return (records.decode(body) for body in bodies if body is not None)

    def in_memory(self) -> list[DigestedCall]:
        """Return the calls that are in memory only."""
        return [records.decode(body) for body in tuple(self._memory.values())]

    # For the index of a store in one directory

    def shards(self) -> dict[str, int]:
        """Return the shard directories and their mtimes (ns)."""
        return self._trees[0].shards()

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Return the current signatures of the records in a shard."""
        return self._trees[0].scan(shard)
