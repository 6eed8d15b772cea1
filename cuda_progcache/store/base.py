# SPDX-License-Identifier: Apache-2.0
"""The base class of stores: a mapping of bytes to bytes, with a record for each entry.

cuda.core and our stores
------------------------
``cuda.core.Program.compile(cache=...)`` requires ``isinstance(cache, cuda.core.utils.ProgramCacheResource)``, but we
must not import cuda.core, which takes 0.3 s. If it is loaded when one of our stores is made, the store registers with
its ABC. If it is imported later, the ``isinstance`` check itself triggers the registration:
``ABCMeta.__instancecheck__`` first reads the instance's ``__class__``, which in :class:`ProgramCacheResource` is a
property that registers if necessary and returns the true type. This needs no import hook and no private name of
cuda.core, only the public ``cuda.core.utils.ProgramCacheResource``, looked up in ``sys.modules``.
"""

from __future__ import annotations

import abc
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

from cuda_progcache._util.digest import is_digest_prefix, sha256
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import AmbiguousDigestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self, TypeAlias, TypeVar, overload

    from cuda.core import ObjectCode

    from cuda_progcache.store.breaker import CircuitBreaker
    from cuda_progcache.store.compile_record import CompileRecord
    from cuda_progcache.store.stats import StoreStats
    from cuda_progcache.store.tiers.leases import FleetLeases

    Key: TypeAlias = bytes | str
    Value: TypeAlias = bytes | bytearray | memoryview | ObjectCode
    T = TypeVar("T")

#: Bytes of each record that the size cap doesn't count: its fixed fields. A long log or header list counts.
RECORD_ALLOWANCE = 512
#: Keys of up to this many bytes may be held in memory as they are; longer ones are replaced by their digest.
SHORT_KEY = 128


class Entry:
    """The result of a verified read; it unpacks as a pair, ``data, record = entry``.

    Parameters
    ----------
    data : bytes
        The compiled binary.
    record : Mapping or callable
        The record that was published with it, or a function that reads it on demand. Most callers don't need it, and
        parsing a long one takes longer than the rest of a lookup.
    record_json : bytes, optional
        The record as it is stored, if available.

    Attributes
    ----------
    data : bytes
    record : Mapping
        The record exactly as it was published, of any shape; empty for a plain ``cache[key] = value``. The caller owns
        it and may change it.
    about : CompileRecord
        What the record says about a compile.
    """

    __slots__ = ("_json", "_record", "data")

    def __init__(
        self,
        data: bytes,
        record: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        record_json: bytes | None = None,
    ) -> None:
        self.data = data
        self._record = record
        self._json = record_json

    @property
    def record_json(self) -> bytes:
        """The record as it is stored."""
        if self._json is None:
            from cuda_progcache.store.records import encode_record

            self._json = encode_record(self.record)
        return self._json

    @property
    def record(self) -> Mapping[str, Any]:
        """The record that was published with the entry."""
        record = self._record
        if callable(record):
            record = self._record = record()
        return record

    @property
    def about(self) -> CompileRecord:
        """What the record says of a compile, each field of its own type."""
        return _about(self.record)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.data, self.record))

    def __getitem__(self, index: int) -> Any:
        return (self.data, self.record)[index]

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Entry | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # records are dictionaries

    def __repr__(self) -> str:
        return f"Entry(data={self.data!r}, record={self.record!r})"


class EntryInfo(NamedTuple):
    """One entry as it lies in a store.

    Attributes
    ----------
    digest : str
        64 hex digits, SHA-256 of the key.
    size : int
        Bytes of the entry, without its record.
    created, last_used : float
        Seconds since the epoch. ``last_used`` is accurate to a few minutes where a store persists it, and is only
        updated by stores with a size cap.
    checksum : str
        32 hex digits, XXH3-128 of the entry's bytes as they were published.
    path : Path or None
        The file that holds the bytes; ``None`` in a store without files.
    record : Mapping
        The record exactly as it was published, of any shape.
    about : CompileRecord
        What the record says about a compile.
    """

    digest: str
    size: int
    created: float
    last_used: float
    checksum: str
    path: Path | None
    record: Mapping[str, Any]

    @property
    def about(self) -> CompileRecord:
        """What the record says of a compile, each field of its own type."""
        return _about(self.record)


