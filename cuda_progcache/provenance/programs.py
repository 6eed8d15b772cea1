# SPDX-License-Identifier: Apache-2.0
"""A store of compiled programs as a cache of calls.

Every entry is a call: its key is the entry's digest, its result is the binary, and its name is the program's. Its
arguments are ``arch``, ``target_type``, ``code_type``, ``options`` (a tuple of flags) and ``code`` (the source, as
recorded). A link also has ``inputs`` (the keys of the linked programs), a part of a linked kernel has ``part_of`` (the
kernel's name), and a kernel of a library has ``kernel`` and the kernel's parameters by name. The metadata holds
``runtime``, ``links`` (keys of parents and children), ``entry`` (``size``, ``checksum``) and ``record``: the whole
record as it was published. A call transferred into another store is published there with the same key and record.

The cache also has the calls that made no program (:mod:`~cuda_progcache.provenance.steps`), and calls whose result is
small enough to be kept in their record.

>>> from cuda_progcache import InMemoryProgramCache
>>> from cuda_progcache.provenance.programs import program_cache
>>> program_cache(InMemoryProgramCache()).query(arguments={"arch": "sm_90"}).count()
0
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from cuda_progcache._util import files
from cuda_progcache.memo.caches.cache import Cache
from cuda_progcache.memo.call import DigestedCall, QueryCall
from cuda_progcache.memo.digest import Digest, digest
from cuda_progcache.memo.index import Index
from cuda_progcache.memo.storage import records
from cuda_progcache.memo.storage.base import CallStorage, ValueStorage
from cuda_progcache.memo.storage.tree import FileTree, Signature
from cuda_progcache.memo.tagged_json import SaveError
from cuda_progcache.provenance.step_records import Steps
from cuda_progcache.provenance.steps import inlined, kind_of, links_of
from cuda_progcache.store.compile_record import CompileRecord

if TYPE_CHECKING:
    from cuda_progcache.memo.call import LazyCall
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource

#: Binaries held until their call is saved; any beyond this number are left over from failed saves.
_PENDING = 16
_FIXED = ("arch", "target_type", "code_type")


def program_cache(store: ProgramCacheResource) -> Cache:
    """Return a cache of the calls that made the programs of a store.

    Parameters
    ----------
    store : store
        A store of this package: in memory, on disk, read-only, or a stack.

    Raises
    ------
    TypeError
        The store keeps no records.
    """
    from cuda_progcache.store.base import ProgramCacheResource

    if not isinstance(store, ProgramCacheResource):
        raise TypeError(f"a {type(store).__name__} keeps no records of its programs")
    values = ProgramValueStorage(store)
    return ProgramCalls(values, ProgramCallStorage(store, values))


class _Programs:
    """Keys of a store: the digests of its entries."""

    def __init__(self, store: ProgramCacheResource) -> None:
        self.store = store

    def list(self) -> Iterable[Digest]:
        """Return the digests of all entries."""
        return tuple(Digest(key) for key in self.store._digests(""))

    def _contains(self, key: Digest) -> bool:
        try:
            self.store.info(key)
        except KeyError:
            return False
        return True

    def _evict(self, key: Digest) -> None:
        self.store.remove(key)

    def _prefix_candidates(self, prefix: str) -> Iterable[Digest]:
        return sorted(Digest(key) for key in self.store._digests(prefix.lower()))[:2]


class ProgramValueStorage(_Programs, ValueStorage):
    """The binaries of a store, by the digests of their entries."""

    def __init__(self, store: ProgramCacheResource) -> None:
        super().__init__(store)
        self._lock = threading.Lock()
        self._pending: dict[Digest, bytes] = {}

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Hold a binary until its call is saved, which publishes it; raise SaveError for anything but bytes."""
        if not isinstance(value, bytes):
            raise SaveError(f"a program store keeps bytes, not a {type(value).__name__}")
        if key is None:
            key = digest(value)
        with self._lock:
            while len(self._pending) >= _PENDING:
                del self._pending[next(iter(self._pending))]
            self._pending[key] = value
        return key

    def take(self, key: Digest) -> bytes | None:
        """Remove and return a binary that was saved but isn't published yet; None if there is none."""
        with self._lock:
            return self._pending.pop(key, None)

    def load(self, key: Digest | str) -> bytes:
        """Return the binary of an entry, checked against its record; raise KeyError if it is missing or corrupt.

        Entries in files are read without the store, so that reading them doesn't count as a hit.
        """
        info = self.store.info(self._normalize_key(key))
        if info.path is not None:
            try:
                data, _ = files.read_regular(str(info.path))
            except OSError:
                raise KeyError(key) from None
            if data is None or xxh3_128_hexdigest(data) != info.checksum:
                raise KeyError(key)
            return data
        entry = self.store.load(_program_key(info.about)) if info.about.key else None
        if entry is None:
            raise KeyError(key)
        return entry.data


