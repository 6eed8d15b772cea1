# SPDX-License-Identifier: Apache-2.0
"""Containers taken apart: elements that several values share are stored once.

A list ``[1, [2, 3]]`` becomes a :class:`DigestedIterable` of ``1`` and the digest of ``[2, 3]``, which is stored by
itself; loading puts it together again. ``remaining_depth`` says what stays in its container: of 1 scalars, of 2 also
flat lists of them, of 0 or less nothing.
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
    """A container with digests in place of elements; it has the digest of the container itself."""

    @abc.abstractmethod
    def underlying(self) -> Any:
        """The container with digests in it."""

    @abc.abstractmethod
    def children(self) -> Iterable[Any]:
        """Elements, digests among them."""

    @abc.abstractmethod
    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """The same with every element replaced."""

    def mend(self, storage: ValueStorage) -> Any:
        """The container with its elements loaded from ``storage``; KeyError where one is gone."""
        return self.with_each(lambda part: storage.load(part) if isinstance(part, Digest) else part).underlying()

    def __digest__(self) -> Digest:
        return digest(self.underlying())


@dataclasses.dataclass
class DigestedIterable(Digested):
    """A list or tuple."""

    items: Any

    def underlying(self) -> Any:
        """The list or tuple with digests in it."""
        return self.items

    def children(self) -> Iterable[Any]:
        """Elements."""
        return list(self.items)

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """The same with every element replaced."""
        return type(self)(type(self.items)(map(change, self.items)))


@dataclasses.dataclass
class DigestedDict(Digested):
    """A dict."""

    items: dict[Any, Any]

    def underlying(self) -> Any:
        """The dict with digests in it."""
        return self.items

    def children(self) -> Iterable[Any]:
        """Keys and values."""
        return [*self.items, *self.items.values()]

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """The same with every key and value replaced."""
        return type(self)({change(key): change(item) for key, item in self.items.items()})


@dataclasses.dataclass
class DigestedFields(Digested):
    """A dataclass or attrs instance, made again without its ``__init__``."""

    cls: type
    fields: dict[str, Any]

    def underlying(self) -> Any:
        """The instance with digests in it."""
        made: Any = object.__new__(self.cls)
        for name, value in self.fields.items():
            object.__setattr__(made, name, value)
        return made

    def children(self) -> Iterable[Any]:
        """Values of the fields."""
        return list(self.fields.values())

    def with_each(self, change: Callable[[Any], Any]) -> Self:
        """The same with the value of every field replaced."""
        return type(self)(self.cls, {name: change(value) for name, value in self.fields.items()})

    def __digest__(self) -> Digest:
        return Digest(digest_fields(self.cls, self.fields).decode("ascii"))


def _as_digested(value: Any) -> Digested | None:
    """A container, as one that can be taken apart; None for what is empty, or no container, or lacks a field."""
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
    """A value storage that can tell which values a stored one refers to."""

    def child_digests(self, key: Digest) -> set[Digest]:
        """Values that the one under ``key`` refers to directly; KeyError if it isn't there."""


@dataclasses.dataclass(frozen=True)
class DestructuringMixin(ValueStorage):
    """Takes containers apart on saving; goes before the :class:`ValueMixin` in the bases.

    Attributes
    ----------
    remaining_depth : float
        What is less deep than this stays in its container.
    """

    remaining_depth: float = 1

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Keep a value, under its digest or under ``key``; elements by themselves."""
        if _as_digested(value) is None:
            return super().save(value, key)  # type: ignore[safe-super]
        kept, depth = self._intern(value, key)
        return super().save(kept, key) if depth < self.remaining_depth else kept  # type: ignore[safe-super]

    def load(self, key: Digest | str) -> Any:
        """The value with this digest, put together; KeyError if it, or a part of it, isn't there."""
        value = super().load(key)  # type: ignore[safe-super]
        return value.mend(self) if isinstance(value, Digested) else value

    def child_digests(self, key: Digest | str) -> set[Digest]:
        """Values that the one under ``key`` refers to directly; KeyError if it isn't there."""
        raw = super().load(key)  # type: ignore[safe-super]
        return {part for part in raw.children() if isinstance(part, Digest)} if isinstance(raw, Digested) else set()

    def count_reuses(self) -> Counter[Digest]:
        """How many stored values refer to each stored value."""
        counts: Counter[Digest] = Counter(dict.fromkeys(self.list(), 0))
        for key in list(counts):
            counts.update(child for child in self.child_digests(key) if child in counts)
        return counts

    def _intern(self, value: Any, key: Digest | None = None) -> tuple[Any, float]:
        """Store a value, or leave it to its container; gives what stands for it, and how deep it is."""
        if isinstance(value, Digest):
            return value, -1
        value, depth = self._taken_apart(value)
        if depth < self.remaining_depth:
            return value, depth
        if key is None:
            key = digest(value)
            if self._contains(key):
                return key, depth  # an equal one isn't written over
        return super().save(value, key), depth  # type: ignore[safe-super]

    def _taken_apart(self, value: Any) -> tuple[Any, float]:
        """A value with digests in place of those elements that are stored by themselves, and how deep it is."""
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
            return value, _OPAQUE  # an element can't be stored by itself
        return taken if any(isinstance(part, Digest) for part in taken.children()) else value, 1 + max(depths)
