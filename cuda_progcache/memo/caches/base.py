# SPDX-License-Identifier: Apache-2.0
"""The base class of caches, caches that wrap another one, and caches that combine several."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo.call import Call, DigestedCall, LazyCall, Metadata, PreparedCall, QueryCall
from cuda_progcache.memo.digest import Digest, Indigestible
from cuda_progcache.memo.explain import explain
from cuda_progcache.memo.query import QueryIterator
from cuda_progcache.memo.storage.base import Intent, Shrinking, _combine_expand, _combine_shrink
from cuda_progcache.memo.storage.locking import PerKeyLockMixin

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("cuda_progcache.memo.caches")

T = TypeVar("T")


class Rejected(ProgCacheError):  # noqa: N818 - an established name
    """A cache refused a call: it is read-only, or its storage can't keep the call. No computed result is lost."""


class BaseCache(Shrinking):
    """A cache of calls, which are saved under their keys; loaded calls load their values on demand."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Reset ``find`` in a subclass that overrides only ``load``, so that a base's faster ``find`` isn't used."""
        super().__init_subclass__(**kwargs)
        first = next(kind for kind in cls.__mro__ if "load" in vars(kind) or "find" in vars(kind))
        if "find" not in vars(first):
            cls.find = BaseCache.find  # type: ignore[method-assign]

    def __counts__(self) -> None:
        """Return None: a cache that memoized code refers to doesn't count, since its content isn't an input."""

    @abc.abstractmethod
    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call, replacing one with the same key; return the key. Rejected if the cache refuses the call."""

    @abc.abstractmethod
    def load(self, key: str) -> LazyCall:
        """Return the call with this key or unambiguous prefix; KeyError on a miss."""

    @abc.abstractmethod
    def load_value(self, key: str) -> Any:
        """Return the value with this digest; KeyError on a miss."""

    @abc.abstractmethod
    def evict(self, key: str) -> None:
        """Remove a call; its values stay until :meth:`Cache.gc`."""

    @abc.abstractmethod
    def expand(self, prefix: str) -> Digest:
        """Return the full digest of the call or value with this prefix.

        Parameters
        ----------
        prefix : str
            At least 4 characters.

        Raises
        ------
        KeyError
            No digest has the prefix.
        AmbiguousDigestError
            Several digests have the prefix.
        """

    @abc.abstractmethod
    def _query(self, template: QueryCall) -> Iterable[LazyCall]: ...

    def _children(self, value: Digest) -> set[Digest]:  # noqa: ARG002 - for overriders
        """Return the digests of the values that a value refers to."""
        return set()

    @property
    def leases(self) -> str | None:
        """The directory of leases, with which processes that share the cache agree on who runs a call; None if none."""
        return None

    #: Whether lookups are skipped, so that new results replace the recorded ones.
    refreshing = False

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """Return the result and metadata of the call with this key; KeyError on a miss. Memoized functions use this."""
        call = self.load(key)
        if call._result is None:
            raise KeyError(key)
        return call.result, call.metadata

    def prepare(self, call: Call) -> PreparedCall:
        """Seal a call's key before its body runs; caches with storages also store the arguments.

        The returned call must be committed or abandoned, once.
        """
        return PreparedCall(call.digest(), self)

    def contains(self, key: str) -> bool:
        """Return whether there is a call with this key."""
        try:
            self.load(key)
        except KeyError:
            return False
        return True

    def transfer(self, other: BaseCache, pop: bool = False, overwrite: bool = False) -> None:  # noqa: FBT001, FBT002
        """Copy every call with its values into another cache.

        Parameters
        ----------
        other : BaseCache
        pop : bool
            Evict the copied calls from this cache.
        overwrite : bool
            Replace calls that ``other`` has. Otherwise such a call stays as it is in both caches, with a warning in the
            log.
        """
        self.query().transfer(other, pop=pop, overwrite=overwrite)

    def _transfer_one(self, call: LazyCall, *, overwrite: bool = False) -> bool:
        """Save a call of another cache; False if this one has a call with the key, and ``overwrite`` isn't set."""
        key = call.to_lookup_key()
        with self._operation_context(key):
            if not overwrite and self.contains(key):
                return False
            self.save(call.fetch())
            return True

    def readonly(self) -> ReadOnlyCache:
        """Return a read-only view of the cache."""
        return ReadOnlyCache(self)

    def push(self, cache: BaseCache) -> CacheStack:
        """Return a stack of this cache with another one in front of it."""
        return CacheStack((cache, self))

    def query(self, template: QueryCall | None = None, **fields: Any) -> QueryIterator:
        """Return the calls that match a pattern.

        Parameters
        ----------
        template : QueryCall, optional
            The pattern.
        **fields
            The pattern's fields instead: ``query(name="area", arguments={"r": 2})``. An omitted field matches anything;
            values are compared by digest; ``NONE`` matches the value None.

        Returns
        -------
        QueryIterator
            Each iteration runs the query again.

        Raises
        ------
        TypeError
            Both a pattern and fields were given, or a field that patterns don't have.
        """
        if template is not None and fields:
            raise TypeError("query() takes a pattern or fields, not both")
        pattern = QueryCall(**fields) if template is None else template

        def calls() -> Iterable[LazyCall]:
            try:
                yield from self._query(pattern)
            except Indigestible as error:
                _logger.warning("nothing can match this query: %s", error)

        return QueryIterator(calls, cache=self)

    def table(
        self, arguments: Iterable[str] | str | Literal[True] = (), results: bool = False, shrink_keys: bool = True  # noqa: FBT001, FBT002
    ) -> pd.DataFrame:  # fmt: skip
        """Return a table with a row for every call; see :meth:`QueryIterator.table`."""
        return self.query().table(arguments=arguments, results=results, shrink_keys=shrink_keys)

    def explain(self, call: str | Call | LazyCall | DigestedCall) -> tuple[str, ...]:
        """Explain how a call differs from the nearest one that ran before it, with a sentence per difference.

        Parameters
        ----------
        call : str or call
            A call, recorded or not, or the key of a recorded call, or the key's first digits.

        Raises
        ------
        KeyError
            No recorded call has this key.
        """
        return explain(self, call)

    def filter(self, predicate: Callable[[LazyCall], bool] | QueryCall) -> FilteredCache:
        """Return a read-only view of the calls that match; the filter is applied at each access."""
        return FilteredCache(self, predicate.matcher() if isinstance(predicate, QueryCall) else predicate)


