# SPDX-License-Identifier: Apache-2.0
"""Where calls lie that belong to a store of programs and made none of them (:mod:`cuda_progcache.provenance.steps`).

Of a store on disk they are files below ``steps/`` in its directory, beside ``records/``, in the format of every call;
those of all its levels and layers are found. Of a store in memory they are in this process's memory.
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

#: Calls that a shard may hold, of 256, or a store in memory; the oldest go first. Programs don't need them: their own
#: records say what they were made of.
MOST = 128
MOST_IN_MEMORY = 4096

_lock = threading.Lock()
_in_memory: WeakKeyDictionary[ProgramCacheResource, dict[Digest, bytes]] = WeakKeyDictionary()


class Steps:
    """The calls beside a store's programs; ``counters`` says what went wrong here: ``corrupt``, ``dropped``."""

    def __init__(self, store: ProgramCacheResource) -> None:
        place = getattr(store, "path", None)
        roots = dict.fromkeys(map(str, [*([] if place is None else [place]), *store.roots]))
        self._memory = _in_memory.setdefault(store, {})
        self._trees = [FileTree(os.path.join(root, "steps"), ".json") for root in roots]
        #: The one that is written; the others are only read.
        self._own = None if place is None else self._trees[0]
        self.counters: Counter[str] = Counter()

    def save(self, call: DigestedCall) -> Digest:
        """Keep a call; where the directory can't be written, in memory."""
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
        """Keep a shard small, however many programs come and go."""
        if len(tree.keys_of(shard)) > MOST:
            by_age = sorted(tree.scan(shard).items(), key=lambda item: item[1].mtime_ns)
            for key, _ in by_age[: len(by_age) - MOST * 3 // 4]:
                files.unlink_quietly(tree.path(key))

    def record(self, key: str) -> bytes | None:
        """The JSON of a call's record; None where there is none, or it is damaged."""
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
        """A call; KeyError where there is none."""
        body = self.record(key)
        if body is None:
            raise KeyError(key)
        return records.decode(body)

    def contains(self, key: str) -> bool:
        """Whether there is a call."""
        return key in self._memory or any(tree.contains(key) for tree in self._trees)

    def remove(self, key: Digest) -> bool:
        """Remove a call, where that can be done; False if there was none."""
        with _lock:
            found = self._memory.pop(key, None) is not None
        return found | (self._own is not None and self._own.remove(key))

    def all(self) -> Iterable[Digest]:
        """Every key."""
        return {*tuple(self._memory), *itertools.chain.from_iterable(tree.keys() for tree in self._trees)}

    def with_prefix(self, prefix: str) -> list[Digest]:
        """Keys with a prefix of 2 characters at least; of each place two at most."""
        here = [key for key in tuple(self._memory) if key.startswith(prefix)]
        return [*here, *(key for tree in self._trees for key in tree.with_prefix(prefix))]

    def calls(self) -> Iterator[DigestedCall]:
        """Every call that can be read."""
        bodies = map(self.record, self.all())
        return (records.decode(body) for body in bodies if body is not None)

    def in_memory(self) -> list[DigestedCall]:
        """The calls that are in memory alone."""
        return [records.decode(body) for body in tuple(self._memory.values())]

    # What the index of a store in one directory reads

    def shards(self) -> dict[str, int]:
        """Shard directories and their mtimes (ns)."""
        return self._trees[0].shards()

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Records of a shard as they are now."""
        return self._trees[0].scan(shard)
