# SPDX-License-Identifier: Apache-2.0
"""What storages are: keys, and for values and calls what is kept under them."""

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
from cuda_progcache.memo.tagged_json import SaveError as SaveError  # noqa: PLC0414 - a name of this module, too
from cuda_progcache.memo.tagged_json import decode_json, encode_json

if TYPE_CHECKING:
    from cuda_progcache.memo.index import Index

#: Characters that a digest prefix has to have at least.
SHORTEST_PREFIX = 4


class Intent(enum.StrEnum):
    """What an operation is about to do with a key: ``WRITE`` excludes others of the same key, ``READ`` nobody."""

    WRITE = "write"
    READ = "read"


_NOTHING = contextlib.nullcontext()


class OperationContext(abc.ABC):  # noqa: B024 - a base for mixins; nothing in it is abstract
    """A hook around every operation on a key, for mixins that lock."""

    def _operation_context(
        self,
        key: Digest | str,  # noqa: ARG002 - for overriders
        *,
        intent: Intent = Intent.WRITE,  # noqa: ARG002
    ) -> contextlib.AbstractContextManager[None]:
        """Enter around an operation on ``key``; overriders enter ``super()``'s inside theirs."""
        return _NOTHING


class Shrinking(OperationContext):
    """Keys that people may give by their first characters."""

    @overload
    def shrink(self, key: str, /) -> Digest: ...
    @overload
    def shrink(self, key: str, /, *keys: str) -> tuple[Digest, ...]: ...
    def shrink(self, *keys: str) -> Digest | tuple[Digest, ...]:
        """The shortest prefixes (4 characters at least) that are unambiguous here; of one key one, of several a tuple.

        For people: what is unambiguous now needn't be when more is stored.

        Raises
        ------
        KeyError
            A key isn't here.
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
    """The one candidate; KeyError for none, AmbiguousDigestError for several. With ``dedupe`` equal ones are one."""
    found = sorted(set(candidates)) if dedupe else list(candidates)
    if not found:
        raise KeyError(prefix)
    if len(found) > 1:
        raise AmbiguousDigestError(str(prefix), found)
    return found[0]


def _combine_expand(key: str, results: Iterable[Digest]) -> Digest:
    """What a prefix expands to in several storages, which have to agree."""
    return _resolve_prefix(key, results, dedupe=True)


def _combine_shrink(key: str, results: Iterable[Digest]) -> Digest:
    """What several storages shrink a key to: the longest, which is unambiguous in all; KeyError for none."""
    digests = list(results)
    if not digests:
        raise KeyError(key)
    return max(digests, key=len)


class KeyManagement(Shrinking):
    """What every storage can do with keys; it needs ``list``, ``_contains`` and ``_evict``."""

    @abc.abstractmethod
    def list(self) -> Iterable[Digest]:
        """Every key, in no particular order."""

    @abc.abstractmethod
    def _evict(self, key: Digest) -> None: ...

    @abc.abstractmethod
    def _contains(self, key: Digest) -> bool: ...

    def evict(self, key: Digest | str) -> None:
        """Remove what is kept under a key; of a full key that isn't there nothing happens, of a prefix KeyError."""
        with self._operation_context(key):
            self._evict(self._normalize_key(key))

    def contains(self, key: Digest | str) -> bool:
        """Whether something is kept under a key, or under the one key with this prefix."""
        with self._operation_context(key, intent=Intent.READ):
            try:
                full = self._normalize_key(key)
            except KeyError:
                return False
            return self._contains(full)

    def expand(self, key: Digest | str) -> Digest:
        """The key with this prefix (4 characters at least); a full digest is its own.

        Raises
        ------
        KeyError
            None has it, or it is too short.
        AmbiguousDigestError
            Several have it.
        """
        with self._operation_context(key, intent=Intent.READ):
            if len(key) >= DIGEST_LENGTH:
                return Digest(key)
            if len(key) < SHORTEST_PREFIX:
                raise KeyError(key)
            return _resolve_prefix(str(key), self._prefix_candidates(str(key)))

    def _prefix_candidates(self, prefix: str) -> Iterable[Digest]:
        """Keys with this prefix, sorted; the first two if there are several."""
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
    """The shortest prefix of ``key`` that no other of the sorted ``known`` keys has; KeyError where it isn't there."""
    place = bisect.bisect_left(known, key)
    if place == len(known) or known[place] != key:
        raise KeyError(key)
    short = lengthened(Digest(key[:SHORTEST_PREFIX]), key, known)
    if len(short) >= len(key):
        raise AmbiguousDigestError(key[:-1], [k for k in known[max(0, place - 1) : place + 2] if k[:-1] == key[:-1]])
    return short


def lengthened(prefix: Digest, key: str, known: Sequence[str]) -> Digest:
    """A prefix of ``key`` made so long that no other of the sorted ``known`` keys has it: its neighbours decide."""
    place = bisect.bisect_left(known, key)
    neighbours = [*known[max(0, place - 1) : place], *(other for other in known[place : place + 2] if other != key)]
    shared = (len(os.path.commonprefix((key, other))) for other in neighbours)  # noqa: RUF071 - of texts, as it says
    needed = max(shared, default=0) + 1
    return prefix if needed <= len(prefix) else Digest(key[:needed])


