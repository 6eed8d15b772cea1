# SPDX-License-Identifier: Apache-2.0
"""What every cache is, those that show another one in part or in another light, and those that make one of several."""

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
    """A cache refused a call: it is read-only, or its storage can't keep it. What was computed is not lost by it."""


class BaseCache(Shrinking):
    """A cache of calls: saved under their keys, loaded with values that come when they are asked for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See to it that a subclass that has its own ``load`` is asked by it, and not by a base's shorter way."""
        super().__init_subclass__(**kwargs)
        first = next(kind for kind in cls.__mro__ if "load" in vars(kind) or "find" in vars(kind))
        if "find" not in vars(first):
            cls.find = BaseCache.find  # type: ignore[method-assign]

    def __counts__(self) -> None:
        """What counts of a cache where memoized code refers to it: nothing. What it holds is no input."""

    @abc.abstractmethod
    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call, in place of one with the same key; gives the key. Rejected where the cache refuses it."""

    @abc.abstractmethod
    def load(self, key: str) -> LazyCall:
        """The call with this key, or with the one key that has this prefix; KeyError on a miss."""

    @abc.abstractmethod
    def load_value(self, key: str) -> Any:
        """The value with this digest; KeyError on a miss."""

    @abc.abstractmethod
    def evict(self, key: str) -> None:
        """Remove a call; its values stay until :meth:`Cache.gc`."""

    @abc.abstractmethod
    def expand(self, prefix: str) -> Digest:
        """The full digest, of a call or a value, with this prefix.

        Parameters
        ----------
        prefix : str
            4 characters at least.

        Raises
        ------
        KeyError
            None has it.
        AmbiguousDigestError
            Several have it.
        """

    @abc.abstractmethod
    def _query(self, template: QueryCall) -> Iterable[LazyCall]: ...

    def _children(self, value: Digest) -> set[Digest]:  # noqa: ARG002 - for overriders
        """Values that a value refers to."""
        return set()

    @property
    def leases(self) -> str | None:
        """A directory by which processes that save here can agree who runs a call; None where there is none."""
        return None

    #: Whether nothing is looked up: what is computed replaces what is there.
    refreshing = False

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """The result and metadata of the call with this key; KeyError on a miss. What memoized functions ask."""
        call = self.load(key)
        if call._result is None:
            raise KeyError(key)
        return call.result, call.metadata

    def prepare(self, call: Call) -> PreparedCall:
        """Seal a call's key before its body runs; caches with storages also store the arguments.

        The call that comes back is committed or abandoned, once.
        """
        return PreparedCall(call.digest(), self)

    def contains(self, key: str) -> bool:
        """Whether there is a call with this key."""
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
            Evict here what was copied.
        overwrite : bool
            Replace calls that ``other`` has; else they are left there, and here, with a warning in the log.
        """
        self.query().transfer(other, pop=pop, overwrite=overwrite)

    def _transfer_one(self, call: LazyCall, *, overwrite: bool = False) -> bool:
        """Take a call from another cache; False if there is one with its key, and ``overwrite`` isn't set."""
        key = call.to_lookup_key()
        with self._operation_context(key):
            if not overwrite and self.contains(key):
                return False
            self.save(call.fetch())
            return True

    def readonly(self) -> ReadOnlyCache:
        """The same cache, without writes."""
        return ReadOnlyCache(self)

    def push(self, cache: BaseCache) -> CacheStack:
        """The same cache with another one in front of it."""
        return CacheStack((cache, self))

    def query(self, template: QueryCall | None = None, **fields: Any) -> QueryIterator:
        """Calls that fit a pattern.

        Parameters
        ----------
        template : QueryCall, optional
            The pattern.
        **fields
            The pattern's fields instead: ``query(name="area", arguments={"r": 2})``. What isn't given fits anything;
            matching goes by digest; ``NONE`` asks for the value None.

        Returns
        -------
        QueryIterator
            Each iteration asks anew.

        Raises
        ------
        TypeError
            Both were given, or a field that patterns don't have.
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
        """Every call as a row of a table; see :meth:`QueryIterator.table`."""
        return self.query().table(arguments=arguments, results=results, shrink_keys=shrink_keys)

    def explain(self, call: str | Call | LazyCall | DigestedCall) -> tuple[str, ...]:
        """What tells a call from the nearest one that ran before it: a sentence per difference.

        Parameters
        ----------
        call : str or call
            A call, recorded or not, or the key of one that is recorded, or its first digits.

        Raises
        ------
        KeyError
            No call has this key.
        """
        return explain(self, call)

    def filter(self, predicate: Callable[[LazyCall], bool] | QueryCall) -> FilteredCache:
        """Only the calls that fit, read-only, as they are when asked for."""
        return FilteredCache(self, predicate.matcher() if isinstance(predicate, QueryCall) else predicate)


@dataclass(frozen=True)
class CacheWrapper(BaseCache):
    """Another cache, unchanged; a base for those that change something.

    Attributes
    ----------
    cache : BaseCache
    """

    cache: BaseCache

    @property
    def leases(self) -> str | None:
        """The wrapped cache's."""
        return self.cache.leases

    def prepare(self, call: Call) -> PreparedCall:
        """As the wrapped cache does; the commit goes through this one's :meth:`save`."""
        prepared = self.cache.prepare(call)
        bound = PreparedCall(prepared.digested, self, prepared.release)
        prepared.release = None  # it is the new one's now
        return bound

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call in the wrapped cache."""
        return self.cache.save(call)

    def load(self, key: str) -> LazyCall:
        """The wrapped cache's call."""
        return self.cache.load(key)

    def load_value(self, key: str) -> Any:
        """The wrapped cache's value."""
        return self.cache.load_value(key)

    def contains(self, key: str) -> bool:
        """Whether the wrapped cache has the call."""
        return self.cache.contains(key)

    def evict(self, key: str) -> None:
        """Remove a call from the wrapped cache."""
        self.cache.evict(key)

    def expand(self, prefix: str) -> Digest:
        """The full digest in the wrapped cache."""
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
    """Refuses every write; goes first in the bases. ``isinstance(cache, ReadOnlyMixin)`` tells a read-only cache."""

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
    """Another cache, without writes."""


