# SPDX-License-Identifier: Apache-2.0
"""What every cache is."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo.call import Call, DigestedCall, LazyCall, Metadata, PreparedCall, QueryCall
from cuda_progcache.memo.digest import Digest, Indigestible
from cuda_progcache.memo.explain import explain
from cuda_progcache.memo.query import QueryIterator
from cuda_progcache.memo.storage.base import OperationContext, one_or_all

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("cuda_progcache.memo.caches")

#: What makes a cache's views and stacks, by the method that is asked for one; filled by the modules that define them.
made_by: dict[str, Callable[..., BaseCache]] = {}


class Rejected(ProgCacheError):  # noqa: N818 - an established name
    """A cache refused a call: it is read-only, or its storage can't keep it. What was computed is not lost by it."""


class BaseCache(OperationContext):
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
    def _shrink(self, *keys: str) -> tuple[Digest, ...]: ...

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

    def readonly(self) -> BaseCache:
        """The same cache, without writes: a ``ReadOnlyCache``."""
        return made_by["readonly"](self)

    def push(self, cache: BaseCache) -> BaseCache:
        """The same cache with another one in front of it: ``CacheStack((cache, self))``."""
        return made_by["push"]((cache, self))

    @overload
    def shrink(self, key: str, /) -> Digest: ...
    @overload
    def shrink(self, key: str, /, *keys: str) -> tuple[Digest, ...]: ...
    def shrink(self, *keys: str) -> Digest | tuple[Digest, ...]:
        """The shortest prefixes (4 characters at least) that are unambiguous here; of one key one, of several a tuple.

        For people: what is unambiguous now needn't be when more calls are recorded.

        Raises
        ------
        KeyError
            A key isn't here.
        AmbiguousDigestError
            Only the whole key is unambiguous.
        """
        return one_or_all(keys, self._shrink)

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
                _logger.warning("nothing can fit this query: %s", error)

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

    def filter(self, predicate: Callable[[LazyCall], bool] | QueryCall) -> BaseCache:
        """Only the calls that fit, read-only, as they are when asked for: a ``FilteredCache``.

        Parameters
        ----------
        predicate : callable or QueryCall
        """
        return made_by["filter"](self, predicate.matcher() if isinstance(predicate, QueryCall) else predicate)
