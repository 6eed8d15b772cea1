# SPDX-License-Identifier: Apache-2.0
"""Containers taken apart: elements that several values share are stored once.

A list ``[1, [2, 3]]`` becomes a :class:`DigestedIterable` of ``1`` and the digest of ``[2, 3]``, which is stored by
itself; loading puts it together again. ``remaining_depth`` says what stays in its container: of 1 scalars, of 2 also
flat lists of them, of 0 or less nothing.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from numbers import Number
from typing import Any, Protocol, runtime_checkable

from cuda_progcache.memo.digest import Digest, digest, digest_fields
from cuda_progcache.memo.storage.base import ValueStorage

_OPAQUE = float("inf")

#: Store a child, or leave it: what stands for it, and how deep it is.
Intern = Callable[[Any], tuple[Any, float]]


class Digested(abc.ABC):
    """A container with digests in place of elements; it has the digest of the container itself."""

    @abc.abstractmethod
    def underlying(self) -> Any:
        """The container with digests in it."""

    @abc.abstractmethod
    def mend(self, storage: ValueStorage) -> Any:
        """The container with its elements loaded from ``storage``; KeyError where one is gone."""

    @abc.abstractmethod
    def children(self) -> Iterable[Any]:
        """Elements, digests among them."""

    def __digest__(self) -> Digest:
        return digest(self.underlying())


def _loaded(storage: ValueStorage, element: Any) -> Any:
    return storage.load(element) if isinstance(element, Digest) else element


@dataclasses.dataclass
class DigestedIterable(Digested):
    """A list or tuple."""

    items: Any

    def underlying(self) -> Any:
        """The list or tuple with digests in it."""
        return self.items

    def mend(self, storage: ValueStorage) -> Any:
        """The list or tuple with its elements loaded."""
        return type(self.items)(_loaded(storage, item) for item in self.items)

    def children(self) -> Iterable[Any]:
        """Elements."""
        return list(self.items)

    @classmethod
    def take_apart(cls, value: Any, intern: Intern) -> tuple[Any, float]:
        """What is stored for ``value``, and its depth."""
        parts = [intern(item) for item in value]
        items = type(value)(item for item, _ in parts)
        kept = cls(items) if any(isinstance(item, Digest) for item, _ in parts) else items
        return kept, 1 + max(depth for _, depth in parts)


@dataclasses.dataclass
class DigestedDict(Digested):
    """A dict."""

    items: dict[Any, Any]

    def underlying(self) -> Any:
        """The dict with digests in it."""
        return self.items

    def mend(self, storage: ValueStorage) -> Any:
        """The dict with keys and values loaded."""
        return {_loaded(storage, key): _loaded(storage, value) for key, value in self.items.items()}

    def children(self) -> Iterable[Any]:
        """Keys and values."""
        return [*self.items, *self.items.values()]

    @classmethod
    def take_apart(cls, value: dict[Any, Any], intern: Intern) -> tuple[Any, float]:
        """What is stored for ``value``, and its depth."""
        parts = [(intern(key), intern(item)) for key, item in value.items()]
        items = {key: item for (key, _), (item, _) in parts}
        taken = any(isinstance(part, Digest) for pair in items.items() for part in pair)
        return (cls(items) if taken else items), 1 + max(max(k[1], v[1]) for k, v in parts)


@dataclasses.dataclass
class DigestedFields(Digested):
    """A dataclass or attrs instance, made again without its ``__init__``."""

    cls: type
    fields: dict[str, Any]

    def underlying(self) -> Any:
        """The fields with digests in them."""
        return self.fields

    def __digest__(self) -> Digest:
        return Digest(digest_fields(self.cls, self.fields).decode("ascii"))

    def mend(self, storage: ValueStorage) -> Any:
        """The instance with its fields loaded."""
        made: Any = object.__new__(self.cls)
        for name, value in self.fields.items():
            object.__setattr__(made, name, _loaded(storage, value))
        return made

    def children(self) -> Iterable[Any]:
        """Values of the fields."""
        return list(self.fields.values())

    @classmethod
    def take_apart(cls, value: Any, intern: Intern) -> tuple[Any, float]:
        """What is stored for ``value``, and its depth; one that lacks a field is left whole."""
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
        else:
            names = [attribute.name for attribute in type(value).__attrs_attrs__]
        if not names:
            return value, 0
        try:
            parts = {name: intern(getattr(value, name)) for name in names}
        except (AttributeError, TypeError):
            return value, _OPAQUE
        depth = 1 + max(depth for _, depth in parts.values())
        if any(isinstance(part, Digest) for part, _ in parts.values()):
            return cls(type(value), {name: part for name, (part, _) in parts.items()}), depth
        return value, depth


_TAKERS: list[tuple[Callable[[Any], bool], Callable[[Any, Intern], tuple[Any, float]]]] = [
    (lambda v: type(v) in {list, tuple}, DigestedIterable.take_apart),
    (lambda v: type(v) is dict, DigestedDict.take_apart),
    (lambda v: dataclasses.is_dataclass(v) and not isinstance(v, type), DigestedFields.take_apart),
    (lambda v: hasattr(type(v), "__attrs_attrs__"), DigestedFields.take_apart),
]


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
        if not self._divides(value):
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

    def _divides(self, value: Any) -> bool:
        if isinstance(value, (list, tuple, dict)) and not value:
            return False
        return any(fits(value) for fits, _ in _TAKERS)

    def _intern(self, value: Any, key: Digest | None = None) -> tuple[Any, float]:
        if isinstance(value, Digest):
            return value, -1
        depth = _OPAQUE
        if isinstance(value, (Number, str, bytes)) or (isinstance(value, (dict, list, tuple)) and not value):
            depth = 0
        else:
            for fits, take_apart in _TAKERS:
                if fits(value):
                    value, depth = take_apart(value, self._intern)
                    break
        if depth < self.remaining_depth:
            return value, depth
        if key is None:
            key = digest(value)
            if self._contains(key):
                return key, depth  # an equal one isn't written over
        return super().save(value, key), depth  # type: ignore[safe-super]