@dataclass(frozen=True)
class CacheWrapper(BaseCache):
    """A cache that passes every operation on to another cache; a base for wrappers that change something.

    Attributes
    ----------
    cache : BaseCache
    """

    cache: BaseCache

    @property
    def leases(self) -> str | None:
        """The wrapped cache's directory of leases."""
        return self.cache.leases

    def prepare(self, call: Call) -> PreparedCall:
        """Prepare a call as the wrapped cache does; its commit calls this cache's :meth:`save`."""
        prepared = self.cache.prepare(call)
        bound = PreparedCall(prepared.digested, self, prepared.release)
        prepared.release = None  # now owned by the new call
        return bound

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call in the wrapped cache."""
        return self.cache.save(call)

    def load(self, key: str) -> LazyCall:
        """Return the wrapped cache's call."""
        return self.cache.load(key)

    def load_value(self, key: str) -> Any:
        """Return the wrapped cache's value."""
        return self.cache.load_value(key)

    def contains(self, key: str) -> bool:
        """Return whether the wrapped cache has the call."""
        return self.cache.contains(key)

    def evict(self, key: str) -> None:
        """Remove a call from the wrapped cache."""
        self.cache.evict(key)

    def expand(self, prefix: str) -> Digest:
        """Return the full digest in the wrapped cache."""
        return self.cache.expand(prefix)

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        return self.cache._shrink(*keys)

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        return self.cache.query(template)

    def _children(self, value: Digest) -> set[Digest]:
        return self.cache._children(value)

    def _operation_context(
        self, key: Digest | str, *, intent: Intent = Intent.WRITE
    ) -> contextlib.AbstractContextManager[None]:
        return self.cache._operation_context(key, intent=intent)


