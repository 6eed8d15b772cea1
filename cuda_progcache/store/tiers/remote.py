# SPDX-License-Identifier: Apache-2.0
"""A program store on a service beyond this machine."""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from cuda_progcache._util import modes
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.errors import StoreError
from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    entry_digest,
    frozen_miss,
    is_digest,
    key_bytes,
    program_bytes,
)
from cuda_progcache.store.derived import merged_manifest
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.stats import Counters, StoreStats
from cuda_progcache.store.tiers import write_back
from cuda_progcache.store.tiers.calls import Calls, OutOfUseError
from cuda_progcache.store.tiers.engine import TooLargeError, reason
from cuda_progcache.store.tiers.envelope import DamagedObjectError, pack, unpack
from cuda_progcache.store.tiers.write_back import WriteBack

if TYPE_CHECKING:
    from cuda_progcache.store.base import Key, T, Value
    from cuda_progcache.store.breaker import CircuitBreaker
    from cuda_progcache.store.tiers.engine import Engine, Listed
    from cuda_progcache.store.tiers.leases import FleetLeases

R = TypeVar("R")
#: Says why an entry isn't to be trusted; ``None``: it is. Takes digest, bytes and record.
Verifier = Callable[[str, bytes, Mapping[str, Any]], str | None]
#: The record to store in the place of the one given. Takes digest, bytes and record.
Signer = Callable[[str, bytes, Mapping[str, Any]], Mapping[str, Any]]

PROGRAMS, MANIFESTS, PACKS = "v1/programs/", "v1/manifests/", "packs/"
#: Seconds for a listing.
_LISTING = 60.0
#: Objects of one call for many.
_BATCH = 100
#: Bytes of a header manifest's object, at most, and what its content leaves of them to record and signature.
MOST_OF_MANIFEST, _ROOM = 4 << 20, 1 << 14
#: Bytes that a signature takes in a record, at most.
_SIGNATURE = 2048
#: What is asked for to see whether a service works again: nothing has this name.
_NOTHING = PROGRAMS + "00/" + 62 * "0"
#: Seconds for which a miss is remembered, and how many are.
_MISSED_FOR, _MOST_MISSED = 2.0, 4096


class TierStats(NamedTuple):
    """What a tier has cost and given in this process.

    Attributes
    ----------
    name : str
        Its URL without secrets.
    state : {"closed", "open", "half-open"}
        Of its circuit breaker: in use; out of use for a while; about to be tried again.
    hits, misses : int
        Look-ups of programs; those that it was spared are misses.
    corrupt, untrusted : int
        Objects that weren't what was asked for, and those that nobody who is trusted has signed.
    errors, timeouts : int
        Calls that failed, and those of them that ran out of time.
    skipped : int
        Calls that it was spared while it was out of use.
    stored, dropped, waiting : int
        Objects written, given up, and on their way.
    bytes_in, bytes_out : int
        Of objects.
    calls : int
        Calls that it answered.
    seconds : float
        That these took in all.
    error : str
        The latest, without secrets; empty where there was none.
    """

    name: str
    state: str
    hits: int
    misses: int
    corrupt: int
    untrusted: int
    errors: int
    timeouts: int
    skipped: int
    stored: int
    dropped: int
    waiting: int
    bytes_in: int
    bytes_out: int
    calls: int
    seconds: float
    error: str


