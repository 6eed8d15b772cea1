# SPDX-License-Identifier: Apache-2.0
"""A program store on a remote service."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import forks, modes
from cuda_progcache._util.digest import is_digest
from cuda_progcache.errors import StoreError
from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    entry_digest,
    frozen_miss,
    key_bytes,
    program_bytes,
)
from cuda_progcache.store.derived import merged_manifest
from cuda_progcache.store.readonly import ReadOnlyProgramCache
from cuda_progcache.store.stats import Counters, StoreStats
from cuda_progcache.store.tiers import write_back
from cuda_progcache.store.tiers.calls import Calls
from cuda_progcache.store.tiers.envelope import MANIFESTS, PACKS, PROGRAMS, digest_in, object_name
from cuda_progcache.store.tiers.remote_objects import RemoteObjects
from cuda_progcache.store.tiers.settings import TierSettings
from cuda_progcache.store.tiers.signing import Trust
from cuda_progcache.store.tiers.tally import TierStats

if TYPE_CHECKING:
    from cuda_progcache.store.base import Key, Value
    from cuda_progcache.store.breaker import CircuitBreaker
    from cuda_progcache.store.records import Version
    from cuda_progcache.store.tiers.engine import Engine
    from cuda_progcache.store.tiers.leases import FleetLeases
    from cuda_progcache.store.tiers.signing import Doubt, Sign

#: The object that a probe requests: no program has this digest.
_NOTHING = object_name(PROGRAMS, 64 * "0")
#: The default settings, for a service without a URL.
_PLAIN = TierSettings("")


class RemoteProgramCache(ProgramCacheResource):
    """Programs, and the header manifests that lead to them, on a remote service.

    A service that is down costs its callers one deadline in all, and never causes an error: trouble is a miss, is
    counted, and is warned about once per kind. Objects are verified like files, and so are their signatures if the tier
    requires them. Writes are queued, and sent by a thread; if the service is down, once it works again. Lookups also
    find what is queued.

    Parameters
    ----------
    engine : Engine
        The service.
    settings : TierSettings, optional
        Its time and size limits. Default: those of a URL without options.
    verifier, signer, voucher : callable, optional
        See :class:`~cuda_progcache.store.tiers.signing.Trust`.

    Attributes
    ----------
    trust : Trust
    """

    is_remote = True
    breaker: CircuitBreaker

    def __init__(
        self,
        engine: Engine,
        settings: TierSettings = _PLAIN,
        *,
        verifier: Doubt | None = None,
        signer: Sign | None = None,
        voucher: Doubt | None = None,
    ) -> None:
        self.engine = engine
        self.trust = Trust(verifier, signer, voucher, settings.pinned)
        self._settings = settings
        patience = min(settings.connect_timeout, settings.timeout)
        self._calls = Calls(engine, self._probe, self._in_trouble, patience=patience)
        self.breaker = self._calls.breaker
        self._counters = Counters()
        self._objects = RemoteObjects(engine, self._calls, settings, self.trust, self._counters)
        self._fleet: FleetLeases | None = None
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        """Count from zero, as a forked child does."""
        self._objects.reset()
        self._unsent = 0  # dropped, refused or postponed writes at the last has_published()

    @property
    def name(self) -> str:
        """Its URL without secrets."""
        return self.engine.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.name}>"

    @property
    def demands_signatures(self) -> bool:
        """Whether it only returns entries that one of its configured keys has signed."""
        return self.trust.verifier is not None

    @property
    def fleet(self) -> FleetLeases | None:  # type: ignore[override]  # a class attribute in the base class
        """The leases of the hosts that publish here, on the Redis named by ``lease_url``, or on this one."""
        kept = self._settings.lease or (self._settings if self._settings.scheme in {"redis", "rediss"} else None)
        if kept is None or self._settings.mode != "rw":
            return None
        shared: dict[str, Any] = {}
        if kept is self._settings:  # both uses share one server's state
            if self.breaker.state != "closed" and not self._is_worth_asking():
                return None
            shared = {"ill": self._ill, "well": self._well_again}
        if self._fleet is None:
            from cuda_progcache.store.tiers.leases import FleetLeases

            self._fleet = FleetLeases(kept, landed=self._objects.writes.then, news=self.forget_misses, **shared)
        return self._fleet

    def _is_worth_asking(self) -> bool:
        """Whether to ask a service although it is out of use, since it fails at once: it may be restarting."""
        return self._fleet is not None and self._fleet.answers_at_once and not self._calls.late

    def _ill(self) -> None:
        """Stop using the service, because its leases have found it in trouble."""
        self.breaker.failed(timed_out=True)

    def _well_again(self) -> None:
        """Use the service again, because it has answered its leases."""
        if self.breaker.state != "closed":
            self.breaker.succeeded()
        self._objects.writes.again()

    def _in_trouble(self) -> None:
        """Inform the leases on the same service once it is out of use."""
        if self._fleet is not None and self._settings.lease is None and self.breaker.state == "open":
            self._fleet.suspect()

    def _probe(self) -> None:
        """Request a missing object; once that is answered, send the postponed writes."""
        self._calls.attempt(self._settings.timeout, self._get_nothing)
        self._objects.writes.again()

    def _get_nothing(self, *, until: float) -> None:
        if self.engine.get(_NOTHING, limit=self._settings.max_bytes, until=until) is not None:
            raise StoreError(errno.EPROTO, "the server sends something other than what was asked for", self.name)

    # Lookups

    def __getitem__(self, key: Key) -> bytes:
        found = self._look(key_bytes(key))
        if found is None:
            raise frozen_miss(repr(self), key) if modes.current() == "frozen" else KeyError(key)
        return found[0]

    def load(self, key: Key) -> Entry | None:
        """The entry with its record; ``None`` on a miss."""
        return self._load(key_bytes(key), count_miss=True)

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        return self._load(key_bytes(key), count_miss=False)

    def _load(self, name: bytes, *, count_miss: bool) -> Entry | None:
        found = self._look(name, count_miss=count_miss)
        return None if found is None else _entry(*found)

    def _look(self, key: bytes, *, count_miss: bool = True) -> tuple[bytes, Version] | None:
        found = self._objects.find(PROGRAMS, entry_digest(key))
        if found is not None:
            self._counters.count("hits")
        elif count_miss:
            self._counters.count("misses")
        self._calls.tell()
        return found

    def forget_misses(self) -> None:
        """Forget recent misses, so that those objects are requested again."""
        self._objects.misses.clear()

    # Header manifests

    def find_manifest(self, name: str) -> bytes | None:
        """A header manifest; ``None`` if there is none."""
        found = self._objects.find(MANIFESTS, name)
        self._calls.tell()
        return None if found is None else found[0]

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Header manifests; see :meth:`ProgramCacheResource.find_manifests`."""
        found = {name: data for name, data, _ in self._objects.find_many(MANIFESTS, names)}
        self._calls.tell()
        return found

    def keep_manifest(self, name: str, content: bytes) -> None:
        """Queue a header manifest; its sets are added to those of the service."""
        waiting = self._objects.waiting(MANIFESTS, name)
        if waiting is not None:
            content = merged_manifest(content, waiting[0]) or content
        self._objects.put(MANIFESTS, name, content, {})

    def load_many(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Entry]]:
        """Load many entries in as few requests as possible: those that exist, with their keys."""
        asked = {entry_digest(key): key for key in keys}
        found = 0
        for digest, data, version in self._objects.find_many(PROGRAMS, asked):
            found += 1
            yield asked[digest], _entry(data, version)
        self._counters.count("hits", found)
        self._counters.count("misses", len(asked) - found)
        self._calls.tell()

    # Writes

    def __setitem__(self, key: Key, value: Value) -> None:
        data = program_bytes(value)
        del value  # a frame that can raise holds no ObjectCode
        self._assign(key, data)

    def _assign(self, key: Key, value: Value) -> bool:
        return self.publish(key, value, {})

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:
        """Queue an entry with its record; ``False`` if it is too large, or the queue is full or unusable."""
        digest, payload = entry_digest(key_bytes(key)), program_bytes(data)
        del data  # as above
        done = self._objects.put(PROGRAMS, digest, payload, record)
        self._calls.tell()
        return done

    def copy(self, key: Key, entry: Entry) -> bool:
        """Queue a copy of another store's entry; ``False`` if it would be signed here and nobody vouches for it.

        See :meth:`may_sign` and :meth:`publish`.
        """
        if not self.may_sign(entry_digest(key_bytes(key)), entry.data, entry.record):
            self._counters.count("refused")
            return False
        return self.publish(key, entry.data, entry.record)

    def may_sign(self, digest: str, data: bytes, record: Mapping[str, Any]) -> bool:
        """Whether an entry made by others may be published here.

        If entries are signed here, only those that one of the tier's keys has signed may be. Otherwise anybody's
        programs and header sets would get this publisher's signature.
        """
        return self.trust.why_not_sign(digest, data, record) is None

    def __delitem__(self, key: Key) -> None:
        try:
            self.remove(entry_digest(key_bytes(key)))
        except KeyError:
            raise KeyError(key) from None

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        if not is_digest(digest):
            raise KeyError(digest)
        removed = self._objects.remove(PROGRAMS, digest)
        self._calls.tell()
        if not removed:
            raise KeyError(digest)

    def clear(self) -> None:
        """Remove every program, manifest and pack, of all users of the tier."""
        self._objects.clear((PROGRAMS, MANIFESTS, PACKS))
        self._calls.tell()

    # Contents

    def _listed(self, prefix: str = "") -> list[tuple[str, int]]:
        """Digest and size of every program whose digest starts with a prefix; none if the service can't list."""
        self._objects.writes.flush(self._settings.write_timeout)
        shard = f"{PROGRAMS}{prefix[:2]}/" if len(prefix) >= 2 else PROGRAMS
        try:
            found = [(digest_in(listed.name), listed.size) for listed in self._objects.list(shard)]
        except OSError:
            self._calls.tell()
            return []
        return [(digest, size) for digest, size in found if is_digest(digest) and digest.startswith(prefix)]

    def __len__(self) -> int:
        return len(self._listed())

    def _digests(self, prefix: str) -> Iterable[str]:
        return [digest for digest, _ in self._listed(prefix)]

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        return [(digest, size, 0) for digest, size in self._listed()]

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry; this reads all of them."""
        for digest, data, version in self._objects.find_many(PROGRAMS, self._digests("")):
            yield _info(digest, data, version)

    def info(self, digest: str) -> EntryInfo:
        """One entry, which is read completely; :class:`KeyError` if there is none of that digest."""
        found = self._objects.find(PROGRAMS, digest) if is_digest(digest) else None
        self._calls.tell()
        if found is None:
            raise KeyError(digest)
        return _info(digest, *found)

    def stats(self) -> StoreStats:
        """The counters, and the service's contents in numbers; ``bytes`` includes the records."""
        sizes = self._listed()
        return self._counters.stats(entries=len(sizes), size=sum(size for _, size in sizes), record_size=0)

    def tier(self) -> TierStats:
        """The tier's statistics in this process; the service isn't asked."""
        counted, calls = self._counters.totals()._asdict(), self._calls
        return TierStats(
            name=self.name,
            state=self.breaker.state,
            waiting=self._objects.writes.count,
            calls=calls.made,
            error=calls.error,
            **{field: counted[field] for field in ("hits", "misses", "corrupt", "stored", "dropped")},
            **{field: getattr(calls, field) for field in ("errors", "timeouts", "skipped", "seconds")},
            **self._objects.counts(),
        )

    def flush(self, seconds: float | None = None) -> bool:
        """Wait, by default for 2 seconds, until queued writes are sent, dropped or postponed; False if they aren't."""
        done = self._objects.writes.flush(write_back.AT_EXIT if seconds is None else seconds)
        self._calls.tell()
        return done

    def then(self, call: Callable[[], object]) -> None:
        """Call a function, on any thread, once everything now queued is sent, dropped or postponed."""
        self._objects.writes.then(call)

    def has_published(self) -> bool:
        """Wait for the queue, and return whether everything published since the last call has been sent."""
        sent = self.flush(2 * self._settings.write_timeout)
        counted = self._counters.totals()
        before, self._unsent = self._unsent, counted.dropped + counted.refused + self._objects.writes.delayed
        return sent and self._unsent == before

    def close(self) -> None:
        """Send queued writes, for 2 seconds at most, and close the connections. The store can be used afterwards."""
        self.flush()
        if self._fleet is not None:
            self._fleet.close()
        if self._calls.is_its_own:
            self.engine.close()


def remote_in(store: object) -> RemoteProgramCache | None:
    """The store itself if it is remote, or the remote store that it is a read-only view of; ``None`` otherwise."""
    inner = store._inner if isinstance(store, ReadOnlyProgramCache) else store
    return inner if isinstance(inner, RemoteProgramCache) else None


def _entry(data: bytes, version: Version) -> Entry:
    return Entry(data, version.record, version.record_json)


def _info(digest: str, data: bytes, version: Version) -> EntryInfo:
    return EntryInfo(
        digest=digest,
        size=len(data),
        created=version.created,
        last_used=version.created,
        checksum=version.checksum,
        path=None,
        record=version.record(),
    )