class ProgramCallStorage(_Programs, CallStorage):
    """The records of a store as calls; ``steps`` has the calls that made no program, ``values`` the binaries."""

    inline_limit = 1024

    def __init__(self, store: ProgramCacheResource, values: ProgramValueStorage) -> None:
        from cuda_progcache.store.stack import ProgramCacheStack

        super().__init__(store)
        self.values = values
        self.steps = Steps(store)
        # A stack's path is that of one of its levels; the other levels' entries aren't under it.
        path = None if isinstance(store, ProgramCacheStack) else getattr(store, "path", None)
        self._records, self._entries = (os.path.join(path or "", name) for name in ("records", "entries"))
        indexed = path is not None and os.path.isdir(self._records)
        self.index = Index(self, f"{path}/calls.sqlite") if indexed else None

    def list(self) -> Iterable[Digest]:
        """Return the digests of all entries, and the keys of the other calls."""
        return (*super().list(), *self.steps.all())

    def _contains(self, key: Digest) -> bool:
        return super()._contains(key) or self.steps.contains(key)

    def _evict(self, key: Digest) -> None:
        if not self.steps.remove(key):
            super()._evict(key)

    def _prefix_candidates(self, prefix: str) -> Iterable[Digest]:
        return sorted({*super()._prefix_candidates(prefix), *self.steps.with_prefix(prefix.lower())})[:2]

    def save(self, call: DigestedCall) -> Digest:
        """Publish a program from another store, or keep a call with a small result; raise SaveError for other calls.

        A store that drops a program warns why.
        """
        key = call.to_lookup_key()
        data = self.values.take(call.result) if call.result is not None else None
        record = call.metadata.get("record") or {}
        about = CompileRecord(record)
        if not record and (kind_of(call) or call.result in call.inline):
            return self.steps.save(call)
        if data is None or not about.key:
            raise SaveError(f"{call.name}: a program store keeps only programs and small results")
        program = _program_key(about)
        if hashlib.sha256(program, usedforsecurity=False).hexdigest() != key:
            raise SaveError(f"{call.name}: the record belongs to another program")
        if not self.store.publish(program, data, record):
            raise SaveError(f"{call.name}: the program store dropped it")
        return key

    def load(self, key: Digest | str) -> DigestedCall:
        """Return the call with a key, whether or not it made a program; raise KeyError if there is none."""
        full = self._normalize_key(key)
        try:
            return call_that_made(self.store.info(full))
        except KeyError:
            return self.steps.load(full)

    def inline(self, value: Any) -> bytes | None:
        """Return a small value as JSON, or None; binaries are never inlined."""
        return None if isinstance(value, bytes) else super().inline(value)

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Yield the calls that match a pattern; an index is used if the store is in files."""
        matches = template.matcher()
        if self.index is not None:
            yield from self.index.query(template)
            yield from filter(matches, self.steps.in_memory())
            return
        yield from filter(matches, map(call_that_made, self.store.entries()))
        yield from filter(matches, self.steps.calls())

    # For the index: the records of programs by shard, and those of the steps, whose shards are named ``steps/..``.

    def shards(self) -> dict[str, int]:
        """Return the shards, each with a number that changes when an entry or a record is added or removed."""
        found = {}
        for name in _names(self._records):
            # Adding a program changes the mtime of records/ first and of entries/ second; removing one does so in
            # the reverse order. Of two changes, at least one therefore moves the later of the two times.
            with contextlib.suppress(OSError):
                found[name] = max(os.stat(f"{tree}/{name}").st_mtime_ns for tree in (self._records, self._entries))
        return found | {f"steps/{name}": mtime for name, mtime in self.steps.shards().items()}

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Return the current signatures of the records in a shard: of its entries, or of its steps."""
        if shard.startswith("steps/"):
            return self.steps.scan(shard.removeprefix("steps/"))
        present = set(_names(f"{self._entries}/{shard}"))
        found: dict[Digest, Signature] = {}
        for name in _names(f"{self._records}/{shard}"):
            if name in present and len(name) == 62:
                with contextlib.suppress(OSError):
                    found[Digest(shard + name)] = Signature.of(os.lstat(f"{self._records}/{shard}/{name}"))
        return found

    settled = staticmethod(FileTree.settled)

    def record(self, key: Digest) -> bytes | None:
        """Return a call in the JSON format of call records; None if there is none."""
        try:
            return records.encode(call_that_made(self.store.info(key)), key)
        except KeyError:
            return self.steps.record(key)
        except SaveError:
            return None

    decode = staticmethod(records.decode)


