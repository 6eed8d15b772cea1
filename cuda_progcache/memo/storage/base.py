# SPDX-License-Identifier: Apache-2.0
"""The base classes of storages: key management, value storages and call storages."""

from __future__ import annotations

import abc
import bisect
import contextlib
import enum
import heapq
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, overload

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.memo.call import DigestedCall, QueryCall
from cuda_progcache.memo.digest import DIGEST_LENGTH, Digest, digest
from cuda_progcache.memo.tagged_json import SaveError as SaveError  # noqa: PLC0414 - also a name of this module
from cuda_progcache.memo.tagged_json import decode_json, encode_json

if TYPE_CHECKING:
    from cuda_progcache.memo.index import Index

#: The fewest characters of a digest prefix.
SHORTEST_PREFIX = 4


class Intent(enum.StrEnum):
    """The purpose of an operation on a key: ``WRITE`` excludes other writes of the key, ``READ`` excludes nothing."""

    WRITE = "write"
    READ = "read"


_NOTHING = contextlib.nullcontext()


class OperationContext(abc.ABC):  # noqa: B024 - a base for mixins; nothing in it is abstract
    """A base class with a hook around every operation on a key, for mixins that lock."""

    def _operation_context(
        self,
        key: Digest | str,  # noqa: ARG002 - for overriders
        *,
        intent: Intent = Intent.WRITE,  # noqa: ARG002
    ) -> contextlib.AbstractContextManager[None]:
        """Return the context for an operation on ``key``; an override must enter ``super()``'s inside its own."""
        return _NOTHING


class Shrinking(OperationContext):
    """A base class for collections whose keys can be abbreviated to prefixes."""

    @overload
    def shrink(self, key: str, /) -> Digest: ...
    @overload
    def shrink(self, key: str, /, *keys: str) -> tuple[Digest, ...]: ...
    def shrink(self, *keys: str) -> Digest | tuple[Digest, ...]:
        """Return the shortest unambiguous prefixes (at least 4 characters): one for one key, a tuple for several.

        They are meant for display: a prefix may become ambiguous when more is stored.

        Raises
        ------
        KeyError
            A key doesn't exist.
        AmbiguousDigestError
            Only the whole key is unambiguous.
        """
        if not keys:
            raise TypeError("shrink() takes at least one key")
        found = self._shrink(*keys)
        return found[0] if len(keys) == 1 else found

    @abc.abstractmethod
    def _shrink(self, *keys: str) -> tuple[Digest, ...]: ...


def _resolve_prefix(prefix: str, candidates: Iterable[Digest], *, dedupe: bool = False) -> Digest:
    """Return the only candidate; KeyError for none, AmbiguousDigestError for several. ``dedupe`` merges equal ones."""
    found = sorted(set(candidates)) if dedupe else list(candidates)
    if not found:
        raise KeyError(prefix)
    if len(found) > 1:
        raise AmbiguousDigestError(str(prefix), found)
    return found[0]


def _combine_expand(key: str, results: Iterable[Digest]) -> Digest:
    """Return the digest that a prefix expands to in several storages; AmbiguousDigestError if they don't agree."""
    return _resolve_prefix(key, results, dedupe=True)


def _combine_shrink(key: str, results: Iterable[Digest]) -> Digest:
    """Return the longest of the prefixes from several storages, which is unambiguous in all; KeyError for none."""
    digests = list(results)
    if not digests:
        raise KeyError(key)
    return max(digests, key=len)