class RemoteProgramCache(ProgramCacheResource):
    """Programs, and the header manifests that they are found by, on a service beyond this machine.

    It costs a caller at most its deadline once, then nothing, and never an error: trouble is a miss, counted and warned
    about once per kind. What comes back is checked as a file would be, and against the signers that are trusted. Writes
    are queued, and sent by a thread; a look-up here finds what is on its way.

    Parameters
    ----------
    engine : Engine
        The service.
    settings : TierSettings, optional
        Whence the times and sizes are taken that aren't given.
    verifier, signer : callable, optional
        See :data:`Verifier` and :data:`Signer`.
    voucher : callable, optional
        A :data:`Verifier` of what others made and the signer may sign: header sets that it adds its own to, and
        copies. Without it, a signer signs nothing of others.
    timeout, write_timeout : float, optional
        Seconds that a look-up, and a write off the caller's path, may take in all.
    max_bytes : int, optional
        Of an object.
    """

    is_remote = True
    breaker: CircuitBreaker

    def __init__(
        self,
        engine: Engine,
        settings: Any = None,
        *,
        verifier: Verifier | None = None,
        signer: Signer | None = None,
        voucher: Verifier | None = None,
        timeout: float | None = None,
        write_timeout: float | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.engine = engine
        self._verifier, self._signer = verifier, signer
        self._voucher: Verifier = voucher or (lambda *_: "nobody vouches for what others publish")
        self._timeout = _given(timeout, settings, "timeout", 2.0)
        self._write_timeout = _given(write_timeout, settings, "write_timeout", 10.0)
        self._max_bytes = _given(max_bytes, settings, "max_bytes", 64 << 20)
        patience = min(_given(None, settings, "connect_timeout", 0.5), self._timeout)
        self._calls = Calls(engine, self._probe, self._in_trouble, patience=patience)
        self.breaker = self._calls.breaker
        self._counters = Counters()
        self._lock = ForkSafeLock()
        self._missed: OrderedDict[str, float] = OrderedDict()  # until when, by name
        self._writes = WriteBack(self._send, self._dropped)
        self._settings = settings
        self._fleet: FleetLeases | None = None
        self.reset()
        _all.add(self)

    def reset(self) -> None:
        """Count from zero, as a forked child does."""
        self._counts = {"untrusted": 0, "bytes_in": 0, "bytes_out": 0}
        self._unsent = 0  # dropped or refused, when has_published() was last asked

    @property
    def name(self) -> str:
        """Its URL without secrets."""
        return self.engine.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.name}>"

    @property
    def demands_signatures(self) -> bool:
        """Whether it gives only what one of the listed keys has signed."""
        return self._verifier is not None

    @property
    def fleet(self) -> FleetLeases | None:  # type: ignore[override]  # a plain store has none, which is a class's matter
        """The leases of those who publish there: on the Redis that the settings name for them, or that it is itself."""
        if self._fleet is None and self._settings is not None and self._settings.mode == "rw":
            kept = self._settings.lease or (self._settings if self._settings.scheme in {"redis", "rediss"} else None)
            # A service that is out of use keeps no leases, either.
            if kept is not None and (kept is not self._settings or self.breaker.state == "closed"):
                from cuda_progcache.store.tiers.leases import FleetLeases

                well = self._well_again if kept is self._settings else lambda: None
                self._fleet = FleetLeases(kept, landed=self._writes.then, news=self.forget_misses, well=well)
        return self._fleet

    def _well_again(self) -> None:
        """Have it in use again: what keeps its leases is the service itself, and answers."""
        if self.breaker.state != "closed":
            self.breaker.succeeded()

    def _in_trouble(self) -> None:
        """Tell the leases that are kept there, once it is out of use."""
        if self._fleet is not None and self._settings.lease is None and self.breaker.state == "open":
            self._fleet.suspect()

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def _probe(self) -> None:
        """Ask for something that isn't there."""
        self._calls.attempt(self._timeout, self._get_nothing)

    def _get_nothing(self, *, until: float) -> None:
        if self.engine.get(_NOTHING, limit=self._max_bytes, until=until) is not None:
            raise StoreError(errno.EPROTO, "the server sends something other than what was asked for", self.name)

    # Look-ups

    if TYPE_CHECKING:

        @overload
        def get(self, key: Key) -> bytes | None: ...
        @overload
        def get(self, key: Key, default: T) -> bytes | T: ...

    def get(self, key: Key, default: Any = None) -> Any:
        """The entry's bytes, or ``default`` on a miss."""
        found = self._look(key_bytes(key))
        if found is None:
            if modes.current() == "frozen":
                raise frozen_miss(repr(self), key)
            return default
        return found[0]

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
        digest = entry_digest(key)
        found = self._find(digest, _object(PROGRAMS, digest))
        if found is not None:
            self._counters.count("hits")
        elif count_miss:
            self._counters.count("misses")
        self._calls.tell()
        return found

    def _limit(self, name: str) -> int:
        """Bytes that an object may have."""
        most: int = self._max_bytes
        return min(most, MOST_OF_MANIFEST) if name.startswith(MANIFESTS) else most

    def _find(self, digest: str, name: str) -> tuple[bytes, Version] | None:
        """A verified entry or manifest; whatever is wrong is a miss."""
        packed = self._writes.find(name)
        if packed is not None:
            return unpack(digest, packed)
        if self._missed and self._has_missed(name):
            return None
        try:
            packed = self._calls.look_up(self._timeout, self.engine.get, name, limit=self._limit(name))
        except OutOfUseError:
            return None
        except TooLargeError as exc:
            self._counters.count("refused")
            self._calls.note("large", f"has {name}, which is too large ({reason(exc)}); this counts as a miss")
            self._remember_miss(name)
            return None
        except OSError:
            self._counters.count("read_errors")
            return None
        if packed is None:
            self._calls.judge(is_sound=True)
            self._remember_miss(name)
            return None
        self._count("bytes_in", len(packed))
        return self._verified(digest, name, packed, self._verifier)

    def _find_many(self, digests: Mapping[str, str]) -> Iterator[tuple[str, bytes, Version]]:
        """Those of the entries or manifests, by name, that are there."""
        names = [name for name in digests if not self._has_missed(name)]
        answers = self._get_many(names, self._timeout if len(names) == 1 else self._write_timeout)
        while True:
            try:
                name, theirs = next(answers)
            except (StopIteration, OutOfUseError):
                return
            except OSError:
                self._counters.count("read_errors")
                return
            packed = self._writes.find(name) or theirs
            if packed is None:
                self._remember_miss(name)
                continue
            self._count("bytes_in", len(packed))
            verified = self._verified(digests[name], name, packed, self._verifier)
            if verified is not None:
                yield digests[name], *verified

    def _get_many(self, names: Sequence[str], seconds: float) -> Iterator[tuple[str, bytes | None]]:
        """Each name with its object, in calls for many of so many seconds (OSError: one failed)."""
        waiting = list(names)
        while waiting:
            batch, waiting = waiting[:_BATCH], waiting[_BATCH:]
            found = self._calls.make(seconds, self.engine.get_many, batch, limit=self._limit(batch[0]))
            if not found:
                raise StoreError(errno.EPROTO, "the server answered none of several questions", self.name)
            waiting = [name for name in batch if name not in found] + waiting
            yield from found.items()

    def _verified(
        self, digest: str, name: str, packed: bytes, verifier: Verifier | None
    ) -> tuple[bytes, Version] | None:
        try:
            data, version = unpack(digest, packed)
        except DamagedObjectError as exc:
            self._counters.count("corrupt")
            self._calls.judge(is_sound=False)
            self._calls.note("corrupt", f"sent something else for {name} ({exc}); this counts as a miss")
            self._remember_miss(name)
            return None
        self._calls.judge(is_sound=True)
        vouched = name.startswith(MANIFESTS) and self.engine.pinned  # whose own digest is in the URL
        if verifier is not None and not vouched and (why := verifier(digest, data, version.record())) is not None:
            self._count("untrusted")
            self._calls.note("untrusted", f"has {name}, which isn't trusted ({why}); this counts as a miss")
            self._remember_miss(name)
            return None
        return data, version

    def _has_missed(self, name: str) -> bool:
        until = self._missed.get(name)
        return until is not None and time.monotonic() < until

    def _remember_miss(self, name: str) -> None:
        with self._lock:
            self._missed[name] = time.monotonic() + _MISSED_FOR
            self._missed.move_to_end(name)
            if len(self._missed) > _MOST_MISSED:
                self._missed.popitem(last=False)

    def forget_misses(self) -> None:
        """Ask for everything anew."""
        with self._lock:
            self._missed.clear()

    # Header manifests

    def find_manifest(self, name: str) -> bytes | None:
        """A header manifest; ``None`` where there is none."""
        found = self._find(name, _object(MANIFESTS, name))
        self._calls.tell()
        return None if found is None else found[0]

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Header manifests; see :meth:`ProgramCacheResource.find_manifests`."""
        found = {name: data for name, data, _ in self._find_many({_object(MANIFESTS, name): name for name in names})}
        self._calls.tell()
        return found

    def keep_manifest(self, name: str, content: bytes) -> None:
        """Add a header manifest's sets to those that the service has, before long."""
        where = _object(MANIFESTS, name)
        waiting = self._writes.find(where)
        if waiting is not None:
            content = merged_manifest(content, unpack(name, waiting)[0]) or content
        self._queue(name, where, content, {})

    def load_many(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Entry]]:
        """Those of the entries that are there, by key, asked for together."""
        asked = {entry_digest(key): key for key in keys}
        found = 0
        for digest, data, version in self._find_many({_object(PROGRAMS, digest): digest for digest in asked}):
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
        """Queue an entry with its record; ``False`` where it is too large, or queueing it has no room or use."""
        digest, payload = entry_digest(key_bytes(key)), program_bytes(data)
        del data  # as above
        done = self._queue(digest, _object(PROGRAMS, digest), payload, record)
        self._calls.tell()
        return done

    def copy(self, key: Key, entry: Entry) -> bool:
        """Queue a copy of what another store holds; ``False`` where it would be signed here, and nobody vouches for it.

        See :meth:`may_sign` and :meth:`publish`.
        """
        if not self.may_sign(entry_digest(key_bytes(key)), entry.data, entry.record):
            self._counters.count("refused")
            return False
        return self.publish(key, entry.data, entry.record)

    def _queue(self, digest: str, name: str, data: bytes, record: Mapping[str, Any]) -> bool:
        packed = pack(digest, data, Version.of(data, encode_record(record), time.time()))
        if len(packed) + (0 if self._signer is None else _SIGNATURE) > self._limit(name):
            self._counters.count("refused")
            return False
        if not self._calls.is_ready():
            self._dropped(1)
            return False
        with self._lock:
            self._missed.pop(name, None)
        return self._writes.put(name, packed, len(packed))

    def _send(self, objects: Mapping[str, bytes]) -> None:
        """Write objects, on the thread that does so."""
        objects = self._signed(self._with_theirs(objects))
        self._calls.make(self._write_timeout, self.engine.put_many, objects)
        self._counters.count("stored", len(objects))
        self._count("bytes_out", sum(map(len, objects.values())))

    def _with_theirs(self, objects: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The objects, manifests with the sets that others have added.

        Two that add to one at the same moment lose a set, and with it a compile.
        """
        manifests = [name for name in objects if name.startswith(MANIFESTS)]
        if not manifests:
            return objects
        merged = dict(objects)
        for name, packed in self._get_many(manifests, self._write_timeout):
            if packed is None:
                continue
            digest = _digest(name)
            verifier = self._verifier if self._signer is None else self._voucher  # who signs vouches for all of it
            theirs = self._verified(digest, name, packed, verifier)
            if theirs is not None:
                ours, version = unpack(digest, objects[name])
                content = merged_manifest(ours, theirs[0]) or ours
                if len(content) > self._limit(name) - _ROOM:
                    continue
                merged[name] = pack(digest, content, Version.of(content, b"{}", version.created))
        return merged

    def may_sign(self, digest: str, data: bytes, record: Mapping[str, Any]) -> bool:
        """Whether what others made may be sent on from here: to a signing tier, only what one of its keys signed.

        Else anybody's programs and header sets would get this publisher's signature.
        """
        return self._signer is None or self._voucher(digest, data, record) is None

    def _signed(self, objects: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The objects with signatures in their records, where this tier's publishers sign."""
        if self._signer is None:
            return objects
        made = {}
        for name, packed in objects.items():
            digest = _digest(name)
            data, version = unpack(digest, packed)
            try:
                record = self._signer(digest, data, version.record())
            except OSError as exc:
                self._calls.note("signing", f"receives nothing from here ({exc})")
                raise
            made[name] = pack(digest, data, Version.of(data, encode_record(record), version.created))
        return made

    def _dropped(self, count: int) -> None:
        self._counters.count("dropped", count)

    def __delitem__(self, key: Key) -> None:
        try:
            self.remove(entry_digest(key_bytes(key)))
        except KeyError:
            raise KeyError(key) from None

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        if not is_digest(digest):
            raise KeyError(digest)
        name = _object(PROGRAMS, digest)
        was_queued = self._writes.find(name) is not None
        self._writes.forget([name])
        self._writes.flush(self._write_timeout)  # it may be under way
        try:
            if self._is_there(name):
                self._calls.make(self._timeout, self.engine.delete, [name])
            elif not was_queued:
                raise KeyError(digest)
        except OSError:
            self._counters.count("failed")
        self._calls.tell()

    def _is_there(self, name: str) -> bool:
        """Whether the service has an object of that name, of whatever size."""
        try:
            return self._calls.make(self._timeout, self.engine.get, name, limit=self._max_bytes) is not None
        except TooLargeError:
            return True

    def clear(self) -> None:
        """Remove every program, manifest and pack: those of all who use the tier."""
        self._writes.forget()
        self._writes.flush(self._write_timeout)
        try:
            for prefix in (PROGRAMS, MANIFESTS, PACKS):
                names = [listed.name for listed in self._list(prefix)]
                for at in range(0, len(names), _BATCH):
                    self._calls.make(self._write_timeout, self.engine.delete, names[at : at + _BATCH])
        except OSError:
            self._counters.count("failed")
        self._calls.tell()

    # What there is

    def _list(self, prefix: str) -> list[Listed]:
        def listed(*, until: float) -> list[Listed]:  # noqa: ARG001 - an engine's own are for each page
            return list(self.engine.list(prefix))

        return self._calls.make(_LISTING, listed)

    def _listed(self, prefix: str = "") -> list[tuple[str, int]]:
        """Digest and size of every program with such a digest; none where the service can't list."""
        self._writes.flush(self._write_timeout)
        shard = f"{PROGRAMS}{prefix[:2]}/" if len(prefix) >= 2 else PROGRAMS
        try:
            found = [(_digest(listed.name), listed.size) for listed in self._list(shard)]
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
        """Every entry; all of them are read for that."""
        for digest, data, version in self._find_many({_object(PROGRAMS, d): d for d, _ in self._listed()}):
            yield _info(digest, data, version)

    def info(self, digest: str) -> EntryInfo:
        """One entry, which is read for that; :class:`KeyError` if there is none of that digest."""
        found = self._find(digest, _object(PROGRAMS, digest)) if is_digest(digest) else None
        self._calls.tell()
        if found is None:
            raise KeyError(digest)
        return _info(digest, *found)

    def stats(self) -> StoreStats:
        """What was counted, and what the service lists; ``bytes`` are those of its objects, with their records."""
        sizes = self._listed()
        return self._counters.stats(entries=len(sizes), size=sum(size for _, size in sizes), record_size=0)

    def tier(self) -> TierStats:
        """What it has cost and given; asks the service nothing."""
        with self._lock:
            counts = dict(self._counts)
        counted, calls = self._counters.totals(), self._calls
        return TierStats(
            name=self.name,
            state=self.breaker.state,
            hits=counted.hits,
            misses=counted.misses,
            corrupt=counted.corrupt,
            stored=counted.stored,
            dropped=counted.dropped,
            waiting=self._writes.count,
            errors=calls.errors,
            timeouts=calls.timeouts,
            skipped=calls.skipped,
            calls=calls.made,
            seconds=calls.seconds,
            error=calls.error,
            **counts,
        )

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until what is queued is sent or dropped, for 2 seconds if not told; False where that takes longer."""
        done = self._writes.flush(write_back.AT_EXIT if seconds is None else seconds)
        self._calls.tell()
        return done

    def has_published(self) -> bool:
        """Whether all that was published since this was last asked has been sent, which is waited for."""
        sent = self.flush(2 * self._write_timeout)
        counted = self._counters.totals()
        before, self._unsent = self._unsent, counted.dropped + counted.refused
        return sent and self._unsent == before

    def close(self) -> None:
        """Send what is queued, for 2 seconds at most, and close the connections; the store can be used afterwards."""
        self.flush()
        if self._fleet is not None:
            self._fleet.close()
        if self._calls.is_its_own:
            self.engine.close()


def _given(value: Any, settings: Any, name: str, default: Any) -> Any:
    return value if value is not None else getattr(settings, name, default)


def _object(tree: str, digest: str) -> str:
    return f"{tree}{digest[:2]}/{digest[2:]}"


def _digest(name: str) -> str:
    """The digest in an object's name, if it is one."""
    return "".join(name.rsplit("/", 2)[-2:])


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


_all: weakref.WeakSet[RemoteProgramCache] = weakref.WeakSet()


def _start_anew() -> None:
    """In a forked child, which counts for itself."""
    for store in list(_all):
        store.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