@dataclass(frozen=True)
class FilteringMixin(CacheWrapper):
    """Another cache's calls as far as they fit.

    Attributes
    ----------
    predicate : callable
        Takes a :class:`LazyCall`.
    """

    predicate: Callable[[LazyCall], bool]

    def load(self, key: str) -> LazyCall:
        """The call, if it fits; KeyError if it doesn't, as if it weren't there."""
        call = self.cache.load(key)
        if not self.predicate(call):
            raise KeyError(key)
        return call

    contains = BaseCache.contains  # by load(), which filters; the wrapped cache has calls that don't fit, too

    def load_value(self, key: str) -> Any:
        """A value that a call which fits reaches; KeyError for others. Looks at the calls one by one."""
        full = self.cache.expand(key)
        if not self._reaches(full):
            raise KeyError(key)
        return self.cache.load_value(full)

    def expand(self, prefix: str) -> Digest:
        """The full digest of a call that fits, or of a value that one reaches."""
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
    """Another cache's calls as far as they fit, read-only."""


@dataclass(frozen=True)
class RefreshingCache(CacheWrapper):
    """Another cache that never hits: what is computed replaces what it has. Nested memoized calls run again too."""

    refreshing = True

    def load(self, key: str) -> LazyCall:
        """Miss."""
        raise KeyError(key)

    def contains(self, key: str) -> bool:  # noqa: ARG002
        """Never."""
        return False


class _MultiCache(BaseCache):
    """Reads over several caches, by three ways of going through them."""

    @property
    @abc.abstractmethod
    def _members(self) -> tuple[BaseCache, ...]: ...

    def _first_hit(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError, key: Any = None) -> T:
        """What the first member gives that doesn't raise ``exc``; ``exc(key)`` if all do."""
        for cache in self._members:
            try:
                return op(cache)
            except exc as error:
                key = error.args[0] if key is None and error.args else key
        raise exc(key) if key is not None else exc

    def _collect(self, op: Callable[[BaseCache], T], *, exc: type[BaseException] = KeyError) -> list[T]:
        """What all members give that don't raise ``exc``."""
        found = []
        for cache in self._members:
            with contextlib.suppress(exc):
                found.append(op(cache))
        return found

    def _foreach(
        self, op: Callable[[BaseCache], object], *,
        exc: type[BaseException] | tuple[type[BaseException], ...] = (Rejected, KeyError),
    ) -> None:  # fmt: skip
        """Do it with every member; that one refuses, or has nothing, is fine."""
        for cache in self._members:
            with contextlib.suppress(*(exc if isinstance(exc, tuple) else (exc,))):
                op(cache)

    def load_value(self, key: str) -> Any:
        """The value of the first member that has it."""
        return self._first_hit(lambda cache: cache.load_value(key), key=key)

    def contains(self, key: str) -> bool:
        """Whether a member has the call."""
        return any(cache.contains(key) for cache in self._members)

    def expand(self, prefix: str) -> Digest:
        """The full digest in whichever member; AmbiguousDigestError if they don't agree."""
        return _combine_expand(prefix, self._collect(lambda cache: cache.expand(prefix)))

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        found: dict[str, list[Digest]] = {key: [] for key in keys}
        for cache in self._members:
            present = [key for key in keys if cache.contains(key)]
            for key, short in zip(present, cache._shrink(*present) if present else (), strict=True):
                found[key].append(short)
        # The key of no call is a value's, or nobody's.
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
    """Caches from the nearest to the farthest.

    A call is saved in the first one. A hit is copied into every level below the one that had it, once however many
    threads load it; that a level refuses, or fails, is logged, and the hit is a hit.

    Attributes
    ----------
    stack : tuple of BaseCache
        None of them a stack.
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
        """The first cache's: it is where calls are saved."""
        return self.stack[0].leases

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """File a call in the first cache."""
        return self.stack[0].save(call)

    def prepare(self, call: Call) -> PreparedCall:
        """As the first cache does."""
        return self.stack[0].prepare(call)

    def load(self, key: str) -> LazyCall:
        """The call of the first cache that has it, copied into those before it; KeyError with the key on a miss."""
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
        """The result and metadata of the call with this key; the nearest cache is asked the short way."""
        try:
            return self.stack[0].find(key)
        except KeyError:
            return super().find(key)

    def _backfill(self, key: str, lc: LazyCall, levels: tuple[BaseCache, ...] | None = None) -> None:
        """Copy a hit into levels, as a rule all but the last, that don't have it."""
        try:
            key = lc.to_lookup_key()  # of a prefix the whole
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
        """The same stack with another cache in front."""
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
    """Caches side by side, read-only: the first that has a call gives it, nothing is copied.

    Attributes
    ----------
    caches : tuple of BaseCache
    """

    caches: tuple[BaseCache, ...]

    @property
    def _members(self) -> tuple[BaseCache, ...]:
        return self.caches

    def load(self, key: str) -> LazyCall:
        """The call of the first cache that has it; KeyError on a miss."""
        return self._first_hit(lambda cache: cache.load(key), key=key)