def _about(record: Mapping[str, Any]) -> CompileRecord:
    from cuda_progcache.store.compile_record import CompileRecord  # a hit rarely needs it

    return CompileRecord(record)


#: The sort keys of listings; the largest values come first.
ORDERS: dict[str, Callable[[EntryInfo], float]] = {
    "used": lambda entry: entry.last_used,
    "created": lambda entry: entry.created,
    "size": lambda entry: entry.size,
}


def key_bytes(key: object) -> bytes:
    """A key as bytes: ``str`` is encoded as UTF-8, so ``"k"`` and ``b"k"`` are the same key.

    Raises
    ------
    TypeError
        The key is neither bytes nor str.
    """
    if isinstance(key, (bytes, bytearray)):
        return bytes(key)
    if isinstance(key, str):
        return key.encode("utf-8")
    raise TypeError(f"cache keys must be bytes or str, got {type(key).__name__}")


def entry_digest(key: Key) -> str:
    """The name of a key's entry in every store: SHA-256 of the key, 64 hex digits."""
    name = key if type(key) is bytes else key_bytes(key)
    return _short_digest(name) if len(name) <= SHORT_KEY else sha256(name).hexdigest()


@functools.lru_cache(maxsize=4096)
def _short_digest(key: bytes) -> str:
    """The digest of a short key, cached because one lookup asks for it several times."""
    return sha256(key).hexdigest()


def frozen_miss(where: str, key: Key) -> Exception:
    """The error for a lookup by key in a frozen store that has no entry for it."""
    from cuda_progcache.errors import FrozenMissError

    return FrozenMissError(
        f"the cache is frozen, and {where} has no entry {entry_digest(key)[:12]}; nothing was compiled. Run this once "
        f"with CUDA_PROGCACHE=rw, or prewarm the cache",
        command="CUDA_PROGCACHE=rw",
    )