class KeyManagement(Shrinking):
    """The key operations of every storage; subclasses define ``list``, ``_contains`` and ``_evict``."""

    @abc.abstractmethod
    def list(self) -> Iterable[Digest]:
        """Return every key, in no particular order."""

    @abc.abstractmethod
    def _evict(self, key: Digest) -> None: ...

    @abc.abstractmethod
    def _contains(self, key: Digest) -> bool: ...

    def evict(self, key: Digest | str) -> None:
        """Remove the entry of a key; an unknown full key is ignored, an unknown prefix raises KeyError."""
        with self._operation_context(key):
            self._evict(self._normalize_key(key))

    def contains(self, key: Digest | str) -> bool:
        """Return whether there is an entry with this key or unambiguous prefix."""
        with self._operation_context(key, intent=Intent.READ):
            try:
                full = self._normalize_key(key)
            except KeyError:
                return False
            return self._contains(full)

    def expand(self, key: Digest | str) -> Digest:
        """Return the key with this prefix (at least 4 characters); a full digest is returned as it is.

        Raises
        ------
        KeyError
            No key has the prefix, or the prefix is too short.
        AmbiguousDigestError
            Several keys have the prefix.
        """
        with self._operation_context(key, intent=Intent.READ):
            if len(key) >= DIGEST_LENGTH:
                return Digest(key)
            if len(key) < SHORTEST_PREFIX:
                raise KeyError(key)
            return _resolve_prefix(str(key), self._prefix_candidates(str(key)))

    def _prefix_candidates(self, prefix: str) -> Iterable[Digest]:
        """Return the keys with this prefix, sorted, at most two."""
        return heapq.nsmallest(2, (key for key in self.list() if key.startswith(prefix)))

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        with contextlib.ExitStack() as entered:
            for key in keys:
                entered.enter_context(self._operation_context(key, intent=Intent.READ))
            known = sorted(self.list())
            return tuple(shortest_prefix(key, known) for key in keys)

    def _normalize_key(self, key: Digest | str) -> Digest:
        if len(key) < DIGEST_LENGTH:
            return self.expand(key)
        return key if type(key) is Digest else Digest(key)


def shortest_prefix(key: str, known: Sequence[str]) -> Digest:
    """Return the shortest prefix of ``key`` that no other of the sorted ``known`` keys has; KeyError if unknown."""
    place = bisect.bisect_left(known, key)
    if place == len(known) or known[place] != key:
        raise KeyError(key)
    short = lengthened(Digest(key[:SHORTEST_PREFIX]), key, known)
    if len(short) >= len(key):
        raise AmbiguousDigestError(key[:-1], [k for k in known[max(0, place - 1) : place + 2] if k[:-1] == key[:-1]])
    return short


def lengthened(prefix: Digest, key: str, known: Sequence[str]) -> Digest:
    """Return a prefix of ``key`` lengthened until no other of the sorted ``known`` keys has it."""
    place = bisect.bisect_left(known, key)
    neighbours = [*known[max(0, place - 1) : place], *(other for other in known[place : place + 2] if other != key)]
    shared = (len(os.path.commonprefix((key, other))) for other in neighbours)  # noqa: RUF071 - compares strings, not paths
    needed = max(shared, default=0) + 1
    return prefix if needed <= len(prefix) else Digest(key[:needed])


class StorageBackend(KeyManagement):
    """A backend with ``put`` and ``get``; :class:`ValueMixin` and :class:`CallMixin` turn it into a storage."""

    @abc.abstractmethod
    def put(self, value: Any, key: Digest) -> Digest:
        """Store ``value`` under ``key``, replacing any previous value; SaveError if that isn't possible."""

    @abc.abstractmethod
    def get(self, key: Digest) -> Any:
        """Return a copy of the value under ``key``, which the caller may change; KeyError if there is none."""

    def _contains(self, key: Digest) -> bool:
        try:
            self.get(key)
        except KeyError:
            return False
        return True


class ValueStorage(KeyManagement):
    """A storage that keeps values under their digests."""

    @abc.abstractmethod
    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Store a value under its digest or under ``key``; SaveError or Indigestible if that isn't possible."""

    @abc.abstractmethod
    def load(self, key: Digest | str) -> Any:
        """Return the value with this digest; KeyError if there is none."""

    def keep(self, value: Any, key: Digest) -> Digest:
        """Store a value whose digest other values may have; return the key that loads exactly this value.

        Dicts in another order have the same digest, and so may objects whose class defines ``__digest__``. The first
        such value is stored under the digest; one that differs from it gets a key of its own.
        """
        wanted = _exactly(value)
        try:
            if _exactly(self.load(key)) == wanted:
                return key
        except KeyError:
            self.save(value, key)
            with contextlib.suppress(KeyError):
                if _exactly(self.load(key)) == wanted:
                    return key
        other = digest(("cuda_progcache", "another value", key, wanted))
        return self._keep_whole(value, other)

    def _keep_whole(self, value: Any, key: Digest) -> Digest:
        return self.save(value, key)


