# SPDX-License-Identifier: Apache-2.0
"""The results of a query: an iterator over calls, and operations on them."""

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

#: A function of a call, or the name of an argument.
KeyFunction = str | Callable[[LazyCall], Any]


def _key_function(key: KeyFunction) -> Callable[[LazyCall], Any]:
    if isinstance(key, str):
        name = key
        return lambda call: call.arguments[name]
    return key


@dataclass(frozen=True)
class QueryIterator(Iterable[LazyCall]):
    """The calls that match a query; each iteration runs the query again.

    ``take``, ``skip``, ``filter``, ``sorted`` and ``unique`` are lazy and return another query iterator.

    Attributes
    ----------
    calls : callable
        Returns the calls.
    cache : BaseCache or None
        The cache that contains the calls.
    """

    calls: Callable[[], Iterable[LazyCall]]
    cache: Home | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[LazyCall]:
        yield from self.calls()

    def _derived(self, calls: Callable[[], Iterable[LazyCall]]) -> QueryIterator:
        return QueryIterator(calls, cache=self.cache)

    def only(self) -> LazyCall:
        """Return the only call; IndexError if there is none, ValueError if there are several."""
        found = list(itertools.islice(self, 2))
        if not found:
            raise IndexError("no call matches the query")
        if len(found) > 1:
            raise ValueError("more than one call matches the query")
        return found[0]

    def count(self) -> int:
        """Return the number of calls."""
        return builtins.sum(1 for _ in self)

    def any(self) -> LazyCall | None:
        """Return the first call, or None."""
        return next(iter(self), None)

    def empty(self) -> bool:
        """Return whether there are no calls."""
        return self.any() is None

    def take(self, n: int) -> QueryIterator:
        """Return the first ``n`` calls."""
        return self._derived(lambda: itertools.islice(self, n))

    def skip(self, n: int) -> QueryIterator:
        """Return all calls but the first ``n``."""
        return self._derived(lambda: itertools.islice(self, n, None))

    def filter(self, predicate: Callable[[LazyCall], bool]) -> QueryIterator:
        """Return the calls for which ``predicate`` is true."""
        return self._derived(lambda: (call for call in self if predicate(call)))

    def sorted(self, key: KeyFunction | None = None, reverse: bool = False) -> QueryIterator:  # noqa: FBT001, FBT002
        """Return the calls sorted by ``key``: a function of a call, or an argument's name."""
        by: Any = None if key is None else _key_function(key)
        return self._derived(lambda: builtins.sorted(self, key=by, reverse=reverse))

    def unique(self, key: KeyFunction) -> QueryIterator:
        """Return the first call for each value of ``key``: a function of a call, or an argument's name."""
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
        """Return the calls grouped by the value of ``key``; the query runs now, and only once."""
        by = _key_function(key)
        groups: dict[Any, list[LazyCall]] = {}
        for call in self:
            groups.setdefault(by(call), []).append(call)
        return {value: self._derived(calls.copy) for value, calls in groups.items()}

    def latest(self) -> LazyCall:
        """Return the call that ended last (``metadata["runtime"]["timestop"]``).

        Raises
        ------
        IndexError
            There are no calls.
        ValueError
            No call records when it ended.
        """
        return self._ended(builtins.max, "latest")

    def oldest(self) -> LazyCall:
        """Return the call that ended first; see :meth:`latest`."""
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
        """Remove the calls from their cache."""
        for call in list(self):
            call._cache.evict(call.to_lookup_key())

    def transfer(self, target: Home, pop: bool = False, overwrite: bool = False) -> None:  # noqa: FBT001, FBT002
        """Copy the calls with their values into another cache; see :meth:`BaseCache.transfer`."""
        for call in list(self) if pop else self:
            key = call.to_lookup_key()
            if not target._transfer_one(call, overwrite=overwrite):
                _logger.warning("Not transferring %s: the target has it, and overwrite isn't set", key)
            elif pop:
                call._cache.evict(key)

    def table(
        self, arguments: Iterable[str] | str | Literal[True] = (), results: bool = False, shrink_keys: bool = True  # noqa: FBT001, FBT002
    ) -> pd.DataFrame:  # fmt: skip
        """Return the calls as table rows.

        Parameters
        ----------
        arguments : iterable of str, str or True
            Arguments to show; True shows all. Each is a column, named ``a_<name>`` if the plain name is taken.
        results : bool
            Show results.
        shrink_keys : bool
            Index by the shortest unambiguous prefixes of the keys instead of the whole keys.

        Returns
        -------
        pandas.DataFrame
            Indexed by key; columns ``name``, ``module``, each entry of the metadata, and the requested columns.
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
        """Yield the calls' results."""
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
