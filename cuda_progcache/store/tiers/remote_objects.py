# SPDX-License-Identifier: Apache-2.0
"""The objects of a service, as a store uses them: verified on reading, and written by a thread."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.store.derived import merged_manifest
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.tiers.calls import OutOfUseError
from cuda_progcache.store.tiers.engine import TooLargeError, batches, each_of, reason
from cuda_progcache.store.tiers.envelope import (
    MANIFESTS,
    DamagedObjectError,
    digest_in,
    most_bytes,
    object_name,
    pack,
    unpack,
)
from cuda_progcache.store.tiers.write_back import WriteBack

if TYPE_CHECKING:
    from cuda_progcache.store.stats import Counters
    from cuda_progcache.store.tiers.calls import Calls
    from cuda_progcache.store.tiers.engine import Engine, Listed
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.signing import Doubt, Trust

#: The time limit of a listing, in seconds.
_LISTING = 60.0
#: Bytes of a header manifest's object that are reserved for its record and signature.
_ROOM = 1 << 14
#: The maximum size of a signature in a record, in bytes.
_SIGNATURE = 2048
#: Seconds for which a miss is remembered, and how many are remembered.
_MISSED_FOR, _MOST_MISSED = 2.0, 4096


class RecentMisses:
    """Names of missing objects, each remembered for a moment."""

    def __init__(self) -> None:
        self._lock = ForkSafeLock()
        self._until: OrderedDict[str, float] = OrderedDict()  # by name

    def __contains__(self, name: str) -> bool:
        until = self._until.get(name)
        return until is not None and time.monotonic() < until

    def add(self, name: str) -> None:
        """Remember a name."""
        with self._lock:
            self._until[name] = time.monotonic() + _MISSED_FOR
            self._until.move_to_end(name)
            if len(self._until) > _MOST_MISSED:
                self._until.popitem(last=False)

    def forget(self, name: str) -> None:
        """Forget a name, since it has been written."""
        with self._lock:
            self._until.pop(name, None)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._until.clear()


class RemoteObjects:
    """Finds and writes the programs and header manifests of a service.

    If anything is wrong with an object, that is a miss, which is counted, and reported by the next caller. Writes are
    queued, and lookups also find what is queued.

    Parameters
    ----------
    engine : Engine
    calls : Calls
        The calls to the engine.
    settings : TierSettings
        Its time and size limits.
    trust : Trust
    counters : Counters
        The store's counters.
    """

    def __init__(self, engine: Engine, calls: Calls, settings: TierSettings, trust: Trust, counters: Counters) -> None:
        self._engine = engine
        self._calls = calls
        self._settings = settings
        self._trust = trust
        self._counters = counters
        self._lock = ForkSafeLock()
        self.misses = RecentMisses()
        self.writes = WriteBack(self._send, self._dropped, lambda: calls.breaker.state != "closed")
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self._counts = {"untrusted": 0, "bytes_in": 0, "bytes_out": 0}

    def count(self, name: str, by: int = 1) -> None:
        """Add to one of the counters that only tiers have."""
        with self._lock:
            self._counts[name] += by

    def counts(self) -> dict[str, int]:
        """These counters, by name."""
        with self._lock:
            return dict(self._counts)

    def _limit(self, name: str) -> int:
        return most_bytes(name, self._settings.max_bytes)

    # Lookups

    def waiting(self, tree: str, digest: str) -> tuple[bytes, Version] | None:
        """A queued entry or manifest; ``None`` if there is none."""
        packed = self.writes.find(object_name(tree, digest))
        return None if packed is None else unpack(digest, packed)

    def find(self, tree: str, digest: str) -> tuple[bytes, Version] | None:
        """A verified entry or manifest; ``None`` on a miss. Anything wrong is a miss."""
        found = self.waiting(tree, digest)
        if found is not None:
            return found
        name = object_name(tree, digest)
        if name in self.misses:
            return None
        packed = self._fetch(self._calls.look_up, self._settings.timeout, name, self._limit(name))
        return None if packed is None else self._verified(name, packed, self._trust.verifier_of(tree))

    def fetch(self, name: str, *, limit: int) -> bytes | None:
        """A large object as it was sent, unverified; ``None`` on a miss. Anything wrong is a miss."""
        return self._fetch(self._calls.make, self._settings.write_timeout, name, limit)

    def _fetch(self, call: Callable[..., bytes | None], seconds: float, name: str, limit: int) -> bytes | None:
        try:
            packed = call(seconds, self._engine.get, name, limit=limit)
        except OutOfUseError:
            return None
        except TooLargeError as exc:
            self._counters.count("refused")
            self._calls.note("large", f"has {name}, which is too large ({reason(exc)}); this counts as a miss")
            self.misses.add(name)
            return None
        except OSError:
            self._counters.count("read_errors")
            return None
        if packed is None:
            self._calls.judge(is_sound=True)
            self.misses.add(name)
            return None
        self.count("bytes_in", len(packed))
        return packed

    def find_many(self, tree: str, digests: Iterable[str]) -> Iterator[tuple[str, bytes, Version]]:
        """Find many entries or manifests: those that exist, with their digests; see :meth:`find`."""
        names = []
        for digest in digests:
            found = self.waiting(tree, digest)
            if found is not None:
                yield digest, *found
            elif (name := object_name(tree, digest)) not in self.misses:
                names.append(name)
        timeout = self._settings.timeout if len(names) == 1 else self._settings.write_timeout
        verifier = self._trust.verifier_of(tree)
        try:
            for name, packed in self._get_many(tree, names, timeout):
                if packed is None:
                    self.misses.add(name)
                    continue
                self.count("bytes_in", len(packed))
                verified = self._verified(name, packed, verifier)
                if verified is not None:
                    yield digest_in(name), *verified
        except OutOfUseError:
            return
        except OSError:
            self._counters.count("read_errors")

    def _get_many(self, tree: str, names: Iterable[str], seconds: float) -> Iterator[tuple[str, bytes | None]]:
        """Each name with its object, from batch calls with this time limit (OSError if one fails)."""
        limit = self._limit(tree)
        return each_of(
            names, lambda some: self._calls.make(seconds, self._engine.get_many, some, limit=limit), self._engine.name
        )

    def _verified(self, name: str, packed: bytes, verifier: Doubt | None) -> tuple[bytes, Version] | None:
        digest = digest_in(name)
        try:
            data, version = unpack(digest, packed)
        except DamagedObjectError as exc:
            self.reject("corrupt", f"sent something else for {name} ({exc}); this counts as a miss")
            self.misses.add(name)
            return None
        self._calls.judge(is_sound=True)
        if verifier is not None and (why := verifier(digest, data, version.record())) is not None:
            self.count("untrusted")
            self._calls.note("untrusted", f"has {name}, which isn't trusted ({why}); this counts as a miss")
            self.misses.add(name)
            return None
        return data, version

    def reject(self, kind: str, said: str) -> None:
        """Count a wrong answer, and keep a warning for the next caller."""
        self._counters.count("corrupt")
        self._calls.judge(is_sound=False)
        self._calls.note(kind, said)

    # Writes

    def put(self, tree: str, digest: str, data: bytes, record: Mapping[str, Any]) -> bool:
        """Queue an entry or manifest; ``False`` if it is too large, or the queue is full or unusable."""
        name = object_name(tree, digest)
        packed = pack(digest, data, Version.of(data, encode_record(record), time.time()))
        if len(packed) + (0 if self._trust.signer is None else _SIGNATURE) > self._limit(name):
            self._counters.count("refused")
            return False
        if not self._calls.is_ready():
            self._dropped(1)
            return False
        return self.writes.put(name, packed, len(packed))

    def _dropped(self, count: int) -> None:
        self._counters.count("dropped", count)

    def _send(self, objects: Mapping[str, bytes]) -> None:
        """Write objects; runs on the queue's thread."""
        objects = self._signed(self._with_theirs(objects))
        self._calls.make(self._settings.write_timeout, self._engine.put_many, objects)
        for name in objects:
            self.misses.forget(name)
        self._counters.count("stored", len(objects))
        self.count("bytes_out", sum(map(len, objects.values())))

    def _with_theirs(self, objects: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The objects; manifests are merged with the sets that others have added.

        If two processes add to one manifest at the same time, a set is lost, which costs a compile.
        """
        manifests = [name for name in objects if name.startswith(MANIFESTS)]
        if not manifests:
            return objects
        merged = dict(objects)
        # The signer vouches for all sets.
        signs = self._trust.signer is not None
        verifier = self._trust.why_not_sign if signs else self._trust.verifier_of(MANIFESTS)
        for name, packed in self._get_many(MANIFESTS, manifests, self._settings.write_timeout):
            theirs = None if packed is None else self._verified(name, packed, verifier)
            if theirs is not None:
                digest = digest_in(name)
                ours, version = unpack(digest, objects[name])
                content = merged_manifest(ours, theirs[0]) or ours
                if len(content) <= self._limit(name) - _ROOM:
                    merged[name] = pack(digest, content, Version.of(content, b"{}", version.created))
        return merged

    def _signed(self, objects: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The objects, with signatures in their records if this tier's publishers sign."""
        if self._trust.signer is None:
            return objects
        made = {}
        for name, packed in objects.items():
            digest = digest_in(name)
            data, version = unpack(digest, packed)
            try:
                signed = self._trust.version(digest, data, version.record(), version.created)
            except OSError as exc:
                self._calls.note("signing", f"receives nothing from here ({exc})")
                raise
            made[name] = pack(digest, data, signed)
        return made

    def remove(self, tree: str, digest: str) -> bool:
        """Remove an entry or manifest, also from the queue; ``False`` if there was none."""
        name = object_name(tree, digest)
        found = self.writes.find(name) is not None
        self.writes.forget([name])
        self.writes.flush(self._settings.write_timeout)  # it may be under way
        self.writes.forget([name])  # and may have been postponed
        try:
            if self._is_there(name):
                found = True
                self._calls.make(self._settings.timeout, self._engine.delete, [name])
        except OSError:
            self._counters.count("failed")
            return True  # unknown
        return found

    def _is_there(self, name: str) -> bool:
        """Whether the service has an object of that name, of any size."""
        limit = self._settings.max_bytes
        try:
            return self._calls.make(self._settings.timeout, self._engine.get, name, limit=limit) is not None
        except TooLargeError:
            return True

    def clear(self, trees: Iterable[str]) -> None:
        """Remove all objects of these trees, and all queued writes."""
        self.writes.forget()
        self.writes.flush(self._settings.write_timeout)
        self.writes.forget()
        try:
            for tree in trees:
                names = [listed.name for listed in self.list(tree)]
                for batch in batches(names, lambda _: 0):
                    self._calls.make(self._settings.write_timeout, self._engine.delete, batch)
        except OSError:
            self._counters.count("failed")

    def list(self, prefix: str) -> list[Listed]:
        """The objects whose names start with a prefix (OSError if the service can't list, or is in trouble)."""

        def listed(*, until: float) -> list[Listed]:
            return [*self._engine.list(prefix, until=until)]

        return self._calls.make(_LISTING, listed)