def program_bytes(value: object) -> bytes:
    """The binary to store: bytes-like values as they are, an ``ObjectCode``'s code (read from disk if path-backed).

    Raises
    ------
    FileNotFoundError
        The file of a path-backed ``ObjectCode`` is gone.
    TypeError
        The value is neither bytes-like nor an ``ObjectCode``.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    # If nobody has imported cuda.core, nobody holds an ObjectCode.
    object_code = getattr(sys.modules.get("cuda.core"), "ObjectCode", None)
    if object_code is not None and isinstance(value, object_code):
        code = value.code
        if not isinstance(code, (str, os.PathLike)):
            return bytes(code)
        path = os.fspath(code)
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"can't store a path-backed ObjectCode in the program cache: {path} no longer exists"
            ) from None
    raise TypeError(f"cache values must be bytes-like or ObjectCode, got {type(value).__name__}")


def check_size_cap(max_size_bytes: int | None) -> None:
    """Reject a size cap that isn't positive.

    Raises
    ------
    ValueError
        Zero or negative.
    """
    if max_size_bytes is not None and max_size_bytes <= 0:
        raise ValueError(f"max_size_bytes must be positive, or None for no limit, got {max_size_bytes}")


def charged_size(data_size: int, record_size: int) -> int:
    """Bytes that an entry counts towards a size cap: its own, and those of its record beyond the fixed fields."""
    return data_size + max(0, record_size - RECORD_ALLOWANCE)


_registered_with: weakref.WeakSet[type] = weakref.WeakSet()  # more than one where a test re-imports cuda.core


def register_with_cuda_core() -> bool:
    """Make ``isinstance(store, cuda.core.utils.ProgramCacheResource)`` true for our stores, if cuda.core is loaded.

    Returns
    -------
    bool
        Whether cuda.core is loaded (and our stores registered there).

    Notes
    -----
    This happens automatically whenever one of our stores is made or type-checked, and never imports cuda.core. Call it
    yourself only before an ``issubclass`` check on our classes, if cuda.core was imported after our last store was
    made.
    """
    theirs = getattr(sys.modules.get("cuda.core.utils"), "ProgramCacheResource", None)
    if theirs is None:
        return False
    if theirs not in _registered_with:
        theirs.register(ProgramCacheResource)
        _registered_with.add(theirs)
    return True


class ProgramCacheResource(abc.ABC):
    """A store of compiled programs: a mapping of bytes to bytes, with a record for each entry.

    It has the interface of ``cuda.core.utils.ProgramCacheResource``, and our stores pass ``isinstance`` for it (see
    this module's docstring), so ``cuda.core.Program(...).compile("cubin", cache=store)`` works. A store of your own
    needs the five abstract methods; records are kept only if you override :meth:`load` and :meth:`publish` as well.

    ``key in store`` and iteration raise :class:`TypeError`: another process may remove the entry between the check and
    the read. Use ``get``, which does both at once.
    """

    #: The mode that it was given (:mod:`cuda_progcache._util.modes`); None: the environment's.
    mode: str | None = None
    #: The leases of the hosts that share it, if it is a tier that keeps leases (``store.tiers.leases``).
    fleet: FleetLeases | None = None
    #: Whether it is on another machine. Such a store is asked for single keys, and not listed.
    is_remote: bool = False
    #: The circuit breaker of a store whose service may be out of order.
    breaker: CircuitBreaker | None = None

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        """Register with cuda.core, if it is loaded."""
        register_with_cuda_core()
        return object.__new__(cls)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Self]:
        """The type; reading it registers with cuda.core, if that is loaded."""
        register_with_cuda_core()
        return type(self)

    @abc.abstractmethod
    def __getitem__(self, key: Key) -> bytes:
        """The entry's bytes; :class:`KeyError` on a miss."""

    @abc.abstractmethod
    def __setitem__(self, key: Key, value: Value) -> None:
        """Store ``value`` with an empty record; :class:`~cuda_progcache.errors.StoreError` if that fails."""

    @abc.abstractmethod
    def __delitem__(self, key: Key) -> None:
        """Remove the entry; :class:`KeyError` if there is none."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of entries."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Remove every entry."""

    def __bool__(self) -> bool:
        # An empty store is still a store: ``if cache`` asks whether one was given, and len() may scan a directory.
        return True

    def __contains__(self, key: object) -> bool:
        raise TypeError(f"{type(self).__name__} has no `in`: check-then-read races with other processes; use get(key)")

    __iter__ = None  # iter() would fall back on __getitem__ with 0, 1, 2...

    if TYPE_CHECKING:

        @overload
        def get(self, key: Key) -> bytes | None: ...
        @overload
        def get(self, key: Key, default: T) -> bytes | T: ...

    def get(self, key: Key, default: Any = None) -> Any:
        """The entry's bytes, or ``default`` on a miss."""
        try:
            return self[key]
        except KeyError:
            return default

    def update(self, items: Mapping[Key, Value] | Iterable[tuple[Key, Value]], /) -> None:
        """Do ``self[key] = value`` for each pair; what was written before an error stays."""
        for key, value in items.items() if isinstance(items, Mapping) else items:
            self[key] = value

    def _assign(self, key: Key, value: Value) -> bool:
        """Do ``self[key] = value``, and return whether it was stored. For stores that may drop it without raising."""
        self[key] = value
        return True

    def load(self, key: Key) -> Entry | None:
        """The entry with its record; ``None`` on a miss. Any trouble in the cache is a miss."""
        data = self.get(key)
        return None if data is None else Entry(data, {})

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted: another miss isn't counted again."""
        return self.load(key)

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Store an entry with its record, without raising on trouble; the compile path uses this.

        Parameters
        ----------
        key : bytes or str
            The program's key.
        data : bytes-like or ObjectCode
            The compiled binary.
        record : Mapping
            A JSON object about it, kept as it is.

        Returns
        -------
        bool
            ``False`` if it was dropped because of trouble in the cache (disk full, no permission) or because of its
            size. The store counts every drop, and warns about the first.
        """
        try:
            self[key] = data
        except OSError:
            return False
        return True

    def copy(self, key: Key, entry: Entry) -> bool:
        """:meth:`publish` a copy of another store's entry, which need not survive a crash: it can be copied again."""
        return self.publish(key, entry.data, entry.record)

    def load_many(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Entry]]:
        """Load many entries: those that exist, with their keys. A store that can fetches them together."""
        for key in keys:
            entry = self.load(key)
            if entry is not None:
                yield key, entry

    def fetch(self, keys: Iterable[bytes]) -> int:  # noqa: ARG002
        """Fetch these programs from other machines, and return how many came. A local store fetches nothing."""
        return 0

    def has_published(self) -> bool:
        """Wait until everything published since the last call is where others can find it; ``False`` if some isn't."""
        return True

    @property
    def demands_signatures(self) -> bool:
        """Whether it only returns entries that one of its configured keys has signed."""
        return False

    @property
    def reaches_beyond(self) -> bool:
        """Whether it, or a store behind it, is on another machine."""
        return self.is_remote

    def find_manifest(self, name: str) -> bytes | None:
        """A header manifest from another machine; ``None`` if there is none, or if the store is local."""
        return self.find_manifests([name]).get(name)

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:  # noqa: ARG002
        """Header manifests from other machines, by name, fetched together; missing ones are left out."""
        return {}

    def keep_manifest(self, name: str, content: bytes) -> None:  # noqa: B027
        """Add the sets of a header manifest to those on the other machine; a local store does nothing."""

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry that has a record, in no particular order; those added or removed meanwhile may be missing."""
        raise NotImplementedError(f"{type(self).__name__} can't list its entries")

    def first(
        self, count: int, *, by: str = "used", matches: Callable[[EntryInfo], bool] = lambda _: True
    ) -> list[EntryInfo]:
        """The first entries in an order. A store on disk reads no more records than necessary.

        Parameters
        ----------
        count : int
            The maximum number.
        by : {"used", "created", "size"}
            The most recently used, the most recently created or the largest first.
        matches : callable
            Only entries for which it is true.

        Returns
        -------
        list of EntryInfo
        """
        import heapq

        return heapq.nlargest(count, filter(matches, self.entries()), key=ORDERS[by])

    def info(self, digest: str) -> EntryInfo:
        """One entry; :class:`KeyError` if there is none of that digest."""
        for entry in self.entries():
            if entry.digest == digest:
                return entry
        raise KeyError(digest)

    def resolve(self, prefix: str) -> str:
        """The digest of the one entry whose digest starts with ``prefix``.

        Parameters
        ----------
        prefix : str
            At least 4 hex digits.

        Raises
        ------
        KeyError
            No entry fits, or ``prefix`` isn't 4 hex digits or more.
        AmbiguousDigestError
            Several fit.
        """
        wanted = prefix.lower()
        if not is_digest_prefix(wanted):
            raise KeyError(f"{prefix!r} is not a digest prefix (4 to 64 hex digits)")
        matches = sorted(self._digests(wanted))
        if not matches:
            raise KeyError(f"no entry's digest starts with {prefix!r}")
        if len(matches) > 1:
            raise AmbiguousDigestError(prefix, matches)
        return matches[0]

    def digests(self) -> Iterable[str]:
        """The digest of every entry that has a record."""
        return self._digests("")

    def _digests(self, prefix: str) -> Iterable[str]:
        return [entry.digest for entry in self.entries() if entry.digest.startswith(prefix)]

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        """Digest, size and record size of every entry; in many stores cheaper than :meth:`entries`."""
        import json

        return ((entry.digest, entry.size, len(json.dumps(entry.record))) for entry in self.entries())

    def remove(self, digest: str) -> None:
        """Remove the entry of that digest; :class:`KeyError` if there is none."""
        raise NotImplementedError(f"{type(self).__name__} can't remove by digest")

    def quarantine(self, digest: str) -> None:
        """Move an entry that proved wrong to where it is never a hit; :class:`KeyError` if there is no such entry.

        A store without a quarantine removes it.
        """
        self.remove(digest)

    def count_unkeyed(self, kind: str) -> None:
        """Count a program that was compiled but can't be kept, by the kind of reason (``stats().unkeyed``).

        A store without counters ignores this.
        """
        counters = getattr(self, "_counters", None)
        if counters is not None:
            counters.count_unkeyed(kind)

    def stats(self) -> StoreStats:
        """The store's contents in numbers, and its counters."""
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics")

    @property
    def directory(self) -> str | None:
        """The root directory as a string, so that :mod:`pathlib` isn't imported; ``None`` if there is none."""
        path = getattr(self, "path", None)
        return None if path is None else os.fspath(path)

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories of its levels, from which derived data (header manifests) may be read; the fastest first."""
        return ()

    def close(self) -> None:  # noqa: B027
        """Save the counters, if the store keeps any. The store can be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
