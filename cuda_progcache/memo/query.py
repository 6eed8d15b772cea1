# SPDX-License-Identifier: Apache-2.0
"""The calls that a query finds, and what can be done with them."""

from __future__ import annotations

import builtins
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cuda_progcache.memo.call import Home, LazyCall

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger(__name__)

#: Of a call, or the name of an argument that is meant.
KeyFunction = str | Callable[[LazyCall], Any]


def _key_function(key: KeyFunction) -> Callable[[LazyCall], Any]:
    if isinstance(key, str):
        name = key
        return lambda call: call.arguments[name]
    return key


@dataclass(frozen=True)
class QueryIterator(Iterable[LazyCall]):
    """Calls, found anew each time one goes through them.

    ``take``, ``skip``, ``filter``, ``sorted`` and ``unique`` give another one and look at nothing yet.

    Attributes
    ----------
    calls : callable
        Gives the calls.
    cache : BaseCache or None
        Which they are found in.
    """

    calls: Callable[[], Iterable[LazyCall]]
    cache: Home | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[LazyCall]:
        yield from self.calls()

    def _derived(self, calls: Callable[[], Iterable[LazyCall]]) -> QueryIterator:
        return QueryIterator(calls, cache=self.cache)

    def only(self) -> LazyCall:
        """The one call; IndexError if there is none, ValueError if there are several."""
        found = list(itertools.islice(self, 2))
        if not found:
            raise IndexError("no call matches the query")
        if len(found) > 1:
            raise ValueError("more than one call matches the query")
        return found[0]

    def count(self) -> int:
        """How many there are."""
        return builtins.sum(1 for _ in self)

    def any(self) -> LazyCall | None:
        """The first one, or None."""
        return next(iter(self), None)

    def empty(self) -> bool:
        """Whether there is none."""
        return self.any() is None

    def take(self, n: int) -> QueryIterator:
        """The first ``n``."""
        return self._derived(lambda: itertools.islice(self, n))

    def skip(self, n: int) -> QueryIterator:
        """All but the first ``n``."""
        return self._derived(lambda: itertools.islice(self, n, None))

    def filter(self, predicate: Callable[[LazyCall], bool]) -> QueryIterator:
        """Those for which ``predicate`` is true."""
        return self._derived(lambda: (call for call in self if predicate(call)))

    def sorted(self, key: KeyFunction | None = None, reverse: bool = False) -> QueryIterator:  # noqa: FBT001, FBT002
        """In order of ``key``: a function of a call, or an argument's name."""
        by: Any = None if key is None else _key_function(key)
        return self._derived(lambda: builtins.sorted(self, key=by, reverse=reverse))

    def unique(self, key: KeyFunction) -> QueryIterator:
        """The first one for each value of ``key``: a function of a call, or an argument's name."""
        by = _key_function(key)

        def firsts() -> Iterator[LazyCall]:
            seen = set()
            for call in self:
                value = by(call)
                if value not in seen:
                    seen.add(value)
                    yield call

        return self._derived(firsts)

    def groupby(self, key: KeyFunction) -> dict[Any, QueryIterator]:
        """Those of each value of ``key``, as they are now."""
        by = _key_function(key)
        groups: dict[Any, list[LazyCall]] = {}
        for call in self:
            groups.setdefault(by(call), []).append(call)
        return {value: self._derived(calls.copy) for value, calls in groups.items()}

    def latest(self) -> LazyCall:
        """The one that ended last (``metadata["runtime"]["timestop"]``).

        Raises
        ------
        IndexError
            There is none.
        ValueError
            None says when it ended.
        """
        return self._ended(builtins.max, "latest")

    def oldest(self) -> LazyCall:
        """The one that ended first; see :meth:`latest`."""
        return self._ended(builtins.min, "oldest")

    def _ended(self, pick: Callable[..., tuple[float, int, LazyCall]], which: str) -> LazyCall:
        calls = list(self)
        if not calls:
            raise IndexError("no call matches the query")
        timed = [
            (float(stop), place, call)
            for place, call in enumerate(calls)
            if (stop := call.runtime.get("timestop")) is not None
        ]
        if not timed:
            raise ValueError(f"can't tell which call is the {which}: none has a timestop in its Runtime metadata")
        return pick(timed, key=lambda entry: entry[0])[2]

    def evict(self) -> None:
        """Remove them from the cache."""
        for call in list(self):
            call._cache.evict(call.to_lookup_key())

    def transfer(self, target: Home, pop: bool = False, overwrite: bool = False) -> None:  # noqa: FBT001, FBT002
        """Copy them, with their values, into another cache; see :meth:`BaseCache.transfer`."""
        for call in list(self) if pop else self:
            key = call.to_lookup_key()
            if not target._transfer_one(call, overwrite=overwrite):
                _logger.warning("Not transferring %s: the target has it, and overwrite isn't set", key)
            elif pop:
                call._cache.evict(key)

    def table(
        self, arguments: Iterable[str] | str | Literal[True] = (), results: bool = False, shrink_keys: bool = True  # noqa: FBT001, FBT002
    ) -> pd.DataFrame:  # fmt: skip
        """Them as the rows of a table.

        Parameters
        ----------
        arguments : iterable of str, str or True
            Arguments to show, each a column, ``a_<name>`` where there is one of its name already; True: all.
        results : bool
            Show results.
        shrink_keys : bool
            Index by the shortest unambiguous prefixes instead of the keys.

        Returns
        -------
        pandas.DataFrame
            Indexed by key; columns ``name``, ``module``, each entry of the metadata, and what was asked for.
            ``timestart`` and ``timestop`` are local times.
        """
        import pandas as pd

        wanted: Any = (arguments,) if isinstance(arguments, str) else arguments
        wanted = wanted if wanted is True else tuple(wanted)
        calls = list(self)
        keys: list[str] = [call.to_lookup_key() for call in calls]
        if shrink_keys and calls:
            short = (self.cache or calls[0]._cache)._shrink(*keys)
            keys = list(short)
        rows = {str(key): _row(call, wanted, results=results) for key, call in zip(keys, calls, strict=True)}
        table = pd.DataFrame.from_dict(rows, orient="index")
        if calls:
            table = table.reindex(list(rows))
        zone = _local_zone()
        for column in ("timestart", "timestop"):
            if column in table.columns:
                table[column] = pd.to_datetime(table[column], unit="s", utc=True).dt.tz_convert(zone)
        return table

    def results(self) -> Iterator[Any]:
        """Their results."""
        for call in self:
            yield call.result


def _row(call: LazyCall, wanted: Any, *, results: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": call.name, "module": call.module}
    if results:
        row["result"] = call.result
    for group in (call.metadata or {}).values():
        if isinstance(group, dict):
            row.update(group)
    have = call.arguments
    for name in have if wanted is True else wanted:
        row[f"a_{name}" if name in row else name] = have.get(name)
    return row


def _local_zone() -> Any:
    import datetime as dt

    return dt.datetime.now(dt.UTC).astimezone().tzinfo
