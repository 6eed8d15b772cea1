# SPDX-License-Identifier: Apache-2.0
"""The basic cache: a value storage and a call storage."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from cuda_progcache.memo.caches.base import BaseCache, Rejected
from cuda_progcache.memo.call import (
    NO_RESULT,
    Call,
    DigestedCall,
    LazyCall,
    Metadata,
    PreparedCall,
    QueryCall,
    Unstored,
    digests_of,
)
from cuda_progcache.memo.digest import DIGEST_LENGTH, Digest, digest, digest_loosely
from cuda_progcache.memo.storage.base import (
    CallStorage,
    Intent,
    KeyManagement,
    ValueStorage,
    _combine_expand,
    lengthened,
)
from cuda_progcache.memo.storage.destructuring import HasChildDigests
from cuda_progcache.memo.storage.locking import PerKeyLockMixin
from cuda_progcache.memo.tagged_json import SaveError, decode_json

_logger = logging.getLogger("cuda_progcache.memo.caches")


class _Flights:
    """The values of calls in flight, for storages without pins; only one process uses such a storage."""

    def __init__(self) -> None:
        #: Held while values and the record that refers to them are written, and during a whole collection.
        self.lock = threading.RLock()
        self.values: Counter[Digest] = Counter()


_flights: weakref.WeakKeyDictionary[Any, _Flights] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _flights_of(values: Any) -> _Flights | None:
    """Return the flights of a storage; None if the storage has pins, which other processes see too."""
    if hasattr(type(values), "pin"):
        return None
    with _making:
        found = _flights.get(values)
        if found is None:
            found = _flights[values] = _Flights()
        return found


@dataclass(frozen=True)
class Cache(PerKeyLockMixin, BaseCache):
    """A cache that keeps calls in one storage and their values in another.

    Attributes
    ----------
    values : ValueStorage
    calls : CallStorage
    """

    values: ValueStorage
    calls: CallStorage

    @property
    def leases(self) -> str | None:
        """The directory of leases, beside the calls; None if the calls aren't in files."""
        found = getattr(self.calls, "leases", None)
        return found if isinstance(found, str) else None

    def load_value(self, key: str) -> Any:
        """Return the value with this digest or unambiguous prefix, from a file or a record; KeyError on a miss."""
        with self._operation_context(key, intent=Intent.READ):
            try:
                return self.values.load(key)
            except KeyError:
                full = self.expand(key) if len(key) < DIGEST_LENGTH else Digest(key)
                return self.calls.inlined(full)

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """Return the result and metadata of the call with this key; KeyError on a miss or if the value is gone."""
        call = self.calls.peek(key)
        if call.result is None:
            raise KeyError(key)
        text = call.inline.get(call.result)
        return (self.values.load(call.result) if text is None else decode_json(text)), call.metadata

    def prepare(self, call: Call) -> PreparedCall:
        """Digest and store the arguments now, so that the body can't change the key by changing the arguments."""
        arguments: dict[str, Digest] = {}
        inline: dict[Digest, bytes] = {}
        stored: dict[str, Any] = {}
        for name, value in call.arguments.items():
            if isinstance(value, Digest):
                arguments[name] = value
                continue
            known = call.digests.get(name)
            arguments[name] = digest(value) if known is None else Digest(known.decode("ascii"))
            if (text := self._inlined(value)) is not None:
                inline[arguments[name]] = text
            else:
                stored[name] = value
        release = None
        if stored:
            release = self._hold([arguments[name] for name in stored])
            with self._writing():
                for name, value in stored.items():
                    arguments[name] = self._keep_argument(call.name, name, value, arguments[name])
        sealed = call.in_form(DigestedCall, arguments=arguments, inline=inline, sealed=call.sealed)
        return PreparedCall(sealed, self, release)

    def _inlined(self, value: Any) -> bytes | None:
        text = self.calls.inline(value)
        return text if isinstance(text, bytes) else None

    def _keep_argument(self, function: str, name: str, value: Any, key: Digest) -> Digest:
        try:
            if not self.values.contains(key):  # an equal value isn't overwritten
                self.values.save(value, key)
        except (SaveError, RecursionError) as error:
            _logger.debug("only the digest of argument %s of %s is stored: %s", name, function, error)
            return Unstored(key)
        return key

    def save(self, call: Call | PreparedCall | DigestedCall) -> Digest:
        """Store a call; return its key.

        Raises
        ------
        Rejected
            The result can't be stored, or the storage failed.
        """
        if isinstance(call, Call):
            prepared = self.prepare(call)
            try:
                return self._file(prepared.digested, call.result)
            finally:
                prepared.abandon()
        if isinstance(call, PreparedCall):
            return self._file(call.digested, call.result, live=True)
        return self._file(call, NO_RESULT)

    def _file(self, call: DigestedCall, result: Any, *, live: bool = False) -> Digest:
        """Store a call; a ``live`` result is always a value, any other :class:`Digest` stands for a stored value."""
        key = call.to_lookup_key()
        with self._operation_context(key):
            release = None
            try:
                if result is NO_RESULT:
                    with self._writing():
                        return self.calls.save(call)
                found, loose = digest_loosely(result)
                if live and isinstance(result, Digest):
                    found = digest(("cuda_progcache", "a digest", str(result)))
                if isinstance(result, Digest) and not live:
                    call = call.altered(result=found)
                elif (text := self._inlined(result)) is not None:
                    call = call.altered(result=found, inline={**call.inline, found: text})
                else:
                    release = self._hold([found])
                    with self._writing():
                        found = self.values.keep(result, found) if loose else self.values.save(result, found)
                        return self.calls.save(call.altered(result=found))
                with self._writing():
                    return self.calls.save(call)
            except SaveError as error:
                raise Rejected(str(error)) from error
            finally:
                if release is not None:
                    release()

    def load(self, key: str) -> LazyCall:
        """Return the call with this key or unambiguous prefix; KeyError on a miss."""
        with self._operation_context(key, intent=Intent.READ):
            return self.calls.load(key).fetch(self)

    def contains(self, key: str) -> bool:
        """Return whether there is a call with this key."""
        with self._operation_context(key, intent=Intent.READ):
            return self.calls.contains(key)

    def evict(self, key: str) -> None:
        """Remove a call; its values stay until :meth:`gc`."""
        with self._operation_context(key):
            self.calls.evict(key)

    def expand(self, prefix: str) -> Digest:
        """Return the full digest of the call or value with this prefix; see :meth:`BaseCache.expand`."""
        with self._operation_context(prefix, intent=Intent.READ):
            found = []
            for storage in (self.calls, self.values):
                with contextlib.suppress(KeyError):
                    found.append(storage.expand(prefix))
            if not found:
                with contextlib.suppress(KeyError):
                    found.append(self.calls.expand_inlined(prefix))
            return _combine_expand(prefix, found)

    def _shrink(self, *keys: str) -> tuple[Digest, ...]:
        shares: dict[bool, list[str]] = {True: [], False: []}
        for key in keys:
            is_call = self.calls.contains(key)
            if not is_call and not self.values.contains(key):
                raise KeyError(key)
            shares[is_call].append(key)
        found: dict[str, Digest] = {}
        sides: tuple[tuple[bool, Any, Any], ...] = ((True, self.calls, self.values), (False, self.values, self.calls))
        for is_call, storage, other in sides:
            if shares[is_call]:
                short = storage._shrink(*shares[is_call])
                strangers = sorted(other.list()) if isinstance(other, KeyManagement) else []
                found.update(
                    {
                        key: lengthened(prefix, key, strangers)
                        for key, prefix in zip(shares[is_call], short, strict=True)
                    }
                )
        return tuple(found[key] for key in keys)

    def _query(self, template: QueryCall) -> Iterable[LazyCall]:
        def full(value: Any) -> Any:
            return self.expand(value) if isinstance(value, Digest) and len(value) < DIGEST_LENGTH else value

        if template.arguments or isinstance(template.result, Digest):
            arguments = {name: full(value) for name, value in (template.arguments or {}).items()}
            template = replace(template, arguments=arguments, result=full(template.result))
        for call in self.calls.query(template):
            try:
                found = call.fetch(self)
            except Exception:
                _logger.exception("Indicates corrupt cache: a recorded call can't be read and is skipped")
                continue
            yield found

    def _children(self, value: Digest) -> set[Digest]:
        if not isinstance(self.values, HasChildDigests):
            return set()
        try:
            return self.values.child_digests(value)
        except KeyError:
            return set()

    def redigest(self) -> None:
        """Store every call under its present key and evict it under the old one, after the digest function changed.

        Values under their old digests stay until :meth:`gc`. A call that can't be loaded stops the operation with an
        error; the calls before it have been moved.
        """
        for key in tuple(self.calls.list()):
            call = self.load(key).fetch()
            renamed = call.to_lookup_key()
            if renamed == key:
                continue
            first, second = sorted((key, renamed))  # a fixed order, so that two threads can't deadlock
            with self._operation_context(first), self._operation_context(second):
                self.save(call)
                self.evict(key)

    def gc(self) -> set[Digest]:
        """Remove values that no call reaches directly or through containers. Values of calls in flight are kept.

        Returns
        -------
        set of Digest
            The digests of the removed values.
        """
        flights = _flights_of(self.values)
        if flights is not None:
            with flights.lock:
                reached = self._reached(self._referred(self.calls.list())[0] | set(flights.values))
                return {key for key in tuple(self.values.list()) if key not in reached and self._removed(key)}
        return self._collect_files(self.values)

    def _removed(self, key: Digest) -> bool:
        try:
            self.values.evict(key)
        except KeyError:
            return False  # another collection was quicker
        return True

    def _collect_files(self, values: Any) -> set[Digest]:
        """Collect garbage while other processes may be writing.

        Unreached values are put away first. Only then the pins are read, and the calls recorded since: by the time its
        values were put away, a call in flight had either pinned them or stored its record. The values that these reach
        are put back; the rest are thrown away.
        """
        roots, seen = self._referred(self.calls.list())
        reached = self._reached(roots)
        away = {key for key in tuple(values.list()) if key not in reached and values.put_away(key)}
        pinned, since = values.pinned()
        later, _ = self._referred(key for key in self.calls.list() if key not in seen)
        back = {key for key in away if since is not None and values.written_since(key, since)}
        frontier = (pinned | later) - reached
        while frontier:
            back_now = frontier & away
            for key in back_now:
                values.put_back(key)
            back |= back_now
            reached |= frontier
            frontier = {child for key in frontier for child in self._children(key)} - reached
        for key in away:
            if key in back:
                values.put_back(key)
            else:
                values.throw_away(key)
        values.tree.sweep()
        return away - back

    def _referred(self, keys: Iterable[Digest]) -> tuple[set[Digest], set[Digest]]:
        """Return the values that calls refer to, and the keys of the calls that could be loaded."""
        roots: set[Digest] = set()
        seen: set[Digest] = set()
        for key in tuple(keys):
            try:
                roots.update(digests_of(self.calls.load(key)))
            except KeyError:
                continue  # evicted since
            seen.add(key)
        return roots, seen

    def _reached(self, roots: set[Digest]) -> set[Digest]:
        reached, frontier = set(roots), set(roots)
        while frontier:
            frontier = {child for key in frontier for child in self._children(key)} - reached
            reached |= frontier
        return reached

    def _hold(self, keys: list[Digest]) -> Callable[[], object]:
        """Protect values from garbage collection; return a function that ends the protection."""
        flights = _flights_of(self.values)
        if flights is None:
            release: Callable[[], object] = self.values.pin(keys)  # type: ignore[attr-defined]
            return release
        with flights.lock:
            flights.values.update(keys)

        def let_go() -> None:
            with flights.lock:
                flights.values.subtract(keys)
                for key in keys:
                    if flights.values[key] <= 0:
                        del flights.values[key]

        return let_go

    def _writing(self) -> contextlib.AbstractContextManager[Any]:
        flights = _flights_of(self.values)
        return contextlib.nullcontext() if flights is None else flights.lock