def call_that_made(info: EntryInfo) -> DigestedCall:
    """Return the call that made an entry."""
    about = info.about
    arguments: dict[str, Any] = {name: value for name in _FIXED if (value := getattr(about, name))}
    if about.is_compile:
        arguments["options"] = tuple(about.labelled("option"))
    code = [value for label, value in about.components if label == "code" or label.endswith(" code")]
    if code:
        arguments["code"] = code[0] if len(code) == 1 else tuple(code)
    if about.inputs:
        arguments["inputs"] = tuple(part.digest or part.sha256 for part in about.inputs)
    if about.part_of is not None:
        arguments["part_of"] = about.part_of.name
    if about.kernel is not None:
        arguments["kernel"] = about.kernel.name
        for name, value in about.kernel.parameters.items():
            arguments[name if name not in arguments else f"parameter_{name}"] = value
    duration, stop = about.seconds, _seconds(about.created, info.created)
    around = links_of(about)
    metadata: dict[str, dict[str, Any]] = {
        "runtime": {"status": "done", "timestart": stop - duration, "timestop": stop, "duration": duration},
        **({"links": around} if around else {}),
        "entry": {"size": info.size, "checksum": info.checksum},
        "record": dict(info.record),
    }
    digests, inline = inlined(arguments)
    key = Digest(info.digest)
    return DigestedCall(about.name, digests, key, metadata, "cuda_progcache.compile", key=key, inline=inline)


def _seconds(made: float | None, default: float) -> float:
    """Return when an entry was made: the store's time if it agrees with the record, which has whole seconds."""
    return default if made is None or made <= default < made + 1 else made


def _program_key(about: CompileRecord) -> bytes:
    try:
        return bytes.fromhex(about.key)
    except ValueError:
        raise SaveError(f"the record of {about.name!r} has no hexadecimal key") from None


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


@dataclass(frozen=True)
class ProgramCalls(Cache):
    """The cache returned by :func:`program_cache`."""

    calls: ProgramCallStorage

    def _transfer_one(self, call: LazyCall, *, overwrite: bool = False) -> bool:
        if kind_of(call) is None:
            return super()._transfer_one(call, overwrite=overwrite)
        with self._operation_context(call.to_lookup_key()):
            new = overwrite or not self.contains(call.to_lookup_key())
            if new:
                self.calls.save(call.detach())  # the record is complete: no value is stored separately
            return new

    def gc(self) -> set[Digest]:
        """Remove renderings, analyses and prewarm runs whose programs are all gone; return their keys."""
        programs: set[str] = set()
        needed: set[str] = set()
        steps: dict[Digest, list[str]] = {}
        for call in self.query():
            if kind_of(call) is not None:
                steps[call.to_lookup_key()] = call.links("children") + call.links("parents")
            elif "record" in call.metadata:
                programs.add(call.to_lookup_key())
                needed.update(call.links("parents"))
        unneeded = [key for key, around in steps.items() if key not in needed and programs.isdisjoint(around)]
        return {key for key in unneeded if self.calls.steps.remove(key)}
