# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in this process's memory."""

from __future__ import annotations

import functools
import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from cuda_progcache import events
from cuda_progcache._util import modes
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.store.base import (
    SHORT_KEY,
    Entry,
    EntryInfo,
    ProgramCacheResource,
    charged_size,
    check_size_cap,
    entry_digest,
    frozen_miss,
    key_bytes,
    program_bytes,
)
from cuda_progcache.store.derived import forget_derived
from cuda_progcache.store.records import checksum, encode_record
from cuda_progcache.store.stats import Counters, StoreStats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.base import Key, Value


class _Held(NamedTuple):
    data: bytes
    record_json: bytes  # JSON, so that callers can't alter a stored record, and all stores return the same
    digest: str
    charged: int
    created: float
    last_used: list[float]  # one element, replaced by a read


class InMemoryProgramCache(ProgramCacheResource):
    """A thread-safe LRU of compiled programs that lives as long as this process.

    Parameters
    ----------
    max_size_bytes : int, optional
        Cap on the bytes of entries, and of their records beyond 512 bytes each; the least recently used entries are
        evicted. ``None``: no limit. A value larger than the cap is refused and counted, and evicts nothing.

    Raises
    ------
    ValueError
        ``max_size_bytes`` is zero or negative.
    """

    def __init__(self, *, max_size_bytes: int | None = None) -> None:
        check_size_cap(max_size_bytes)
        self._max_size_bytes = max_size_bytes
        self._entries: OrderedDict[bytes | str, _Held] = OrderedDict()  # least recently used first
        self._keys: dict[str, bytes | str] = {}
        self._total_bytes = 0
        self._counters = Counters()
        self._lock = self._counters.lock

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} entries>"

    def _find(self, key: object) -> _Held | None:
        if type(key) is not bytes or len(key) > SHORT_KEY:
            key = _name(key)
        with self._lock:
            held = self._entries.get(key)
            if held is None:
                self._counters.misses += 1
                return None
            self._entries.move_to_end(key)
            self._counters.hits += 1
        held.last_used[0] = time.time()
        return held

    def __getitem__(self, key: Key) -> bytes:
        held = self._find(key)
        if held is None:
            raise frozen_miss(type(self).__name__, key) if modes.current() == "frozen" else KeyError(key)
        return held.data

    def load(self, key: Key) -> Entry | None:
        """The entry with its record; ``None`` on a miss."""
        held = self._find(key)
        return None if held is None else Entry(held.data, functools.partial(json.loads, held.record_json))

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        entry = self.load(key)
        if entry is None:
            self._counters.count("misses", -1)
        return entry

    def __setitem__(self, key: Key, value: Value) -> None:
        data = program_bytes(value)
        del value  # a frame that can raise holds no ObjectCode
        self._assign(key, data)

    def _assign(self, key: Key, value: Value) -> bool:
        return self._put(_name(key), program_bytes(value), b"{}")

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Store an entry with its record; ``False`` if it is larger than the cap."""
        return self._put(_name(key), program_bytes(data), encode_record(record))

    def _put(self, key: bytes | str, data: bytes, record_json: bytes) -> bool:
        now = time.time()
        charged = charged_size(len(data), len(record_json))
        cap = self._max_size_bytes
        held = _Held(data, record_json, key if isinstance(key, str) else entry_digest(key), charged, now, [now])
        with self._lock:
            self._discard(key)  # even if the new value is refused: a later read must not return the old one
            if cap is not None and charged > cap:
                self._counters.refused += 1
                return False
            self._entries[key] = held
            self._keys[held.digest] = key
            self._total_bytes += charged
            self._counters.stored += 1
            evicted = []
            while cap is not None and self._total_bytes > cap:
                victim, found = next(iter(self._entries.items()))
                self._discard(victim)
                self._counters.evicted += 1
                evicted.append(found.digest)
        for digest in evicted:
            events.emit_evicted(digest)
        return True

    def _discard(self, key: bytes | str) -> bool:
        held = self._entries.pop(key, None)
        if held is None:
            return False
        del self._keys[held.digest]
        self._total_bytes -= held.charged
        return True

    def __delitem__(self, key: Key) -> None:
        with self._lock:
            found = self._discard(_name(key))
        if not found:
            raise KeyError(key)

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        with self._lock:
            key = self._keys.get(digest)
            if key is None:
                raise KeyError(digest)
            self._discard(key)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Remove every entry, and the data derived from compiles."""
        forget_derived(self)
        with self._lock:
            self._entries.clear()
            self._keys.clear()
            self._total_bytes = 0

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry that exists when the iteration starts, least recently used first."""
        with self._lock:
            held = list(self._entries.values())
        return map(_info, held)

    def info(self, digest: str) -> EntryInfo:
        """One entry; :class:`KeyError` if there is none of that digest."""
        with self._lock:
            key = self._keys.get(digest)
            if key is None:
                raise KeyError(digest)
            held = self._entries[key]
        return _info(held)

    def _digests(self, prefix: str) -> list[str]:
        with self._lock:
            return [digest for digest in self._keys if digest.startswith(prefix)]

    def _sizes(self) -> list[tuple[str, int, int]]:
        with self._lock:
            return [(held.digest, len(held.data), len(held.record_json)) for held in self._entries.values()]

    def stats(self) -> StoreStats:
        """The store's contents in numbers, and its counters."""
        with self._lock:
            held = list(self._entries.values())
            return self._counters.stats(
                entries=len(held),
                size=sum(len(one.data) for one in held),
                record_size=sum(len(one.record_json) for one in held),
            )


def _name(key: object) -> bytes | str:
    """The dictionary key for a cache key: the key itself or, if that is long, its digest (a str)."""
    name = key_bytes(key)
    return name if len(name) <= SHORT_KEY else entry_digest(name)


def _info(held: _Held) -> EntryInfo:
    return EntryInfo(
        digest=held.digest,
        size=len(held.data),
        created=held.created,
        last_used=held.last_used[0],
        checksum=checksum(held.data),
        path=None,
        record=json.loads(held.record_json),
    )
