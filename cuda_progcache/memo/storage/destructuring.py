# SPDX-License-Identifier: Apache-2.0
"""Destructuring: containers are taken apart, so that elements that several values share are stored once.

A list ``[1, [2, 3]]`` becomes a :class:`DigestedIterable` of ``1`` and the digest of ``[2, 3]``, which is stored
separately; loading reassembles the list. ``remaining_depth`` says which elements stay in their container: with 1,
scalars; with 2, flat lists of scalars too; with 0 or less, none.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from numbers import Number
from typing import Any, Protocol, Self, runtime_checkable

from cuda_progcache.memo.digest import Digest, Indigestible, digest, digest_fields, field_names
from cuda_progcache.memo.storage.base import ValueStorage

_OPAQUE = float("inf")


class Digested(abc.ABC):
    """A container with digests in place of elements; its digest is that of the original container."""

    @abc.abstractmethod
    def underlying(self) -> Any:
        """Return the container with digests in it."""

    @abc.abstractmethod
    def children(self) -> Iterable[Any]:
        """Return the elements, some of which are digests."""

    @abc.abstractmethod
    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy with ``change`` applied to every element."""

    def mend(self, storage: ValueStorage) -> Any:
        """Return the container with its elements loaded from ``storage``; KeyError if an element is gone."""
        return self.with_each(lambda part: storage.load(part) if isinstance(part, Digest) else part).underlying()

    def __digest__(self) -> Digest:
        return digest(self.underlying())


@dataclasses.dataclass
class DigestedIterable(Digested):
    """A list or tuple with digests in place of elements."""

    items: Any

    def underlying(self) -> Any:
        """Return the list or tuple with digests in it."""
        return self.items

    def children(self) -> Iterable[Any]:
        """Return the elements."""
        return list(self.items)

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy with ``change`` applied to every element."""
        return type(self)(type(self.items)(map(change, self.items)))


@dataclasses.dataclass
class DigestedDict(Digested):
    """A dict with digests in place of keys and values."""

    items: dict[Any, Any]

    def underlying(self) -> Any:
        """Return the dict with digests in it."""
        return self.items

    def children(self) -> Iterable[Any]:
        """Return the keys and values."""
        return [*self.items, *self.items.values()]

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy with ``change`` applied to every key and value."""
        return type(self)({change(key): change(item) for key, item in self.items.items()})


@dataclasses.dataclass
class DigestedFields(Digested):
    """A dataclass or attrs instance with digests in place of field values; rebuilt without its ``__init__``."""

    cls: type
    fields: dict[str, Any]

    def underlying(self) -> Any:
        """Return the instance with digests in it."""
        made: Any = object.__new__(self.cls)
        for name, value in self.fields.items():
            object.__setattr__(made, name, value)
        return made

    def children(self) -> Iterable[Any]:
        """Return the values of the fields."""
        return list(self.fields.values())

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy with ``change`` applied to the value of every field."""
        return type(self)(self.cls, {name: change(value) for name, value in self.fields.items()})

    def __digest__(self) -> Digest:
        return Digest(digest_fields(self.cls, self.fields).decode("ascii"))


def _as_digested(value: Any) -> Digested | None:
    """Return the :class:`Digested` form of a container; None if it is empty, lacks a field, or isn't a container."""
    kind = type(value)
    if kind in {list, tuple}:
        return DigestedIterable(value) if value else None
    if kind is dict:
        return DigestedDict(value) if value else None
    if dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__"):
        with contextlib.suppress(AttributeError):
            return DigestedFields(kind, {name: getattr(value, name) for name in field_names(kind) or ()})
    return None


@runtime_checkable
class HasChildDigests(Protocol):
    """A value storage that knows which values a stored value refers to."""

    def child_digests(self, key: Digest) -> set[Digest]:
        """Return the digests that the value under ``key`` refers to directly; KeyError if there is none."""


@dataclasses.dataclass(frozen=True)
class DestructuringMixin(ValueStorage):
    """A mixin that takes containers apart when it saves them; list it before :class:`ValueMixin` in the bases.

    Attributes
    ----------
    remaining_depth : float
        An element less deep than this stays in its container.
    """

    remaining_depth: float = 1

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Store a value under its digest or under ``key``; deep elements are stored separately."""
        if _as_digested(value) is None:
            return super().save(value, key)  # type: ignore[safe-super]
        kept, depth = self._intern(value, key)
        return super().save(kept, key) if depth < self.remaining_depth else kept  # type: ignore[safe-super]

    def load(self, key: Digest | str) -> Any:
        """Return the value with this digest, reassembled; KeyError if it or a part of it is missing."""
        value = super().load(key)  # type: ignore[safe-super]
        return value.mend(self) if isinstance(value, Digested) else value

    def child_digests(self, key: Digest | str) -> set[Digest]:
        """Return the digests that the value under ``key`` refers to directly; KeyError if there is none."""
        raw = super().load(key)  # type: ignore[safe-super]
        return {part for part in raw.children() if isinstance(part, Digest)} if isinstance(raw, Digested) else set()

    def count_reuses(self) -> Counter[Digest]:
        """Return how many stored values refer to each stored value."""
        counts: Counter[Digest] = Counter(dict.fromkeys(self.list(), 0))
        for key in list(counts):
            counts.update(child for child in self.child_digests(key) if child in counts)
        return counts

    def _intern(self, value: Any, key: Digest | None = None) -> tuple[Any, float]:
        """Store a value or leave it in its container; return the value or its digest accordingly, and its depth."""
        if isinstance(value, Digest):
            return value, -1
        value, depth = self._taken_apart(value)
        if depth < self.remaining_depth:
            return value, depth
        if key is None:
            key = digest(value)
            if self._contains(key):
                return key, depth  # an equal value isn't overwritten
        return super().save(value, key), depth  # type: ignore[safe-super]

    def _taken_apart(self, value: Any) -> tuple[Any, float]:
        """Return a value with digests in place of the elements that are stored separately, and its depth."""
        if isinstance(value, (Number, str, bytes)) or (isinstance(value, (dict, list, tuple)) and not value):
            return value, 0
        whole = _as_digested(value)
        if whole is None:
            return value, _OPAQUE
        depths = [-1.0]

        def intern(part: Any) -> Any:
            kept, depth = self._intern(part)
            depths.append(depth)
            return kept

        try:
            taken = whole.with_each(intern)
        except Indigestible:
            return value, _OPAQUE  # an element can't be stored separately
        return taken if any(isinstance(part, Digest) for part in taken.children()) else value, 1 + max(depths)