class StorageBackend(KeyManagement):
    """Puts and gets; :class:`ValueMixin` and :class:`CallMixin` make storages of it."""

    @abc.abstractmethod
    def put(self, value: Any, key: Digest) -> Digest:
        """Keep ``value`` under ``key``, in place of what was there; SaveError where that can't be done."""

    @abc.abstractmethod
    def get(self, key: Digest) -> Any:
        """What is kept under ``key``, a copy that the caller may change; KeyError if nothing is."""

    def _contains(self, key: Digest) -> bool:
        try:
            self.get(key)
        except KeyError:
            return False
        return True


class ValueStorage(KeyManagement):
    """Keeps values under their digests."""

    @abc.abstractmethod
    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Keep a value, under its digest or under ``key``; SaveError, Indigestible where that can't be done."""

    @abc.abstractmethod
    def load(self, key: Digest | str) -> Any:
        """The value with this digest; KeyError if it isn't there."""

    def keep(self, value: Any, key: Digest) -> Digest:
        """Keep a value beside others that have the same digest; gives the key under which it loads as it is.

        A dict in another order has the same digest, and so has what a class's ``__digest__`` says so of. The first is
        kept under the digest; one that differs from it gets a key of its own.
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
    """Keeps calls under their keys."""

    #: Bytes of JSON up to which arguments and results go into the record; 0: none do.
    inline_limit: int = 0
    #: Finds calls and values, where the records lie in files.
    index: Index | None = None

    @abc.abstractmethod
    def save(self, call: DigestedCall) -> Digest:
        """Keep a call, in place of one with the same key; SaveError where that can't be done."""

    @abc.abstractmethod
    def load(self, key: Digest | str) -> DigestedCall:
        """The call with this key; KeyError if it isn't there."""

    @abc.abstractmethod
    def query(self, template: QueryCall) -> Iterable[DigestedCall]:
        """Calls that fit a pattern."""

    def peek(self, key: Digest) -> DigestedCall:
        """:meth:`load` for a caller who changes nothing of it, and gives the full key."""
        return self.load(key)

    def inline(self, value: Any) -> bytes | None:
        """A value as tagged JSON, if it is so small that it goes into the record of its call; else None."""
        kind = type(value)
        if kind in {str, bytes, list, tuple, dict, set} and len(value) > self.inline_limit:
            return None
        try:
            text = encode_json(value) if self.inline_limit else b""
        except SaveError:
            return None
        return text if 0 < len(text) <= self.inline_limit else None

    def inlined(self, key: Digest) -> Any:
        """A value that lies in a record; KeyError if none has it."""
        if self.index is not None:
            text = self.index.inlined(key)
        else:
            text = next((values[key] for values in self._inlines() if key in values), None)
        if text is None:
            raise KeyError(key)
        return decode_json(text)

    def expand_inlined(self, prefix: str) -> Digest:
        """The digest of a value that lies in a record, from its first characters; KeyError if none has them."""
        if len(prefix) < SHORTEST_PREFIX:
            raise KeyError(prefix)
        if self.index is not None:
            return _resolve_prefix(prefix, self.index.values_with_prefix(prefix))
        return _combine_expand(prefix, {key for values in self._inlines() for key in values if key.startswith(prefix)})

    def _inlines(self) -> Iterator[Mapping[Digest, bytes]]:
        """The values in each record, where there is no index."""
        return (call.inline for call in self.query(QueryCall())) if self.inline_limit else iter(())

    def transform(self, function: Callable[[DigestedCall], DigestedCall] | None = None) -> None:
        """Replace every call by what ``function`` makes of it (None: itself), under the key that that has."""
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
    """A hash that tells a value from others with its digest; never the same twice for what can't be pickled."""
    try:
        return sha256(pickle.dumps(value, protocol=5), usedforsecurity=False).digest()
    except Exception:  # noqa: BLE001 - pickling runs any class's code
        return uuid.uuid4().bytes


class ValueMixin(ValueStorage, StorageBackend):
    """A value storage from a backend's puts and gets."""

    def _keep_whole(self, value: Any, key: Digest) -> Digest:
        with self._operation_context(key):
            return self.put(value, key)  # not taken apart: a Digest in it is itself a value

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Keep a value, under its digest or under ``key``."""
        if key is None:
            key = digest(value)
        with self._operation_context(key):
            return self.put(value, key)

    def load(self, key: Digest | str) -> Any:
        """The value with this digest, or with the one digest that has this prefix; KeyError if it isn't there."""
        with self._operation_context(key, intent=Intent.READ):
            return self.get(self._normalize_key(key))


class CallMixin(CallStorage, StorageBackend):
    """A call storage from a backend's puts and gets."""

    def save(self, call: DigestedCall) -> Digest:
        """Keep a call, in place of one with the same key."""
        key = call.to_lookup_key()
        with self._operation_context(key):
            return self.put(call, key)

    def load(self, key: Digest | str) -> DigestedCall:
        """The call with this key, or with the one key that has this prefix; KeyError if it isn't there."""
        with self._operation_context(key, intent=Intent.READ):
            call: DigestedCall = self.get(self._normalize_key(key))
            return call

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Calls that fit a pattern, by looking at all of them."""
        matches = template.matcher()
        for key in tuple(self.list()):
            try:
                call = self.get(key)
            except KeyError:
                continue  # gone since
            if matches(call):
                yield call