class CallStorage(KeyManagement):
    """A storage that keeps calls under their keys."""

    #: The most bytes of JSON that an argument or result in the record may take; 0: the record contains none.
    inline_limit: int = 0
    #: The index of calls and values, if the records are in files.
    index: Index | None = None

    @abc.abstractmethod
    def save(self, call: DigestedCall) -> Digest:
        """Store a call, replacing one with the same key; SaveError if that isn't possible."""

    @abc.abstractmethod
    def load(self, key: Digest | str) -> DigestedCall:
        """Return the call with this key; KeyError if there is none."""

    @abc.abstractmethod
    def query(self, template: QueryCall) -> Iterable[DigestedCall]:
        """Return the calls that match a pattern."""

    def peek(self, key: Digest) -> DigestedCall:
        """Return the call with this full key, like :meth:`load`, for a caller that doesn't change it."""
        return self.load(key)

    def inline(self, value: Any) -> bytes | None:
        """Return a value as tagged JSON if it is small enough for the record of its call, otherwise None."""
        kind = type(value)
        if kind in {str, bytes, list, tuple, dict, set} and len(value) > self.inline_limit:
            return None
        try:
            text = encode_json(value) if self.inline_limit else b""
        except SaveError:
            return None
        return text if 0 < len(text) <= self.inline_limit else None

    def inlined(self, key: Digest) -> Any:
        """Return a value that a record contains, by its digest; KeyError if no record has it."""
        if self.index is not None:
            text = self.index.inlined(key)
        else:
            text = next((values[key] for values in self._inlines() if key in values), None)
        if text is None:
            raise KeyError(key)
        return decode_json(text)

    def expand_inlined(self, prefix: str) -> Digest:
        """Return the digest with this prefix of a value that a record contains; KeyError if there is none."""
        if len(prefix) < SHORTEST_PREFIX:
            raise KeyError(prefix)
        if self.index is not None:
            return _resolve_prefix(prefix, self.index.values_with_prefix(prefix))
        return _combine_expand(prefix, {key for values in self._inlines() for key in values if key.startswith(prefix)})

    def _inlines(self) -> Iterator[Mapping[Digest, bytes]]:
        """Yield the values in each record, for storages without an index."""
        return (call.inline for call in self.query(QueryCall())) if self.inline_limit else iter(())

    def transform(self, function: Callable[[DigestedCall], DigestedCall] | None = None) -> None:
        """Replace every call with the result of ``function`` (None: the call itself), under the result's key."""
        for key in tuple(self.list()):
            try:
                call = self.load(key)
            except KeyError:
                continue
            changed = call if function is None else function(call)
            self.save(changed)
            if changed.to_lookup_key() != key:
                self.evict(key)


def _exactly(value: Any) -> bytes:
    """Return a hash that distinguishes values with the same digest; random for a value that can't be pickled."""
    try:
        return sha256(pickle.dumps(value, protocol=5), usedforsecurity=False).digest()
    except Exception:  # noqa: BLE001 - pickling runs any class's code
        return uuid.uuid4().bytes


class ValueMixin(ValueStorage, StorageBackend):
    """A value storage made from a backend's ``put`` and ``get``."""

    def _keep_whole(self, value: Any, key: Digest) -> Digest:
        with self._operation_context(key):
            return self.put(value, key)  # not taken apart, since a Digest in it is itself a value

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Store a value under its digest or under ``key``."""
        if key is None:
            key = digest(value)
        with self._operation_context(key):
            return self.put(value, key)

    def load(self, key: Digest | str) -> Any:
        """Return the value with this digest or unambiguous prefix; KeyError if there is none."""
        with self._operation_context(key, intent=Intent.READ):
            return self.get(self._normalize_key(key))


class CallMixin(CallStorage, StorageBackend):
    """A call storage made from a backend's ``put`` and ``get``."""

    def save(self, call: DigestedCall) -> Digest:
        """Store a call, replacing one with the same key."""
        key = call.to_lookup_key()
        with self._operation_context(key):
            return self.put(call, key)

    def load(self, key: Digest | str) -> DigestedCall:
        """Return the call with this key or unambiguous prefix; KeyError if there is none."""
        with self._operation_context(key, intent=Intent.READ):
            call: DigestedCall = self.get(self._normalize_key(key))
            return call

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Yield the calls that match a pattern; every call is loaded."""
        matches = template.matcher()
        for key in tuple(self.list()):
            try:
                call = self.get(key)
            except KeyError:
                continue  # gone since
            if matches(call):
                yield call