class ReadOnlyMixin:
    """A mixin that refuses every write; list it first in the bases. A read-only cache is an instance of it."""

    def save(self, call: Call | PreparedCall | DigestedCall) -> NoReturn:  # noqa: ARG002
        """Refuse the call."""
        raise Rejected(f"{type(self).__name__} is read-only")

    def evict(self, key: str) -> NoReturn:  # noqa: ARG002
        """Refuse to remove anything."""
        raise Rejected(f"{type(self).__name__} is read-only")

    def prepare(self, call: Call) -> PreparedCall:
        """Seal the key and store nothing; the commit will be refused."""
        return PreparedCall(call.digest(), self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReadOnlyCache(ReadOnlyMixin, CacheWrapper):
    """A read-only view of another cache."""


@dataclass(frozen=True)
class FilteringMixin(CacheWrapper):
    """A view of another cache's calls for which a predicate is true.

    Attributes
    ----------
    predicate : callable
        Takes a :class:`LazyCall`.
    """

    predicate: Callable[[LazyCall], bool]

    def load(self, key: str) -> LazyCall:
        """Return the call if it matches; KeyError if it doesn't match or doesn't exist."""
        call = self.cache.load(key)
        if not self.predicate(call):
            raise KeyError(key)
        return call

    contains = BaseCache.contains  # uses load(), which filters; the wrapped cache's would find all calls

    def load_value(self, key: str) -> Any:
        """Return a value that a matching call reaches; KeyError for other values. All calls are searched in turn."""
        full = self.cache.expand(key)
        if not self._reaches(full):
            raise KeyError(key)
        return self.cache.load_value(full)

    def expand(self, prefix: str) -> Digest:
        """Return the full digest of a matching call, or of a value that such a call reaches."""
        full = self.cache.expand(prefix)
        if not (self.contains(full) or self._reaches(full)):
            raise KeyError(prefix)
        return full

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        for key in keys:
            self.expand(key)
        return self.cache._shrink(*keys)

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        return (call for call in self.cache.query(template) if self.predicate(call))

    def _reaches(self, value: Digest) -> bool:
        seen: set[Digest] = set()
        for call in self.query():
            frontier = {digest for digest in (*call._arguments.values(), call._result) if isinstance(digest, Digest)}
            while frontier := frontier - seen:
                if value in frontier:
                    return True
                seen |= frontier
                frontier = {child for digest in frontier for child in self.cache._children(digest)}
        return False


@dataclass(frozen=True)
class FilteredCache(ReadOnlyMixin, FilteringMixin):
    """A read-only view of another cache's calls for which a predicate is true."""


@dataclass(frozen=True)
class RefreshingCache(CacheWrapper):
    """A view of another cache that never hits: new results replace the recorded ones.

    Nested memoized calls run again too.
    """

    refreshing = True

    def load(self, key: str) -> LazyCall:
        """Raise KeyError: every load is a miss."""
        raise KeyError(key)

    def contains(self, key: str) -> bool:  # noqa: ARG002
        """Return False: no lookup hits."""
        return False


class _MultiCache(BaseCache):
    """A cache that reads several member caches; it has three ways of iterating over them."""

    @property
    @abc.abstractmethod
    def _members(self) -> tuple[BaseCache, ...]: ...

    def _first_hit(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError, key: Any = None) -> T:
        """Return the result of the first member that doesn't raise ``exc``; raise ``exc(key)`` if all do."""
        for cache in self._members:
            try:
                return op(cache)
            except exc as error:
                key = error.args[0] if key is None and error.args else key
        raise exc(key) if key is not None else exc

    def _collect(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError) -> list[T]:
        """Return the results of all members that don't raise ``exc``."""
        found = []
        for cache in self._members:
            with contextlib.suppress(exc):
                found.append(op(cache))
        return found

    def _foreach(
        self, op: Callable[[BaseCache], object], *,
        exc: type[BaseException] | tuple[type[BaseException], ...] = (Rejected, KeyError),
    ) -> None:  # fmt: skip
        """Apply ``op`` to every member, and ignore members that raise ``exc``: they refuse, or have no such key."""
        for cache in self._members:
            with contextlib.suppress(*(exc if isinstance(exc, tuple) else (exc,))):
                op(cache)

    def load_value(self, key: str) -> Any:
        """Return the value from the first member that has it."""
        return self._first_hit(lambda cache: cache.load_value(key), key=key)

    def contains(self, key: str) -> bool:
        """Return whether a member has the call."""
        return any(cache.contains(key) for cache in self._members)

    def expand(self, prefix: str) -> Digest:
        """Return the full digest in any member; AmbiguousDigestError if the members don't agree."""
        return _combine_expand(prefix, self._collect(lambda cache: cache.expand(prefix)))

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        found: dict[str, list[Digest]] = {key: [] for key in keys}
        for cache in self._members:
            present = [key for key in keys if cache.contains(key)]
            for key, short in zip(present, cache._shrink(*present) if present else (), strict=True):
                found[key].append(short)
        # A key that isn't a call's is a value's, or unknown.
        return tuple(_combine_shrink(key, found[key] or self._shorts(key)) for key in keys)

    def _shorts(self, key: str) -> list[Digest]:
        return self._collect(lambda cache: cache._shrink(key)[0])

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        seen = set()
        for cache in self._members:
            for call in cache.query(template):
                key = call.to_lookup_key()
                if key not in seen:
                    seen.add(key)
                    yield call

    def _children(self, value: Digest) -> set[Digest]:
        return set().union(*(cache._children(value) for cache in self._members))


@dataclass(frozen=True)
class CacheStack(PerKeyLockMixin, _MultiCache):
    """A stack of caches, from the nearest to the farthest.

    A call is saved in the first cache. A hit is copied into every cache before the one that had it, once, even if many
    threads load the call. If a cache refuses the copy or fails, a warning is logged, and the load still succeeds.

    Attributes
    ----------
    stack : tuple of BaseCache
        The caches; none of them may be a stack.
    """

    stack: tuple[BaseCache, ...]

    def __post_init__(self) -> None:
        if any(isinstance(cache, CacheStack) for cache in self.stack):
            raise ValueError("a CacheStack cannot be nested in another one: put all caches into one stack")

    @property
    def _members(self) -> tuple[BaseCache, ...]:
        return self.stack

    @property
    def leases(self) -> str | None:
        """The first cache's directory of leases, since calls are saved there."""
        return self.stack[0].leases

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call in the first cache."""
        return self.stack[0].save(call)

    def prepare(self, call: Call) -> PreparedCall:
        """Prepare a call as the first cache does."""
        return self.stack[0].prepare(call)

    def load(self, key: str) -> LazyCall:
        """Return the call from the first cache that has it, and copy it into those before; KeyError on a miss."""
        for level, cache in enumerate(self.stack):
            try:
                call = cache.load(key)
            except KeyError:
                continue
            if level:
                self._backfill(key, call, self.stack[:level])
            return call
        raise KeyError(key)

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """Return the result and metadata of the call with this key; the nearest cache uses its own ``find``."""
        try:
            return self.stack[0].find(key)
        except KeyError:
            return super().find(key)

    def _backfill(self, key: str, lc: LazyCall, levels: tuple[BaseCache, ...] | None = None) -> None:
        """Copy a hit into those of ``levels`` (default: all caches but the last) that don't have it."""
        try:
            key = lc.to_lookup_key()  # the whole key, since ``key`` may be a prefix
            with super()._operation_context(key):
                missing = [
                    cache for cache in (self.stack[:-1] if levels is None else levels) if not cache.contains(key)
                ]
                live = lc.fetch() if missing else None
                for cache in missing:
                    self._fill(cache, key, live)
        except Exception as error:  # noqa: BLE001 - a level may be anyone's code, and none may fail a load
            _logger.warning("Failed to transfer the hit %s to the caches below: %s", lc, error)

    @staticmethod
    def _fill(cache: BaseCache, key: str, call: Any) -> None:
        try:
            cache.save(call)
        except Exception as error:  # noqa: BLE001 - as above
            _logger.warning("Failed to transfer the hit %s to %s: %s", key, type(cache).__name__, error)

    def push(self, cache: BaseCache) -> CacheStack:
        """Return the stack with another cache in front."""
        return CacheStack((cache, *self.stack))

    def evict(self, key: str) -> None:
        """Remove a call from every cache that allows it."""
        self._foreach(lambda cache: cache.evict(key))

    @contextlib.contextmanager
    def _operation_context(self, key: Digest | str, *, intent: Intent = Intent.WRITE) -> Iterator[None]:
        with super()._operation_context(key, intent=intent), self.stack[0]._operation_context(key, intent=intent):
            yield


@dataclass(frozen=True)
class CachePool(ReadOnlyMixin, _MultiCache):
    """A read-only pool of caches: a call is loaded from the first cache that has it; nothing is copied.

    Attributes
    ----------
    caches : tuple of BaseCache
    """

    caches: tuple[BaseCache, ...]

    @property
    def _members(self) -> tuple[BaseCache, ...]:
        return self.caches

    def load(self, key: str) -> LazyCall:
        """Return the call from the first cache that has it; KeyError on a miss."""
        return self._first_hit(lambda cache: cache.load(key), key=key)
